"""A recovered directory becomes the new production: plan and show, then configure, start, archive, back up.

Called by commands/promote.py, on the machine and as the user that will run the server. Nothing of the old
production is touched. It may be run again after a crash: the record of the recovery stays in the directory
until the first base backup on the new timeline is there.
"""

import contextlib
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from psycopg.conninfo import make_conninfo

from backup_pipeline.actions import base_backup
from backup_pipeline.actions.promotion_checks import (
    TwinPromoted,
    major_of,
    owner_of,
    read_record,
    refuse_doubt,
    refuse_taken,
    system_in_archive,
)
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Report
from backup_pipeline.actions.source_configuration import (
    SourceConfiguration,
    is_configured,
    left_out_before,
    put_in_force,
    read_source_configuration,
)
from backup_pipeline.config import Secret
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovered import (
    PROMOTED_NAME,
    RECORD_NAME,
    RecoveredRecord,
)
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.engines.postgres import daemon, recovery
from backup_pipeline.engines.postgres.cluster import server_in
from backup_pipeline.engines.postgres.daemon import Address
from backup_pipeline.engines.postgres.server import connect, server_errors
from backup_pipeline.engines.postgres.tools import Tools, find_tools
from backup_pipeline.errors import BackupError, Refused, ServerError
from backup_pipeline.process import Identity
from backup_pipeline.storage import base_backups
from backup_pipeline.units import show_line
from backup_pipeline.wal.listing import read_archive

PROGRAMS = ("postgres", "pg_ctl", "pg_controldata")
_WAL_LEVELS = ("replica", "logical")


@dataclass(frozen=True)
class PromoteRequest:
    """What the operator asked for."""

    data: Path
    archive_command: str
    allowed: frozenset[str] = frozenset()  # names of settings that may run commands or load libraries
    source_is_gone: bool = False
    confirm: str = ""  # the cluster's name
    as_nobody: bool = False  # for tests: production runs as a user of its own


