"""What a listing of the archive tells."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backup_pipeline.domain.layout import wal_identity_key
from backup_pipeline.domain.wal import WalGap, WalSegment
from backup_pipeline.errors import BackupNotFound, Corrupt
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.identity import System, adopt, claim
from backup_pipeline.wal.listing import read_archive
from backup_pipeline_tests.wal.archives import AT, HISTORY, LABEL, archive_in
from backup_pipeline_tests.wal.segments import OTHER, SEGMENT_BYTES, SYSTEM, DataDirectory, segment


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
