"""Parts of a segment that was not finished: which one is taken, where a recovery ends, what is refused."""

import hashlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.layout import wal_key
from backup_pipeline.domain.recovery_route import Ending, find_route, judge
from backup_pipeline.domain.recovery_target import parse_target
from backup_pipeline.domain.replayable_wal import Archive, BasePoint, reaching
from backup_pipeline.domain.wal import Lsn, WalSegment, parse_wal_name
from backup_pipeline.domain.wal_archive import ArchiveIdentity, ListedWal, list_archive
from backup_pipeline.errors import Corrupt, NotArchived, Refused, StoreError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import ObjectInfo
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.listing import read_archive
from backup_pipeline.wal.partials import content_of, digest_of, push_partial
from backup_pipeline_tests.wal.box import begin
from backup_pipeline_tests.wal.segments import MIB, OTHER, SYSTEM, DataDirectory, segment

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def part(archive: WalArchive, data: DataDirectory, content: bytes, length: int) -> str:
    path = data.put("spool", content)
    with path.open("rb") as file:
        return push_partial(archive, parse_wal_name(NAME), file, SYSTEM, length=length)


NAME = "000000010000000000000004"


@pytest.fixture
def archive(tmp_path: Path) -> WalArchive:
    (tmp_path / "store").mkdir()
    store = DirectoryStore(tmp_path / "store")
    begin(store)
    return WalArchive(store, "main")


def test_of_several_parts_the_longest_is_taken_and_no_part_beside_the_whole(
    archive: WalArchive, data: DataDirectory, tmp_path: Path
) -> None:
    whole, target = segment(4), tmp_path / "fetched"
    lengths = (50_000, 100_000, 70_000)  # the one in the middle goes furthest
    for length in lengths:
        part(archive, data, whole, length)
    found = fetch(archive.store, "main", NAME, target)
    assert (found.partial, found.content_bytes) == (True, len(whole[:100_000].rstrip(b"\0")))
    assert target.read_bytes() == whole[:100_000].ljust(MIB, b"\0")
    (listed,) = read_archive(archive.store, "main").partials
    assert (listed.segment, listed.objects) == (WalSegment(1, 4), 3)
    assert read_archive(archive.store, "main").conflicts == ()
    archive.push(data.segment(4))
    assert not fetch(archive.store, "main", NAME, target).partial
    assert target.read_bytes() == whole


def test_a_part_before_other_segments_is_a_gap(
    archive: WalArchive, data: DataDirectory, tmp_path: Path
) -> None:
    part(archive, data, segment(4), 50_000)
    archive.push(data.segment(5))
    with pytest.raises(Refused, match="is missing"):
        fetch(archive.store, "main", NAME, tmp_path / "fetched", pause=lambda _: None)
    with pytest.raises(NotArchived):
        fetch(archive.store, "main", "000000010000000000000006", tmp_path / "fetched")


def test_parts_of_two_histories_are_refused(archive: WalArchive, data: DataDirectory, tmp_path: Path) -> None:
    part(archive, data, segment(4), 50_000)
    part(archive, data, segment(4, seed=1), 60_000)
    with pytest.raises(Refused, match="neither is the beginning of the other"):
        fetch(archive.store, "main", NAME, tmp_path / "fetched")


def test_a_route_ends_in_the_part_of_its_last_segment() -> None:
    base = BasePoint(BackupId("main", "20260301T000000Z-aaaaaa"), 1, Lsn(3 * MIB), Lsn(4 * MIB), AT)
    there = {1: {3: AT, 4: AT}}
    parts = {WalSegment(1, 5): AT + timedelta(minutes=1)}
    archive = Archive(MIB, there, partials=parts)
    route = find_route([base], archive, parse_target("latest"))
    assert (route.partial, route.end, route.end_at) == (
        WalSegment(1, 5),
        Lsn(5 * MIB),
        parts[route.segments[-1]],
    )
    route = reaching(route, 500, archive)
    assert route.end == Lsn(5 * MIB + 500)
    judged = judge(route, parse_target("latest"), Ending(AT), archive)
    assert judged.needed == tuple(WalSegment(1, number) for number in (3, 4, 5))
    judge(route, parse_target(str(Lsn(5 * MIB + 499))), Ending(AT), archive)
    with pytest.raises(Refused, match="past the end"):
        judge(route, parse_target(str(Lsn(5 * MIB + 500))), Ending(AT), archive)
    # Not where more lies beyond: that is a gap.
    gap = find_route([base], Archive(MIB, {1: {3: AT, 4: AT, 6: AT}}, partials=parts), parse_target("latest"))
    assert gap.partial is None
    assert gap.missing is not None


