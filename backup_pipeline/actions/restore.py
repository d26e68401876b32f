"""Restore a backup: plan and show, build a new database beside the others, check it, name it or swap it.

Called by cli.py and by Dagster's restore job. Nothing that exists is touched before the new copy is
complete and, unless the operator said otherwise, equal to its source.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from backup_pipeline.actions import backups, target
from backup_pipeline.actions.compare import Restored, compare_restored
from backup_pipeline.actions.fetch import (
    Fetched,
    fetch_dump,
    fetch_imported,
    fetch_small,
    imported_header,
)
from backup_pipeline.actions.protected import Clock, Protected
from backup_pipeline.actions.publish import Place, publish
from backup_pipeline.actions.report import Report, loading
from backup_pipeline.domain import recovery
from backup_pipeline.domain.backup import Backup, DatabaseProperties, ObjectRole
from backup_pipeline.domain.choice import find
from backup_pipeline.domain.fingerprint import Fingerprint, fingerprint_from_json
from backup_pipeline.domain.recovery import RestorePlan, plan_restore
from backup_pipeline.engines.postgres import load, restore
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.event_triggers import without_event_triggers
from backup_pipeline.engines.postgres.globals import Globals, Role, parse_globals
from backup_pipeline.engines.postgres.lock import NEUTRAL_DATABASE
from backup_pipeline.engines.postgres.properties import read_properties
from backup_pipeline.engines.postgres.roles import (
    NO_ROLES,
    RolePlan,
    create_roles,
    existing_roles,
    plan_roles,
)
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.engines.postgres.tools import Tools, find_tools
from backup_pipeline.errors import BackupError, ConfigError, ProofFailed
from backup_pipeline.spool import private_folder
from backup_pipeline.storage import leases
from backup_pipeline.storage.store import Store
from backup_pipeline.units import show_count, show_line, show_seconds

CHECKS = ("content", "counts", "none")


@dataclass(frozen=True)
class RestoreRequest(recovery.RestoreRequest):
    """What the operator asked for, where to, and how closely the copy is looked at before it counts."""

    to: Endpoint | None = None  # another server; None: the one of restore_dsn
    check: str = "content"  # "content" | "counts" | "none": what is compared with the source
    accept_unverified: bool = False  # open an imported dump with a pg_restore of a known hole
    jobs: int = 0  # how many tables and indexes are loaded at once; 0: as the manifest says
    program: tuple[str, ...] = target.PROGRAM  # what begins the commands that are told


@dataclass(frozen=True)
class Plan:
    """A restore that may be carried out; `lines` are for the operator to read first."""

    request: RestoreRequest
    target: Endpoint  # the maintenance database of the server
    decided: RestorePlan
    tools: Tools
    expected: Fingerprint | None = None  # what the copy is compared with; None: nothing is compared
    known_roles: Globals | None = None  # where roles that are missing are described
    created: tuple[Role, ...] = ()

    @property
    def backup(self) -> Backup:
        """What will be restored."""
        return self.decided.backup

    @property
    def place(self) -> Place:
        """Where the finished copy belongs."""
        decided, request = self.decided, self.request
        return Place(self.target, decided.target, bool(decided.kept_name), request.to, request.program)

    @property
    def contents(self) -> bool:
        """Whether rows are compared, not only counted."""
        return self.request.check == "content" and bool(self.expected and self.expected.has_contents)

    @property
    def jobs(self) -> int:
        """How many tables and indexes are loaded at once."""
        return self.request.jobs or (self.backup.manifest.jobs if self.backup.manifest else 1)

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words."""
        roles = (f"role: {_shown_role(role)}" for role in self.created)
        load_line = f"load: {show_count(self.jobs, 'job')} at once"
        return tuple(show_line(line) for line in (*self.decided.lines, *roles, load_line, self._check_line()))

    def _check_line(self) -> str:
        if self.contents:
            return "check: every row is compared with the source's before the copy gets its name"
        if self.backup.manifest is None:
            return "check: none; with a dump of an older layout there is nothing to compare"
        if self.expected is None:
            return "check: none"
        if self.request.check == "content":
            return "check: rows are counted, not compared: more was not recorded with this backup"
        return "check: rows are counted, not compared"


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
    if request.jobs < 0:
        raise ConfigError(f"jobs is {request.jobs}", hint="Give a number from 1, or 0 for the manifest's.")
    server = target.maintenance(request.to or protected.target())
    listing = backups.listing(protected, fresh=True)
    backup = find(listing, request.backup)
    expected, known = _expected(protected, backup, request), _globals(protected, backup, request)
    wanted = target.Wanted(
        backup,
        database=request.into,
        live=_live_name(protected, backup),
        replace=request.replace,
        owners=not request.without_owners,
        accept_unverified=request.accept_unverified,
    )
    tools = find_tools(protected.config.bin_dir, at_least=_client_major(protected, backup))
    with contextlib.closing(connect(server, purpose="restore")) as session:
        server, grant = without_event_triggers(server, session)
        facts = target.look(server, session, tools, wanted)
        facts = replace(facts, notes=(*facts.notes, *_foreign(protected, backup, wanted.live)))
        if grant and expected and any(each.kind == "EVENT TRIGGER" for each in expected.schema_before):
            note = f"event triggers of the copy run before it is compared: as a superuser, {grant}"
            facts = replace(facts, notes=(*facts.notes, note))
        roles = _plan_roles(session, backup, known) if known and facts.missing_roles else NO_ROLES
        facts = replace(facts, undescribed_roles=roles.absent)
    decided = plan_restore(listing, replace(request, backup=str(backup.id)), facts, now=clock())
    return Plan(request, server, decided, tools, expected, known, roles.create)


