"""What a recovery leaves: a server that runs where it was told, the source's configuration, its record."""

import contextlib
import shutil
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.actions import recover, recovery_history
from backup_pipeline.actions.recovery_plan import RecoverRequest
from backup_pipeline.config import Secret
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.layout import recoveries_prefix
from backup_pipeline.domain.recovered import RECORD_NAME, RecoveryFigures, estimate, recovered_from_json
from backup_pipeline.domain.recovery_target import LATEST
from backup_pipeline.engines.postgres import daemon
from backup_pipeline.engines.postgres.cluster import free_port, server_identity, server_in
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import Refused, ServerError, StoreError, ToolError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import Said, ask, execute, now
from backup_pipeline_tests.actions.protected_box import NAME
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.storage.effects import CountingStore

PASSWORD = "as it was"


@pytest.fixture(scope="module", params=[servers.bin_dir_15, servers.bin_dir_17], ids=["15", "17"])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    """A role with a password, an unlogged table, and a configuration file beside the data directory."""
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    with a_recovery_box(request.param(), store) as made:
        endpoint = made.cluster.endpoint()
        execute(endpoint, f"CREATE ROLE clerk LOGIN PASSWORD '{PASSWORD}'")
        execute(endpoint, "CREATE UNLOGGED TABLE public.cache AS SELECT 1 AS a")
        beside = made.folder / "extra.conf"
        beside.write_text("work_mem = '7MB'\n")
        beside.chmod(0o644)
        conf = made.cluster.data / "postgresql.conf"
        conf.write_text(conf.read_text() + f"include '{beside}'\n")
        made.commit(1)
        made.take()
        beside.unlink()
        made.commit(2)
        made.switch()
        yield made


@pytest.fixture(scope="module")
def finished(box: RecoveryBox) -> tuple[Path, recover.RecoverResult]:
    """The box recovered, its server stopped."""
    return box.folder / "finished", box.recover(LATEST, into="finished")


def by_tcp(port: int, user: str, password: str = "") -> Endpoint:
    dsn = f"host=127.0.0.1 port={port} user={user} dbname=postgres"
    return Endpoint(dsn, Secret(value=password) if password else None)


def test_a_port_leaves_it_running_for_those_who_have_a_password(box: RecoveryBox) -> None:
    port, into = free_port(), box.folder / "running"
    try:
        result = box.recover(LATEST, into="running", port=port)
        assert server_in(into) is not None
        assert ask(by_tcp(port, "clerk", PASSWORD), "SELECT current_user") == "clerk"
        for who in (by_tcp(port, "clerk", "another"), by_tcp(port, "postgres")):
            with pytest.raises(ServerError):
                connect(who).close()
        own = Endpoint(f"host={into} port={port} user=postgres dbname=postgres")
        assert ask(own, "SELECT count(*) FROM public.ledger") == 3
        assert ask(own, "SHOW listen_addresses") == "127.0.0.1"
        assert ask(own, "SHOW archive_mode") == "off"
        assert into.stat().st_mode & 0o777 == 0o700
        with pytest.raises(Refused, match=f"port {port} of 127.0.0.1 is taken"):
            box.recover(LATEST, into="second", port=port)
        (stop,) = (line for line in result.lines if line.startswith("to stop it: "))
        argv = tuple(stop.removeprefix("to stop it: ").split())
        process.run(process.Command(argv, identity=server_identity(), cwd="/"), timeout_s=60)
        assert server_in(into) is None
    finally:
        with contextlib.suppress(ToolError):
            daemon.stop(f"{box.cluster.bin_dir}/pg_ctl", into, owner=server_identity())
        shutil.rmtree(into, ignore_errors=True)


def test_without_a_port_it_is_stopped_and_says_what_is_empty(
    finished: tuple[Path, recover.RecoverResult],
) -> None:
    into, result = finished
    assert server_in(into) is None
    assert any("the server is stopped" in line for line in result.lines)
    (warned,) = (line for line in result.lines if line.startswith("warning: "))
    assert "1 unlogged table, index or sequence: empty now" in warned
    assert "listen_addresses = ''" in (into / "postgresql.conf").read_text()
    assert "host" not in (into / "pg_hba.conf").read_text()


