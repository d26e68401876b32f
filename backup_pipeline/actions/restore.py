"""Restore a backup: plan and show, build a new database beside the others, check it, name it or swap it.

Called by cli.py and by Dagster's restore job. Nothing that exists is touched before the new copy is
complete and, unless the operator said otherwise, equal to its source.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from backup_pipeline.actions import backups
from backup_pipeline.actions.compare import Restored, compare_restored
from backup_pipeline.actions.fetch import Fetched, fetch_dump, fetch_imported, fetch_small
from backup_pipeline.actions.protected import Clock, Protected
from backup_pipeline.actions.report import Report, timed
from backup_pipeline.domain import recovery
from backup_pipeline.domain.backup import Backup, DatabaseProperties, Manifest, ObjectRole, Source
from backup_pipeline.domain.choice import find
from backup_pipeline.domain.fingerprint import fingerprint_from_json
from backup_pipeline.domain.recovery import RestorePlan, TargetFacts, plan_restore
from backup_pipeline.engines.postgres import load, restore, swap
from backup_pipeline.engines.postgres.archive import read_header
from backup_pipeline.engines.postgres.globals import parse_globals
from backup_pipeline.engines.postgres.properties import read_properties
from backup_pipeline.engines.postgres.requirements import Requirements, missing_requirements
from backup_pipeline.engines.postgres.roles import create_roles, existing_roles, plan_roles
from backup_pipeline.engines.postgres.server import (
    NEUTRAL_DATABASE,
    Connection,
    Endpoint,
    connect,
    read_server_info,
)
from backup_pipeline.engines.postgres.tools import Tools, find_tools, known_vulnerable
from backup_pipeline.errors import ConfigError, ProofFailed
from backup_pipeline.spool import private_folder
from backup_pipeline.storage import leases
from backup_pipeline.units import show_count, show_line, show_seconds

CHECKS = ("content", "counts", "none")


@dataclass(frozen=True)
class RestoreRequest(recovery.RestoreRequest):
    """What the operator asked for, where to, and how closely the copy is looked at before it counts."""

    to: Endpoint | None = None  # another server; None: the one of restore_dsn
    check: str = "content"  # "content" | "counts" | "none": what is compared with the source
    accept_unverified: bool = False  # open an imported dump with a pg_restore of a known hole


@dataclass(frozen=True)
class Plan:
    """A restore that may be carried out; `lines` are for the operator to read first."""

    request: RestoreRequest
    target: Endpoint  # the maintenance database of the server
    decided: RestorePlan

    @property
    def backup(self) -> Backup:
        """What will be restored."""
        return self.decided.backup

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words."""
        check = {
            "content": "check: every row is compared with the source's before the copy gets its name",
            "counts": "check: rows are counted, not compared",
            "none": "check: none",
        }[self.request.check]
        return tuple(show_line(line) for line in (*self.decided.lines, check))


@dataclass(frozen=True)
class RestoreResult:
    """What a restore came to."""

    database: str  # the name that the restored copy bears now
    kept_as: str  # the name of the database that it replaced; "" when none was
    restore_s: float
    lines: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(show_line(line) for line in self.lines))


def plan(protected: Protected, request: RestoreRequest, *, clock: Clock) -> Plan:
    """Look at the store and the target, change nothing, and say what a restore would do.

    Raises Refused with every reason and the fix for each; BackupNotFound, ConfigError, ServerError.
    """
    if request.check not in CHECKS:
        raise ConfigError(f'check is "{request.check}"', hint=f"Choose one of {', '.join(CHECKS)}.")
    target = _maintenance(request.to or protected.target())
    listing = backups.listing(protected, fresh=True)
    backup = find(listing, request.backup)
    asked = replace(
        request,
        backup=str(backup.id),
        without_owners=request.without_owners or backup.manifest is None,
    )
    with contextlib.closing(connect(target, purpose="restore")) as session:
        facts = _facts(protected, target, session, backup, request)
    return Plan(request, target, plan_restore(listing, asked, facts, now=clock()))


def name_to_confirm(protected: Protected, request: RestoreRequest) -> str:
    """The name of the database that a replacing restore would replace. Raises BackupNotFound."""
    return request.into or _live_name(protected, backups.find(protected, request.backup))


def carry_out(protected: Protected, planned: Plan, *, clock: Clock, report: Report) -> RestoreResult:
    """Restore as planned. May be repeated; whatever fails leaves every existing database as it was.

    Raises Corrupt, ToolError, ServerError, StoreError, Refused, Busy; ProofFailed when the copy is not
    equal to its source: then it is dropped.
    """
    backup, decided = planned.backup, planned.decided
    begun_s = time.monotonic()
    with (
        leases.hold(protected.store, backup.id, "restore", clock=clock, required=False) as lease,
        private_folder("restore") as spool,
    ):
        if lease.unshielded:
            report.say(f"warning: {lease.unshielded}")
        source = _bring(protected, backup, spool, report)
        said = _create_missing_roles(protected, planned, report)
        with restore.temporary_database(planned.target, decided.target, source.properties) as temporary:
            _fill(planned, source, temporary, report)
            checked = _check(protected, planned, source, temporary, report)
            lease.check()
            restore_s = time.monotonic() - begun_s
            named = _name(protected, planned, temporary, clock(), report)
    return RestoreResult(
        database=decided.target,
        kept_as=named.kept,
        restore_s=restore_s,
        lines=(
            f"restored {backup.id} as {decided.target} in {show_seconds(restore_s)}",
            *checked,
            *said,
            *named.lines,
        ),
    )


