"""Drills of real clusters: proven when all is well, red when anything is not, and never by a guess."""

import contextlib
import struct
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from backup_pipeline.actions import drill_recovery
from backup_pipeline.config import Secret
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.drill import Drill
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.errors import Refused, StoreError
from backup_pipeline.storage import base_backups, drills
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import open_store, read_all
from backup_pipeline_tests.actions.box import ask, execute, now
from backup_pipeline_tests.actions.damage import flip, remove, segments, swap, truncate
from backup_pipeline_tests.actions.drill_box import a_drill_box, drill, forge, protected
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.servers.s3 import rclone_s3

NOBODY = Secret("host=/nonexistent user=postgres dbname=postgres")


def left() -> list[Path]:
    """What drills left below the system's folder for temporary files."""
    return list(Path(tempfile.gettempdir()).glob("backup-drill-*"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for temporary files that no other test's drill uses at the same time."""
    with tempfile.TemporaryDirectory(prefix="drills-") as folder:
        Path(folder).chmod(0o711)  # the server's user enters too
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    with a_drill_box(servers.bin_dir_17(), DirectoryStore(tmp_path_factory.mktemp("store"))) as made:
        yield made


@pytest.fixture
def copy(box: RecoveryBox, tmp_path: Path) -> DirectoryStore:
    """The store once more: what is done to it, and recorded in it, is the test's own."""
    return box.copy_of_store(tmp_path / "copy")


def verdict_of_base(store: DirectoryStore) -> Verdict:
    (backup,) = base_backups.list_base_backups(store, "main").backups
    return backup.verdict


def recorded(store: DirectoryStore, done: Drill) -> None:
    """The record in the store is what was returned, and nothing is left of the drill itself."""
    assert drills.drills(store, "main").drills == (done,)
    assert not left()


def test_the_second_before_a_heartbeat_is_recovered_and_proven(
    box: RecoveryBox, copy: DirectoryStore
) -> None:
    at = box.ledger[5].at
    done = drill(box, copy, to=at)
    assert (done.verdict, done.differences) == (Verdict.PROVEN, ())
    recorded(copy, done)
    assert verdict_of_base(copy) is Verdict.PROVEN
    assert (done.target_at, done.seed) == (at, None)
    said = "\n".join(done.checked)
    assert "(number 1)" in said
    assert "(number 2), is not" in said
    assert "every table and B-tree index of 3 databases is sound" in said  # the hostile one among them
    assert "1 unlogged table came back empty, as after any crash" in done.notes
    assert any("no page checksums" in note for note in done.notes)
    assert done.recovery is not None
    took = done.recovery
    assert min(took.plan_s, took.unpack_s, took.replay_s, took.start_s, done.check_s) > 0
    assert done.segments >= 3
    assert done.wal_bytes > 0
    assert done.loss is not None
    assert done.loss.asked
    assert 0 <= done.loss.loss_s < 300


@pytest.mark.parametrize("major", ["17", "15"])
def test_a_random_second_of_a_cluster_with_checksums(major: str, tmp_path: Path) -> None:
    bin_dir = servers.bin_dir_17() if major == "17" else servers.bin_dir_15()
    store = DirectoryStore(tmp_path)
    with a_drill_box(bin_dir, store, checksums=True) as box:
        done = drill(box)
    assert (done.verdict, done.differences) == (Verdict.PROVEN, ())
    assert "every page agrees with its checksum" in done.checked
    assert done.target_at is not None
    assert any(span.from_at <= done.target_at <= span.to_at for span in done.spans)
    recorded(store, done)


def test_a_drill_from_s3_by_a_machine_whose_clock_is_years_ahead(tmp_path: Path) -> None:
    def ahead() -> datetime:
        return now() + timedelta(days=3650)

    with rclone_s3(tmp_path) as server, a_drill_box(servers.bin_dir_17(), open_store(server.store())) as box:
        done = drill_recovery.drill(protected(box), clock=ahead, report=box.said)
        assert (done.verdict, done.differences) == (Verdict.PROVEN, ())
        assert drills.drills(box.store, "main").drills == (done,)
    assert done.loss is not None
    assert done.loss.loss_s < 300
    assert not left()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove, "missing; nothing beyond"),
        (truncate, "is not what was archived"),
        (flip, "is not what was archived"),
        (swap, "is not what was archived"),
    ],
)
def test_a_damaged_archive_turns_it_red(
    box: RecoveryBox, copy: DirectoryStore, damage: Callable[[DirectoryStore], None], said: str
) -> None:
    damage(copy)
    done = drill(box, copy, to=box.ledger[-1].at)
    assert done.verdict is Verdict.FAILED
    assert said in "\n".join(done.differences)
    assert any(line.startswith("what to do: ") for line in done.differences)
    recorded(copy, done)


