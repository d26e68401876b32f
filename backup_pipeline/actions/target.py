"""The server that a restore or an undo goes to: what is found there, for a plan. Changes nothing.

Called by restore.py and undo.py. What follows from what was found is domain/recovery.py's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from psycopg import sql

from backup_pipeline.domain.backup import Backup, Source
from backup_pipeline.domain.recovery import TargetFacts
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import NEUTRAL_DATABASE
from backup_pipeline.engines.postgres.requirements import Requirements, missing_requirements
from backup_pipeline.engines.postgres.server import Connection, read_server_info
from backup_pipeline.engines.postgres.swap import check_swap
from backup_pipeline.engines.postgres.tools import Tools, known_vulnerable
from backup_pipeline.errors import Refused

PROGRAM = ("backup-pipeline",)
"""What begins the commands that are told to the operator."""


@dataclass(frozen=True)
class Wanted:
    """What is to be restored to a server, as far as the server is asked about it."""

    backup: Backup
    database: str  # the name that it will have, or "" when one is made up
    live: str  # the database that the backup is of
    replace: bool
    owners: bool
    accept_unverified: bool


def maintenance(endpoint: Endpoint) -> Endpoint:
    """The server's `postgres`: a database that no restore touches."""
    return endpoint.with_database(NEUTRAL_DATABASE)


def look(target: Endpoint, session: Connection, tools: Tools, wanted: Wanted) -> TargetFacts:
    """What a plan has to know of the server of `session`."""
    info = read_server_info(session)
    source = wanted.backup.manifest.source if wanted.backup.manifest else None
    lacking = missing_requirements(session, source) if source else None
    databases = database_names(session)
    replaced = (wanted.database or wanted.live) if wanted.replace else ""
    problems = [*_of_requirements(lacking), *_of_tools(tools, wanted)]
    notes = list(lacking.notes if lacking else ())
    if source and wanted.owners and not info.is_superuser:
        problems += _of_owner(session, source)
    if replaced in databases:
        problems += swap_problems(target, session, replaced)
        if grant := signal_grant(session):
            notes.append(f"sessions of other roles cannot be ended; as a superuser: {grant}")
    return TargetFacts(
        server=target.shown,
        server_version=info.version,
        server_version_text=info.version_text,
        client_version=tools.version,
        client_version_text=tools.version_text,
        databases=databases,
        live=wanted.live,
        missing_roles=lacking.roles if lacking else (),
        missing_extensions=lacking.extensions if lacking else (),
        missing_tablespaces=lacking.tablespaces if lacking else (),
        need_bytes=lacking.need_bytes if lacking else None,
        free_bytes=lacking.free_bytes if lacking else None,
        sessions=sessions_in(session, replaced),
        may_create=may_create(session),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _of_requirements(lacking: Requirements | None) -> Iterator[tuple[str, str]]:
    if lacking is None:
        return
    if lacking.standby:
        yield lacking.standby, "Restore to the primary, or to another server."
    if lacking.locale:
        yield lacking.locale, "Install that locale on the server's machine."
    if lacking.untrusted_extensions:
        names = ", ".join(lacking.untrusted_extensions)
        yield f"only a superuser may create extensions {names}", "Restore as a superuser."


def _of_tools(tools: Tools, wanted: Wanted) -> Iterator[tuple[str, str]]:
    hole = known_vulnerable(tools.version)
    if hole and wanted.backup.manifest is None and not wanted.accept_unverified:
        fix = "Update the client tools, or accept an unverified dump if you know who wrote it."
        yield f"an imported dump has no digest to verify, and {hole}", fix


def _of_owner(session: Connection, source: Source) -> Iterator[tuple[str, str]]:
    """The new database is given to its owner, and renamed, which takes a member of that role."""
    row = session.execute(
        "SELECT current_user FROM pg_catalog.pg_roles"
        " WHERE rolname = %s AND NOT pg_catalog.pg_has_role(oid, 'USAGE')",
        [source.database.owner],
    ).fetchone()
    if row:
        owner, role = sql.Identifier(source.database.owner), sql.Identifier(str(row[0]))
        grant = sql.SQL("GRANT {} TO {};").format(owner, role).as_string(session)
        yield (
            f"role {row[0]} is no member of {source.database.owner}, whose the database is",
            f"As a superuser: {grant} Or leave out owners.",
        )


def swap_problems(target: Endpoint, session: Connection, live: str) -> Iterator[tuple[str, str]]:
    """What keeps this role from swapping `live`, which exists, as things are now: (problem, fix)."""
    try:
        check_swap(target, session, live)
    except Refused as error:
        facts = "; ".join(f"{name}: {value}" for name, value in error.detail.items())
        yield f"{error.message}{f' ({facts})' if facts else ''}", error.hint or "Choose another database."


def may_create(session: Connection) -> bool:
    """Whether the role of `session` may create databases."""
    row = session.execute(
        "SELECT rolcreatedb OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user"
    ).fetchone()
    return bool(row and row[0])


def signal_grant(session: Connection) -> str:
    """The statement that lets the role of `session` end sessions of others; "" when it may."""
    row = session.execute(
        "SELECT rolname FROM pg_catalog.pg_roles WHERE rolname = current_user AND NOT rolsuper"
        " AND NOT pg_catalog.pg_has_role('pg_signal_backend', 'USAGE')"
    ).fetchone()
    if row is None:
        return ""
    return sql.SQL("GRANT pg_signal_backend TO {};").format(sql.Identifier(str(row[0]))).as_string(session)


def database_names(session: Connection) -> tuple[str, ...]:
    """The names of all databases of the server."""
    rows = session.execute("SELECT datname FROM pg_catalog.pg_database")
    return tuple(sorted(str(name) for (name,) in rows))


def exists(session: Connection, database: str) -> bool:
    """Whether the server has this database."""
    query = "SELECT FROM pg_catalog.pg_database WHERE datname = %s"
    return session.execute(query, [database]).fetchone() is not None


def sessions_in(session: Connection, database: str) -> int:
    """How many sessions are in `database` now."""
    row = session.execute(
        "SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity WHERE datname = %s", [database]
    ).fetchone()
    return int(str(row[0])) if row else 0


def size_of(session: Connection, database: str) -> int | None:
    """The bytes that `database` takes; None when the role may not see it."""
    row = session.execute(
        "SELECT CASE WHEN pg_catalog.has_database_privilege(oid, 'CONNECT')"
        " THEN pg_catalog.pg_database_size(oid) END FROM pg_catalog.pg_database WHERE datname = %s",
        [database],
    ).fetchone()
    return None if row is None or row[0] is None else int(str(row[0]))
