"""Dumps on real servers: what a backup consists of, and what a failed one leaves: nothing."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline.actions import dump, prove, prune, restore
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import ProvePolicy, ScratchConfig, Secret
from backup_pipeline.domain.backup import ObjectRole, Verdict
from backup_pipeline.domain.fingerprint import fingerprint_from_json
from backup_pipeline.engines.postgres import dump as tool
from backup_pipeline.engines.postgres import fingerprint, load
from backup_pipeline.engines.postgres import snapshot as snapshots
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.lock import advisory_lock
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import (
    BackupError,
    Busy,
    ConfigError,
    ServerError,
    StoreError,
    ToolError,
)
from backup_pipeline.storage import catalog
from backup_pipeline.storage.store import open_store, read_all
from backup_pipeline_tests.actions.box import DUE, Box, Meddling, ask, now, our_children, stored
from backup_pipeline_tests.actions.dumping import Watching, whole
from backup_pipeline_tests.domain.values import manifest
from backup_pipeline_tests.servers.s3 import rclone_s3
from backup_pipeline_tests.storage.backups import put_backup
from backup_pipeline_tests.storage.effects import DatedStore

# More than the pipe and a chunk hold, so that pg_dump still writes when the first chunk is stored.
BULK = """CREATE TABLE public.bulk AS
    SELECT sha512(random()::text::bytea) AS noise FROM generate_series(1, 120000)"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_published_backup_is_whole(box: Box, jobs: int) -> None:
    before = now()
    backup = box.take("daily", scheduled_for=DUE, protected=box.configured(jobs=jobs))
    record = backup.manifest
    assert record is not None
    whole(box.protected, backup)
    assert [item.id for item in catalog.list_backups(box.store).backups] == [backup.id]
    assert (backup.tier, record.scheduled_for, record.jobs) == ("daily", DUE, jobs)
    assert record.format == ("custom" if jobs == 1 else "directory")
    assert before <= record.started_at <= record.snapshot_at <= record.finished_at <= now()
    assert (backup.expires_at, backup.verdict, backup.pinned) == (None, Verdict.NONE, False)
    roles = [item.role for item in record.objects]
    assert (roles.count(ObjectRole.GLOBALS), roles.count(ObjectRole.FINGERPRINT)) == (1, 1)
    dump_names = sorted(item.name for item in record.of_role(ObjectRole.DUMP))
    assert dump_names == ["database.dump"] or (jobs == 2 and "dump/toc.dat" in dump_names)
    assert len(dump_names) == 1 if jobs == 1 else len(dump_names) >= 4  # two tables, large objects, contents
    source = record.source
    assert str(source.server_version) == ask(box.endpoint, "SHOW server_version_num")
    assert (source.database.name, source.database.owner) == (box.endpoint.database, box.owner)
    assert set(source.roles) >= {box.owner, box.reader}
    assert not [key for key in stored(box.store) if key.startswith("leases/")]


