"""Incremental base backups taken of real servers: what each builds on, and when a whole one is taken."""

import contextlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from backup_pipeline.actions.unpack import unpack
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.domain.base_chain import by_id, chain_of
from backup_pipeline.domain.layout import base_prefix, catalog_key
from backup_pipeline.domain.recovery_target import LATEST, parse_target
from backup_pipeline.engines.postgres import base_backup as engine
from backup_pipeline.engines.postgres.cluster import server_identity
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.source_cluster import server_clock
from backup_pipeline.engines.postgres.unpack import plan_places
from backup_pipeline.errors import BackupNotFound, Corrupt, Refused
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.s3 import S3Store
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline_tests.actions.box import Meddling, Said, ask, execute, now
from backup_pipeline_tests.actions.chains import bases, fail, small, tablespace
from backup_pipeline_tests.actions.cluster_box import ClusterBox, a_cluster
from backup_pipeline_tests.actions.cluster_box import started as started_with_wal
from backup_pipeline_tests.actions.protected_box import NAME
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box, started
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.servers.s3 import rclone_s3
from backup_pipeline_tests.storage.effects import CountingStore, Died, DyingStore
from backup_pipeline_tests.waiting import wait_until


def whole_listed(store: Store) -> set[BackupId]:
    """The base backups that are listed; each has all its objects, and so has all that it builds on."""
    found = base_backups.list_base_backups(store, NAME, fresh=True)
    assert not found.unreadable
    known = by_id(each.manifest for each in found.backups)
    for manifest in known.values():
        chain = chain_of(manifest, known)
        assert not chain.broken
        assert not [link for link in chain.links if base_backups.missing_objects(store, link)]
    return set(known)


@pytest.fixture(scope="module")
def taking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    """A small cluster to take base backups of; one is there."""
    with small(DirectoryStore(tmp_path_factory.mktemp("store"))) as made:
        made.commit(1)
        made.take()
        yield made


def test_dying_before_any_effect_lists_nothing_without_its_chain(taking: RecoveryBox) -> None:
    parent = bases(taking.store)[0].id
    counting = CountingStore(taking.store)
    taking.take(store=counting, parent=parent)
    for number in range(1, len(counting.effects) + 1):
        before = whole_listed(taking.store)
        dying = DyingStore(taking.store, before=number)
        with contextlib.suppress(Died):
            taking.take(store=dying, parent=parent)
        assert dying.dead
        done = any(effect.startswith("put_if_absent catalog/") for effect in dying.effects)
        assert len(whole_listed(taking.store) - before) == int(done)
    assert len(base_backups.rebuild(taking.store, NAME)[0]) == 1  # the one whose record's copy was there
    whole_listed(taking.store)


def test_its_parent_is_kept_from_a_prune_meanwhile(taking: RecoveryBox) -> None:
    chain = [taking.take().id, taking.take(incremental=True).id]
    kept = []

    def prune() -> None:
        for each in chain:
            found = base_backups.load(taking.store, each)
            kept.append(base_backups.delete(taking.store, found, clock=now).kept)

    child = taking.take(store=Meddling(taking.store, "base.tar.zst", prune), incremental=True).id
    assert len(kept) == 2
    assert all("parent" in reason for reason in kept)
    assert {*chain, child} <= whole_listed(taking.store)


@pytest.mark.parametrize("number", [0, 1])
def test_one_whose_chain_went_all_the_same_is_not_listed(taking: RecoveryBox, number: int) -> None:
    chain = [taking.take().id, taking.take(incremental=True).id]
    before = {each.id for each in bases(taking.store)}
    unlisted = set(base_backups.unlisted(taking.store, NAME))
    lost = catalog_key(chain[number])
    record = read_all(taking.store, lost)
    store = Meddling(taking.store, "base.tar.zst", lambda: taking.store.delete([lost]))
    with pytest.raises(Refused, match=f"is not listed: {chain[number]}, which .* builds on, is not there"):
        taking.take(store=store, incremental=True)
    assert {each.id for each in bases(taking.store)} == before - {chain[number]}
    assert set(base_backups.unlisted(taking.store, NAME)) == unlisted | {chain[number]}
    taking.store.put(lost, [record])


@contextlib.contextmanager
def on_a_copy(box: RecoveryBox, folder: Path) -> Iterator[DirectoryStore]:
    """The box with a copy of its store, to be damaged."""
    was, shipped = box.store, set(box.shipped)
    assert isinstance(was, DirectoryStore)
    shutil.copytree(was.root, folder, dirs_exist_ok=True)
    box.store = DirectoryStore(folder)
    try:
        yield box.store
    finally:
        box.store, box.shipped = was, shipped


