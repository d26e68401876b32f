"""Where a receiver begins to read a server's WAL, and how far what it read is in the archive. Pure.

Asked by wal/receive.py. What a slot says comes from engines/postgres/slots.py.
"""

from dataclasses import dataclass, replace

from backup_pipeline.domain.wal import Lsn, TimelineHistory, WalSegment
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

    def on_the_way(segment: WalSegment) -> bool:
        # A segment in which a timeline was left belongs to the later one, which begins with a copy of it.
        return history.timeline_at(Lsn(segment.end(size).value - 1)) == segment.timeline

    whole = [
        each.segment.number + 1
        for found in listing.segments.values()
        for each in found
        if on_the_way(each.segment)
    ]
    parts = [each.segment.number for each in listing.partials if on_the_way(each.segment)]
    if not whole and not parts:
        return None
    number = max((*whole, *parts))
    return WalSegment(history.timeline_at(Lsn(number * size)), number)


def beginnings(slot: WalSegment, archived: WalSegment | None, *, segment_bytes: int) -> tuple[Beginning, ...]:
    """Where to begin, and where else when the server no longer has that: behind a gap.

    `slot` is the segment that the slot was confirmed up to: all before it is in the archive, unless the slot
    is a new one. `archived` is what `archived_until` says.
    """
    by_slot = Beginning(slot.timeline, slot.start(segment_bytes))
    if archived is None or archived.number >= slot.number:
        return (by_slot,)
    first, last = archived.name(segment_bytes), WalSegment(archived.timeline, slot.number - 1)
    gap = first if archived.number == last.number else f"{first} to {last.name(segment_bytes)}"
    return Beginning(archived.timeline, archived.start(segment_bytes)), replace(by_slot, gap=gap)


def gap_error(cluster: str, slot: str, what: str) -> Refused:
    """The refusal to go on where the server no longer has what the archive needs next."""
    return Refused(
        f"the WAL archive of {cluster} has a gap: {what}",
        detail={"slot": slot},
        hint="No moment in the gap can be recovered, nor any behind it, before a new base backup is taken. "
        f"If the segments can be found nowhere else: backup-pipeline wal receive {cluster} --accept-gap "
        f"begins behind it; at once after it: backup-pipeline base-backup {cluster}",
    )