def test_the_fingerprint_and_globals_say_what_the_source_holds(taken: Box) -> None:
    first = min(catalog.list_backups(taken.store).backups, key=lambda item: item.id.stamp)
    assert first.manifest is not None
    (item,) = first.manifest.of_role(ObjectRole.FINGERPRINT)
    found = fingerprint_from_json(read_all(taken.store, item.key), item.key)
    assert {str(table): table.rows for table in found.tables} == {
        "public.customer": 100,
        "public.orders": 1000,
    }
    assert found.has_contents
    assert found.large_objects.count == 1
    assert [value.value for value in found.newest] == ["2026-01-05 04:00:00+00"]
    (globals_,) = first.manifest.of_role(ObjectRole.GLOBALS)
    text = read_all(taken.store, globals_.key).decode()
    assert f"CREATE ROLE {taken.owner};" in text
    assert "PASSWORD" not in text


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_service_that_names_the_database_is_enough(
    box: Box, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jobs: int
) -> None:
    host, name = box.endpoint.conninfo["host"], box.endpoint.database
    services = f"[prod]\nhost={host}\nport=5432\nuser=postgres\ndbname={name}\n"
    (tmp_path / "services").write_text(
        f"{services}[maintenance]\nhost={host}\nuser=postgres\ndbname=postgres\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    dsn, restore_dsn = Secret("service=prod"), Secret("service=maintenance")
    protected = box.configured(dsn=dsn, restore_dsn=restore_dsn, jobs=jobs)
    assert protected.source().database == name
    backup = box.take("daily", protected=protected)
    whole(protected, backup)
    assert backup.manifest is not None
    assert backup.manifest.source.database.name == name
    plan = restore.plan(protected, restore.RestoreRequest(backup="latest"), clock=now)
    done = restore.carry_out(protected, plan, clock=now, report=box.said)
    assert ask(box.cluster.endpoint(done.database), "SELECT count(*) FROM public.orders") == 1000
    with (
        advisory_lock(box.endpoint, name, purpose="another dump", wait_s=0),
        pytest.raises(Busy, match="held by another dump"),
    ):
        box.take("daily", protected=box.configured(dsn=dsn, lock_timeout=timedelta(seconds=0.2)))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_dump_tells_its_share_once_there_is_one_to_judge_by(box: Box, jobs: int) -> None:
    box.execute(BULK)
    protected, totals = box.configured(jobs=jobs), []
    for said in (Watching(), Watching()):
        backup = replace(box, said=said).take(protected=protected)
        told = said.of("dump and upload")
        done = [item.done_bytes for item in told]
        elapsed = [item.elapsed_s for item in told]
        assert (done, elapsed) == (sorted(done), sorted(elapsed))
        assert done[-1] == backup.size_bytes
        (total,) = {item.total_bytes for item in told}
        totals.append((total, done[-1]))
    (first, _), (second, size_bytes) = totals
    assert first is None
    assert second == pytest.approx(size_bytes, rel=0.2)


def at(moment: datetime) -> Callable[[], datetime]:
    """A clock that stands still."""
    return lambda: moment


def test_a_manual_backup_expires(box: Box) -> None:
    protected = box.configured(manual_keep=timedelta(days=3))
    backup = box.take(protected=protected)
    assert backup.expires_at is not None
    assert abs(backup.expires_at - now() - timedelta(days=3)) < timedelta(minutes=5)
    later = now() + timedelta(days=2)
    for hours in (0, 1):  # the two newest good backups stay whatever they are
        put_backup(box.store, manifest(at=(later + timedelta(hours=hours)).replace(microsecond=0)))
    for days, goes in ((2.5, False), (3.5, True)):
        then = now() + timedelta(days=days)
        plan = prune.plan(box.store, protected.config, now=then)
        assert (backup.id in {item.id for item in plan.plan.delete}) is goes
        prune.carry_out(DatedStore(box.store, at=then), plan, clock=at(then), log=box.said.say)
        assert (not [key for key in stored(box.store) if backup.id.stamp in key]) is goes


def test_the_same_on_s3(box: Box, tmp_path: Path) -> None:
    with rclone_s3(tmp_path / "s3") as server:
        protected = box.on(open_store(server.store("some prefix/of ours")))
        first = box.take("daily", scheduled_for=DUE, protected=protected)
        assert prove.prove(protected, first.id, clock=now, report=box.said).verdict is Verdict.PROVEN
        second = box.take("weekly", scheduled_for=DUE, protected=protected)
        whole(protected, first)
        whole(protected, second)
        assert second.verdict is Verdict.PROVEN
        plan = restore.plan(protected, restore.RestoreRequest(), clock=now)
        done = restore.carry_out(protected, plan, clock=now, report=box.said)
        assert ask(box.cluster.endpoint(done.database), "SELECT count(*) FROM public.orders") == 1000
        assert not list(protected.store.list("leases/"))


def unreadable(box: Box) -> Protected:
    """The source as a role sees it that may read only one of its tables."""
    box.execute(f"ALTER ROLE {box.reader} LOGIN")
    return box.configured(
        dsn=Secret(box.cluster.endpoint(box.endpoint.database, user=box.reader).dsn), critical_tables=()
    )


def unprovable(box: Box) -> Protected:
    """The same with a secret of [scratch] that nobody set."""
    password = Secret(env="NOT_SET_ANYWHERE", key="scratch.password")
    return replace(box.protected, scratch=ScratchConfig(dsn=Secret("host=scratch"), password=password))


PREFLIGHTS: dict[str, Callable[[Box], Protected]] = {
    "no server": lambda box: box.configured(dsn=Secret("host=/nonexistent dbname=app user=nobody")),
    "no such database": lambda box: box.configured(dsn=Secret(box.cluster.endpoint("not_there").dsn)),
    "no such critical table": lambda box: box.configured(critical_tables=("public.nothing",)),
    "no tools": lambda box: box.configured(bin_dir="/nonexistent"),
    "no right to read": unreadable,
    "no variable": lambda box: box.configured(password=Secret(env="NOT_SET_ANYWHERE", key="password")),
    "no variable for the proof": unprovable,
}


@pytest.mark.parametrize("what", PREFLIGHTS)
def test_a_failing_preflight_leaves_nothing(box: Box, what: str) -> None:
    with pytest.raises((ServerError, ToolError, ConfigError)) as failure:
        box.take(protected=PREFLIGHTS[what](box))
    assert failure.value.hint
    assert not stored(box.store)


def test_what_only_a_proof_needs_is_asked_for_only_when_one_follows(box: Box) -> None:
    protected = unprovable(box)
    by_cron = replace(protected, config=replace(protected.config, prove=ProvePolicy(always=False)))
    for asked, proving in ((protected, True), (by_cron, True), (protected, None)):
        with pytest.raises(ConfigError, match=r"scratch\.password: the environment variable NOT_SET"):
            dump.preflight(asked, report=box.said, proving=proving)
    dump.preflight(protected, report=box.said, proving=False)
    dump.preflight(by_cron, report=box.said)


def test_an_unknown_tier_is_refused_before_anything_is_read(box: Box) -> None:
    with pytest.raises(ConfigError, match="no tier hourly"):
        box.take("hourly")
    assert not stored(box.store)


def kill_pg_dump(_box: Box) -> None:
    (pid,) = our_children("pg_dump")
    os.kill(pid, signal.SIGKILL)


def end_sessions(purpose: str) -> Callable[[Box], None]:
    def end(box: Box) -> None:
        with contextlib.closing(connect(box.cluster.endpoint())) as session:
            ended = session.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s",
                [f"backup_pipeline {purpose}"],
            ).fetchall()
        assert ended

    return end


