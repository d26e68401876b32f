"""Recover a whole cluster to a moment: plan and show, then unpack, replay, and see that it is what was asked.

Called by cli.py and by Dagster's job. The plan is made from the store alone; the cluster may be gone. Nothing
that exists is touched: a new directory gets its name only when the recovery was seen to have reached its
target, and whatever fails leaves nothing behind.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from backup_pipeline import confinement
from backup_pipeline.actions.bring import bring, chain_lines, naming_another, whole_route
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
from backup_pipeline.actions.recovery_facts import RecoveryFacts, read_ending, read_facts
from backup_pipeline.actions.recovery_history import duration_line, known_figures, record_figures
from backup_pipeline.actions.recovery_place import Workplace, workplace
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.domain.recovered import RecoveredRecord, RecoveryFigures
from backup_pipeline.domain.recovery_route import Ending, Judgement, judge
from backup_pipeline.domain.recovery_target import RecoveryTarget, TargetKind, show_moment
from backup_pipeline.engines.postgres import recovery
from backup_pipeline.engines.postgres.cluster import LocalCluster, runs_as, server_identity
from backup_pipeline.engines.postgres.combine import PROGRAM as PG_COMBINEBACKUP
from backup_pipeline.engines.postgres.recovery import ControlFile, Recovered
from backup_pipeline.engines.postgres.tools import Tools, find_tools
from backup_pipeline.engines.postgres.unpack import plan_places
from backup_pipeline.errors import BackupError, ConfigError, Refused, ServerError, ToolError
from backup_pipeline.process import Identity
from backup_pipeline.spool import private_folder
from backup_pipeline.storage import leases
from backup_pipeline.units import show_bytes, show_count, show_line, show_seconds
from backup_pipeline.wal import client
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.prefetch import Prefetch, serving
from backup_pipeline.wal.settling import Pause

PROGRAMS = ("postgres", "pg_controldata", "pg_waldump")
"""What a recovery needs of the server's own major version."""

_LATEST_ANSWER_S = 30 * 24 * 3600.0
_SPOOL = "pg_wal/backup_pipeline"  # its own file system, where pg_wal has one
_UNCONFINED = "a tablespace that was made after the base backup would be written where the source's lies"
_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")


@dataclass(frozen=True)
class RecoverRequest:
    """What the operator asked for."""

    target: RecoveryTarget
    into: Path  # the data directory to be; it does not exist yet, or is empty
    timeline: int = 0  # 0: the newest
    base: BackupId | None = None  # None: the newest that was finished before the target
    tablespaces: Mapping[int, Path] = field(default_factory=dict)  # others go to <into>.tablespaces/<oid>
    also_write: tuple[Path, ...] = ()  # where tablespaces may be that were made after the base backup
    unconfined: bool = False  # let the replay write wherever the WAL says: not on the source's own machine
    port: int | None = None  # leave the server running, on this port of 127.0.0.1
    patience_s: float = 300.0  # how long a store that does not answer is waited for
    try_failed: bool = False  # begin also with one whose drill failed: a drill looks whether it still does


