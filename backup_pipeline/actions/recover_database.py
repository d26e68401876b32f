"""One database as it was at any moment: its cluster recovered into scratch, the database dumped and restored.

Called by commands/recover.py. The recovery is recover.py's, the dump dump.py's, the restore restore.py's: the
copy is built under a temporary name, compared with the recovered one row for row, and only then named.
Nothing of the scratch cluster outlives this.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from backup_pipeline.actions import dump, recover, restore, target
from backup_pipeline.actions.protected import Clock, Protected
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.recovery_plan import Plan as RecoveryPlan
from backup_pipeline.actions.recovery_plan import RecoverRequest
from backup_pipeline.actions.report import Report
from backup_pipeline.config import Config, DatabaseConfig, Secret
from backup_pipeline.domain.backup import MANUAL_TIER
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.recovered_server import entered
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect, read_server_info, resolved
from backup_pipeline.engines.postgres.tools import CLIENT, find_tools
from backup_pipeline.errors import BackupError, ConfigError, Refused
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.units import show_line, show_seconds

_INSIDE = "recovered"  # what the database is called in the store of scratch


@dataclass(frozen=True)
class DatabaseRequest:
    """What the operator asked for, beside the moment."""

    database: str  # its name in the cluster
    into: str  # the new database's
    server: Endpoint  # where it goes
    scratch: Path | None = None  # the folder that the cluster is recovered below; None: $TMPDIR
    create_roles: bool = False
    without_owners: bool = False
    jobs: int = 1
    program: tuple[str, ...] = target.PROGRAM

    @property
    def place(self) -> Path:
        """The folder that scratch is made in."""
        return self.scratch or Path(tempfile.gettempdir())


@dataclass(frozen=True)
class Plan:
    """A recovery of one database that may be carried out."""

    request: DatabaseRequest
    recovery: RecoveryPlan

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words."""
        request = self.request
        return (
            *self.recovery.lines,
            show_line(
                f"then: {request.database} is dumped out of it, and restored as {request.into}, a new "
                f"database on {request.server.shown}; what was recovered is removed"
            ),
            "check: every row is compared with the recovered one before the copy gets its name",
        )


@dataclass(frozen=True)
class Result:
    """What it came to."""

    database: str
    recovered: recover.RecoverResult
    took_s: float
    lines: tuple[str, ...]


def choose_server(config: Config, cluster: str, database: str) -> tuple[Endpoint, DatabaseConfig]:
    """Where the configured database that this is, in this cluster, is restored to; and that database.

    Raises ConfigError unless there is just one.
    """
    home = _address(Endpoint(config.cluster(cluster).dsn.reveal()))
    found = [
        each
        for each in config.databases.values()
        if each.restore_dsn is not None
        and _is(each, database)
        and _address(Endpoint(each.dsn.reveal())) == home
    ]
    if len(found) != 1:
        raise ConfigError(
            f"of the databases with a restore_dsn, {len(found) or 'none'} is {database} of {cluster}",
            hint="Name the server that it is to go to, with --server DSN.",
        )
    (only,) = found
    dsn = only.restore_dsn
    return resolved(Endpoint(dsn.reveal() if dsn else "", only.restore_password)), only


def _is(config: DatabaseConfig, database: str) -> bool:
    return resolved(Endpoint(config.dsn.reveal())).database == database


def _address(endpoint: Endpoint) -> tuple[str, str]:
    return resolved(endpoint).address


def plan(
    cluster: ProtectedCluster, request: DatabaseRequest, recovery: RecoverRequest, *, report: Report
) -> Plan:
    """Look at the store and at the server that the database goes to, and change nothing.

    `recovery.into` is not looked at: the cluster is recovered into scratch. Raises Refused, ConfigError,
    ToolError, ServerError, StoreError.
    """
    request = replace(request, server=target.maintenance(request.server))
    into = request.place / f"backup-scratch-of-{cluster.name}"
    planned = recover.plan(cluster, replace(recovery, into=into.absolute(), port=None), report=report)
    find_tools(planned.tools.bin_dir, exactly=planned.tools.major, needs=CLIENT)
    _look_at(request, planned)
    return Plan(request, planned)


