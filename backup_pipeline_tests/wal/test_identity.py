"""The record of the system that an archive belongs to: who archives, and what an archive is."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backup_pipeline.domain.layout import wal_identity_key
from backup_pipeline.errors import (
    Corrupt,
    Refused,
    StoreError,
)
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store, open_store
from backup_pipeline.wal import identity
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.identity import System, adopt, claim, read_identity
from backup_pipeline.wal.listing import read_archive
from backup_pipeline_tests.servers.s3 import S3Server
from backup_pipeline_tests.wal.archives import AT, HISTORY, archive_in
from backup_pipeline_tests.wal.box import begin
from backup_pipeline_tests.wal.segments import OTHER, SEGMENT_BYTES, SYSTEM, DataDirectory, segment


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
