"""Which WAL can be replayed on a base backup, as far as there is no gap. Pure.

Asked by recoveries, drills, recovery windows and retention. Which base backup a target is reached by, and
whether it is, is domain/recovery_route.py's.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.wal import (
    Lsn,
    TimelineHistory,
    WalGap,
    WalKind,
    WalSegment,
    parse_wal_name,
)
from backup_pipeline.domain.wal_archive import ArchiveListing
from backup_pipeline.errors import ConfigError


@dataclass(frozen=True)
class BasePoint:
    """A base backup as a beginning: a replay is consistent from `end` on, passed at `stopped_at`."""

    id: BackupId
    timeline: int
    start: Lsn
    end: Lsn
    stopped_at: datetime
    size_bytes: int = 0
    broken: str = ""  # why nothing can begin with it, as an incremental one whose parent is gone
    failed: str = ""  # what a drill found wrong: another that leads as far is begun with instead


@dataclass(frozen=True)
class Archive:
    """The WAL of one system: per timeline, which segments are there and since when.

    `doubled` are segments of which two objects with other bytes lie there: nobody knows which is right.
    `partials` were being written when they were archived.
    """

    segment_bytes: int
    segments: Mapping[int, Mapping[int, datetime]]
    histories: Mapping[int, TimelineHistory] = field(default_factory=dict)
    doubled: frozenset[WalSegment] = frozenset()
    partials: Mapping[WalSegment, datetime] = field(default_factory=dict)

    def history(self, timeline: int) -> TimelineHistory | None:
        """Where the timeline came from; None where its history is missing."""
        return TimelineHistory(1) if timeline == 1 else self.histories.get(timeline)

    @property
    def newest_timeline(self) -> int:
        """The timeline that a recovery follows unless another is named; 0 when there is none."""
        return max((*self.segments, *self.histories, *(each.timeline for each in self.partials)), default=0)

    def holds(self, segment: WalSegment) -> bool:
        """Whether the segment is there, once."""
        return segment.number in self.segments.get(segment.timeline, {}) and segment not in self.doubled

    def archived_at(self, segment: WalSegment) -> datetime:
        """When a segment that is there, whole or as far as it was written, was archived."""
        found = self.segments.get(segment.timeline, {}).get(segment.number)
        return found if found is not None else self.partials[segment]


def archive_of(listing: ArchiveListing) -> Archive:
    """The WAL of a listing as routes are found in it."""
    return Archive(
        listing.segment_bytes,
        {
            timeline: {each.segment.number: each.archived_at for each in found}
            for timeline, found in listing.segments.items()
        },
        listing.histories,
        frozenset(_segments_of(listing.conflicts, listing.segment_bytes)),
        {each.segment: each.archived_at for each in listing.partials},
    )


def _segments_of(names: Iterable[str], segment_bytes: int) -> Iterable[WalSegment]:
    for text in names:
        name = parse_wal_name(text)
        if name.kind is WalKind.SEGMENT:
            with contextlib.suppress(ConfigError):
                yield WalSegment(name.timeline, name.number(segment_bytes))


@dataclass(frozen=True)
class Route:
    """A base backup, and the WAL that can be replayed on it without a gap.

    `end` is as far as it goes; `end_at` is when the last segment was archived, before which all its commits
    were made. `missing` is what stops it there while more WAL lies beyond; None at the end of the archive.
    `partial` is the last of `segments` where that one was still being written; how far it goes is known once
    it was looked into (`reaching`), and until then `end` is where it begins.
    """

    base: BasePoint
    timeline: int
    segments: tuple[WalSegment, ...]
    end: Lsn
    end_at: datetime | None
    missing: WalGap | None = None
    unusable: tuple[WalSegment, str] | None = None  # the segment that ends it, and what is wrong with it
    partial: WalSegment | None = None

    @property
    def complete(self) -> bool:
        """Whether it reaches the base backup's own end: below that, nothing is consistent."""
        return self.end >= self.base.end


def routes(bases: Iterable[BasePoint], archive: Archive, timeline: int) -> tuple[Route, ...]:
    """The routes to `timeline`, by the base backups that lie on its way, newest first."""
    history = archive.history(timeline)
    if history is None:
        return ()
    found = [base for base in bases if not base.broken and history.comes_by(base.timeline, base.end)]
    return tuple(
        _follow(base, history, archive) for base in sorted(found, key=lambda base: base.end, reverse=True)
    )


def _follow(base: BasePoint, history: TimelineHistory, archive: Archive) -> Route:
    size, number = archive.segment_bytes, base.start.value // archive.segment_bytes
    last = max(
        (
            *(number for there in archive.segments.values() for number in there),
            *(each.number for each in archive.partials),
        ),
        default=0,
    )
    found: list[WalSegment] = []
    end, end_at = base.start, None
    while number <= last + 1:
        start = Lsn(max(base.start.value, number * size))
        wanted = next(iter(history.segments(start, Lsn((number + 1) * size), size)))
        if archive.holds(wanted):
            found.append(wanted)
            end, end_at = wanted.end(size), archive.segments[wanted.timeline][number]
            number += 1
            continue
        # The ancestor's own segment of that number, if there is one, goes on into a branch that was left.
        bad = (wanted, "two versions are archived") if wanted in archive.doubled else None
        missing = _missing(wanted, history, archive)
        if wanted in archive.partials and missing is None and bad is None:
            found.append(wanted)
            end, end_at = max(end, wanted.start(size)), archive.partials[wanted]
            return Route(base, history.timeline, tuple(found), end, end_at, partial=wanted)
        return Route(base, history.timeline, tuple(found), end, end_at, missing, bad)
    return Route(base, history.timeline, tuple(found), end, end_at)


def _missing(wanted: WalSegment, history: TimelineHistory, archive: Archive) -> WalGap | None:
    """The gap that begins with `wanted`; None when nothing is known to lie beyond it on this route."""
    size = archive.segment_bytes
    there = [WalSegment(timeline, number) for timeline, found in archive.segments.items() for number in found]
    on_route = [
        each.number
        for each in (*there, *archive.partials, *archive.doubled)
        if each.timeline == history.timeline_at(Lsn(each.end(size).value - 1))
    ]
    # Where a timeline of the route was left, it had come that far.
    descendants = (switch for each in archive.histories.values() for switch in each.ancestors)
    left = (*history.ancestors, *(each for each in descendants if each.timeline == history.timeline))
    known = (*on_route, *(WalSegment.before(each.timeline, each.end, size).number for each in left))
    beyond = [number for number in known if number > wanted.number]
    return WalGap(wanted.timeline, wanted.number, min(beyond) - 1) if beyond else None


def without(route: Route, segment: WalSegment, why: str, archive: Archive) -> Route:
    """The same up to a segment that turned out to be of no use."""
    kept = tuple(each for each in route.segments if each.number < segment.number)
    end_at = archive.archived_at(kept[-1]) if kept else None
    end = segment.start(archive.segment_bytes)
    return replace(
        route, segments=kept, end=end, end_at=end_at, missing=None, unusable=(segment, why), partial=None
    )


def reaching(route: Route, content_bytes: int, archive: Archive) -> Route:
    """The same, once it is known how much of its last segment, a partial, is written."""
    if route.partial is None:
        return route
    start = route.partial.start(archive.segment_bytes)
    return replace(route, end=max(route.end, Lsn(start.value + content_bytes)))
