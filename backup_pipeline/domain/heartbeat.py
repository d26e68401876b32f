"""Heartbeats: rows that a cluster gets once a minute, by which a recovered copy of it tells how far it came.

Held against the source's own rows where it can be asked, else against the minute. Pure; rows are read by
engines/postgres/heartbeat.py, the verdict is the drill's.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.units import show_seconds

INTERVAL = timedelta(minutes=1)
"""Between two heartbeats."""

GRACE = timedelta(seconds=10)
"""The most that lies between a row's own time and the commit of it: the statement's timeout, and some."""


@dataclass(frozen=True)
class Heartbeat:
    """One row: its number, and the server's clock when it was written."""

    number: int
    at: datetime


@dataclass(frozen=True)
class SourceBeats:
    """What the source has on both sides of a target, None for none.

    `before` was written GRACE before it or earlier, `after` after it. `stepped_back` is a row whose time is
    earlier than that of the row written before it, near the target: the clock was set back there.
    """

    before: Heartbeat | None
    after: Heartbeat | None
    stepped_back: Heartbeat | None = None


@dataclass(frozen=True)
class CopyBeats:
    """What a recovered copy has: its newest row by time, and which of the source's two rows are in it."""

    newest: Heartbeat | None
    has_before: bool = False
    has_after: bool = False


@dataclass(frozen=True)
class HeartbeatFinding:
    """What the rows say, as sentences. `bracketed`: commits up to the target are in, later ones are not."""

    bracketed: bool
    checked: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def judge_beats(target_at: datetime, copy: CopyBeats, source: SourceBeats | None) -> HeartbeatFinding:
    """Hold a copy that was recovered to `target_at` against its source, or against the minute.

    Without the source, a row within a minute before the target is enough, as no row may be later than it;
    an older one alone says nothing: the server may have been down. With the source, an older one is enough
    where a row from after the target tells that they are still written.
    """
    if copy.newest is not None and copy.newest.at > target_at:
        return HeartbeatFinding(
            False,
            differences=(
                f"the recovered cluster holds the heartbeat of {_shown(copy.newest)}, after the target",
                *_stepped(source),
            ),
        )
    if source is not None and (source.before is not None or source.after is not None):
        return _against_source(target_at, copy, source)
    if copy.newest is None:
        return HeartbeatFinding(
            False, notes=("there was no heartbeat yet at the target: it proves nothing of what is in",)
        )
    late = target_at - copy.newest.at
    said = f"the newest heartbeat is of {_shown(copy.newest)}, {show_seconds(late.total_seconds())} before"
    if late <= INTERVAL + GRACE:
        return HeartbeatFinding(True, (f"{said} the target, as it should be, and none is after it",))
    return HeartbeatFinding(
        False,
        notes=(
            f"{said} the target, and nothing told whether later ones were written: the source could not be "
            "asked, or has them no more",
        ),
    )


def _against_source(target_at: datetime, copy: CopyBeats, source: SourceBeats) -> HeartbeatFinding:
    before, after = source.before, source.after
    differences = []
    if before is not None and not copy.has_before:
        newest = f"its newest is of {_shown(copy.newest)}" if copy.newest else "it holds none"
        differences.append(
            f"the heartbeat of {_shown(before)}, before the target, is not in the recovered cluster: {newest}"
        )
    if after is not None and copy.has_after:
        differences.append(f"the heartbeat of {_shown(after)}, after the target, is in the recovered cluster")
    if differences:
        return HeartbeatFinding(False, differences=(*differences, *_stepped(source)))
    checked, notes = [], []
    fresh = before is not None and target_at - before.at <= INTERVAL + 2 * GRACE
    if before is not None:
        gap_s = (target_at - before.at).total_seconds()
        checked.append(
            f"the source's heartbeat of {_shown(before)}, {show_seconds(gap_s)} before the target, is there"
        )
        if not fresh:
            notes.append(
                "the source has no heartbeat in the last minute before the target: none was written then"
            )
    else:
        notes.append("the source has no heartbeat from before the target")
    if after is not None:
        checked.append(f"the source's next heartbeat, of {_shown(after)}, is not")
    elif fresh:
        notes.append("the source has no heartbeat after the target yet")
    else:
        notes.append("the source has none after the target either: is `backup-pipeline heartbeat` still run?")
    bracketed = before is not None and (fresh or after is not None)
    return HeartbeatFinding(bracketed, tuple(checked), (), tuple(notes))


def _stepped(source: SourceBeats | None) -> tuple[str, ...]:
    if source is None or source.stepped_back is None:
        return ()
    return (
        f"the source's clock was set back before {_shown(source.stepped_back)}: a recovery to a time ends at "
        "the first commit of a later time, whatever was committed after it; near there recover to an LSN",
    )


def _shown(beat: Heartbeat | None) -> str:
    return f"{show_moment(beat.at)} (number {beat.number})" if beat else "none"
