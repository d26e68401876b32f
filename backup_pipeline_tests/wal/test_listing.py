"""What a listing of the archive tells."""

import hashlib
from datetime import UTC, datetime

import pytest

from backup_pipeline.domain.layout import wal_identity_key
from backup_pipeline.domain.wal import WalGap
from backup_pipeline.errors import (
    BackupNotFound,
)
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.listing import read_archive
from backup_pipeline_tests.wal.archives import HISTORY, LABEL
from backup_pipeline_tests.wal.segments import SEGMENT_BYTES, SYSTEM, DataDirectory, segment


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
