"""What may go wrong with a recovery: it ends, says why, leaves nothing, and never ends early in silence."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.actions import recover
from backup_pipeline.actions.recovery_plan import Plan, RecoverRequest
from backup_pipeline.domain.recovery_target import LATEST, parse_target
from backup_pipeline.engines.postgres.cluster import server_identity
from backup_pipeline.errors import BackupError, Corrupt, Refused, StoreError, ToolError
from backup_pipeline.process import Command
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.actions.box import ask, execute, now
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.actions.damage import double, flip, remove, segments, swap, truncate
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box, started
from backup_pipeline_tests.servers import postgres as servers


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    """A base backup and four segments after it; the source's configuration is full of traps."""
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    with a_recovery_box(servers.bin_dir_17(), store) as box:
        trap = box.folder.parent / "trap"
        planted = {
            "archive_command": f"touch {trap}",
            "restore_command": f"touch {trap}",
            "archive_cleanup_command": f"touch {trap}",
            "recovery_end_command": f"touch {trap}",
            "session_preload_libraries": "no_such_library",
            "listen_addresses": "*",
        }
        lines = "".join(f"{name} = '{value}'\n" for name, value in planted.items())
        (box.cluster.data / "planted.conf").write_text(lines)
        give(box.cluster.data / "planted.conf")
        for name in ("postgresql.conf", "postgresql.auto.conf"):
            with (box.cluster.data / name).open("a") as file:
                file.write("include 'planted.conf'\n")
        box.commit(2)
        box.take()
        for _ in range(4):
            box.commit(2, switch=True)
        box.switch()
        yield box


@pytest.fixture
def copy(whole: RecoveryBox, tmp_path: Path) -> DirectoryStore:
    """The store once more, to be damaged."""
    return whole.copy_of_store(tmp_path / "copy")


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (remove, Refused, "lies beyond a gap in the WAL"),
        (truncate, BackupError, "is not what was archived"),
        (flip, BackupError, "is not what was archived"),
        (swap, BackupError, "is not what was archived"),
        (double, Refused, "which cannot be used: two versions are archived"),
    ],
)
def test_a_damaged_archive_is_found_before_it_is_used(
    whole: RecoveryBox,
    copy: DirectoryStore,
    damage: Callable[[DirectoryStore], None],
    error: type[BackupError],
    said: str,
) -> None:
    damage(copy)
    with pytest.raises(error, match=said):
        whole.recover(LATEST, store=copy)
    assert list(whole.folder.iterdir()) == []


@pytest.mark.parametrize("damage", [remove, flip, double])
def test_what_is_wrong_beyond_the_target_is_no_matter(
    whole: RecoveryBox, copy: DirectoryStore, damage: Callable[[DirectoryStore], None]
) -> None:
    damage(copy)
    early = whole.ledger[2]
    whole.recover(parse_target(early.at.isoformat()), store=copy)
    assert whole.numbers() == [1, 2, 3]
    shutil.rmtree(whole.folder / "recovered")


def test_a_damaged_last_segment_ends_the_route_before_it(whole: RecoveryBox, copy: DirectoryStore) -> None:
    key = segments(copy)[-1]
    copy.put(key, [read_all(copy, key)[:-10]])
    with pytest.raises(Refused, match=r"which cannot be used: .* is not what was archived"):
        whole.recover(LATEST, store=copy)
    early = whole.ledger[4]
    whole.recover(parse_target(early.at.isoformat()), store=copy)
    assert whole.numbers() == [1, 2, 3, 4, 5]
    shutil.rmtree(whole.folder / "recovered")


def test_what_is_committed_after_the_plan_is_not_replayed(tmp_path: Path) -> None:
    """The server was idle until the target, and is not any more when the replay runs."""
    with a_recovery_box(servers.bin_dir_17(), DirectoryStore(tmp_path)) as box:
        box.commit(1)
        box.take()
        box.commit(1)
        plan = idle_plan(box)
        assert plan.judged.to_the_end
        box.commit(2, switch=True)
        box.switch()
        result = recover.carry_out(box.protected(), plan, clock=now, report=box.said)
        assert box.numbers() == [1, 2]
        assert result.recovered.last_commit_at == box.ledger[1].at


def test_another_version_that_is_archived_after_the_plan_is_not_looked_at(
    whole: RecoveryBox, copy: DirectoryStore
) -> None:
    """A plan names objects, and not only segments."""
    request = RecoverRequest(LATEST, whole.folder / "recovered")
    cluster = whole.protected(copy)
    plan = recover.plan(cluster, request, report=whole.said)
    double(copy)
    recover.carry_out(cluster, plan, clock=now, report=whole.said)
    assert whole.numbers() == [commit.number for commit in whole.ledger]
    shutil.rmtree(whole.folder / "recovered")


def idle_plan(box: RecoveryBox) -> Plan:
    """A plan for this very moment; a server has to have been idle for it, so it is tried a few times."""
    for attempt in range(10):
        box.switch()
        request = RecoverRequest(parse_target(f"{now().isoformat()}"), box.folder / "recovered")
        try:
            return recover.plan(box.protected(), request, report=box.said)
        except Refused:
            if attempt == 9:
                raise
    raise AssertionError


