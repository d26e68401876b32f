"""A drill: a recovery to a second that nobody chose, into scratch, and what it came to. Pure.

Made by actions/drill_recovery.py, kept by storage/drills.py, shown by listings and Dagster's plots. How a
recovered cluster is held against its source's heartbeats is domain/heartbeat.py's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from backup_pipeline.domain.backup import BackupId, Proof, Verdict
from backup_pipeline.domain.layout import parse_drill_key
from backup_pipeline.domain.manifest import id_from
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.domain.recovery_window import Windows
from backup_pipeline.domain.replayable_wal import Archive, BasePoint, Route, routes
from backup_pipeline.domain.sealed import Fields, Unreadable, corrupt, moment_text, open_sealed, seal
from backup_pipeline.units import show_seconds

DRILL_KIND = "backup-pipeline drill"

KEPT_FOR = timedelta(days=400)
"""So long a record is kept: a year can be compared with the one before."""

_ABOUT = (
    "One drill: a recovery of this cluster to target_at, into scratch, and what was found there. The seed "
    "modulo the seconds in the spans says which second; without a seed it was given. recovery is what it "
    "took, from the plan to a server that answers; loss is what would have been lost with the source then."
)


@dataclass(frozen=True)
class Span:
    """Moments of which each can be recovered, both ends included."""

    from_at: datetime
    to_at: datetime


@dataclass(frozen=True)
class RecoveryTime:
    """What a recovery took, in seconds: to plan it, to unpack, to replay, and until the server answered."""

    plan_s: float
    unpack_s: float
    replay_s: float
    start_s: float

    @property
    def total_s(self) -> float:
        """From the command to a server that answers: the measured RTO."""
        return self.plan_s + self.unpack_s + self.replay_s + self.start_s


@dataclass(frozen=True)
class Loss:
    """The measured RPO: how far the newest moment that can be recovered lay behind the source's clock.

    Without the source (`asked` is false) behind our own clock: then at the most that.
    """

    newest_at: datetime
    loss_s: float
    asked: bool


@dataclass(frozen=True)
class Drill:
    """The record of one drill. Immutable. The id is the cluster's name and when it began."""

    id: BackupId
    verdict: Verdict
    finished_at: datetime
    seed: int | None  # None: the target was given
    spans: tuple[Span, ...]
    target_at: datetime | None  # None: it did not come so far
    base: BackupId | None
    timeline: int
    segments: int  # replayed
    wal_bytes: int  # compressed, as they were fetched
    base_bytes: int  # compressed, as they were fetched
    source_bytes: int  # what was unpacked
    recovery: RecoveryTime | None  # None: no server answered
    check_s: float
    loss: Loss | None  # None: it did not come so far
    checked: tuple[str, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]
    by: str

    @property
    def recovery_s(self) -> float | None:
        """The measured RTO, in seconds."""
        return self.recovery.total_s if self.recovery else None

    @property
    def loss_s(self) -> float | None:
        """The measured RPO, in seconds."""
        return self.loss.loss_s if self.loss else None

    def proof(self, verdict: Verdict, differences: Sequence[str]) -> Proof:
        """What it says of its base backup: `verdict` and `differences` of the recovery alone."""
        return Proof(
            verdict=verdict,
            at=self.finished_at,
            restore_s=self.recovery_s or 0.0,
            compare_s=self.check_s,
            checked=self.checked,
            differences=tuple(differences),
            notes=self.notes,
            by=self.by,
        )


@dataclass(frozen=True)
class DrillListing:
    """The drills of a cluster, newest first, and records that cannot be read, each with why."""

    drills: tuple[Drill, ...]
    unreadable: tuple[tuple[str, str], ...] = ()


def outdated(drills: Sequence[Drill], *, now: datetime) -> tuple[BackupId, ...]:
    """The drills whose records are given up: of those older than KEPT_FOR, all but the newest
    of each verdict.

    `drills` is newest first.
    """
    old = [each for each in drills if each.id.taken_at < now - KEPT_FOR]
    newest = {each.verdict: each.id for each in reversed(old)}
    return tuple(each.id for each in old if each.id != newest[each.verdict])


def drillable(windows: Windows, timeline: int, *, since: datetime, newest: datetime) -> tuple[Span, ...]:
    """What a second is drawn from: the windows of a timeline, from `since` on, oldest first.

    A window ends with what was archived; `newest` is what is known to be in it. Where nothing happened since
    `since`, it is the whole window.
    """
    found = [window for window in windows.windows if window.timeline == timeline]
    whole = [Span(each.from_at, min(each.to_at, newest)) for each in reversed(found)]
    whole = [span for span in whole if span.from_at <= span.to_at]
    recent = [Span(max(span.from_at, since), span.to_at) for span in whole if span.to_at >= since]
    return tuple(recent or whole)


def draw(spans: Sequence[Span], seed: int) -> datetime:
    """The whole second of all those in `spans` that `seed`, a large random number, falls on, modulo how many
    there are: each as likely, and the same for the same seed.

    The newest moment, where there is no whole second. There is one span at least.
    """
    seconds = [range(math.ceil(_seconds(span.from_at)), int(_seconds(span.to_at)) + 1) for span in spans]
    if not any(seconds):
        return spans[-1].to_at
    number = seed % sum(map(len, seconds))
    for each in seconds:
        if number < len(each):
            return datetime.fromtimestamp(each[number], UTC)
        number -= len(each)
    raise AssertionError("unreachable")