def _client_major(protected: Protected, backup: Backup) -> int:
    """The version of pg_dump that wrote the dump: an older pg_restore cannot read it."""
    if backup.manifest is not None:
        return backup.manifest.source.client_version // 10000
    return imported_header(_imports(protected, backup), backup).client_major


def _foreign(protected: Protected, backup: Backup, live: str) -> tuple[str, ...]:
    """A note when an imported dump says that it is of another database than the one it is listed for."""
    if backup.manifest is not None:
        return ()
    found = imported_header(_imports(protected, backup), backup).database
    return () if found in ("", live) else (f"the dump says that it is of database {found}, not of {live}",)


def _imports(protected: Protected, backup: Backup) -> Store:
    if protected.imports is None:
        raise ConfigError(f"{backup.id}: no import_from is configured for {protected.name}")
    return protected.imports


def _expected(protected: Protected, backup: Backup, request: RestoreRequest) -> Fingerprint | None:
    """What the copy is to be compared with: read for the plan, which says how closely that will be."""
    if backup.manifest is None or request.check == "none":
        return None
    (item,) = backup.manifest.of_role(ObjectRole.FINGERPRINT)
    return fingerprint_from_json(fetch_small(protected.store, item), item.key)


def _globals(protected: Protected, backup: Backup, request: RestoreRequest) -> Globals | None:
    if backup.manifest is None or not request.create_roles:
        return None
    (item,) = backup.manifest.of_role(ObjectRole.GLOBALS)
    return parse_globals(fetch_small(protected.store, item))


def name_to_confirm(protected: Protected, request: RestoreRequest) -> str:
    """The name of the database that a replacing restore would replace. Raises BackupNotFound."""
    return request.into or _live_name(protected, backups.find(protected, request.backup))


def carry_out(protected: Protected, planned: Plan, *, clock: Clock, report: Report) -> RestoreResult:
    """Restore as planned. May be repeated; whatever fails leaves every existing database as it was, and
    what fails only to swap keeps the finished copy beside them, which the error names.

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
        source = _bring(protected, planned, spool, report)
        # From here on nothing is needed of the store: its bytes are here, and verified.
        roles = _create_missing_roles(planned, report)
        with (
            roles.told_of(),
            restore.temporary_database(
                planned.target, decided.target, source.properties, tell=report.say
            ) as temporary,
        ):
            unknown = _fill(protected, planned, source, temporary, report)
            checked = _check(protected, planned, source, temporary, report)
            restore_s = time.monotonic() - begun_s
            named = publish(protected, planned.place, temporary, clock(), report)
    return RestoreResult(
        database=decided.target,
        kept_as=named.kept,
        restore_s=restore_s,
        lines=(
            f"restored {backup.id} as {decided.target} in {show_seconds(restore_s)}",
            *checked,
            *(f"note: {line}" for line in decided.left_out),
            *unknown,
            *roles.lines,
            *named.lines,
        ),
    )


@dataclass(frozen=True)
class _Brought:
    """A dump on local disk, and what its database is to be like."""

    fetched: Fetched
    properties: DatabaseProperties


def _bring(protected: Protected, planned: Plan, spool: Path, report: Report) -> _Brought:
    backup = planned.backup
    if backup.manifest is not None:
        fetched = fetch_dump(protected.store, backup.manifest, spool, report)
        return _Brought(fetched, _properties(planned, backup.manifest.source.database))
    fetched = fetch_imported(_imports(protected, backup), backup, spool, report)
    with contextlib.closing(connect(planned.target, purpose="restore")) as session:
        neutral = read_properties(session, NEUTRAL_DATABASE)
    plain = replace(neutral, settings=(), comment=None, connection_limit=-1, is_template=False)
    return _Brought(fetched, _properties(planned, plain))


def _properties(planned: Plan, source: DatabaseProperties) -> DatabaseProperties:
    """What the new database is to have of the source's properties."""
    if planned.decided.without_tablespaces:
        source = replace(source, tablespace="pg_default")
    if not planned.decided.without_owners:
        return source
    with contextlib.closing(connect(planned.target, purpose="restore")) as session:
        row = session.execute("SELECT current_user").fetchone()
    return source.without_roles(owner=str(row[0]) if row else "")


