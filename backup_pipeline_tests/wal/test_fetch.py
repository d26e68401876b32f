"""restore_command's contract: no damage is put in place, and absent is only what is known to be."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline.domain.layout import parse_wal_key, wal_identity_key
from backup_pipeline.domain.wal import WalGap
from backup_pipeline.errors import (
    BackupError,
    BackupNotFound,
    ConfigError,
    Corrupt,
    NotArchived,
    Refused,
    StoreError,
)
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import ObjectInfo, Store, read_all
from backup_pipeline.wal.ahead import AHEAD
from backup_pipeline.wal.fetch import fetch, restore_exit_code
from backup_pipeline.wal.listing import read_archive, read_settled_archive
from backup_pipeline_tests.wal.archives import archive_in, keys, object_of
from backup_pipeline_tests.wal.segments import SEGMENT_BYTES, DataDirectory, segment


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