def _seconds(moment: datetime) -> float:
    return (moment - datetime.fromtimestamp(0, UTC)) / timedelta(seconds=1)


def breaks(
    bases: Sequence[BasePoint], archive: Archive, timeline: int, *, since: datetime
) -> tuple[str, ...]:
    """What keeps moments from `since` on from being recovered: WAL that is missing, or is there twice."""
    found = routes(bases, archive, timeline)
    lines = [
        _broken(route, archive)
        for route in found
        if (route.missing or route.unusable)
        and not any(
            other.complete and other.base.start >= route.end and other.base.stopped_at <= since
            for other in found
        )
    ]
    return tuple(dict.fromkeys(lines))


def _broken(route: Route, archive: Archive) -> str:
    if route.unusable is not None:
        segment, why = route.unusable
        what = f"segment {segment.name(archive.segment_bytes)} cannot be used: {why}"
    else:
        what = f"{route.missing.names(archive.segment_bytes) if route.missing else 'WAL'} missing"
    return f"a gap in the WAL: {what}; nothing beyond {route.end} is reached until a later base backup begins"


def broken_end(route: Route, archive: Archive) -> tuple[str, ...]:
    """What is said of a route that turned out to end before a damaged segment; nothing of another."""
    return (_broken(route, archive),) if route.unusable is not None else ()


def summary(drill: Drill) -> str:
    """A drill in one line."""
    to = f"to {show_moment(drill.target_at)}" if drill.target_at else "to no moment"
    took = f", recovered in {show_seconds(drill.recovery_s)}" if drill.recovery_s is not None else ""
    loss = f", {show_seconds(drill.loss_s)} would have been lost" if drill.loss_s is not None else ""
    return f"drill {drill.id}: {drill.verdict}, {to}{took}{loss}"


def drill_to_json(drill: Drill) -> bytes:
    """The record, sealed."""
    took, loss = drill.recovery, drill.loss
    values = {
        "about": _ABOUT,
        "id": str(drill.id),
        "verdict": drill.verdict.value,
        "finished_at": moment_text(drill.finished_at),
        "seed": str(drill.seed) if drill.seed is not None else None,
        "spans": [
            {"from_at": moment_text(span.from_at), "to_at": moment_text(span.to_at)} for span in drill.spans
        ],
        "target_at": drill.target_at and moment_text(drill.target_at),
        "base": drill.base and str(drill.base),
        "timeline": drill.timeline,
        "segments": drill.segments,
        "wal_bytes": drill.wal_bytes,
        "base_bytes": drill.base_bytes,
        "source_bytes": drill.source_bytes,
        "recovery": took
        and {
            "plan_s": took.plan_s,
            "unpack_s": took.unpack_s,
            "replay_s": took.replay_s,
            "start_s": took.start_s,
        },
        "check_s": drill.check_s,
        "loss": loss
        and {"newest_at": moment_text(loss.newest_at), "loss_s": loss.loss_s, "asked": loss.asked},
        "checked": list(drill.checked),
        "differences": list(drill.differences),
        "notes": list(drill.notes),
        "by": drill.by,
    }
    return seal(DRILL_KIND, values)


def drill_from_json(data: bytes, key: str) -> Drill:
    """The record that lies at `key`. Raises Corrupt."""
    try:
        drill = _drill(open_sealed(data, DRILL_KIND))
        if parse_drill_key(key) != drill.id:
            raise Unreadable(f"it is that of {drill.id}, under another drill's key")
    except Unreadable as error:
        raise corrupt("record of a drill", key, error) from error
    return drill


def _drill(fields: Fields) -> Drill:
    verdict, seed = fields.text("verdict"), fields.optional_text("seed")
    if verdict not in list(Verdict):
        raise Unreadable(f"the verdict {verdict!r} is not known here")
    if seed is not None and not (seed.isascii() and seed.isdigit()):
        raise Unreadable("seed is not a number")
    took, loss = fields.optional_section("recovery"), fields.optional_section("loss")
    return Drill(
        id=id_from(fields, "id"),
        verdict=Verdict(verdict),
        finished_at=fields.moment("finished_at"),
        seed=int(seed) if seed is not None else None,
        spans=tuple(Span(item.moment("from_at"), item.moment("to_at")) for item in fields.sections("spans")),
        target_at=fields.optional_moment("target_at"),
        base=id_from(fields, "base") if fields.optional_text("base") is not None else None,
        timeline=fields.integer("timeline"),
        segments=fields.integer("segments"),
        wal_bytes=fields.integer("wal_bytes"),
        base_bytes=fields.integer("base_bytes"),
        source_bytes=fields.integer("source_bytes"),
        recovery=_recovery(took) if took else None,
        check_s=fields.seconds("check_s"),
        loss=Loss(loss.moment("newest_at"), loss.seconds("loss_s"), loss.flag("asked")) if loss else None,
        checked=fields.texts("checked"),
        differences=fields.texts("differences"),
        notes=fields.texts("notes"),
        by=fields.text("by"),
    )


def _recovery(fields: Fields) -> RecoveryTime:
    return RecoveryTime(
        fields.seconds("plan_s"),
        fields.seconds("unpack_s"),
        fields.seconds("replay_s"),
        fields.seconds("start_s"),
    )