def _fill(
    protected: Protected, planned: Plan, source: _Brought, temporary: str, report: Report
) -> tuple[str, ...]:
    """Load the dump and make its database like the source's; return what is wanting, in words."""
    decided, stall_s = planned.decided, protected.config.stall_timeout.total_seconds()
    restore.try_properties(planned.target, temporary, source.properties)
    load.load(
        planned.target,
        temporary,
        source.fetched.archive,
        load.LoadOptions(
            planned.jobs, tablespaces=not decided.without_tablespaces, owners=not decided.without_owners
        ),
        tools=planned.tools,
        progress=loading(report),
        limits=load.LoadLimits(stall_s),
    )
    report.say("gathering the planner's statistics")
    unknown = tuple(f"warning: {line}" for line in restore.analyze(planned.target, temporary))
    for line in unknown:
        report.say(line)
    restore.apply_properties(planned.target, temporary, source.properties)
    return unknown


def _check(
    protected: Protected, planned: Plan, source: _Brought, temporary: str, report: Report
) -> tuple[str, ...]:
    """Compare the copy with the fingerprint of its source. Raises ProofFailed."""
    if planned.expected is None:
        return ("its contents were not compared with the source",)

    @contextlib.contextmanager
    def spare() -> Iterator[Endpoint]:
        with restore.temporary_database(planned.target, planned.decided.target, source.properties) as name:
            yield planned.target.with_database(name)

    stall_s = protected.config.stall_timeout.total_seconds()
    copy = planned.target.with_database(temporary)
    restored = Restored(copy, source.fetched.archive, planned.tools, spare, stall_s)
    comparison = compare_restored(
        planned.expected,
        restored,
        contents=planned.contents,
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
    left_out = ("owners and grants were not compared",)
    return (*comparison.checked, *(left_out if planned.decided.without_owners else ()))


def _plan_roles(session: Connection, backup: Backup, known: Globals) -> RolePlan:
    source = backup.manifest.source if backup.manifest else None
    needed = (source.database.owner, *source.roles) if source else ()
    return plan_roles(known, needed=needed, existing=existing_roles(session))


@dataclass(frozen=True)
class _Roles:
    """What was created before the load, and the statements that are for a person to decide on."""

    created: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(f"left to you: {statement}" for statement in self.left)

    @contextlib.contextmanager
    def told_of(self) -> Iterator[None]:
        """Let an error say what stays: the next attempt finds these roles there, and is silent."""
        try:
            yield
        except BackupError as error:
            if self.created:
                error.detail["roles that were created and stay"] = ", ".join(self.created)
            if self.left:
                error.detail["left to you"] = " ".join(self.left)
            raise


def _create_missing_roles(planned: Plan, report: Report) -> _Roles:
    if not planned.created or planned.known_roles is None:
        return _Roles()
    with contextlib.closing(connect(planned.target, purpose="restore")) as session:
        wanted = _plan_roles(session, planned.backup, planned.known_roles)
        left = create_roles(session, wanted)
    made = _Roles(tuple(role.name for role in wanted.create), (*wanted.withheld, *left))
    for role in wanted.create:
        report.say(f"created role {_shown_role(role)}")
    for line in made.lines:
        report.say(line)
    return made


def _shown_role(role: Role) -> str:
    return f"{role.name}, {'with the password that it had' if role.password else 'without a password'}"


def _live_name(protected: Protected, backup: Backup) -> str:
    """The database that a replacing restore swaps, unless another is named: the one that was backed up."""
    if backup.manifest is not None:
        return backup.manifest.source.database.name
    return protected.source().database
