"""Whether a dump of a database would be whole: asked of the server before anything is dumped.

Called before each dump, and by the operator's check. A failed check would make the dump fail or, worse,
lose rows without a word; a warning is worth reading and stops nothing. Nothing is changed here.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from psycopg import sql

from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.fingerprint import check_critical_tables
from backup_pipeline.engines.postgres.lock import NEUTRAL_DATABASE
from backup_pipeline.engines.postgres.notes import first_few
from backup_pipeline.engines.postgres.server import (
    Connection,
    ServerInfo,
    connect,
    is_pooled,
    read_server_info,
    server_errors,
)
from backup_pipeline.engines.postgres.tools import choose_compression, find_tools, known_vulnerable
from backup_pipeline.errors import BackupError, ConfigError, ServerError, ToolError
from backup_pipeline.units import show_count

OLDEST, NEWEST = 15, 18
"""The major versions of servers that this software knows."""

_NAMED_IN_A_HINT = 5
_LARGE_OBJECT_PRIVILEGE_SINCE = 180000

# As pg_dump chooses: nothing of the system's, of extensions only what they mark as configuration.
_DUMPED = """
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
   WHERE pg_catalog.left(n.nspname, 3) <> 'pg_' AND n.nspname <> 'information_schema'
     AND (EXISTS (SELECT FROM pg_catalog.pg_extension e WHERE c.oid = ANY (e.extconfig))
          OR NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                          WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
                            AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
                            AND d.deptype = 'e'))
"""
_NAME = "pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)"

_SCHEMAS = f"""
    SELECT DISTINCT pg_catalog.quote_ident(n.nspname) {_DUMPED}
       AND c.relkind IN ('r', 'p', 'S') AND NOT pg_catalog.has_schema_privilege(n.oid, 'USAGE')
"""
_TABLES = f"""
    SELECT {_NAME} {_DUMPED}
       AND c.relkind IN ('r', 'p') AND NOT pg_catalog.has_table_privilege(c.oid, 'SELECT')
"""
_SEQUENCES = f"""
    SELECT {_NAME} {_DUMPED}
       AND CASE c.relkind WHEN 'S' THEN NOT pg_catalog.has_sequence_privilege(c.oid, 'SELECT') END
"""
_HIDDEN_ROWS = f"""
    SELECT {_NAME} {_DUMPED}
       AND c.relkind IN ('r', 'p') AND c.relrowsecurity AND pg_catalog.row_security_active(c.oid)
"""
# Before 18 PostgreSQL has no function for it. pg_read_all_data does not reach large objects there.
_LARGE_OBJECTS = """
    SELECT o.oid::pg_catalog.text FROM pg_catalog.pg_largeobject_metadata o
     WHERE pg_catalog.current_setting('lo_compat_privileges') <> 'on'
       AND NOT pg_catalog.pg_has_role(o.lomowner, 'USAGE')
       AND NOT EXISTS (SELECT FROM pg_catalog.aclexplode(o.lomacl) a
                        WHERE a.privilege_type = 'SELECT'
                          AND (a.grantee = 0 OR pg_catalog.pg_has_role(a.grantee, 'USAGE')))
     ORDER BY o.oid
"""
_LARGE_OBJECTS_18 = """
    SELECT o.oid::pg_catalog.text FROM pg_catalog.pg_largeobject_metadata o
     WHERE pg_catalog.current_setting('lo_compat_privileges') <> 'on'
       AND NOT pg_catalog.has_largeobject_privilege(o.oid, 'SELECT')
     ORDER BY o.oid
"""
_SUBSCRIPTIONS = """
    SELECT pg_catalog.quote_ident(subname) FROM pg_catalog.pg_subscription
     WHERE subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
"""
_USER_MAPPINGS = """
    SELECT pg_catalog.quote_ident(usename) || ' on ' || pg_catalog.quote_ident(srvname)
      FROM pg_catalog.pg_user_mappings WHERE umoptions IS NULL
"""
_NEUTRAL = """
    SELECT datname FROM pg_catalog.pg_database
     WHERE datname = %s AND datallowconn AND pg_catalog.has_database_privilege(oid, 'CONNECT')
"""


class Unfit(ServerError):
    """The source would not be dumped whole as it is; trying again changes nothing."""

    retryable = False


class CheckStatus(StrEnum):
    """What a check found."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and what to do when it is not as it should be."""

    name: str
    status: CheckStatus
    found: str
    hint: str = ""


