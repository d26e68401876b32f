"""Recover a whole cluster to a moment: plan and show, then unpack, replay, and see that it is what was asked.

Called by cli.py and by Dagster's job. The plan is made from the store alone; the cluster may be gone. Nothing
that exists is touched: a new directory gets its name only when the recovery was seen to have reached its
target, and whatever fails leaves nothing behind.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from backup_pipeline import confinement
from backup_pipeline.actions.bring import bring, naming_another, whole_route
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.recovered_directory import (
    emptied_lines,
    lay_carried,
    leave_record,
    leave_running,
    refuse_port,
    stopped,
)
from backup_pipeline.actions.recovery_facts import read_ending, read_facts
from backup_pipeline.actions.recovery_history import known_figures, record_figures
from backup_pipeline.actions.recovery_place import workplace
from backup_pipeline.actions.recovery_plan import UNCONFINED, Plan, RecoverRequest
from backup_pipeline.actions.replay import replay
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.recovered import RecoveredRecord, RecoveryFigures
from backup_pipeline.domain.recovery_route import judge
from backup_pipeline.domain.recovery_target import TargetKind, show_moment
from backup_pipeline.engines.postgres import recovery
from backup_pipeline.engines.postgres.cluster import server_identity
from backup_pipeline.engines.postgres.combine import PROGRAM as PG_COMBINEBACKUP
from backup_pipeline.engines.postgres.recovery import ControlFile, Recovered
from backup_pipeline.engines.postgres.tools import find_tools
from backup_pipeline.engines.postgres.unpack import plan_places
from backup_pipeline.errors import Refused
from backup_pipeline.storage import leases
from backup_pipeline.units import show_line, show_seconds
from backup_pipeline.wal.settling import Pause

PROGRAMS = ("postgres", "pg_controldata", "pg_waldump")
"""What a recovery needs of the server's own major version."""


@dataclass(frozen=True)
class RecoverResult:
    """What a recovery came to."""

    into: Path
    recovered: Recovered
    unpack_s: float
    replay_s: float
    lines: tuple[str, ...]


def plan(
    cluster: ProtectedCluster, request: RecoverRequest, *, report: Report, pause: Pause = time.sleep
) -> Plan:
    """Look at the store, change nothing, and say what a recovery would do, or why it cannot.

    For `latest`, a segment that may be under way is waited for, half a minute. Raises Refused for a target
    that cannot be reached, naming the nearest, and for a place that is taken; ConfigError, ToolError,
    StoreError.
    """
    is_latest = request.target.kind is TargetKind.LATEST
    facts = read_facts(cluster, base=request.base, pause=pause if is_latest else None)
    if request.try_failed:
        facts = replace(facts, failed={})
    facts, route = whole_route(cluster, facts, request.target, timeline=request.timeline, base=request.base)
    manifest, chain = facts.manifest(route.base.id), facts.chain(route.base.id)
    major = manifest.server_version // 10000
    needs = (
        *PROGRAMS,
        *(["pg_ctl"] if request.port else []),
        *([PG_COMBINEBACKUP] if chain.incremental else []),
    )
    tools = find_tools(cluster.config.bin_dir, exactly=major, needs=needs)
    if request.port:
        refuse_port(request.port, tools, server_identity())
    ending, route = read_ending(
        cluster, facts, route, tools.path("pg_waldump"), report, target=request.target
    )
    judged = judge(route, request.target, ending, facts.archive)
    plan_places(request.into, manifest.tablespaces, request.tablespaces)
    if not confinement.available() and not request.unconfined:
        raise Refused(
            "this system cannot keep the replay to its own directory, which takes a Linux with Landlock",
            detail={"what could happen": UNCONFINED},
            hint="Recover on another machine than the source's, and say --unconfined there.",
        )
    known = known_figures(cluster.store, cluster.name)
    return Plan(request, manifest, judged, tools, ending, facts.stored_bytes(judged.needed), facts, known)