def test_a_gap_turns_every_drill_red_but_not_the_base_backup_that_was_recovered(
    box: RecoveryBox, copy: DirectoryStore
) -> None:
    gone = segments(copy)[2].rpartition("/")[2][:24]
    copy.delete([segments(copy)[2]])
    done = drill(box, copy)
    assert done.verdict is Verdict.FAILED
    assert [gone in line for line in done.differences] == [True]
    assert done.recovery is not None
    assert verdict_of_base(copy) is not Verdict.FAILED
    recorded(copy, done)


def test_a_damaged_base_backup_turns_it_red(box: RecoveryBox, copy: DirectoryStore) -> None:
    (key,) = [info.key for info in copy.list("clusters/main/base/") if info.key.endswith("base.tar.zst")]
    data = bytearray(read_all(copy, key))
    data[len(data) // 2] ^= 1
    copy.put(key, [bytes(data)])
    done = drill(box, copy, to=box.ledger[3].at)
    assert (done.verdict, done.recovery) == (Verdict.FAILED, None)
    assert verdict_of_base(copy) is Verdict.FAILED
    recorded(copy, done)


def test_without_a_heartbeat_it_says_that_it_proves_less(box: RecoveryBox, copy: DirectoryStore) -> None:
    done = drill(box, copy, to=box.ledger[3].at, heartbeat=False)
    assert (done.verdict, done.differences) == (Verdict.RESTORED, ())
    assert any("no heartbeat is configured" in note for note in done.notes)
    assert verdict_of_base(copy) is Verdict.RESTORED


def test_without_its_source_the_minute_is_enough(box: RecoveryBox, copy: DirectoryStore) -> None:
    at = box.ledger[3].at
    done = drill(box, copy, to=at, dsn=NOBODY)
    assert done.loss is not None
    assert not done.loss.asked
    before = ask(box.cluster.endpoint(), "SELECT min(at) FROM backup_pipeline.heartbeat")
    assert isinstance(before, datetime)
    in_time = at - before <= timedelta(seconds=70)  # not on a machine that was busy meanwhile
    assert done.verdict is (Verdict.PROVEN if in_time else Verdict.RESTORED)
    assert any("the source's heartbeat was not read" in note for note in done.notes)


def test_a_secret_that_is_not_here_leaves_the_recovery_looked_into(
    box: RecoveryBox, copy: DirectoryStore
) -> None:
    done = drill(box, copy, to=box.ledger[3].at, dsn=Secret(env="NOT_SET_ANYWHERE", key="clusters.main.dsn"))
    assert (done.verdict, done.differences) == (Verdict.RESTORED, ())
    assert any("NOT_SET_ANYWHERE is not set" in note for note in done.notes)


def test_a_clock_that_was_set_back_is_found_and_named(tmp_path: Path) -> None:
    """What it leaves: a row with an earlier time than the one before it, committed after the target."""
    with a_drill_box(servers.bin_dir_17(), DirectoryStore(tmp_path)) as box:
        at = box.ledger[4].at
        forge(box, at - timedelta(seconds=30))
        done = drill(box, to=at)
    assert done.verdict is Verdict.FAILED
    assert "(number 3), before the target, is not in the recovered cluster" in done.differences[0]
    assert "clock was set back before" in done.differences[1]


def corrupt(box: RecoveryBox, relation: str, offset: int, garbage: bytes) -> None:
    """Overwrite a few bytes of a relation, behind the stopped server's back."""
    endpoint = box.cluster.endpoint()
    path = box.cluster.data / str(ask(endpoint, f"SELECT pg_relation_filepath('public.{relation}')"))
    box.cluster.stop()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(garbage)
    box.cluster.start()


@pytest.mark.parametrize(
    ("relation", "offset", "garbage"),
    # In a heap, a row that is said to lie beyond its page.
    [("thing", 24, struct.pack("<I", 0x7FF0 | 1 << 15 | 100 << 17)), ("thing_a", 8192 + 24, b"\xa5" * 200)],
    ids=["heap", "index"],
)
def test_damage_that_the_source_already_had_is_found(
    tmp_path: Path, relation: str, offset: int, garbage: bytes
) -> None:
    """Without page checksums nobody else would have told."""
    with a_recovery_box(servers.bin_dir_17(), DirectoryStore(tmp_path)) as box:
        endpoint = box.cluster.endpoint()
        execute(endpoint, "CREATE TABLE public.thing AS SELECT i AS a FROM generate_series(1, 5000) AS i")
        execute(endpoint, "CREATE INDEX thing_a ON public.thing (a)")
        execute(endpoint, "CHECKPOINT")
        corrupt(box, relation, offset, garbage)
        box.commit(1)
        box.take()
        box.commit(2)
        box.switch()
        done = drill(box, to=box.ledger[1].at, heartbeat=False)
    assert done.verdict is Verdict.FAILED
    assert any(line.startswith("amcheck: ") and f".{relation}" in line for line in done.differences)


def test_a_machine_without_what_it_needs_says_so_and_blames_no_backup(
    box: RecoveryBox, copy: DirectoryStore, tmp_path: Path
) -> None:
    done = drill(box, copy, bin_dir=str(tmp_path))
    assert (done.verdict, done.target_at, done.base) == (Verdict.NOT_PROVABLE, None, None)
    assert "cannot find pg_waldump of PostgreSQL 17" in done.differences[0]
    assert verdict_of_base(copy) is Verdict.NONE
    recorded(copy, done)


@contextlib.contextmanager
def programs_without(bin_dir: str, name: str) -> Iterator[str]:
    """The same programs, less one."""
    with private_folder() as folder:
        programs = folder / "bin"
        programs.mkdir(mode=0o755)
        for path in Path(bin_dir).iterdir():
            if path.name != name:
                (programs / path.name).symlink_to(path)
        yield str(programs)


def test_without_amcheck_nothing_is_called_proven(box: RecoveryBox, copy: DirectoryStore) -> None:
    with programs_without(box.cluster.bin_dir, "pg_amcheck") as bin_dir:
        done = drill(box, copy, to=box.ledger[3].at, bin_dir=bin_dir)
    assert (done.verdict, done.differences) == (Verdict.RESTORED, ())
    assert any("were not checked: there is no" in note for note in done.notes)


def test_page_checksums_that_nobody_compared_are_not_called_proven(tmp_path: Path) -> None:
    with (
        a_drill_box(servers.bin_dir_17(), DirectoryStore(tmp_path), checksums=True) as box,
        programs_without(box.cluster.bin_dir, "pg_checksums") as bin_dir,
    ):
        done = drill(box, to=box.ledger[3].at, bin_dir=bin_dir)
    assert (done.verdict, done.differences) == (Verdict.RESTORED, ())
    assert any("page checksums were not compared" in note for note in done.notes)


def test_where_nothing_can_be_recovered_nothing_is_recorded(
    box: RecoveryBox, copy: DirectoryStore, tmp_path: Path
) -> None:
    cluster = protected(box, copy)
    for at in (box.ledger[0].at, now() + timedelta(days=1)):
        with pytest.raises(Refused, match="lies"):
            drill_recovery.drill(cluster, clock=now, report=box.said, target_at=at)
    key = next(info.key for info in copy.list("catalog/main/"))
    copy.delete([key])
    with pytest.raises(Refused, match="there is no base backup"):
        drill(box, copy)
    assert drills.drills(copy, "main").drills == ()


class Away(DirectoryStore):
    """A store that does not answer for segments."""

    def read(self, key: str) -> Iterator[bytes]:
        if "base.tar" in key:
            raise StoreError("the store does not answer")
        return super().read(key)


def test_a_store_that_does_not_answer_is_no_verdict(box: RecoveryBox, copy: DirectoryStore) -> None:
    with pytest.raises(StoreError, match="does not answer"):
        drill(box, Away(copy.root), to=box.ledger[3].at)
    assert drills.drills(copy, "main").drills == ()
    assert verdict_of_base(copy) is Verdict.NONE
    assert not left()