def check_source(
    endpoint: Endpoint,
    *,
    bin_dir: str = "",
    critical_tables: Sequence[str] = (),
    role_passwords: bool = False,
) -> tuple[Check, ...]:
    """Look at everything that a dump of this database by this role, from this machine, depends on.

    Raises nothing for what it finds: see `raise_first_failure`.
    """
    try:
        with (
            contextlib.closing(connect(endpoint, purpose="preflight")) as session,
            server_errors(endpoint, "cannot look at the source"),
        ):
            info = read_server_info(session)
            checks = [_check_server(endpoint, info), *_check_tools(info, bin_dir)]
            checks += _check_session(session, info)
            checks += _check_rights(session, endpoint, info, role_passwords=role_passwords)
            checks += _check_critical(session, critical_tables)
    except ServerError as error:
        return (Check("server", CheckStatus.FAILED, error.message, error.hint),)
    return tuple(checks)


def raise_first_failure(checks: Iterable[Check]) -> None:
    """Raise for the first check that failed: ToolError or Unfit; the others are in its detail."""
    failed = [check for check in checks if check.status is CheckStatus.FAILED]
    if not failed:
        return
    first, *others = failed
    kind: type[BackupError] = {"tools": ToolError, "server": ServerError}.get(first.name, Unfit)
    raise kind(first.found, detail={check.name: check.found for check in others}, hint=first.hint)


def _check_server(endpoint: Endpoint, info: ServerInfo) -> Check:
    found = f"{endpoint.shown} is PostgreSQL {info.version_text}"
    if info.major < OLDEST:
        hint = (
            f"Upgrade the server: its version is no longer maintained; {OLDEST} to {NEWEST} are known here."
        )
        return Check("version", CheckStatus.FAILED, f"{found}, older than {OLDEST}", hint)
    if info.major > NEWEST:
        hint = "Look for a newer version of this software, and let every dump be proven."
        return Check("version", CheckStatus.WARNING, f"{found}, newer than all that was tried here", hint)
    return Check("version", CheckStatus.OK, found)


def _check_tools(info: ServerInfo, bin_dir: str) -> Iterator[Check]:
    try:
        tools = find_tools(bin_dir, at_least=info.major)
        compression = choose_compression(tools)
    except ToolError as error:
        found = f"the server is {info.version_text}: {error.message}"
        yield Check("tools", CheckStatus.FAILED, found, error.hint)
        return
    found = f"pg_dump {tools.version_text} in {tools.bin_dir}, {compression.name}"
    if tools.major == info.major:
        yield Check("tools", CheckStatus.OK, found)
    else:
        yield Check(
            "tools",
            CheckStatus.WARNING,
            f"{found}: its dumps cannot be read by the pg_restore of PostgreSQL {info.major}",
            f"Install PostgreSQL {info.major}'s own client, so that a dump fits its own server.",
        )
    if reason := known_vulnerable(tools.version):
        yield Check(
            "archive reader",
            CheckStatus.WARNING,
            reason,
            "Update PostgreSQL's client; until then, restore only what this software wrote and checked.",
        )


def _check_session(session: Connection, info: ServerInfo) -> Iterator[Check]:
    if is_pooled(session):
        yield Check(
            "pooler",
            CheckStatus.WARNING,
            "a connection pooler answers instead of the server",
            "Name the server itself in dsn: a pooler may end a dump's long transaction, or lose its lock.",
        )
    if info.in_recovery:
        yield Check(
            "standby",
            CheckStatus.WARNING,
            "this is a standby: it may cancel a long dump, and has no rows of unlogged tables",
            "Set hot_standby_feedback = on, or max_standby_streaming_delay = -1, or dump the primary.",
        )
    if session.execute(_NEUTRAL, [NEUTRAL_DATABASE]).fetchone() is None:
        yield Check(
            "lock",
            CheckStatus.WARNING,
            f"the role may not connect to {NEUTRAL_DATABASE}, where dumps and swaps exclude each other",
            f"GRANT CONNECT ON DATABASE {NEUTRAL_DATABASE} TO {_me(session)};",
        )


@dataclass(frozen=True)
class _Right:
    """What a role must be allowed for a whole dump. `lacks` takes how many of `one`, and the first names."""

    name: str
    one: str
    query: str
    lacks: str
    fix_few: str  # takes the names and the role
    fix_many: str  # takes the role
    status: CheckStatus = CheckStatus.FAILED