def test_where_none_fits_a_whole_one_is_taken_and_said(taking: RecoveryBox, tmp_path: Path) -> None:
    with on_a_copy(taking, tmp_path) as store:
        for each in bases(store):
            store.delete([base_prefix(each.id) + "base.tar.zst"])
        lines = len(taking.said.lines)
        with pytest.raises(Refused, match=r"cannot be built on: .* its object .* is missing"):
            taking.take(parent=bases(store)[0].id)
        with pytest.raises(BackupNotFound):
            taking.take(parent=BackupId(NAME, "20260101T000000Z-none"))
        taken = base_backups.load(store, taking.take(incremental=True).id).manifest
    assert taken.parent is None
    assert any("whole, though an incremental one was asked for" in note for note in taken.notes)
    said = [line for line in taking.said.lines[lines:] if "A WHOLE BASE BACKUP INSTEAD" in line]
    assert len(said) == 1
    assert "can be built on" in said[0]


def test_one_whose_drill_failed_is_not_built_on(taking: RecoveryBox, tmp_path: Path) -> None:
    with on_a_copy(taking, tmp_path) as store:
        for each in bases(store):
            fail(store, each.id)
        named = bases(store)[0].id
        with pytest.raises(Refused, match=f"cannot be built on: a drill of {named} failed"):
            taking.take(parent=named)
        taken = base_backups.load(store, taking.take(incremental=True).id).manifest
    assert taken.parent is None
    assert any("A WHOLE BASE BACKUP INSTEAD" in line for line in taking.said.lines)
    assert any("a drill of " in note for note in taken.notes)