def refuse_writes(_box: Box) -> None:
    raise StoreError("the store is full")


def interrupt(_box: Box) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("meddle", "error", "said"),
    [
        (kill_pg_dump, ToolError, "killed by SIGKILL"),
        (end_sessions("dump"), BackupError, "pg_dump|connection"),
        (end_sessions("snapshot"), ServerError, "lost|terminat|connection is closed"),
        (end_sessions("dump of app"), ServerError, "the lock that keeps other dumps"),
        (refuse_writes, StoreError, "the store is full"),
        (interrupt, KeyboardInterrupt, None),
    ],
    ids=["pg_dump killed", "its session ended", "snapshot lost", "lock lost", "store full", "interrupted"],
)
def test_a_failed_dump_leaves_nothing(
    box: Box, meddle: Callable[[Box], None], error: type[BaseException], said: str | None
) -> None:
    box.execute(BULK)
    store = Meddling(box.store, "database.dump", lambda: meddle(box))
    with pytest.raises(error, match=said):
        box.take("daily", protected=box.on(store))
    assert store.meddled.is_set()
    assert not stored(box.store)
    assert not our_children("pg_dump")
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND application_name LIKE '{}'"
    with advisory_lock(box.endpoint, box.endpoint.database, purpose="test", wait_s=10):
        pass  # the lock is free: what held it is gone
    assert ask(box.cluster.endpoint(), sessions.format(box.endpoint.database, "%snapshot%")) == 0
    whole(box.protected, box.take("daily"))


def test_a_failed_parallel_dump_takes_away_what_it_had_stored(box: Box) -> None:
    box.execute(BULK)
    stored_by_then: list[int] = []

    def meddle() -> None:
        stored_by_then.append(len(list(box.store.list("databases/"))))
        raise StoreError("the store is full")

    store = Meddling(box.store, "globals.sql", meddle)
    with pytest.raises(StoreError, match="the store is full"):
        box.take("daily", protected=replace(box.configured(jobs=2), store=store))
    assert stored_by_then[0] >= 3  # two tables and the table of contents
    assert not stored(box.store)