@dataclass(frozen=True)
class Plan:
    """A recovery that may be carried out; `lines` are for the operator to read first."""

    request: RecoverRequest
    manifest: BaseManifest
    judged: Judgement
    tools: Tools
    ending: Ending
    wal_bytes: int
    facts: RecoveryFacts
    known: tuple[RecoveryFigures, ...] = ()  # of earlier recoveries, newest first

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words."""
        manifest, judged, target = self.manifest, self.judged, self.request.target
        newest = show_moment(self.ending.newest) if self.ending.newest else "not known"
        # Which segment a moment is in is known by when each was archived, which may have been late.
        about = "" if judged.to_the_end else "about "
        wal = f"{about}{show_count(len(judged.needed), 'segment')}, {show_bytes(self.wal_bytes)} compressed"
        lines = (
            f"target: {target}",
            f"begins with: {manifest.id}, consistent at {show_moment(manifest.stopped_at)}, "
            f"{show_bytes(manifest.combined_bytes)}, PostgreSQL {manifest.server_version_text}",
            *chain_lines(self.facts.chain(manifest.id)),
            f"replays: {wal}, to timeline {judged.route.timeline}",
            f"newest that can be recovered: {newest}, LSN {judged.route.end}",
            duration_line(
                self.known,
                source_bytes=self.facts.chain(manifest.id).written_bytes,
                wal_bytes=len(judged.needed) * manifest.segment_bytes,
            ),
            f"into: {self.request.into}",
            *([f"then: runs on 127.0.0.1:{self.request.port}"] if self.request.port else []),
            *(
                f"tablespace {item.oid}, once {item.location}: {self._tablespaces[item.oid]}"
                for item in manifest.tablespaces
                if item.oid in self._tablespaces
            ),
            *self._remarks,
        )
        return tuple(show_line(line) for line in lines)

    @property
    def _remarks(self) -> tuple[str, ...]:
        judged, failure = self.judged, self.facts.failure(self.manifest.id)
        notes = (
            *judged.notes,
            *self.facts.notes,
            *self.facts.passed_over(judged.route, self.request.target),
            *self.manifest.notes,
        )
        return (
            *(f"note: {note}" for note in notes),
            *([f"warning: {failure}"] if failure else []),
            *([f"warning: not confined: {_UNCONFINED}"] if self.request.unconfined else []),
        )

    @property
    def _tablespaces(self) -> Mapping[int, Path]:
        return plan_places(self.request.into, self.manifest.tablespaces, self.request.tablespaces).tablespaces


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
            detail={"what could happen": _UNCONFINED},
            hint="Recover on another machine than the source's, and say --unconfined there.",
        )
    known = known_figures(cluster.store, cluster.name)
    return Plan(request, manifest, judged, tools, ending, facts.stored_bytes(judged.needed), facts, known)


def carry_out(cluster: ProtectedCluster, planned: Plan, *, clock: Clock, report: Report) -> RecoverResult:
    """Recover as planned. What fails leaves nothing: no directory, no server.

    Raises Refused, ToolError for a target that the replay did not meet, Corrupt, StoreError, ServerError.
    """
    request, manifest = planned.request, planned.manifest
    places = plan_places(request.into, manifest.tablespaces, request.tablespaces)
    identity, begun_s = server_identity(), time.monotonic()
    chain = planned.facts.chain(manifest.id)
    with contextlib.ExitStack() as stack:
        for link in chain.links:
            stack.enter_context(leases.hold(cluster.store, link.id, "restore", clock=clock, required=False))
        work = stack.enter_context(workplace(manifest, places, owner=identity))
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
        recovered = _replay(cluster, planned, work, control, report)
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


def _replay(
    cluster: ProtectedCluster, planned: Plan, work: Workplace, control: ControlFile, report: Report
) -> Recovered:
    """Let PostgreSQL replay, and see what it came to; the server has ended on return."""
    target, identity, data = planned.request.target, work.owner, work.inside.data
    prefetch = Prefetch(
        partial(_fetch, cluster, planned, planned.facts.keys(planned.judged.route.segments), report),
        [segment.name(planned.manifest.segment_bytes) for segment in planned.judged.route.segments],
        data / _SPOOL,
        owner=identity,
        patience_s=planned.request.patience_s,
        tell=report.say,
    )
    with _socket_folder(identity) as beside, serving(prefetch, beside / "fetch"):
        python = _python(identity)
        settings = recovery.recovery_settings(
            target,
            to_the_end=planned.judged.to_the_end,
            timeline=planned.judged.route.timeline,
            restore_command=restore_command(python, beside / "fetch", beside),
            control=control,
        )
        server = LocalCluster(
            planned.tools.bin_dir,
            work.folder,
            settings=settings,
            # WAL may make a tablespace where its source has one: files that are not ours.
            confined=not planned.request.unconfined,
            insists=not planned.request.unconfined,
            readable=(str(beside), *_installation(python)),
            writable=tuple(map(str, (*work.inside.tablespaces.values(), *planned.request.also_write))),
        )
        server.answers = partial(recovery.is_ready, server.log)
        try:
            recovered = _await(server, planned, prefetch)
        finally:
            server.stop()
    recovery.check_stopped(planned.tools.path("pg_controldata"), data, recovered)
    shutil.rmtree(data / _SPOOL)
    return recovered


def _fetch(
    cluster: ProtectedCluster,
    planned: Plan,
    keys: Mapping[str, str],
    report: Report,
    name: str,
    path: Path,
) -> None:
    manifest, route = planned.manifest, planned.judged.route
    system = manifest.system_identifier
    fetched = fetch(cluster.store, cluster.name, name, path, system_identifier=system, key=keys.get(name, ""))
    if route.partial is not None and name == route.partial.name(manifest.segment_bytes):
        # More of it may have been archived since. A recovery keeps to its plan.
        os.truncate(path, route.end.value - route.partial.start(manifest.segment_bytes).value)
        os.truncate(path, manifest.segment_bytes)
    report.say(f"fetched {fetched.name}")


def _await(server: LocalCluster, planned: Plan, prefetch: Prefetch) -> Recovered:
    target = planned.request.target
    try:
        server.create()  # opens its folder to the server's user
        server.start(timeout_s=_LATEST_ANSWER_S)
    except ToolError as error:
        log = _log_of(server)
        if prefetch.failure is not None:
            raise _while_recovering(prefetch.failure, target) from error
        raise recovery.explain(error, log, target, server.data) or error from error
    recovered = recovery.read_recovered(
        _log_of(server), target, to_the_end=planned.judged.to_the_end, route=planned.judged.route
    )
    if planned.judged.to_the_end:
        missed = [name for name in prefetch.order if name not in prefetch.brought]
        if missed:
            raise ServerError(
                f"the recovery to {target} cannot be believed: {missed[0]} was archived and not replayed",
                detail={"replayed to": str(recovered.replayed_to)},
            )
    return recovered


def _while_recovering(error: BackupError, target: RecoveryTarget) -> BackupError:
    error.detail["while"] = f"recovering to {target}"
    return error


def _log_of(server: LocalCluster) -> str:
    # There is none where it was not started at all.
    return server.log.read_text(encoding="utf-8", errors="replace") if server.log.exists() else ""


def restore_command(python: str, socket: Path, folder: Path) -> str:
    """The setting: our client, copied into `folder`, where the server's user can read it."""
    program = folder / "client.py"
    shutil.copyfile(client.__file__, program)
    program.chmod(0o644)
    words = (python, "-I", "-S", str(program), "fetch", "--socket", str(socket))
    return f"{shlex.join(words).replace('%', '%%')} %f %p"


