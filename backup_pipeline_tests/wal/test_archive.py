"""archive_command's and restore_command's contracts, file by file, on each kind of store."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backup_pipeline.domain.layout import parse_wal_key, wal_identity_key, wal_key
from backup_pipeline.domain.wal import WalGap, WalKind, WalSegment, parse_wal_name
from backup_pipeline.errors import (
    BackupError,
    BackupNotFound,
    ConfigError,
    Corrupt,
    NotArchived,
    Refused,
    StoreError,
)
from backup_pipeline.storage import files
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import ObjectInfo, Store, open_store, read_all
from backup_pipeline.wal import identity
from backup_pipeline.wal.ahead import AHEAD
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.fetch import fetch, restore_exit_code
from backup_pipeline.wal.identity import System, adopt, claim, read_identity
from backup_pipeline.wal.listing import read_archive, read_settled_archive
from backup_pipeline_tests.servers.s3 import S3Server
from backup_pipeline_tests.wal.box import begin
from backup_pipeline_tests.wal.segments import MIB, OTHER, SEGMENT_BYTES, SYSTEM, DataDirectory, segment

AT = datetime(2026, 3, 1, 2, tzinfo=UTC)
HISTORY = b"1\t0/5000000\tno recovery target specified\n"
LABEL = b"START WAL LOCATION: 0/300028 (file 000000010000000000000003)\n"


def archive_in(store: Store, data: DataDirectory | None = None) -> WalArchive:
    return WalArchive(store, "main", data_directory=data.path if data else None)


@pytest.fixture
def archive(store: Store) -> WalArchive:
    """The archive of cluster `main`, on each kind of store."""
    begin(store)
    return archive_in(store)


@pytest.fixture
def here(tmp_path: Path) -> DirectoryStore:
    """An archive in a directory, whose objects are at hand."""
    (tmp_path / "here").mkdir()
    store = DirectoryStore(tmp_path / "here")
    begin(store)
    return store


def keys(store: Store) -> list[str]:
    """All keys but that of the archive's record."""
    return [info.key for info in store.list("clusters/") if info.key != wal_identity_key("main")]


def test_every_kind_of_file_is_archived_and_comes_back(
    archive: WalArchive, data: DataDirectory, tmp_path: Path
) -> None:
    files = {
        "000000010000000000000003": segment(3),
        "000000010000000000000004.partial": segment(4),
        "000000010000000000000003.00000028.backup": LABEL,
        "00000002.history": HISTORY,
    }
    for name, content in files.items():
        pushed = archive.push(data.put(name, content))
        assert (pushed.name, pushed.plain_bytes, pushed.already) == (name, len(content), False)
        assert archive.store.head(pushed.key).size_bytes == pushed.stored_bytes
    for name, content in files.items():
        got = tmp_path / "RECOVERYXLOG"
        assert fetch(archive.store, "main", name, got).plain_bytes == len(content)
        assert got.read_bytes() == content
    assert [path.name for path in tmp_path.glob("*RECOVERY*")] == ["RECOVERYXLOG"]
    kinds = {found.name.kind for key in keys(archive.store) if (found := parse_wal_key(key))}
    assert kinds == set(WalKind)


def test_the_same_bytes_again_are_done_and_others_refused(archive: WalArchive, data: DataDirectory) -> None:
    first = archive.push(data.segment(3))
    written = list(archive.store.list(""))
    again = archive.push(data.segment(3))
    assert (again.key, again.stored_bytes, again.already) == (first.key, first.stored_bytes, True)
    with pytest.raises(Refused, match="already, with other bytes") as caught:
        archive.push(data.segment(3, seed=1))
    assert hashlib.sha256(segment(3)).hexdigest() in str(caught.value)
    assert "what is archived may be the copy's: look with pg_waldump" in str(caught.value)
    assert list(archive.store.list("")) == written