def undo(protected: Protected, *, clock: Clock, report: Report, to: Endpoint | None = None) -> RestoreResult:
    """Swap back what the last restore replaced; what was live meanwhile is kept under another name.

    Raises BackupNotFound when no kept copy is left, Refused, Busy, ServerError.
    """
    target = _maintenance(to or protected.target())
    live, begun_s = protected.source().database, time.monotonic()
    report.say(f"swapping {live} back")
    done = swap.undo(target, live, clock(), wait_s=protected.config.lock_timeout.total_seconds())
    return RestoreResult(
        database=live,
        kept_as=done.kept,
        restore_s=time.monotonic() - begun_s,
        lines=(
            f"{live} is again the database that the last restore had put aside",
            f"what was live meanwhile is now called {done.kept}; drop it when nobody needs it",
            *done.left_behind,
        ),
    )


@dataclass(frozen=True)
class _Brought:
    """A dump on local disk and what is needed to load it."""

    fetched: Fetched
    tools: Tools
    properties: DatabaseProperties
    jobs: int
    manifest: Manifest | None


@dataclass(frozen=True)
class _Named:
    kept: str = ""
    lines: tuple[str, ...] = ()


def _bring(protected: Protected, backup: Backup, spool: Path, report: Report) -> _Brought:
    manifest, config = backup.manifest, protected.config
    if manifest is not None:
        fetched = fetch_dump(protected.store, manifest, spool, report)
        tools = find_tools(config.bin_dir, at_least=manifest.source.client_version // 10000)
        return _Brought(fetched, tools, manifest.source.database, manifest.jobs, manifest)
    if protected.imports is None:
        raise ConfigError(f"{backup.id}: no import_from is configured for {protected.name}")
    fetched = fetch_imported(protected.imports, backup, spool, report)
    header = read_header(fetched.archive, find_tools(config.bin_dir))
    with contextlib.closing(connect(_maintenance(protected.target()), purpose="restore")) as session:
        own = read_properties(session, NEUTRAL_DATABASE)
    plain = replace(own, owner=protected.target().user, grants=None, settings=(), comment=None)
    return _Brought(fetched, find_tools(config.bin_dir, at_least=header.client_major), plain, 1, None)


def _fill(planned: Plan, source: _Brought, temporary: str, report: Report) -> None:
    tell, decided = timed(report, "restore"), planned.decided
    load.load(
        planned.target,
        temporary,
        source.fetched.archive,
        tools=source.tools,
        jobs=source.jobs,
        tablespaces=not decided.without_tablespaces,
        owners=not decided.without_owners,
        progress=lambda seen: tell(seen.loaded_bytes or 0, 0),
    )
    report.say("gathering the planner's statistics")
    restore.analyze(planned.target, temporary)
    if not decided.without_owners:
        restore.apply_properties(planned.target, temporary, source.properties)


def _check(
    protected: Protected, planned: Plan, source: _Brought, temporary: str, report: Report
) -> tuple[str, ...]:
    """Compare the copy with the fingerprint of its source. Raises ProofFailed."""
    manifest, wanted = source.manifest, planned.request.check
    if wanted == "none" or manifest is None:
        return ("its contents were not compared with the source",)
    (item,) = manifest.of_role(ObjectRole.FINGERPRINT)
    expected = fingerprint_from_json(fetch_small(protected.store, item), item.key)

    @contextlib.contextmanager
    def spare() -> Iterator[Endpoint]:
        with restore.temporary_database(planned.target, planned.decided.target, source.properties) as name:
            yield planned.target.with_database(name)

    restored = Restored(planned.target.with_database(temporary), source.fetched.archive, source.tools, spare)
    contents = wanted == "content" and expected.has_contents
    comparison = compare_restored(
        expected,
        restored,
        contents=contents,
        connections=protected.config.fingerprint_connections,
        report=report,
        owners=not planned.decided.without_owners,
    )
    if comparison.differences:
        raise ProofFailed(
            f"the restored copy of {planned.backup.id} is not equal to its source; it was dropped",
            detail={f"difference {number}": line for number, line in enumerate(comparison.differences, 1)},
            hint="Restore another backup; as the last resort, restore this one with --check none.",
        )
    left_out = ("owners and grants were left out, and not compared",)
    return (*comparison.checked, *(left_out if planned.decided.without_owners else ()))


def _name(protected: Protected, planned: Plan, temporary: str, now: datetime, report: Report) -> _Named:
    """Give the finished copy its name, in one step that happens whole or not at all."""
    decided, target = planned.decided, planned.target
    if not decided.kept_name:
        swap.publish(target, temporary, decided.target)
        return _Named()
    report.say(f"swapping: {decided.target} is kept under another name, its sessions are ended")
    kept = swap.kept_name(decided.target, now)
    wait_s = protected.config.lock_timeout.total_seconds()
    done = swap.swap(target, decided.target, temporary, kept, wait_s=wait_s)
    lines = (
        f"the database that was live is kept as {kept}",
        f"`backup-pipeline undo {protected.name}` swaps it back",
        f"{show_count(done.sessions_ended, 'session')} ended; new ones waited {show_seconds(done.held_s)}",
        *done.left_behind,
    )
    return _Named(kept, lines)


def _create_missing_roles(protected: Protected, planned: Plan, report: Report) -> tuple[str, ...]:
    manifest = planned.backup.manifest
    if not planned.decided.missing_roles or manifest is None:
        return ()
    (item,) = manifest.of_role(ObjectRole.GLOBALS)
    known = parse_globals(fetch_small(protected.store, item))
    needed = (manifest.source.database.owner, *manifest.source.roles)
    with contextlib.closing(connect(planned.target, purpose="restore")) as session:
        wanted = plan_roles(known, needed=needed, existing=existing_roles(session))
        left = create_roles(session, wanted)
    for role in wanted.create:
        report.say(f"created role {role.name}, without a password")
    return tuple(f"left to you: {statement}" for statement in (*wanted.withheld, *left))


def _facts(
    protected: Protected, target: Endpoint, session: Connection, backup: Backup, request: RestoreRequest
) -> TargetFacts:
    info = read_server_info(session)
    manifest = backup.manifest
    source = manifest.source if manifest else None
    wanted = source.client_version // 10000 if source else 0
    tools = find_tools(protected.config.bin_dir, at_least=wanted)
    lacking = missing_requirements(session, source) if source else None
    live = _live_name(protected, backup)
    return TargetFacts(
        server=target.shown,
        server_version=info.version,
        server_version_text=info.version_text,
        client_version=tools.version,
        client_version_text=tools.version_text,
        databases=_names(session, "SELECT datname FROM pg_catalog.pg_database"),
        live=live,
        roles=tuple(sorted(existing_roles(session))),
        extensions=_pairs(session),
        tablespaces=_names(session, "SELECT spcname FROM pg_catalog.pg_tablespace"),
        free_bytes=lacking.free_bytes if lacking else None,
        sessions=_sessions(session, request.into or live),
        may_create=_may_create(session),
        problems=_problems(lacking, tools, source, accept_unverified=request.accept_unverified),
    )


def _problems(
    lacking: Requirements | None, tools: Tools, source: Source | None, *, accept_unverified: bool
) -> tuple[tuple[str, str], ...]:
    """What a plan cannot see by itself."""
    found = []
    if lacking and lacking.standby:
        found.append((lacking.standby, "Restore to the primary, or to another server."))
    if lacking and lacking.locale:
        found.append((lacking.locale, "Install that locale on the server's machine."))
    if lacking and lacking.untrusted_extensions:
        names = ", ".join(lacking.untrusted_extensions)
        found.append((f"only a superuser may create extensions {names}", "Restore as a superuser."))
    hole = known_vulnerable(tools.version)
    if hole and source is None and not accept_unverified:
        fix = "Update the client tools, or accept an unverified dump if you know who wrote it."
        found.append((f"an imported dump has no digest to verify, and {hole}", fix))
    return tuple(found)


def _live_name(protected: Protected, backup: Backup) -> str:
    """The database that a replacing restore swaps, unless another is named: the one that was backed up."""
    if backup.manifest is not None:
        return backup.manifest.source.database.name
    return protected.source().database


def _maintenance(endpoint: Endpoint) -> Endpoint:
    """The server's `postgres`: a database that no restore touches."""
    return endpoint.with_database(NEUTRAL_DATABASE)


def _names(session: Connection, query: str) -> tuple[str, ...]:
    return tuple(sorted(str(name) for (name,) in session.execute(query.encode())))


def _pairs(session: Connection) -> tuple[tuple[str, str], ...]:
    rows = session.execute("SELECT name, default_version FROM pg_catalog.pg_available_extensions")
    return tuple(sorted((str(name), str(version)) for name, version in rows))


def _sessions(session: Connection, database: str) -> int:
    row = session.execute(
        "SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity WHERE datname = %s", [database]
    ).fetchone()
    return int(str(row[0])) if row else 0


def _may_create(session: Connection) -> bool:
    row = session.execute(
        "SELECT rolcreatedb OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user"
    ).fetchone()
    return bool(row and row[0])