@dataclass(frozen=True)
class Plan:
    """A promotion that may be carried out; `lines` are for the operator to read first."""

    cluster: str
    request: PromoteRequest
    record: RecoveredRecord
    tools: Tools
    owner: Identity | None
    configuration: SourceConfiguration | None  # None: that step was done by an earlier attempt
    archiving: dict[str, str]
    running: bool
    warnings: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words."""
        record, data = self.record, self.request.data
        start = ("stopped, and started again" if self.running else "started") if self.configuration else ""
        start = start or ("running already" if self.running else "started")
        lines = (
            f"new production of {self.cluster}: {data}",
            f"recovered: {show_moment(record.recovered_at)}, to {record.target}, from {record.base_backup}",
            f"timeline: {record.timeline}, which left {record.source_timeline} after {record.replayed_to}",
            *(f"WARNING: {warning}" for warning in self.warnings),
            *(self.configuration.lines if self.configuration else ["configuration: put in force already"]),
            *(f"archiving: {name} = {value}" for name, value in self.archiving.items()),
            f"then: the server is {start}",
            "then: a base backup is taken at once; until it is there, the directory counts as not promoted",
        )
        return tuple(show_line(line) for line in lines)


@dataclass(frozen=True)
class Result:
    """What a promotion came to."""

    backup: BackupId
    address: Address
    lines: tuple[str, ...]


def plan(cluster: ProtectedCluster, request: PromoteRequest, *, clock: Clock) -> Plan:
    """Look at the directory, the archive and the old server; change nothing.

    Raises Refused for a directory that no recovery finished, an archive of another system, a source that may
    be alive; ConfigError, ToolError, StoreError.
    """
    data = request.data
    record = read_record(cluster, data)
    tools = find_tools(cluster.config.bin_dir, exactly=major_of(data), needs=PROGRAMS)
    owner = owner_of(data, as_nobody=request.as_nobody)
    control = recovery.read_control_file(tools.path("pg_controldata"), data)
    if control.system_identifier != record.system_identifier:
        raise Refused(
            f"{data} holds system {control.system_identifier}, its record says {record.system_identifier}",
            hint="This is not what was recovered there: recover again.",
        )
    listing = system_in_archive(cluster, record, data)
    warnings = refuse_doubt(cluster, record, listing, data, gone=request.source_is_gone, at=clock())
    configured = is_configured(data)
    refuse_taken(listing, record, data, has_archived=configured)
    configuration = None if configured else read_source_configuration(data, allowed=request.allowed)
    archiving = {} if configuration is None else _archiving(cluster, request, configuration)
    running = server_in(data) is not None
    return Plan(
        cluster.name, request, record, tools, owner, configuration, archiving, running, tuple(warnings)
    )


def carry_out(cluster: ProtectedCluster, planned: Plan, *, clock: Clock, report: Report) -> Result:
    """Promote as planned. What fails in the middle is gone on with when this is run again.

    Raises Refused unless the cluster's name was typed; ToolError, ServerError, StoreError.
    """
    request, record, data = planned.request, planned.record, planned.request.data
    if request.confirm != cluster.name:
        raise Refused(
            f"the promotion of {data} is not confirmed",
            hint=f"Look at the plan (--dry-run), then say --confirm {cluster.name}. Nothing was touched.",
        )
    pg_ctl = planned.tools.path("pg_ctl")
    if planned.configuration is not None:
        daemon.stop(pg_ctl, data, owner=planned.owner)
        postgres = planned.tools.path("postgres")
        put_in_force(data, planned.configuration, planned.archiving, postgres, owner=planned.owner)
        report.say("the source's configuration is in force, as planned")
    address = daemon.address(data) or daemon.start(pg_ctl, data, owner=planned.owner)
    report.say(f"the server runs, {_shown(address)}")
    try:
        local = at_its_own_address(cluster, address)
        _check_server(local, record, data)

        def refuse_twin() -> None:
            listing = read_archive(cluster.store, cluster.name)
            refuse_taken(listing, record, data, has_archived=True)

        # A twin may archive since the plan: what waits for WAL sees only that a name is there.
        refuse_twin()
        backup = _taken(cluster, record) or _back_up(local, clock, report, refuse=refuse_twin)
    except TwinPromoted:
        raise
    except BackupError as error:
        error.detail["meanwhile"] = f"the server of {data} runs, {_shown(address)}; nothing has to be undone"
        error.detail["to go on"] = f"run this again: {_again(request, cluster.name)}"
        raise
    os.replace(data / RECORD_NAME, data / PROMOTED_NAME)
    return Result(backup, address, _result_lines(cluster, planned, backup, address))


def _archiving(
    cluster: ProtectedCluster, request: PromoteRequest, configuration: SourceConfiguration
) -> dict[str, str]:
    given = {each.setting.name: each.setting.value for each in configuration.decisions if each.kept}
    level = given.get("wal_level", "replica")
    return {
        "wal_level": level if level in _WAL_LEVELS else "replica",
        "archive_mode": "on",
        "archive_library": "",
        "archive_command": request.archive_command,
        "archive_timeout": f"{cluster.config.archive_timeout.total_seconds():.0f}",
    }


def at_its_own_address(cluster: ProtectedCluster, address: Address) -> ProtectedCluster:
    """The cluster by the new server's own address: the configured one may still lead to the old.

    By its socket, or by TCP where the rules let the role in only there. Raises ServerError.
    """
    source = cluster.source()
    given = {"port": str(address.port), "user": source.user, "dbname": source.database}
    password = source.conninfo.get("password")
    given |= {"password": password} if password else {}
    refused: ServerError | None = None
    for host in filter(None, (address.socket_folder, "127.0.0.1" if address.host else "")):
        secret = Secret(make_conninfo("", host=host, **given))
        local = ProtectedCluster(replace(cluster.config, dsn=secret, password=None), cluster.store)
        try:
            connect(local.source(), purpose="promote").close()
        except ServerError as error:
            refused = refused or error
        else:
            return local
    raise refused or ServerError(
        f"the new server of {cluster.name} listens nowhere",
        hint="Look at listen_addresses and unix_socket_directories, and restart it; then run this again.",
    )


def _check_server(local: ProtectedCluster, record: RecoveredRecord, data: Path) -> None:
    """Raise ServerError unless the server that answers is the recovered one, and archives."""
    endpoint = local.source()
    with (
        contextlib.closing(connect(endpoint, purpose="promote")) as session,
        server_errors(endpoint, "cannot ask the server what it is"),
    ):
        row = session.execute(
            "SELECT system_identifier::text, pg_catalog.pg_is_in_recovery(),"
            " pg_catalog.current_setting('archive_mode'),"
            " substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8)"
            " FROM pg_catalog.pg_control_system()"
        ).fetchone()
    expected = (record.system_identifier, False, "on", f"{record.timeline:08X}")
    if row is None or tuple(row) != expected:
        raise ServerError(
            f"the server of {data} is not what it should be: {row}, expected {expected}",
            detail={"asked": "system, in recovery, archive_mode, timeline"},
            hint="Look at its configuration, and restart it; then run this again.",
        )


def _taken(cluster: ProtectedCluster, record: RecoveredRecord) -> BackupId | None:
    """A base backup on the new timeline that is there already."""
    for each in base_backups.list_base_backups(cluster.store, cluster.name, fresh=True).backups:
        manifest = each.manifest
        if (
            manifest.system_identifier == record.system_identifier
            and manifest.start.timeline == record.timeline
            and manifest.started_at > record.recovered_at
        ):
            return each.id
    return None


def _back_up(
    local: ProtectedCluster, clock: Clock, report: Report, *, refuse: Callable[[], None]
) -> BackupId:
    report.say("taking the first base backup of the new production")
    return base_backup.take(local, clock=clock, report=report, fast=True, refuse=refuse).id


def _again(request: PromoteRequest, cluster: str) -> str:
    gone = " --source-is-gone" if request.source_is_gone else ""
    return f"backup-pipeline promote {cluster} {shlex.quote(str(request.data))}{gone}"


def _shown(address: Address) -> str:
    by_tcp = f"on {address.host}:{address.port}" if address.host else f"by no TCP, port {address.port}"
    return f"{by_tcp}, its socket in {address.socket_folder or 'no folder'}"


def _result_lines(
    cluster: ProtectedCluster, planned: Plan, backup: BackupId, address: Address
) -> tuple[str, ...]:
    data, name, timeline = planned.request.data, cluster.name, planned.record.timeline
    left = planned.configuration.left_out if planned.configuration else left_out_before(data)
    lines = (
        f"{data} is the production of {name} now, on timeline {timeline}; it archives, and {backup} is taken",
        f"it runs, {_shown(address)}",
        *(
            [f"to do: look at what was left out, in {data}/postgresql.conf: {'; '.join(left)}"]
            if left
            else []
        ),
        "to do: let clients come here: DNS, the pooler, the address in their configuration",
        f"to do: never start the old server again; it goes on with timeline {planned.record.source_timeline}",
        f"to do: clusters.{name} in the configuration: dsn leads here, data_directory is {data}",
        f"to do: the agent, on this machine: systemctl enable --now backup-pipeline-wal-agent@{name}; then "
        f"`backup-pipeline wal status {name}`",
        f"to do: have the system start it at boot; it was started by {planned.tools.bin_dir}/pg_ctl",
        "to do: standbys are made anew, or by pg_rewind; replication slots came along with no backup",
    )
    return tuple(show_line(line) for line in lines)


def record(planned: Plan, result: Result) -> dict[str, object]:
    """What became production, for scripts."""
    return {
        "cluster": planned.cluster,
        "data_directory": str(planned.request.data),
        "timeline": planned.record.timeline,
        "base_backup": str(result.backup),
        "port": result.address.port,
        "lines": list(result.lines),
    }