def test_what_lay_outside_comes_along_unread_and_the_record_says_what_it_is(
    box: RecoveryBox, finished: tuple[Path, recover.RecoverResult]
) -> None:
    into, result = finished
    carried = into / "configuration.source" / str(box.folder / "extra.conf").lstrip("/")
    assert carried.read_text() == "work_mem = '7MB'\n"
    assert carried.stat().st_mode & 0o777 == 0o600
    assert carried.stat().st_uid == into.stat().st_uid
    (said,) = (line for line in result.lines if "its settings are ours" in line)
    assert "configuration.source" in said
    record = recovered_from_json((into / RECORD_NAME).read_bytes(), RECORD_NAME)
    assert (record.cluster, record.source_timeline, record.timeline) == (NAME, 1, 2)
    assert record.replayed_to == result.recovered.replayed_to


def test_a_server_that_does_not_start_leaves_what_was_recovered(box: RecoveryBox) -> None:
    """Between the plan and the start somebody takes the port."""
    port = free_port()
    cluster = box.protected()
    request = RecoverRequest(LATEST, box.folder / "recovered", port=port)
    planned = recover.plan(cluster, request, report=box.said)
    with taken(port), pytest.raises(ToolError) as caught:
        recover.carry_out(cluster, planned, clock=now, report=box.said)
    assert "Address already in use" in str(caught.value.detail["server"])
    assert "stays" in str(caught.value.detail["recovered"])
    assert box.numbers() == [1, 2, 3]
    shutil.rmtree(box.folder / "recovered")


@contextlib.contextmanager
def taken(port: int) -> Iterator[None]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", port))
        listening.listen()
        yield


def test_a_plan_says_how_long_the_last_one_took(
    box: RecoveryBox, finished: tuple[Path, recover.RecoverResult]
) -> None:
    took = finished[1].unpack_s + finished[1].replay_s
    planned = recover.plan(box.protected(), RecoverRequest(LATEST, box.folder / "x"), report=box.said)
    (known,) = (each for each in planned.known if each.took_s == pytest.approx(took, abs=0.01))
    assert (known.source_bytes, known.segments) == (planned.manifest.source_bytes, len(planned.judged.needed))
    assert any(line.startswith("takes: about ") for line in planned.lines)
    all_known = recovery_history.known_figures(box.store, NAME)
    expected = estimate(all_known, source_bytes=2 * known.source_bytes, wal_bytes=0)
    assert expected is not None
    assert expected.total_seconds() >= 2 * max(each.unpack_s for each in planned.known)


def test_before_the_first_recovery_nobody_knows_how_long_it_takes(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    known = recovery_history.known_figures(store, NAME)
    assert estimate(known, source_bytes=10, wal_bytes=0) is None
    said = recovery_history.duration_line((), source_bytes=1, wal_bytes=1)
    assert "not known" in said


def test_a_store_that_may_not_be_written_fails_no_recovery(
    box: RecoveryBox, finished: tuple[Path, recover.RecoverResult]
) -> None:
    said = Said()
    figures = recovery_history.known_figures(box.store, NAME)[0]
    recovery_history.record_figures(ReadOnly(box.store), figures, said)
    assert "not recorded" in said.lines[0]


def test_only_the_last_hundred_are_kept(tmp_path: Path) -> None:
    store, begun = DirectoryStore(tmp_path), now()
    backup = BackupId.make(NAME, begun, "abcdef")
    for number in range(103):
        figures = RecoveryFigures(NAME, backup, begun + timedelta(seconds=number), 1, 1, 1, number, 0.0)
        recovery_history.record_figures(store, figures, Said())
    kept = list(store.list(recoveries_prefix(NAME)))
    assert len(kept) == 100
    assert [each.unpack_s for each in recovery_history.known_figures(store, NAME)] == [102, 101, 100, 99, 98]


class ReadOnly(CountingStore):
    """A store that lets nothing be put."""

    def put(self, key: str, *_: object, **__: object) -> None:
        """Denied."""
        raise StoreError(f"{key}: access denied")