def _python(identity: Identity | None) -> str:
    """A Python that the server's user can run; the client needs no library."""
    python = next((path for path in (sys.executable, *_PYTHONS) if runs_as(Path(path), identity)), "")
    if not python:
        raise ToolError(
            f"the server's user can run no Python: neither {sys.executable} nor {' nor '.join(_PYTHONS)}",
            hint="Install python3 for all users, or run this as a user other than root.",
        )
    return python


def _installation(python: str) -> tuple[str, ...]:
    """The folders that a Python loads itself from."""
    if python != sys.executable:
        return ()  # the system's own
    return tuple(dict.fromkeys((sys.prefix, sys.base_prefix, str(Path(python).resolve().parent.parent))))


@contextlib.contextmanager
def _socket_folder(identity: Identity | None) -> Iterator[Path]:
    """A folder with a short path that only we and the server's user may enter."""
    with private_folder("fetch") as folder:
        if identity is not None:
            os.chown(folder, os.getuid(), identity.gid)
            folder.chmod(0o710)
        yield folder


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


def parse_tablespaces(given: Sequence[str]) -> Mapping[int, Path]:
    """Read `OID=DIRECTORY`s. Raises ConfigError."""
    found: dict[int, Path] = {}
    for text in given:
        oid, _, folder = text.partition("=")
        if not oid.isascii() or not oid.isdigit() or not folder:
            raise ConfigError(f"not a tablespace's place: {text!r}", hint="Write 16384=/srv/fast/main.")
        found[int(oid)] = Path(folder)
    return found