def carry_out(cluster: ProtectedCluster, planned: Plan, *, clock: Clock, report: Report) -> RecoverResult:
    """Recover as planned. What fails leaves nothing: no directory, no server.

    Raises Refused, ToolError for a target that the replay did not meet, Corrupt, StoreError, ServerError.
    """
    request, manifest = planned.request, planned.manifest
    identity, begun_s = server_identity(), time.monotonic()
    chain = planned.facts.chain(manifest.id)
    with contextlib.ExitStack() as stack:
        for link in chain.links:
            stack.enter_context(leases.hold(cluster.store, link.id, "restore", clock=clock, required=False))
        work = stack.enter_context(workplace(manifest, planned.places, owner=identity))
        with naming_another(planned.facts, request.target, timeline=request.timeline):
            bring(
                cluster.store,
                chain,
                work,
                bin_dir=planned.tools.bin_dir,
                insists=not request.unconfined,
                clock=clock,
                report=report,
            )
        unpacked_s = time.monotonic()
        control = recovery.read_control_file(planned.tools.path("pg_controldata"), work.inside.data)
        _check_control(control, planned)
        kept = recovery.lay_out(work.inside.data, control, owner=identity, port=request.port)
        kept += lay_carried(cluster.store, manifest, work.inside.data, owner=identity)
        recovered = replay(cluster, planned, work, control, report)
        leave_record(work.inside.data, _recovered_record(planned, recovered, clock()), owner=identity)
        work.take_names()
    unpack_s, replay_s = unpacked_s - begun_s, time.monotonic() - unpacked_s
    record_figures(cluster.store, _figures(planned, unpack_s, replay_s, clock()), report)
    if request.port:
        going_on = leave_running(request.into, request.port, planned.tools, owner=identity)
    else:
        going_on = stopped(request.into, planned.tools, owner=identity)
    lines = _result_lines(planned, recovered, kept, unpack_s + replay_s, going_on)
    return RecoverResult(request.into, recovered, unpack_s, replay_s, lines)


def _recovered_record(planned: Plan, recovered: Recovered, at: datetime) -> RecoveredRecord:
    return RecoveredRecord(
        cluster=planned.manifest.id.database,
        system_identifier=planned.manifest.system_identifier,
        base_backup=planned.manifest.id,
        target=str(planned.request.target),
        source_timeline=planned.judged.route.timeline,
        timeline=recovered.timeline,
        replayed_to=recovered.replayed_to,
        recovered_at=at,
    )


def _figures(planned: Plan, unpack_s: float, replay_s: float, at: datetime) -> RecoveryFigures:
    manifest = planned.manifest
    return RecoveryFigures(
        cluster=manifest.id.database,
        base_backup=manifest.id,
        finished_at=at,
        source_bytes=planned.facts.chain(manifest.id).written_bytes,
        segments=len(planned.judged.needed),
        segment_bytes=manifest.segment_bytes,
        unpack_s=unpack_s,
        replay_s=replay_s,
    )


def _check_control(control: ControlFile, planned: Plan) -> None:
    manifest = planned.manifest
    if control.system_identifier != manifest.system_identifier or control.major != planned.tools.major:
        raise recovery.ReplayFailed(
            f"{manifest.id} holds cluster {control.system_identifier} of PostgreSQL {control.major}, and its "
            f"record says {manifest.system_identifier} of PostgreSQL {planned.tools.major}",
            hint="Do not use this backup; look for who changed it.",
        )


def _result_lines(
    planned: Plan, recovered: Recovered, kept: tuple[str, ...], took_s: float, going_on: tuple[str, ...]
) -> tuple[str, ...]:
    into = planned.request.into
    settings = f"; those of its source are beside them: {', '.join(kept)}" if kept else ""
    return tuple(
        show_line(line)
        for line in (
            f"recovered {planned.manifest.id.database} into {into} in {show_seconds(took_s)}",
            f"target: {recovered.stopped or 'all that is archived was replayed'}",
            f"last transaction: {show_moment(recovered.last_commit_at)}; replayed to {recovered.replayed_to}",
            f"it is on timeline {recovered.timeline}"
            + ("" if planned.request.port else "; the server is stopped"),
            *emptied_lines(into),
            *going_on,
            f"its settings are ours{settings}",
        )
    )


def record(planned: Plan, result: RecoverResult) -> dict[str, object]:
    """What was recovered, for scripts; times ISO 8601 in UTC."""
    recovered = result.recovered
    return {
        "cluster": planned.manifest.id.database,
        "into": str(result.into),
        "port": planned.request.port,
        "base_backup": str(planned.manifest.id),
        "target": str(planned.request.target),
        "timeline": recovered.timeline,
        "replayed_to": str(recovered.replayed_to),
        "last_commit_at": recovered.last_commit_at.isoformat() if recovered.last_commit_at else None,
        "unpack_s": round(result.unpack_s, 3),
        "replay_s": round(result.replay_s, 3),
        "lines": list(result.lines),
    }