def test_no_part_of_another_cluster_is_archived(archive: WalArchive, data: DataDirectory) -> None:
    with pytest.raises(Corrupt, match="it is of cluster"):
        part(archive, data, segment(4, system=OTHER), 50_000)
    with pytest.raises(Corrupt, match="begins at"):
        part(archive, data, segment(5), 50_000)
    assert read_archive(archive.store, "main").partials == ()


class Losing(DirectoryStore):
    """Says yes, and has lost the end of what was written; or its disk was unmounted before."""

    def __init__(self, root: Path, *, unmounted: bool) -> None:
        super().__init__(root)
        self.unmounted = unmounted

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        if self.unmounted:
            self.root.rename(self.root.with_name("disk"))
            self.root.mkdir()
        kept = chunks if self.unmounted else [b"".join(chunks)[:-1]]
        super().put(key, kept, size_hint_bytes=size_hint_bytes, storage_class=storage_class)


@pytest.mark.parametrize(
    ("unmounted", "said"), [(False, "another size than what was written"), (True, "there is no WAL archive")]
)
def test_a_part_that_the_store_lost_is_not_acknowledged(
    tmp_path: Path, archive: WalArchive, data: DataDirectory, unmounted: bool, said: str
) -> None:
    losing = WalArchive(Losing(tmp_path / "store", unmounted=unmounted), archive.cluster)
    with pytest.raises(StoreError, match=said):
        part(losing, data, segment(4), 50_000)


class Finishing(DirectoryStore):
    """A receiver ships the whole segment right before parts of it are listed."""

    whole: Path | None = None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if ".partial" in prefix and self.whole is not None:
            path, self.whole = self.whole, None
            WalArchive(self, "main").push(path)
        return super().list(prefix)


def test_a_segment_that_is_finished_while_its_parts_are_looked_for_is_not_absent(
    tmp_path: Path, archive: WalArchive, data: DataDirectory
) -> None:
    store = Finishing(tmp_path / "store")
    store.whole = data.segment(4)
    assert not fetch(store, archive.cluster, NAME, tmp_path / "fetched").partial
    assert (tmp_path / "fetched").read_bytes() == segment(4)


@pytest.mark.parametrize("written", [0, 1, MIB, 3 * MIB + 10, 5 * MIB])
def test_a_part_of_many_chunks_is_measured_to_its_last_byte(tmp_path: Path, written: int) -> None:
    path, content = tmp_path / "part", b"".join(bytes([1 + number]) * MIB for number in range(5))[:written]
    path.write_bytes(content.ljust(5 * MIB, b"\0"))
    assert content_of(path) == written
    with path.open("rb") as file:
        assert digest_of(file, written) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("minutes", [(0, 1), (1, 0)])
def test_of_several_objects_the_newest_says_when_it_was_archived(minutes: tuple[int, int]) -> None:
    name = parse_wal_name(f"{NAME}.partial")
    listed = [
        ListedWal(wal_key("main", SYSTEM, name, digest * 64), 10 + minute, AT + timedelta(minutes=minute))
        for digest, minute in zip("ab", minutes, strict=True)
    ]
    identity = ArchiveIdentity("main", SYSTEM, MIB, AT)
    (found,) = list_archive(identity, SYSTEM, listed, {}, segment_bytes=MIB).partials
    assert (found.archived_at, found.stored_bytes, found.objects) == (AT + timedelta(minutes=1), 11, 2)
