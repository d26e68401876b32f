"""By which base backup and which WAL a target is reached, or why it is not. Pure.

`find_route` picks the base backup; `judge` says whether the target is reached, or why not, with the nearest
that is. How far a base backup leads is said by domain/replayable_wal.py; what is in the store is read by
storage/ and wal/; what the last segment holds, by the action that asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovery_target import RecoveryTarget, TargetKind, show_moment
from backup_pipeline.domain.replayable_wal import (
    Archive,
    BasePoint,
    Route,
    routes,
)
from backup_pipeline.domain.wal import WalSegment
from backup_pipeline.errors import Refused


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
