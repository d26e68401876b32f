"""Drill a recovery: to a second that nobody chose, into scratch, looked into, and what it came to recorded.

Called by cli.py and by Dagster's job. A verdict is about what lies in the store: what goes wrong around it (a
store that does not answer, a full disk) is raised, and records nothing.
"""

import contextlib
import platform
import secrets
import time
from datetime import datetime

from backup_pipeline.actions.drill_attempt import Attempt, attempt
from backup_pipeline.actions.drill_outlook import Outlook, look_out
from backup_pipeline.actions.dump import SOFTWARE
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Report
from backup_pipeline.config import ClusterConfig
from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.domain.drill import Drill, draw, summary
from backup_pipeline.domain.recovery_target import TargetKind, parse_target, show_moment
from backup_pipeline.errors import BackupNotFound, ConfigError, Corrupt, NotProvable, Refused
from backup_pipeline.storage import base_backups, drills
from backup_pipeline.wal.settling import Pause

RANDOM = "random"
"""How an operator asks for a second of the window that nobody chose."""


def drill(
    cluster: ProtectedCluster,
    *,
    clock: Clock,
    report: Report,
    target_at: datetime | None = None,
    seed: int | None = None,
    pause: Pause = time.sleep,
) -> Drill:
    """Recover to a random second of the window, or to `target_at`; look into it; return what is recorded.

    `seed` is recorded with what it was drawn from. Raises Refused where there is
    nothing to recover yet, and for a target out of the window; StoreError, ConfigError.
    """
    begun_at = clock()
    seed = None if target_at else secrets.randbits(64) if seed is None else seed
    made, outlook = Attempt(), None
    try:
        outlook = look_out(cluster, at=begun_at, report=report, pause=pause)
        target_at = target_at or _drawn(cluster, outlook, seed or 0)
        report.say(f"drilling a recovery of {cluster.name} to {show_moment(target_at)}")
        promised = any(span.from_at <= target_at <= span.to_at for span in outlook.spans) or (
            bool(outlook.broken and outlook.spans) and outlook.spans[0].from_at <= target_at
        )
        made = attempt(cluster, target_at, promised=promised, clock=clock, report=report)
    except NotProvable as error:
        made.verdict = Verdict.NOT_PROVABLE
        made.differences += [error.message, *([error.hint] if error.hint else [])]
    except Corrupt as error:
        made.verdict = Verdict.FAILED
        made.differences += [error.message, *([error.hint] if error.hint else [])]
    done = _drilled(cluster, made, outlook, target_at, seed, begun_at, clock())
    _record(cluster, done, made)
    _tell(done, report)
    return done


def parse_moment(text: str) -> datetime | None:
    """The moment that an operator asks for; None for RANDOM. Raises ConfigError."""
    if text == RANDOM:
        return None
    target = parse_target(text)
    if target.kind is not TargetKind.TIME:
        raise ConfigError(
            f"a drill is of a time, and {text} is none",
            hint=f"Write it as 2026-03-01T02:00:00Z, or {RANDOM}.",
        )
    return target.at


def as_asked(done: Drill, cluster: ClusterConfig) -> bool:
    """Whether it showed all that can be shown: without a heartbeat, that it recovers."""
    return done.verdict is Verdict.PROVEN or (done.verdict is Verdict.RESTORED and not cluster.heartbeat)


def _drawn(cluster: ProtectedCluster, outlook: Outlook, seed: int) -> datetime:
    if not outlook.spans:
        raise Refused(
            f"no moment of {cluster.name} can be recovered by its time yet",
            hint="Nothing that was committed after the first base backup is archived: wait a minute, or "
            "write a heartbeat.",
        )
    return draw(outlook.spans, seed)


def _drilled(
    cluster: ProtectedCluster,
    made: Attempt,
    outlook: Outlook | None,
    target_at: datetime | None,
    seed: int | None,
    begun_at: datetime,
    finished_at: datetime,
) -> Drill:
    planned = made.planned
    broken = outlook.broken if outlook else ()
    return Drill(
        id=BackupId.make(cluster.name, begun_at, secrets.token_hex(3)),
        # A gap is one, also where this machine could recover nothing.
        verdict=Verdict.FAILED if broken else made.verdict,
        finished_at=finished_at,
        seed=seed,
        spans=outlook.spans if outlook else (),
        target_at=target_at,
        base=planned.manifest.id if planned else None,
        timeline=planned.judged.route.timeline if planned else 0,
        segments=len(made.replayed),
        wal_bytes=planned.facts.stored_bytes(made.replayed) if planned else 0,
        base_bytes=planned.manifest.size_bytes if planned else 0,
        source_bytes=planned.manifest.source_bytes if planned else 0,
        recovery=made.recovery,
        check_s=made.check_s,
        loss=outlook.loss if outlook else None,
        checked=tuple(made.checked),
        differences=(*broken, *made.differences),
        notes=(*(outlook.notes if outlook else ()), *made.notes),
        by=f"{platform.node()}, backup-pipeline {SOFTWARE}",
    )


def _record(cluster: ProtectedCluster, done: Drill, made: Attempt) -> None:
    """In the store, and on the base backup: there without what is wrong elsewhere in the archive."""
    drills.put(cluster.store, done)
    if done.base is not None:
        with contextlib.suppress(BackupNotFound):  # it was pruned meanwhile
            base_backups.record_proof(
                cluster.store,
                done.base,
                done.proof(made.verdict, made.differences),
                comparable=cluster.config.heartbeat,
            )


def _tell(done: Drill, report: Report) -> None:
    report.say(summary(done))
    different = (f"WRONG: {line}" for line in done.differences)
    for line in (*done.checked, *different, *(f"note: {line}" for line in done.notes)):
        report.say(f"  {line}")
