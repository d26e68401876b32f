"""By which base backup and which WAL a target is reached, or why it is not. Pure.

`find_route` picks the base backup and follows the log; `judge` says whether the target is reached, or why
not, with the nearest that is. What is in the store is read by storage/ and wal/; what the last segment
holds, by the action that asks.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovery_target import RecoveryTarget, TargetKind, show_moment
from backup_pipeline.domain.wal import (
    Lsn,
    TimelineHistory,
    WalGap,
    WalKind,
    WalSegment,
    parse_wal_name,
)
from backup_pipeline.domain.wal_archive import ArchiveListing
from backup_pipeline.errors import ConfigError, Refused


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


@dataclass(frozen=True)
class Ending:
    """What is known of the end of a route: the last commit in it, and until when nothing came after it.

    `covered_until` is a moment at which the server had written no commit that is not in the route.
    """

    last_commit_at: datetime | None = None
    covered_until: datetime | None = None

    @property
    def newest(self) -> datetime | None:
        """The newest moment that can be recovered for certain."""
        return max(filter(None, (self.last_commit_at, self.covered_until)), default=None)


@dataclass(frozen=True)
class Judgement:
    """A route that reaches its target. `to_the_end` says that nothing was committed between the last commit
    and the target: all is replayed, and PostgreSQL is given no target, which it would not meet.
    """

    route: Route
    target: RecoveryTarget
    to_the_end: bool
    needed: tuple[WalSegment, ...]  # as far as is known before the replay
    notes: tuple[str, ...] = ()


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


def find_route(
    bases: Sequence[BasePoint],
    archive: Archive,
    target: RecoveryTarget,
    *,
    timeline: int = 0,
    base: BackupId | None = None,
) -> Route:
    """The route to a target: from the newest base backup that was finished before it, or from `base`.

    One whose drill failed is passed over where an older one leads as far. Raises Refused, saying what was
    found and the nearest target that can be reached.
    """
    wanted = timeline or archive.newest_timeline
    if not bases:
        raise Refused("there is no base backup to begin with", hint="Take one; WAL alone restores nothing.")
    if wanted and archive.history(wanted) is None:
        raise Refused(
            f"the history of timeline {wanted} is not in the archive",
            detail={"timelines": ", ".join(map(str, sorted({*archive.segments, *archive.histories})))},
            hint="Name another timeline, or archive its .history file.",
        )
    known = [route for route in routes(bases, archive, wanted) if route.complete]
    if base is not None:
        _refuse_broken(bases, base, known, target)
        known = [route for route in known if route.base.id == base]
    if not known:
        raise Refused(
            f"no base backup {f'{base} ' if base else ''}leads to timeline {wanted}"
            if wanted
            else "no WAL is archived",
            detail={
                "base backups": ", ".join(f"{b.id} ({b.broken or f'timeline {b.timeline}'})" for b in bases)
            },
            hint="A base backup counts once all WAL up to its end is archived; look at `wal status`.",
        )
    before = [route for route in known if begins_before(route.base, target)]
    if not before:
        first = known[-1].base
        raise Refused(
            f"{target} lies before the first moment that can be recovered",
            detail={"first": f"{show_moment(first.stopped_at)}, LSN {first.end}, with {first.id}"},
            hint="Choose a later target; what is older is in dumps only.",
        )
    return _preferred(before)


def _preferred(before: Sequence[Route]) -> Route:
    """The newest whose drill did not fail, as long as it leads as far as the newest of all does."""
    as_far = [route for route in before if route.end >= before[0].end]
    return next((route for route in as_far if not route.base.failed), before[0])


def _refuse_broken(
    bases: Sequence[BasePoint], wanted: BackupId, known: Sequence[Route], target: RecoveryTarget
) -> None:
    """Raise Refused when nothing can begin with the base backup that was asked for, naming what can be."""
    broken = next((base.broken for base in bases if base.id == wanted), "")
    if broken:
        before = [route for route in known if begins_before(route.base, target)]
        instead = _preferred(before).base.id if before else None
        raise Refused(
            f"{wanted} cannot be begun with: {broken}",
            detail={"begins before the target": str(instead) if instead else "no other base backup"},
            hint=f"Begin with --base {instead}." if instead else "Look for a copy of what is missing.",
        )


def begins_before(base: BasePoint, target: RecoveryTarget) -> bool:
    """Whether a recovery to the target can begin with the base backup, as far as time and place go."""
    if target.at is not None:
        return base.stopped_at <= target.at
    if target.lsn is not None:
        return base.end <= target.lsn
    return True


def judge(route: Route, target: RecoveryTarget, ending: Ending, archive: Archive) -> Judgement:
    """Whether the route reaches the target. Raises Refused, naming the gap or the newest moment.

    Whether a name or a transaction is in the WAL only the replay tells.
    """
    match target.kind:
        case TargetKind.LSN if target.lsn is not None:
            if target.lsn >= route.end:
                raise _beyond(route, target, ending, archive)
            return Judgement(
                route, target, False, _up_to(route, target.lsn.value // archive.segment_bytes + 1)
            )
        case TargetKind.TIME if target.at is not None:
            return _judge_time(route, target, target.at, ending, archive)
        case TargetKind.LATEST:
            if route.missing is not None or route.unusable is not None:
                raise _beyond(route, target, ending, archive)
            return Judgement(route, target, True, route.segments)
        case _:
            notes = (f"beyond {route.end} WAL is missing: {_gap(route, archive)}",) if route.missing else ()
            return Judgement(route, target, False, route.segments, notes)


def _judge_time(
    route: Route, target: RecoveryTarget, at: datetime, ending: Ending, archive: Archive
) -> Judgement:
    last = ending.last_commit_at
    # PostgreSQL stops at the first commit beyond an inclusive target: there has to be one.
    if last is not None and (at < last or (at == last and not target.inclusive)):
        number = next(
            (each.number for each in route.segments if archive.archived_at(each) > at),
            None,
        )
        needed = route.segments if number is None else _up_to(route, number + 1)
        return Judgement(route, target, False, needed)
    if (
        ending.newest is None
        or at > ending.newest
        or ((route.missing or route.unusable) is not None and at != last)
    ):
        raise _beyond(route, target, ending, archive)
    note = (
        f"nothing was committed between {show_moment(last)} and the target: all that is archived is replayed"
    )
    return Judgement(route, target, True, route.segments, () if at == last else (note,))


def _up_to(route: Route, number: int) -> tuple[WalSegment, ...]:
    return tuple(segment for segment in route.segments if segment.number <= number)


def _beyond(route: Route, target: RecoveryTarget, ending: Ending, archive: Archive) -> Refused:
    """The refusal of a target that the route does not reach."""
    detail = {"newest": f"{show_moment(ending.newest)}, LSN {route.end}, with {route.base.id}"}
    if route.unusable is not None:
        segment, why = route.unusable
        name = segment.name(archive.segment_bytes)
        return Refused(
            f"{target} lies beyond segment {name}, which cannot be used: {why}",
            detail=detail,
            hint="Choose a target before it, or look for the right object: of two versions the one of "
            "another history goes, of a damaged one there may be an older version or a copy.",
        )
    if route.missing is not None:
        return Refused(
            f"{target} lies beyond a gap in the WAL: {_gap(route, archive)}",
            detail=detail,
            hint="Choose a target before the gap, or one that a later base backup leads to.",
        )
    return Refused(
        f"{target} lies past the end of what is archived",
        detail=detail,
        hint="Choose an earlier one, or wait until more is archived; `latest` takes all that there is.",
    )


def _gap(route: Route, archive: Archive) -> str:
    return f"{route.missing.names(archive.segment_bytes)} missing" if route.missing else ""