_READ_ALL = "GRANT pg_read_all_data TO {role};"
_RIGHTS = (
    _Right(
        "schemas",
        "schema",
        _SCHEMAS,
        "may not use {count}: {names}",
        "GRANT USAGE ON SCHEMA {names} TO {role};",
        _READ_ALL,
    ),
    _Right(
        "tables",
        "table",
        _TABLES,
        "may not read {count}: {names}",
        "GRANT SELECT ON TABLE {names} TO {role};",
        _READ_ALL,
    ),
    _Right(
        "sequences",
        "sequence",
        _SEQUENCES,
        "may not read {count}: {names}",
        "GRANT SELECT ON SEQUENCE {names} TO {role};",
        _READ_ALL,
    ),
    _Right(
        "row security",
        "table",
        _HIDDEN_ROWS,
        "is kept from rows of {count} by row security: {names}",
        "ALTER ROLE {role} BYPASSRLS;",
        "ALTER ROLE {role} BYPASSRLS;",
    ),
    _Right(
        "large objects",
        "large object",
        _LARGE_OBJECTS,
        "may not read {count}: {names}",
        "GRANT SELECT ON LARGE OBJECT {names} TO {role};",
        "ALTER ROLE {role} SET lo_compat_privileges = on;",
    ),
    _Right(
        "subscriptions",
        "subscription",
        _SUBSCRIPTIONS,
        "is no superuser: pg_dump leaves out {count}: {names}",
        "Write them down elsewhere, or dump as a superuser.",
        "Write them down elsewhere, or dump as a superuser.",
        CheckStatus.WARNING,
    ),
    _Right(
        "user mappings",
        "user mapping",
        _USER_MAPPINGS,
        "is no superuser: the options of {count} are not in the dump: {names}",
        "Write them down elsewhere, or dump as a superuser.",
        "Write them down elsewhere, or dump as a superuser.",
        CheckStatus.WARNING,
    ),
)


def _check_rights(
    session: Connection, endpoint: Endpoint, info: ServerInfo, *, role_passwords: bool
) -> Iterator[Check]:
    role = _me(session)
    if info.is_superuser:
        yield Check("rights", CheckStatus.OK, f"role {role} is a superuser and reads everything")
        return
    lacking = False
    for right in _RIGHTS:
        query = right.query
        if right.name == "large objects" and info.version >= _LARGE_OBJECT_PRIVILEGE_SINCE:
            query = _LARGE_OBJECTS_18
        names = sorted((str(name) for (name,) in session.execute(query.encode())), key=_in_order)
        if names:
            lacking = lacking or right.status is CheckStatus.FAILED
            yield _lacks(right, role, names)
    if role_passwords and not _may_read_passwords(session):
        lacking = True
        yield Check(
            "role passwords",
            CheckStatus.FAILED,
            f"role {role} may not read the passwords of roles, which role_passwords asks for",
            f"GRANT SELECT ON pg_catalog.pg_authid TO {role}; or set role_passwords = false.",
        )
    if not lacking:
        yield Check("rights", CheckStatus.OK, f"role {role} reads everything in {endpoint.database}")


def _in_order(name: str) -> tuple[int, str]:
    """Sorts names as text and numbers, of large objects, as numbers."""
    return (int(name) if name.isdigit() else 0, name)


def _lacks(right: _Right, role: str, names: list[str]) -> Check:
    few = len(names) <= _NAMED_IN_A_HINT
    return Check(
        right.name,
        right.status,
        f"role {role} " + right.lacks.format(count=show_count(len(names), right.one), names=first_few(names)),
        (right.fix_few if few else right.fix_many).format(names=", ".join(names), role=role),
    )


def _may_read_passwords(session: Connection) -> bool:
    row = session.execute(
        "SELECT pg_catalog.has_table_privilege('pg_catalog.pg_authid', 'SELECT')"
    ).fetchone()
    return row is not None and bool(row[0])


def _me(session: Connection) -> str:
    """The current role, quoted as an identifier."""
    row = session.execute("SELECT current_user").fetchone()
    return sql.Identifier(str(row[0]) if row else "").as_string()


def _check_critical(session: Connection, names: Sequence[str]) -> Iterator[Check]:
    if not names:
        return
    try:
        check_critical_tables(session, names)
    except ConfigError as error:
        yield Check("critical tables", CheckStatus.FAILED, error.message, error.hint)
    else:
        yield Check("critical tables", CheckStatus.OK, ", ".join(names))