def test_what_comes_right_before_the_snapshot_is_in_the_manifest(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    role, exported_snapshot = f"{box.owner}_late", snapshots.exported_snapshot

    def snapshot_after(*given: Any, **options: Any) -> object:
        box.execute(
            f"CREATE ROLE {role}; GRANT SELECT ON public.orders TO {role}; CREATE EXTENSION isn SCHEMA public"
        )
        return exported_snapshot(*given, **options)

    monkeypatch.setattr(dump, "exported_snapshot", snapshot_after)
    try:
        backup = box.take()
        monkeypatch.undo()
        assert backup.manifest is not None
        assert role in backup.manifest.source.roles
        assert "isn" in dict(backup.manifest.source.extensions)
        found = prove.prove(box.protected, backup.id, clock=now, report=box.said)
        assert found.verdict is Verdict.PROVEN
    finally:
        box.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_locked_table_ends_the_dump_and_names_who_locks_it(box: Box) -> None:
    protected = box.configured(lock_timeout=timedelta(seconds=0.5))
    with contextlib.closing(connect(box.endpoint, autocommit=False, purpose="migration")) as session:
        session.execute("LOCK TABLE public.orders IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(ServerError, match=r"public\.orders is locked") as failure:
            box.take(protected=protected)
        assert "migration" in str(failure.value)
        assert "pg_terminate_backend" in failure.value.hint
        assert not stored(box.store)
        session.rollback()
    whole(protected, box.take(protected=protected))


def test_a_second_dump_is_refused_while_the_first_runs(box: Box) -> None:
    box.execute(BULK)
    go_on = threading.Event()
    store = Meddling(box.store, "database.dump", lambda: go_on.wait(60))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(box.take, "daily", protected=box.on(store))
        assert store.meddled.wait(60)
        try:
            with pytest.raises(Busy, match="held by another dump") as failure:
                box.take("weekly", protected=box.configured(lock_timeout=timedelta(seconds=0.2)))
            assert "dump of app" in str(failure.value)
        finally:
            go_on.set()
        backup = first.result()
    assert [item.id for item in catalog.list_backups(box.store).backups] == [backup.id]
    assert not [key for key in stored(box.store) if backup.id.stamp not in key]


def test_a_second_dump_waits_for_the_first(box: Box) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with ThreadPoolExecutor(1) as pool, contextlib.closing(connect(box.cluster.endpoint())) as session:
        with advisory_lock(box.endpoint, box.endpoint.database, purpose="another dump", wait_s=0):
            second = pool.submit(box.take, "daily")
            while session.execute(waiting.encode()).fetchone() == (0,):
                assert not second.done()
        whole(box.protected, second.result())


def test_the_lock_of_one_database_does_not_hold_another(box: Box, postgres: LocalCluster) -> None:
    with advisory_lock(postgres.endpoint("template1"), "template1", purpose="dump of another", wait_s=0):
        whole(box.protected, box.take(protected=box.configured(lock_timeout=timedelta(0))))


def test_publishing_twice_is_publishing_once(box: Box) -> None:
    record = dump.dump_and_upload(box.protected, tier="daily", scheduled_for=DUE, clock=now, report=box.said)
    assert not catalog.list_backups(box.store).backups
    first = dump.publish(box.protected, record, report=box.said)
    before = stored(box.store)
    assert dump.publish(box.protected, record, report=box.said) == first
    assert stored(box.store) == before


def test_every_tool_is_given_up_after_the_configured_silence(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def spied(of: object, name: str) -> None:
        call: Callable[..., Any] = getattr(of, name)

        def spy(*args: Any, **options: Any) -> Any:
            given.append(options["stall_s"] if "stall_s" in options else options["limits"].stall_s)
            return call(*args, **options)

        monkeypatch.setattr(of, name, spy)

    for of, name in (
        (fingerprint, "prepare"),
        (fingerprint, "of_database"),
        (fingerprint, "capture"),
        (load, "load"),
        (tool, "stream_custom"),
        (tool, "dump_globals"),
    ):
        spied(of, name)
    protected = box.configured(stall_timeout=timedelta(seconds=77))
    backup = box.take("daily", protected=protected)
    prove.prove(protected, backup.id, clock=now, report=box.said)
    plan = restore.plan(protected, restore.RestoreRequest(), clock=now)
    restore.carry_out(protected, plan, clock=now, report=box.said)
    assert len(given) == 13
    assert set(given) == {77.0}


def test_rows_are_only_counted_when_asked_to(box: Box) -> None:
    backup = box.take(protected=box.configured(proof="counts"))
    assert backup.manifest is not None
    (item,) = backup.manifest.of_role(ObjectRole.FINGERPRINT)
    found = fingerprint_from_json(read_all(box.store, item.key), item.key)
    assert not found.has_contents
    assert found.rows == 1100