def _look_at(request: DatabaseRequest, planned: RecoveryPlan) -> None:
    """Refuse now what the restore would refuse after an hour."""
    with contextlib.closing(connect(request.server, purpose="recovery")) as session:
        info = read_server_info(session)
        taken, may = target.exists(session, request.into), target.may_create(session)
    if taken:
        raise Refused(
            f"{request.into} exists on {request.server.shown}",
            hint="Choose a name that is free; what exists is never written over.",
        )
    if not may:
        raise Refused(
            f"the role {request.server.user} may not create databases on {request.server.shown}",
            hint=f'ALTER ROLE "{request.server.user}" CREATEDB; or name another role.',
        )
    if info.major < planned.tools.major:
        raise Refused(
            f"the cluster is PostgreSQL {planned.tools.major}, and the server {info.version_text}",
            hint=f"Restore into PostgreSQL {planned.tools.major} or newer, with --server DSN.",
        )


def carry_out(cluster: ProtectedCluster, planned: Plan, *, clock: Clock, report: Report) -> Result:
    """Do it. What fails leaves no database, and nothing of scratch.

    Raises what a recovery, a dump and a restore raise.
    """
    request, begun_s = planned.request, time.monotonic()
    with private_folder(request.place) as folder:
        inside = folder / "cluster" / "data"
        inside.parent.mkdir(mode=0o711)
        recovery = replace(planned.recovery, request=replace(planned.recovery.request, into=inside))
        recovered = recover.carry_out(cluster, recovery, clock=clock, report=report)
        with _serving(planned, folder / "cluster", cluster.config.stall_timeout) as protected:
            report.say(f"dumping {request.database} out of the recovered cluster")
            try:
                taken = dump.take(
                    protected, tier=MANUAL_TIER, scheduled_for=None, clock=clock, report=report, proving=False
                )
                restored = _restore(protected, request, str(taken.id), clock, report)
            except BackupError as error:
                error.detail["recovered to"] = str(planned.recovery.request.target)
                raise
    return Result(
        request.into,
        recovered,
        time.monotonic() - begun_s,
        _result_lines(planned, recovered, restored, begun_s),
    )


@contextlib.contextmanager
def _serving(planned: Plan, folder: Path, stall: timedelta) -> Iterator[Protected]:
    """The recovered database, on a server that reaches nothing but its own files, and a store beside it."""
    bin_dir = planned.recovery.tools.bin_dir
    server = LocalCluster(bin_dir, folder, network=False, confined=True)
    store = folder / "dumps"
    store.mkdir(mode=0o700)
    with entered(server, planned.recovery.tools) as user:
        endpoint = server.endpoint(planned.request.database, user=user)
        config = DatabaseConfig(
            _INSIDE,
            dsn=Secret(endpoint.dsn),
            bin_dir=bin_dir,
            jobs=planned.request.jobs,
            stall_timeout=stall,
        )
        yield Protected(config, DirectoryStore(store))


def _restore(
    protected: Protected, request: DatabaseRequest, backup: str, clock: Clock, report: Report
) -> restore.RestoreResult:
    wanted = restore.RestoreRequest(
        backup=backup,
        into=request.into,
        to=request.server,
        create_roles=request.create_roles,
        without_owners=request.without_owners,
        jobs=request.jobs,
        program=request.program,
    )
    planned = restore.plan(protected, wanted, clock=clock)
    for line in planned.lines:
        report.say(line)
    return restore.carry_out(protected, planned, clock=clock, report=report)


def _result_lines(
    planned: Plan, recovered: recover.RecoverResult, restored: restore.RestoreResult, begun_s: float
) -> tuple[str, ...]:
    request, found = planned.request, recovered.recovered
    took = show_seconds(time.monotonic() - begun_s)
    return tuple(
        show_line(line)
        for line in (
            f"{request.database} of {planned.recovery.manifest.id.database}, as of "
            f"{planned.recovery.request.target}, is {request.into} on {request.server.shown}; {took} in all",
            f"last transaction of its cluster: {show_moment(found.last_commit_at)}; replayed to "
            f"{found.replayed_to}",
            *restored.lines[1:],  # the first names the dump in scratch
        )
    )


def record(planned: Plan, result: Result) -> dict[str, object]:
    """What was recovered, for scripts."""
    return {
        "cluster": planned.recovery.manifest.id.database,
        "from": planned.request.database,
        "database": result.database,
        "base_backup": str(planned.recovery.manifest.id),
        "target": str(planned.recovery.request.target),
        "replayed_to": str(result.recovered.recovered.replayed_to),
        "took_s": round(result.took_s, 3),
        "lines": list(result.lines),
    }
