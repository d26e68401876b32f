"""One recovery into scratch, looked into: what it took, what is well, what is not, and the verdict.

Called by drill_recovery.py. Planned and carried out as an operator's is (recover.py); the place is private,
reaches no network and no file but its own, and is gone at the end, or, after a kill, with the next drill.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from backup_pipeline import confinement
from backup_pipeline.actions import recover
from backup_pipeline.actions.bring import require_room
from backup_pipeline.actions.drill_beats import hold_against_heartbeat
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.recover import RecoverResult
from backup_pipeline.actions.recovery_plan import Plan, RecoverRequest
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.drill import RecoveryTime
from backup_pipeline.domain.recovery_target import RecoveryTarget, TargetKind
from backup_pipeline.domain.wal import WalSegment
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.recovered_copy import (
    Integrity,
    check_pages,
    looking_into,
)
from backup_pipeline.engines.postgres.recovery import ReplayFailed
from backup_pipeline.engines.postgres.scratch import end_cluster
from backup_pipeline.engines.postgres.unpack import plan_places
from backup_pipeline.errors import (
    BackupError,
    Corrupt,
    NotArchived,
    NotProvable,
    ObjectNotFound,
    ProofFailed,
    Refused,
    ServerError,
    ToolError,
)
from backup_pipeline.spool import private_folder
from backup_pipeline.units import show_bytes, show_count, show_seconds

_DATA = "data"
_SETTINGS = {
    # The copy is thrown away, and nothing runs in it but what we ask.
    "fsync": "off",
    "autovacuum": "off",
    "jit": "off",
    "lc_messages": "C",
}
_FULL = "No space left on device"
_WITH_NETWORK = (
    "the copy was not cut off from the network, which this system does not allow: what an index of it runs "
    "could have reached other machines"
)


@dataclass
class Attempt:
    """What a recovery into scratch came to, also when it was broken off."""

    verdict: Verdict = Verdict.NONE
    planned: Plan | None = None
    recovery: RecoveryTime | None = None
    replayed: tuple[WalSegment, ...] = ()
    check_s: float = 0.0
    checked: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def attempt(
    cluster: ProtectedCluster, target_at: datetime, *, promised: bool, clock: Clock, report: Report
) -> Attempt:
    """Recover to `target_at`, look into what came, and remove it.

    Where `promised`, a target that cannot be reached is the archive's failure. Raises Refused for another
    one; StoreError and what else is no fault of the backups.
    """
    made = Attempt()
    try:
        with _scratch() as home:
            result = _recover(cluster, target_at, home, made, promised=promised, clock=clock, report=report)
            proven = _look_into(cluster, target_at, home, made, result, report)
    except NotProvable as error:
        made.verdict = Verdict.NOT_PROVABLE
        made.differences += _lines(error)
    except (Corrupt, ObjectNotFound, NotArchived, ReplayFailed, ServerError, ProofFailed) as error:
        made.verdict = Verdict.FAILED
        made.differences += _lines(error)
    else:
        made.verdict = Verdict.PROVEN if proven else Verdict.RESTORED
        if made.differences:
            made.verdict = Verdict.FAILED
    return made


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """The folder of a cluster to be, private and gone at the end."""
    with private_folder("drill", mode=0o711, ending=end_cluster) as folder:
        home = folder / "cluster"
        home.mkdir(mode=0o711)
        yield home


def _recover(
    cluster: ProtectedCluster,
    target_at: datetime,
    home: Path,
    made: Attempt,
    *,
    promised: bool,
    clock: Clock,
    report: Report,
) -> RecoverResult:
    """As an operator would, with what stands in its way judged: by the backups, or by this machine."""
    begun_s = time.monotonic()
    target = RecoveryTarget(TargetKind.TIME, at=target_at)
    request = RecoverRequest(target, home / _DATA, try_failed=True)
    made.planned = planned = _plan(cluster, request, promised=promised, report=report)
    for line in planned.lines:
        report.say(f"  {line}")
    planned_s = time.monotonic() - begun_s
    try:
        chain = planned.facts.chain(planned.manifest.id)
        require_room(chain, plan_places(request.into, planned.manifest.tablespaces))
        result = recover.carry_out(cluster, planned, clock=clock, report=report)
    except Refused as error:
        if "while" in error.detail:  # said by what fetches WAL for the replay
            raise ProofFailed(error.message, detail=error.detail, hint=error.hint) from error
        raise _not_here(error) from error
    except ReplayFailed:
        raise
    except ToolError as error:
        if _FULL in str(error):
            raise
        raise _not_here(error) from error
    # The plan says how many there may be; the replay, how many there were.
    size, end = planned.manifest.segment_bytes, result.recovered.replayed_to
    made.replayed = tuple(each for each in planned.judged.route.segments if each.start(size) <= end)
    made.recovery = RecoveryTime(planned_s, result.unpack_s, result.replay_s, 0.0)
    made.checked.append(
        f"recovered from {planned.manifest.id} ({show_bytes(planned.manifest.size_bytes)}) and "
        f"{show_count(len(made.replayed), 'WAL segment')}"
    )
    return result


def _plan(cluster: ProtectedCluster, request: RecoverRequest, *, promised: bool, report: Report) -> Plan:
    try:
        return recover.plan(cluster, request, report=report)
    except ToolError as error:
        raise _not_here(error) from error
    except Refused as error:
        if not confinement.available():
            raise _not_here(error) from error
        if promised:
            raise ProofFailed(error.message, detail=error.detail, hint=error.hint) from error
        raise


def _look_into(
    cluster: ProtectedCluster,
    target_at: datetime,
    home: Path,
    made: Attempt,
    result: RecoverResult,
    report: Report,
) -> bool:
    """Start what was recovered, and ask it; returns whether that proves it, if nothing differs."""
    planned, begun_s = made.planned, time.monotonic()
    if planned is None or made.recovery is None:
        raise ServerError("nothing was recovered")
    server = LocalCluster(
        planned.tools.bin_dir, home, network=False, confined=True, insists=True, settings=_SETTINGS
    )
    try:
        server.create()
        with looking_into(server, planned.tools.major) as copy:
            start_s = time.monotonic() - begun_s
            made.recovery = RecoveryTime(made.recovery.plan_s, result.unpack_s, result.replay_s, start_s)
            report.say(f"recovered, and it answers after {show_seconds(made.recovery.total_s)}")
            begun_s = time.monotonic()
            databases = copy.databases()
            beats = hold_against_heartbeat(
                cluster, target_at, copy, databases, planned.manifest.system_identifier
            )
            made.checked += beats.checked
            made.differences += beats.differences
            made.notes += beats.notes
            report.say("looking into every table and index")
            made.notes += copy.unlogged(databases)
            if not server.cut_off and not confinement.keeps_from_network():
                made.notes.append(_WITH_NETWORK)
            sound = _add(made, copy.amcheck(databases))
        if planned.manifest.page_checksums:
            sound = _add(made, check_pages(server)) and sound
        else:
            made.notes.append("the cluster has no page checksums: a page that was changed may look sound")
    except Refused as error:
        raise _not_here(error) from error
    except ToolError as error:
        if _FULL in str(error):
            raise
        raise ProofFailed(error.message, detail=error.detail, hint=error.hint) from error
    finally:
        made.check_s = time.monotonic() - begun_s
    return beats.bracketed and sound


def _add(made: Attempt, found: Integrity) -> bool:
    made.checked += found.checked
    made.differences += found.differences
    made.notes += found.notes
    return found.made


def _not_here(error: BackupError) -> NotProvable:
    return NotProvable(error.message, detail=error.detail, hint=error.hint)


def _lines(error: BackupError) -> list[str]:
    facts = [f"{name}: {value}" for name, value in error.detail.items() if name not in ("command", "log")]
    return [error.message, *facts, *([f"what to do: {error.hint}"] if error.hint else [])]