def test_after_the_clock_was_set_back_a_whole_one_comes_first_and_then_a_chain(
    taking: RecoveryBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "backup_pipeline.actions.base_backup.server_clock"
    monkeypatch.setattr(asked, lambda session: server_clock(session) - timedelta(days=1))
    with on_a_copy(taking, tmp_path) as store:
        with pytest.raises(Refused, match="it is dated later than the server's clock"):
            taking.take(parent=bases(store)[-1].id)
        whole = base_backups.load(store, taking.take(incremental=True).id).manifest
        assert whole.parent is None
        assert any("dated later than the server's clock" in note for note in whole.notes)
        assert base_backups.load(store, taking.take(incremental=True).id).manifest.parent == whole.id


def test_a_parent_whose_own_manifest_is_damaged_is_not_built_on(taking: RecoveryBox, tmp_path: Path) -> None:
    with on_a_copy(taking, tmp_path) as store:
        newest = bases(store)[-1].id
        key = base_prefix(newest) + "backup_manifest"
        store.put(key, [read_all(store, key).replace(b"PG_VERSION", b"PG_VERSIOM")])
        with pytest.raises(Corrupt, match="the stored bytes are not those that were written"):
            taking.take(parent=newest)
        assert base_backups.load(store, taking.take(incremental=True).id).manifest.parent is None


def test_an_upload_that_fails_is_taken_away_and_no_whole_one_taken(taking: RecoveryBox) -> None:
    before = whole_listed(taking.store)

    def fail() -> None:
        raise Corrupt("not what it was")

    with pytest.raises(Corrupt):
        taking.take(store=Meddling(taking.store, "base.tar.zst", fail), incremental=True)
    assert whole_listed(taking.store) == before


def test_what_the_server_did_not_summarize_is_refused_or_taken_whole(tmp_path: Path) -> None:
    with small(DirectoryStore(tmp_path), summarize_wal="off") as box:
        box.commit(1)
        first = box.take().id
        counting = CountingStore(box.store)
        with pytest.raises(Refused, match="summarize_wal is off in cluster main") as caught:
            box.take(store=counting, incremental=True)
        assert "ALTER SYSTEM SET summarize_wal = on" in caught.value.hint
        assert not [effect for effect in counting.effects if "probe/" not in effect]
        box.commit(1, switch=True)
        execute(box.cluster.endpoint(), "ALTER SYSTEM SET summarize_wal = on")
        restart_with(box, summarize_wal="on")
        box.commit(1, switch=True)
        # Its checkpoint ends what is summarized, and what was summarized until it began is taken away.
        began = base_backups.load(box.store, box.take().id).manifest.start.lsn
        summarized = f"SELECT bool_or(end_lsn >= '{began}') FROM pg_available_wal_summaries()"
        wait_until(lambda: bool(ask(box.cluster.endpoint(), summarized)))
        for path in (box.cluster.data / "pg_wal" / "summaries").glob("[0-9A-F]*.summary"):
            path.unlink()
        with pytest.raises(engine.NotSinceParent, match="WAL summaries are required") as unknown:
            box.take(parent=first)
        assert "take a whole base backup" in unknown.value.hint
        assert not unknown.value.retryable


def restart_with(box: RecoveryBox, **settings: str) -> None:
    box.cluster.stop()
    box.cluster.settings = {**box.cluster.settings, **settings}
    box.cluster.start()


def test_after_a_promotion_a_whole_one_comes_first_and_then_a_chain(tmp_path: Path) -> None:
    """The new timeline's server has no summaries of the time before; from then on there are chains again."""
    with rclone_s3(tmp_path) as server, small(S3Store(server.store("prefix"))) as box:
        box.commit(1)
        box.take()
        box.commit(3)
        box.switch()
        box.recover(parse_target(box.ledger[-2].at.isoformat()), "second")
        box.go_on_with("second")
        with (box.cluster.data / "pg_hba.conf").open("a") as rules:
            rules.write("local replication all trust\n")
        execute(box.cluster.endpoint(), "SELECT pg_reload_conf()")
        del box.ledger[-1]
        box.commit(1)
        whole = base_backups.load(box.store, box.take(incremental=True).id).manifest
        assert whole.parent is None
        assert whole.end.timeline == 2
        box.commit(1)
        tablespace(box, "fresh")
        execute(box.cluster.endpoint(), "CREATE TABLE public.there TABLESPACE fresh AS SELECT 4711 AS n")
        child = base_backups.load(box.store, box.take(incremental=True).id).manifest
        assert child.parent == whole.id
        box.commit(1)
        box.switch()
        box.recover(LATEST)
        assert box.numbers() == [entry.number for entry in box.ledger]
        with started(box.cluster.bin_dir, box.folder / "recovered") as recovered:
            assert ask(recovered, "SELECT n FROM public.there") == 4711


def test_on_18_a_chain_gives_the_ledger(tmp_path: Path) -> None:
    with a_recovery_box(servers.bin_dir_18(), DirectoryStore(tmp_path), summarize_wal="on") as box:
        box.commit(1)
        box.take()
        for _ in range(2):
            box.commit(1)
            box.take(incremental=True)
        box.commit(1)
        box.switch()
        box.recover(LATEST)
        assert box.numbers() == [1, 2, 3, 4]
    assert any("combined 3 base backups" in line for line in box.said.lines)


def test_older_servers_take_none(tmp_path: Path) -> None:
    with a_cluster(servers.bin_dir_15(), tmp_path / "store") as box:
        with pytest.raises(Refused, match="runs PostgreSQL 15, and incremental base backups need 17"):
            box.take(incremental=True)
        assert not bases(box.store)


def test_from_a_standby(tmp_path: Path) -> None:
    with a_cluster(servers.bin_dir_17(), tmp_path / "store", summarize_wal="on") as primary:
        endpoint = primary.cluster.endpoint()
        execute(
            endpoint,
            "CREATE TABLE public.big AS SELECT g, md5(g::text) AS t FROM generate_series(1, 50000) g",
        )
        whole = primary.take().manifest
        with private_folder() as folder:
            places = plan_places(folder / "data", ())
            unpack(primary.store, whole, places, clock=now, report=Said(), owner=server_identity())
            (folder / "data" / "standby.signal").touch()
            settings = {
                "primary_conninfo": endpoint.dsn.replace("dbname=postgres", ""),
                "summarize_wal": "on",
            }
            with started_with_wal(primary, folder, **settings) as cluster:
                standby = replace(primary, cluster=cluster)
                execute(endpoint, "UPDATE public.big SET t = 'seen' WHERE g = 1; CHECKPOINT")
                seen = "SELECT redo_lsn FROM pg_control_checkpoint()"
                await_equal(standby, str(ask(endpoint, seen)))
                child = switching(primary, standby, whole.id)
        assert child.from_standby
        assert child.parent == whole.id
        assert child.size_bytes < 0.3 * whole.size_bytes


def await_equal(standby: ClusterBox, redo: str) -> None:
    """Until the standby has a restart point at the primary's checkpoint."""

    def is_there() -> bool:
        execute(standby.cluster.endpoint(), "CHECKPOINT")
        return str(ask(standby.cluster.endpoint(), "SELECT redo_lsn FROM pg_control_checkpoint()")) == redo

    wait_until(is_there)


def switching(primary: ClusterBox, standby: ClusterBox, parent: BackupId) -> BaseManifest:
    """One of the standby, while its primary begins new segments."""

    def switch(ended: threading.Event) -> None:
        while not ended.wait(0.2):
            execute(
                primary.cluster.endpoint(), "SELECT pg_logical_emit_message(true, '', ''), pg_switch_wal()"
            )

    with meanwhile(switch):
        return standby.take(parent=parent).manifest
