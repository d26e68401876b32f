"""Where a receiver begins to read a server's WAL, and how far what it read is in the archive. Pure.

Asked by wal/receive.py. What a slot says comes from engines/postgres/slots.py.
"""

from dataclasses import dataclass, replace

from backup_pipeline.domain.wal import Lsn, TimelineHistory, WalGap, WalSegment
from backup_pipeline.domain.wal_archive import ArchiveListing
from backup_pipeline.errors import Refused


@dataclass(frozen=True)
class Beginning:
    """The first byte that is asked for: of a segment. `gap` says what is missing before it, and accepted."""

    timeline: int
    start: Lsn
    gap: str = ""


def archived_until(listing: ArchiveListing, history: TimelineHistory) -> WalSegment | None:
    """The first segment on the way to a timeline of which the archive has nothing, or only a part.

    None where it has nothing at all of that way.
    """
    size = listing.segment_bytes
    whole = [number + 1 for number in _whole(listing, history)]
    parts = [each.segment.number for each in listing.partials if _on_the_way(each.segment, history, size)]
    if not whole and not parts:
        return None
    number = max((*whole, *parts))
    return WalSegment(history.timeline_at(Lsn(number * size)), number)


def lowest_hole(listing: ArchiveListing, history: TimelineHistory, *, within: int) -> WalGap | None:
    """What is missing before a segment that is there, at most `within` below the newest.

    So many were under way at once when a receiver was killed, and came in in any order.
    """
    size, whole = listing.segment_bytes, _whole(listing, history)
    oldest, newest = min(whole, default=0), max(whole, default=0)
    first = next((each for each in range(max(oldest, newest - within), newest) if each not in whole), None)
    if first is None:
        return None
    last = min(number for number in whole if number > first) - 1
    return WalGap(history.timeline_at(Lsn(first * size)), first, last)


def _whole(listing: ArchiveListing, history: TimelineHistory) -> set[int]:
    segments = (each.segment for found in listing.segments.values() for each in found)
    return {each.number for each in segments if _on_the_way(each, history, listing.segment_bytes)}


def _on_the_way(segment: WalSegment, history: TimelineHistory, segment_bytes: int) -> bool:
    # A segment in which a timeline was left belongs to the later one, which begins with a copy of it.
    return history.timeline_at(Lsn(segment.end(segment_bytes).value - 1)) == segment.timeline


def beginnings(
    slot: WalSegment, archived: WalSegment | None, *, segment_bytes: int, hole: WalGap | None = None
) -> tuple[Beginning, ...]:
    """Where to begin, and where else when the server no longer has that: behind a gap.

    `slot` is the segment that the slot was confirmed up to: all before it is in the archive, unless the slot
    is a new one; then `hole` is what `lowest_hole` says. `archived` is what `archived_until` says.
    """
    by_slot = Beginning(slot.timeline, slot.start(segment_bytes))
    gaps = [hole] if hole is not None and hole.first < slot.number else []
    if archived is not None and archived.number < slot.number:
        gaps.append(WalGap(archived.timeline, archived.number, slot.number - 1))
    if not gaps:
        return (by_slot,)
    first = WalSegment(gaps[0].timeline, gaps[0].first)
    gap = " and ".join(each.names(segment_bytes) for each in gaps)
    return Beginning(first.timeline, first.start(segment_bytes)), replace(by_slot, gap=gap)


def gap_error(cluster: str, slot: str, what: str) -> Refused:
    """The refusal to go on where the server no longer has what the archive needs next."""
    return Refused(
        f"the WAL archive of {cluster} has a gap: {what}",
        detail={"slot": slot},
        hint="No moment in the gap can be recovered, nor any behind it, before a new base backup is taken. "
        f"If the segments can be found nowhere else: backup-pipeline wal receive {cluster} --accept-gap "
        f"begins behind it; at once after it: backup-pipeline base-backup {cluster}",
    )