def test_a_history_is_compared_byte_for_byte(archive: WalArchive, data: DataDirectory) -> None:
    assert not archive.push(data.put("00000002.history", HISTORY)).already
    assert archive.push(data.put("00000002.history", HISTORY)).already
    for other in (HISTORY + b"\n", HISTORY.replace(b"5", b"6")):
        with pytest.raises(Refused, match=r"00000002\.history is in the archive of main already"):
            archive.push(data.put("00000002.history", other))
    assert read_all(archive.store, wal_key("main", SYSTEM, parse_wal_name("00000002.history"), "")) == HISTORY


class Killed(BaseException):
    """The process ended here."""


def push_in(store: DirectoryStore, path: Path) -> None:
    archive_in(store).push(path)


def begin_in(store: DirectoryStore, path: Path) -> None:
    begin(store)


@pytest.mark.parametrize(
    ("name", "write"),
    [("000000010000000000000003", push_in), ("00000002.history", push_in), ("identity.json", begin_in)],
)
def test_what_a_killed_writer_left_is_durable_before_it_counts(
    here: DirectoryStore,
    data: DataDirectory,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[DirectoryStore, Path], None],
) -> None:
    """It died between giving the object its name and syncing the folders."""
    path = data.put(name, HISTORY if name.endswith(".history") else segment(3))
    if write is begin_in:
        here.delete([wal_identity_key("main")])

    def killed(_: int) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync_folder", killed)
        with pytest.raises(Killed):
            write(here, path)
    (key,) = (info.key for info in here.list("clusters/") if info.key.split("/")[-1].startswith(name))
    synced: list[Path] = []
    real = os.fsync

    def note(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        real(file)

    monkeypatch.setattr(os, "fsync", note)
    write(here, path)
    expected = [here.root / key, *(here.root / key).parents]
    assert synced == expected[: expected.index(here.root) + 1]


def test_only_the_system_of_the_record_archives(archive: WalArchive, tmp_path: Path) -> None:
    ours, copy = DataDirectory(tmp_path / "ours"), DataDirectory(tmp_path / "copy", OTHER)
    archive.push(ours.segment(3))
    before = list(archive.store.list(""))
    foreign = copy.put("000000010000000000000004", segment(4, system=OTHER))
    with pytest.raises(Refused, match=f"belongs to PostgreSQL system {SYSTEM}, not to {OTHER}") as caught:
        archive.push(foreign)
    assert "backup-pipeline wal setup main --adopt" in caught.value.hint
    assert list(archive.store.list("")) == before

    adopted = adopt(archive.store, "main", System(OTHER, SEGMENT_BYTES), at=AT)
    assert (adopted.system_identifier, adopted.earlier) == (OTHER, (SYSTEM,))
    archive.push(foreign)
    with pytest.raises(Refused, match=f"belongs to PostgreSQL system {OTHER}"):
        archive_in(archive.store).push(ours.segment(5))
    assert read_archive(archive.store, "main", system_identifier=SYSTEM).numbers(1) == (3,)
    assert read_archive(archive.store, "main").numbers(1) == (4,)


def test_each_system_has_its_own_histories(here: DirectoryStore, data: DataDirectory) -> None:
    """An agent outlives the change of its data directory's system, as by pg_upgrade."""
    archive = archive_in(here)
    data.put("00000002.history", HISTORY)
    for number, system in ((3, SYSTEM), (4, OTHER)):
        data.belong_to(system)
        adopt(here, "main", System(system, SEGMENT_BYTES), at=AT)
        name = f"{2:08X}{number:016X}"
        archive.push(data.put(name, segment(number, timeline=2, system=system)))
        assert read_archive(here, "main", system_identifier=system).histories.keys() == {2}


def test_the_record_is_written_once_and_read_back(store: Store) -> None:
    assert read_identity(store, "main") is None
    first = claim(store, "main", System(SYSTEM, SEGMENT_BYTES), at=AT)
    assert claim(store, "main", System(SYSTEM, SEGMENT_BYTES), at=datetime.now(UTC)) == first
    assert adopt(store, "main", System(SYSTEM, SEGMENT_BYTES), at=datetime.now(UTC)) == first
    with pytest.raises(Refused, match="takes segments of 1048576 bytes, not of 2097152"):
        claim(store, "main", System(SYSTEM, 2 * SEGMENT_BYTES), at=AT)


def test_a_push_begins_no_archive(here: DirectoryStore, data: DataDirectory) -> None:
    """Where the record is missing, the store is another one than it was, or lost it."""
    archive_in(here).push(data.segment(3))
    here.delete([wal_identity_key("main")])
    before = list(here.list(""))
    with pytest.raises(StoreError, match=f"there is no WAL archive of main in {here.url}") as caught:
        archive_in(here).push(data.segment(4))
    assert "backup-pipeline wal setup main --apply" in caught.value.hint
    assert list(here.list("")) == before


def test_a_disk_that_is_unmounted_is_no_archive(here: DirectoryStore, data: DataDirectory) -> None:
    """An agent has pushed to it before; the folder beneath is empty, and may be written to."""
    archive = archive_in(here)
    archive.push(data.segment(3))
    disk = unmount(here.root)
    with pytest.raises(StoreError, match="there is no WAL archive of main"):
        archive.push(data.segment(4))
    assert list(here.root.iterdir()) == []
    here.root.rmdir()
    disk.rename(here.root)
    archive.push(data.segment(4))
    assert read_archive(here, "main").numbers(1) == (3, 4)


class Unmounting(DirectoryStore):
    """Its disk is unmounted before something is written."""

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        """Write to the folder beneath."""
        unmount(self.root)
        super().put(key, chunks, size_hint_bytes=size_hint_bytes, storage_class=storage_class)


def test_what_was_written_beneath_a_disk_is_not_acknowledged(
    here: DirectoryStore, data: DataDirectory
) -> None:
    with pytest.raises(StoreError, match="there is no WAL archive of main"):
        archive_in(Unmounting(here.root)).push(data.segment(3))


def unmount(root: Path) -> Path:
    """Leave an empty folder where a disk was; where the disk's contents are then."""
    disk = root.with_name("disk")
    root.rename(disk)
    root.mkdir()
    return disk


def test_a_lost_record_is_made_anew_only_for_the_one_system_that_archived(
    here: DirectoryStore, data: DataDirectory
) -> None:
    """Whatever else lies there, and whichever of several comes first in the order of keys."""
    ours, other = System(SYSTEM, SEGMENT_BYTES), System(OTHER, SEGMENT_BYTES)
    archive_in(here).push(data.segment(3))
    here.put("clusters/main/wal-archive/.keep", [b""])
    here.delete([wal_identity_key("main")])
    with pytest.raises(Refused, match=f"has no record, and holds WAL of system {SYSTEM}") as caught:
        claim(here, "main", other, at=AT)
    assert "--adopt" in caught.value.hint
    assert claim(here, "main", ours, at=AT).system_identifier == SYSTEM

    data.belong_to(OTHER)
    adopt(here, "main", other, at=AT)
    archive_in(here).push(data.put("000000010000000000000004", segment(4, system=OTHER)))
    here.delete([wal_identity_key("main")])
    for system in (ours, other):
        with pytest.raises(Refused, match=f"holds WAL of systems {SYSTEM} and {OTHER}"):
            claim(here, "main", system, at=AT)
    assert adopt(here, "main", other, at=AT).system_identifier == OTHER


def test_a_damaged_record_stops_everything(here: DirectoryStore, data: DataDirectory, tmp_path: Path) -> None:
    archive_in(here).push(data.segment(3))
    path = here.root / wal_identity_key("main")
    path.write_bytes(path.read_bytes().replace(SYSTEM.encode(), OTHER.encode()))
    with pytest.raises(Corrupt, match="damaged, or was edited"):
        archive_in(here).push(data.segment(4))
    with pytest.raises(Corrupt):
        fetch(here, "main", "000000010000000000000003", tmp_path / "got")


def test_the_record_is_asked_for_again_when_it_is_old(
    rclone: S3Server, data: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(rclone.store("belief"))
    begin(store)
    archive = archive_in(store)
    archive.push(data.segment(3))
    adopt(store, "main", System(OTHER, SEGMENT_BYTES), at=AT)
    archive.push(data.segment(4))  # within the minute: under its own system's keys, so it does no harm
    monkeypatch.setattr(identity, "monotonic", lambda: 1e12)
    with pytest.raises(Refused, match=f"belongs to PostgreSQL system {OTHER}"):
        archive.push(data.segment(5))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("000000010000000000000003", segment(4), "begins at 0/400000"),
        ("000000010000000000000003", segment(3, timeline=2), "timeline 2"),
        ("000000010000000000000003", segment(3)[:-8192], "it has 1040384 bytes"),
        ("000000010000000000000003", segment(3, system=OTHER), "it is of cluster"),
        ("000000010000000000000003", b"", "too short"),
        ("000000010000000000000003", bytes(SEGMENT_BYTES), "does not begin like a WAL segment"),
        ("000000010000000000000003.partial", segment(4), "begins at 0/400000"),
        ("000000010000000000000003", segment(1, size_bytes=2 * MIB), "begins at"),
        ("00000002.history", b"nonsense", "cannot be read in line 1"),
        ("00000001.history", HISTORY, "names 1 as its origin"),
        ("000000010000000000000003.00000028.backup", b"", "should be a short text"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_not_archived(
    here: DirectoryStore, data: DataDirectory, name: str, content: bytes, said: str
) -> None:
    with pytest.raises((Corrupt, Refused), match=re.escape(said)):
        archive_in(here).push(data.put(name, content))
    assert keys(here) == []


@pytest.mark.parametrize(
    "name", ["000000010000000000000003.ready", "postgresql.conf", "00000001000000000000000g", "1.history"]
)
def test_a_file_with_another_name_is_not_archived(
    here: DirectoryStore, data: DataDirectory, name: str
) -> None:
    with pytest.raises(ConfigError, match="not a WAL file's name"):
        archive_in(here).push(data.put(name, segment(3)))


def test_only_regular_files_of_the_clusters_own_pg_wal_are_read(
    here: DirectoryStore, data: DataDirectory, tmp_path: Path
) -> None:
    elsewhere = DataDirectory(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="the data directory of cluster main"):
        archive_in(here, data).push(elsewhere.segment(3))
    archive_in(here, data).push(data.segment(3))
    name = "000000010000000000000004"
    makers: list[Callable[[Path], object]] = [
        lambda path: path.symlink_to(elsewhere.segment(4)),
        os.mkfifo,
        Path.mkdir,
        Path.exists,
    ]
    for make in makers:
        make(data.wal / name)
        with pytest.raises(ConfigError, match=name):
            archive_in(here).push(data.wal / name)
        path = data.wal / name
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert read_archive(here, "main").numbers(1) == (3,)


# Fetching


def object_of(store: DirectoryStore, number: int) -> Path:
    """The file of one archived segment."""
    (key,) = (key for key in keys(store) if f"{number:024X}"[8:] in key.split("/")[-1])
    return store.root / key


@pytest.fixture
def filled(here: DirectoryStore, data: DataDirectory) -> DirectoryStore:
    """An archive with segments 3, 4 and 5."""
    for number in (3, 4, 5):
        archive_in(here).push(data.segment(number))
    return here


def damages(path: Path) -> Iterator[bytes]:
    """Contents that an object may come to have."""
    whole = path.read_bytes()
    yield from (whole[:length] for length in (0, 1, 4, len(whole) // 2, len(whole) - 1))
    yield from (whole + b"\0", whole + whole)
    # A flip in the next byte, the size of the window, would leave the plain bytes as they are.
    for at in (0, 4, 20, len(whole) // 2, len(whole) - 5, len(whole) - 1):
        yield whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :]


def test_damage_is_found_and_nothing_put_in_place(filled: DirectoryStore, tmp_path: Path) -> None:
    target, name = tmp_path / "RECOVERYXLOG", "000000010000000000000004"
    target.write_bytes(b"as it was")
    path = object_of(filled, 4)
    whole = path.read_bytes()
    tried = 0
    for damaged in damages(path):
        path.write_bytes(damaged)
        with pytest.raises(Corrupt, match="is not what was archived") as caught:
            fetch(filled, "main", name, target)
        assert restore_exit_code(caught.value) == 200
        assert target.read_bytes() == b"as it was"
        path.write_bytes(whole)
        tried += 1
    assert tried == 13
    assert sorted(each.name for each in tmp_path.iterdir()) == ["RECOVERYXLOG", "data", "here"]
    fetch(filled, "main", name, target)
    assert target.read_bytes() == segment(4)


def test_swapped_objects_are_found(filled: DirectoryStore, tmp_path: Path) -> None:
    one, other = object_of(filled, 3), object_of(filled, 4)
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    for name in ("000000010000000000000003", "000000010000000000000004"):
        with pytest.raises(Corrupt, match="another digest"):
            fetch(filled, "main", name, tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_a_renamed_object_is_found_by_its_header(filled: DirectoryStore, tmp_path: Path) -> None:
    path = object_of(filled, 5)
    shutil.copy(path, path.with_name(path.name.replace("05-", "06-")))
    with pytest.raises(Corrupt, match="not the segment that its name says"):
        fetch(filled, "main", "000000010000000000000006", tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_two_objects_under_one_name_are_refused_with_both_named(
    filled: DirectoryStore, tmp_path: Path
) -> None:
    path = object_of(filled, 4)
    sha256 = parse_wal_key(str(path.relative_to(filled.root)))
    assert sha256 is not None
    second = path.with_name(path.name.replace(sha256.sha256, "0" * 64))
    shutil.copy(path, second)
    with pytest.raises(Refused, match="2 times, with different bytes") as caught:
        fetch(filled, "main", "000000010000000000000004", tmp_path / "got")
    assert path.name in str(caught.value)
    assert second.name in str(caught.value)
    assert restore_exit_code(caught.value) == 200
    listed = read_archive(filled, "main")
    assert (listed.conflicts, listed.numbers(1)) == (("000000010000000000000004",), (3, 5))


class Counting(DirectoryStore):
    """Tells what was asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def read(self, key: str) -> Iterator[bytes]:
        self.asked.append("read")
        return super().read(key)

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        self.asked.append("read a range")
        return super().read_range(key, offset=offset, length=length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self.asked.append("list")
        return super().list(prefix)


def test_an_object_that_a_listing_has_told_is_one_request(filled: DirectoryStore, tmp_path: Path) -> None:
    store, name, got = Counting(filled.root), "000000010000000000000004", tmp_path / "got"
    (key,) = (key for key in keys(filled) if name in key)
    fetched = fetch(store, "main", name, got, key=key)
    assert (store.asked, fetched.key, fetched.plain_bytes) == (["read"], key, SEGMENT_BYTES)
    assert got.read_bytes() == segment(4)


def test_an_object_that_a_listing_has_told_is_verified_and_its_absence_explained(
    filled: DirectoryStore, tmp_path: Path
) -> None:
    name, got = "000000010000000000000004", tmp_path / "got"
    (key,) = (key for key in keys(filled) if name in key)
    (other,) = (key for key in keys(filled) if name[:-1] + "5" in key)

    def failure(key: str) -> BackupError:
        with pytest.raises(BackupError) as caught:
            fetch(filled, "main", name, got, key=key, pause=lambda _: None)
        assert not got.exists()
        return caught.value

    whole = read_all(filled, key)
    filled.put(key, [read_all(filled, other)])
    assert isinstance(failure(key), Corrupt)
    filled.delete([key])
    assert "is missing in the archive" in str(failure(key))
    assert isinstance(failure(other), Refused)  # it is another's, and no help
    filled.delete([wal_identity_key("main")])
    assert isinstance(failure(key), StoreError)  # a disk that went away
    filled.put(key, [whole])
    assert fetch(filled, "main", name, got, key=key).key == key


def test_absent_is_only_what_is_known_not_to_exist(filled: DirectoryStore, tmp_path: Path) -> None:
    codes: dict[str, int] = {}

    def code_of(name: str, store: Store = filled) -> int:
        with pytest.raises(BackupError) as caught:
            fetch(store, "main", name, tmp_path / "got", pause=lambda _: None)
        codes[name] = restore_exit_code(caught.value)
        return codes[name]

    assert code_of("000000010000000000000006") == 1
    assert code_of("000000020000000000000004") == 1
    assert code_of("00000002.history") == 1
    assert code_of("000000010000000000000006.partial") == 1
    with pytest.raises(NotArchived):
        fetch(filled, "main", "000000010000000000000006", tmp_path / "got")
    object_of(filled, 4).unlink()
    assert code_of("000000010000000000000004") == 200  # a gap: 5 is there
    assert code_of("nonsense") == 200
    (tmp_path / "empty").mkdir()
    empty = DirectoryStore(tmp_path / "empty")  # a disk that is not mounted
    assert code_of("000000010000000000000003", empty) == 200
    (tmp_path / "empty").rmdir()
    assert code_of("000000010000000000000003", empty) == 200
    assert restore_exit_code(None) == 0
    assert {restore_exit_code(error) for error in (KeyError(), OSError(), BackupNotFound("x"))} == {200}


def test_a_segment_that_others_were_archived_ahead_of_is_waited_for(
    here: DirectoryStore, data: DataDirectory, tmp_path: Path
) -> None:
    """Of segment 4, which is slow; 5 and what follows were archived meanwhile."""
    archive, name = archive_in(here), "000000010000000000000004"
    for number in (3, *range(5, 5 + AHEAD)):
        archive.push(data.segment(number))
    waited: list[float] = []

    def pause(wait_s: float) -> None:
        waited.append(wait_s)
        if len(waited) == 3:
            archive.push(data.segment(4))

    with pytest.raises(Refused, match=f"{name} is missing .* has 000000010000000000000005") as caught:
        fetch(here, "main", name, tmp_path / "got", pause=lambda _: None)
    assert restore_exit_code(caught.value) == 200
    assert read_settled_archive(here, "main", pause=lambda _: None).gaps() == (WalGap(1, 4, 4),)
    fetch(here, "main", name, tmp_path / "got", pause=pause)
    assert (tmp_path / "got").read_bytes() == segment(4)
    object_of(here, 4).unlink()
    waited.clear()
    assert read_settled_archive(here, "main", pause=pause).gaps() == ()
    assert sum(waited) < 10
    object_of(here, 4).unlink()
    waited.clear()
    archive.push(data.segment(5 + AHEAD))  # so many are not archived ahead: it is lost
    with pytest.raises(Refused, match="is missing"):
        fetch(here, "main", name, tmp_path / "got", pause=pause)
    assert read_settled_archive(here, "main", pause=pause).gaps() == (WalGap(1, 4, 4),)
    assert waited == []


def test_a_target_that_cannot_be_written_is_no_absence(filled: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write") as caught:
        fetch(filled, "main", "000000010000000000000004", tmp_path / "no folder" / "got")
    assert restore_exit_code(caught.value) == 200


# Listing


def test_a_listing_tells_segments_gaps_and_timelines(archive: WalArchive, data: DataDirectory) -> None:
    for number in (3, 4, 6, 9):
        archive.push(data.segment(number))
    archive.push(data.segment(9, timeline=2))
    archive.push(data.put("00000002.history", HISTORY))
    archive.push(data.put("000000010000000000000009.partial", segment(9)))
    archive.push(data.put("000000010000000000000003.00000028.backup", LABEL))
    listed = read_archive(archive.store, "main")
    assert listed.timelines == (1, 2)
    assert (listed.numbers(1), listed.numbers(2), listed.numbers(3)) == ((3, 4, 6, 9), (9,), ())
    assert listed.gaps() == (WalGap(1, 5, 5), WalGap(1, 7, 8))
    assert (listed.segment_bytes, listed.system_identifier) == (SEGMENT_BYTES, SYSTEM)
    assert listed.histories[2].ancestors[0].timeline == 1
    assert [(each.segment.number, each.objects) for each in listed.partials] == [(9, 1)]
    assert [name.text for name in listed.labels] == ["000000010000000000000003.00000028.backup"]
    newest = listed.newest(1)
    assert newest is not None
    assert (newest.segment.number, newest.sha256) == (9, hashlib.sha256(segment(9)).hexdigest())
    assert abs((newest.archived_at - datetime.now(UTC)).total_seconds()) < 60
    assert listed.newest(3) is None
    assert 0 < listed.stored_bytes < 5 * SEGMENT_BYTES
    assert (listed.conflicts, listed.odd) == ((), ())


def test_an_earlier_systems_segments_are_counted_in_their_own_size(store: Store, tmp_path: Path) -> None:
    """256 of 16 MiB to a log, and 1024 of 4 MiB: one name is another number of each."""
    large, numbers = 4 * SEGMENT_BYTES, (1026, 1027)
    claim(store, "main", System(SYSTEM, large), at=AT)
    earlier, now = DataDirectory(tmp_path / "earlier"), DataDirectory(tmp_path / "now", OTHER)
    keys = [
        archive_in(store)
        .push(earlier.put(WalSegment(1, number).name(large), segment(number, size_bytes=large)))
        .key
        for number in numbers
    ]
    adopt(store, "main", System(OTHER, SEGMENT_BYTES), at=AT)
    archive_in(store).push(now.put("000000010000000100000002", segment(4098, system=OTHER)))
    found = read_archive(store, "main", system_identifier=SYSTEM)
    assert (found.segment_bytes, found.numbers(1)) == (large, numbers)
    listed = read_archive(store, "main")
    assert (listed.segment_bytes, listed.numbers(1)) == (SEGMENT_BYTES, (4098,))

    store.put(keys[0], [b"damaged"])  # the others tell
    assert read_archive(store, "main", system_identifier=SYSTEM).numbers(1) == numbers
    store.put(keys[1], [b"damaged"])
    with pytest.raises(Corrupt, match=f"how large the segments of system {SYSTEM} are"):
        read_archive(store, "main", system_identifier=SYSTEM)


def test_a_listing_passes_over_what_is_not_ours(filled: DirectoryStore) -> None:
    place = f"clusters/main/wal-archive/{SYSTEM}/"
    filled.put(f"{place}notes.txt", [b"x"])
    filled.put(f"{place}00000003.history", [b"garbage"])
    listed = read_archive(filled, "main")
    assert [key.rpartition("/")[2] for key, _ in listed.odd] == ["00000003.history", "notes.txt"]
    assert (listed.numbers(1), listed.histories) == ((3, 4, 5), {})


def test_there_is_no_listing_without_an_archive(here: DirectoryStore) -> None:
    here.delete([wal_identity_key("main")])
    with pytest.raises(BackupNotFound, match="no WAL archive of main"):
        read_archive(here, "main")