def test_a_killed_recovery_leaves_nothing_that_the_next_one_does_not_collect(
    whole: RecoveryBox, copy: DirectoryStore
) -> None:
    into = str(whole.folder / "recovered")
    program = (sys.executable, "-m", "backup_pipeline.cli", "--store", f"file://{copy.root}")
    command = Command((*program, "recover", "main", "--to", "latest", "--into", into))
    child = process.start(command, stderr=subprocess.PIPE)
    with child:
        assert child.stderr is not None
        for line in child.stderr:
            if b"fetched" in line:
                break
        child.kill()
    (left,) = whole.folder.iterdir()
    assert left.name.startswith("backup-recovery-")
    whole.recover(LATEST)
    assert [path.name for path in whole.folder.iterdir()] == ["recovered"]
    shutil.rmtree(whole.folder / "recovered")


def test_a_damaged_base_backup_is_found_before_it_is_used(whole: RecoveryBox, copy: DirectoryStore) -> None:
    (key,) = [info.key for info in copy.list("clusters/main/base/") if info.key.endswith("base.tar.zst")]
    data = bytearray(read_all(copy, key))
    data[len(data) // 2] ^= 1
    copy.put(key, [bytes(data)])
    with pytest.raises(Corrupt):
        whole.recover(LATEST, store=copy)
    assert list(whole.folder.iterdir()) == []


class Vanishing(DirectoryStore):
    """A store that does not answer any more once so many segments were read, for so many requests."""

    def __init__(self, root: Path, *, after: int, requests: int) -> None:
        super().__init__(root)
        self.after, self.requests, self.served = after, requests, 0

    def read(self, key: str) -> Iterator[bytes]:
        if "/wal-archive/" in key and key.endswith(".zst"):
            self.served += 1
            if self.served > self.after and self.requests > 0:
                self.requests -= 1
                raise StoreError("the store does not answer")
        return super().read(key)


def test_a_store_that_comes_back_is_waited_for(whole: RecoveryBox, copy: DirectoryStore) -> None:
    whole.recover(LATEST, store=Vanishing(copy.root, after=2, requests=2))
    assert whole.numbers() == list(range(1, 11))
    shutil.rmtree(whole.folder / "recovered")
    assert any("does not answer; trying again" in line for line in whole.said.lines)


def test_a_store_that_stays_away_ends_the_recovery_and_no_server_is_promoted_short_of_it(
    whole: RecoveryBox, copy: DirectoryStore
) -> None:
    store = Vanishing(copy.root, after=2, requests=1000)
    with pytest.raises(StoreError, match="does not answer") as caught:
        whole.recover(LATEST, store=store, patience_s=0.0)
    assert caught.value.detail["while"] == "recovering to the end of the archive"
    assert list(whole.folder.iterdir()) == []


def test_nothing_that_the_source_s_configuration_says_is_run(whole: RecoveryBox) -> None:
    whole.recover(LATEST)
    recovered = whole.folder / "recovered"
    assert "planted.conf" in (recovered / "postgresql.conf.source").read_text()
    assert "planted" not in (recovered / "postgresql.conf").read_text()
    with started(whole.cluster.bin_dir, recovered) as endpoint:
        assert ask(endpoint, "SHOW session_preload_libraries") == ""
        assert ask(endpoint, "SHOW archive_mode") == "off"
        assert ask(endpoint, "SHOW max_logical_replication_workers") == "0"
    assert not (whole.folder.parent / "trap").exists()
    shutil.rmtree(recovered)


def test_a_place_that_is_taken_is_refused(whole: RecoveryBox) -> None:
    taken = whole.folder / "recovered"
    taken.mkdir()
    (taken / "precious").write_text("do not touch")
    with pytest.raises(Refused, match="is there already"):
        whole.recover(LATEST)
    assert (taken / "precious").read_text() == "do not touch"
    shutil.rmtree(taken)


def test_tablespaces_are_recovered_beside_and_one_made_later_never_where_the_source_has_it(
    tmp_path: Path,
) -> None:
    store = DirectoryStore(tmp_path)
    with a_recovery_box(servers.bin_dir_17(), store) as box:
        early, late = (give_new(box.folder.parent / name) for name in ("early", "late"))
        endpoint = box.cluster.endpoint()
        execute(endpoint, f"CREATE TABLESPACE early LOCATION '{early}'")
        execute(endpoint, "CREATE TABLE public.there TABLESPACE early AS SELECT 1 AS a")
        box.commit(1)
        box.take()
        box.commit(1)
        before = box.ledger[-1]
        box.commit(1)  # a tablespace comes into being before the commit that it belongs to
        execute(endpoint, f"CREATE TABLESPACE late LOCATION '{late}'")
        execute(endpoint, "CREATE TABLE public.later TABLESPACE late AS SELECT 2 AS a")
        box.commit(1)
        box.switch()
        box.recover(parse_target(before.at.isoformat()))
        (beside,) = (box.folder / "recovered.tablespaces").iterdir()
        assert any(beside.iterdir())
        with started(box.cluster.bin_dir, box.folder / "recovered") as recovered:
            assert ask(recovered, "SELECT a FROM public.there") == 1
        shutil.rmtree(box.folder / "recovered")
        shutil.rmtree(box.folder / "recovered.tablespaces")
        files = {path: path.read_bytes() for path in late.rglob("*") if path.is_file()}
        with pytest.raises(ToolError, match="the replay wanted to write outside") as caught:
            box.recover(LATEST)
        assert str(late) in caught.value.message
        assert {path: path.read_bytes() for path in late.rglob("*") if path.is_file()} == files
        assert list(box.folder.iterdir()) == []


def give_new(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return give(path)


def test_who_runs_the_server(whole: RecoveryBox) -> None:
    result = whole.recover(LATEST)
    assert any("chown" in line for line in result.lines) is (server_identity() is not None)
    shutil.rmtree(whole.folder / "recovered")
