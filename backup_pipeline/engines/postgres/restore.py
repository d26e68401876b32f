"""New databases for restores: made, dressed like the source's, analyzed, dropped.

Called by restores and proofs. Whatever is restored under a name that matters is built under another,
temporary one (`temporary_database`) and renamed when it is complete and checked (swap.py): so a name
never holds half a database, whatever is killed. pg_restore itself is load.py's.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import psycopg
from psycopg import sql

from backup_pipeline.domain.backup import DatabaseProperties
from backup_pipeline.domain.names import NAME_BYTES, cut_name
from backup_pipeline.domain.unfinished import (
    MARKING_LIMIT,
    NAME_INFIX,
    TOKEN_BYTES,
    is_marked,
    is_temporary,
    marked,
)
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import NEUTRAL_DATABASE, advisory_lock
from backup_pipeline.engines.postgres.properties import create_statement, statements
from backup_pipeline.engines.postgres.rename import check_name
from backup_pipeline.engines.postgres.server import Connection, connect, server_errors
from backup_pipeline.errors import BackupError, Busy, Refused, ServerError
from backup_pipeline.stderr import without_values

PURPOSE = "restore"
"""What pg_stat_activity and a refused second run show of a restore."""

_NO_LOCALE = (
    psycopg.errors.WrongObjectType,
    psycopg.errors.InvalidParameterValue,
    psycopg.errors.FeatureNotSupported,
)
_CANNOT_HAVE = (psycopg.ProgrammingError, psycopg.DataError, psycopg.NotSupportedError)
_MAY_NOT = (
    "Restore as a superuser or a member of the owner; a setting that the server does not know needs GRANT SET"
    " ON PARAMETER."
)
_LACKS = "Install on that server's machine what the statement names, or choose another server."


def temporary_name(target: str, token: str) -> str:
    """The name under which `target` is restored: `<target>.restoring-<token>`, cut to fit."""
    suffix = f"{NAME_INFIX}{token}"
    return cut_name(target, NAME_BYTES - len(suffix)) + suffix


@contextlib.contextmanager
def temporary_database(
    endpoint: Endpoint,
    target: str,
    properties: DatabaseProperties,
    *,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Create an empty database in which to build `target`, and yield its name.

    `endpoint` is another database of the server. It bears a mark until it is renamed (rename.py).
    Leaving drops it, unless it has been renamed; what a killed process left behind is dropped by the
    next one, because its lock ended with it.
    """
    drop_stale(endpoint, tell)
    name = temporary_name(target, secrets.token_hex(TOKEN_BYTES))
    with advisory_lock(endpoint, name, purpose=PURPOSE, wait_s=0, renames=True):
        try:
            create_database(endpoint, name, properties)
            yield name
        except BaseException:
            with contextlib.suppress(BackupError):  # the next run tries again
                drop_temporary(endpoint, name)
            raise
        drop_temporary(endpoint, name)


def drop_stale(endpoint: Endpoint, tell: Callable[[str], None] = lambda _: None) -> tuple[str, ...]:
    """Drop what killed restores left on this server; return the names.

    Only what bears the mark: whatever else has such a name is somebody's. Running restores' are left
    alone, and what somebody is connected to, until the next time: it stands in nobody's way.
    """
    with _session(endpoint) as session, server_errors(endpoint, "cannot list the databases"):
        rows = session.execute(
            "SELECT datname, datconnlimit, pg_catalog.shobj_description(oid, 'pg_database')"
            " FROM pg_catalog.pg_database WHERE pg_catalog.pg_has_role(datdba, 'USAGE') ORDER BY datname"
        ).fetchall()
    dropped = []
    for name, limit, comment in ((str(row[0]), row[1], row[2]) for row in rows if is_temporary(str(row[0]))):
        if limit != MARKING_LIMIT and not is_marked(None if comment is None else str(comment)):
            tell(f"database {name} is left alone: it bears no mark of ours, only such a name")
            continue
        try:
            with advisory_lock(endpoint, name, purpose=PURPOSE, wait_s=0, renames=True):
                drop_temporary(endpoint, name, force=False)
        except Busy:
            continue
        except BackupError as error:
            tell(f"database {name}, which a killed restore left unfinished, stays: {error.message}")
            continue
        dropped.append(name)
        tell(f"dropped database {name}, which a killed restore left unfinished")
    return tuple(dropped)


def create_database(endpoint: Endpoint, name: str, properties: DatabaseProperties) -> None:
    """Create the empty database `name` with the encoding, locale and tablespace of `properties`.

    Its owner and grants are set at once, where the roles exist: a copy of something private is never
    open to others while it is loaded. All else is for `apply_properties`, at the end.

    Raises Refused when `name` is taken, or when the server lacks the locale or the tablespace.
    """
    check_name(name)
    with _session(endpoint) as session, server_errors(endpoint, f"cannot create database {name}"):
        statement = create_statement(properties, name, server_version=session.info.server_version)
        there = {str(role) for (role,) in session.execute("SELECT rolname FROM pg_catalog.pg_roles")}
        if properties.owner in there:
            statement += sql.SQL(" OWNER {}").format(sql.Identifier(properties.owner))
        if is_temporary(name):
            statement += sql.SQL(" CONNECTION LIMIT {}").format(sql.Literal(MARKING_LIMIT))
        try:
            session.execute(statement)
        except psycopg.errors.DuplicateDatabase:
            raise Refused(
                f"database {name} exists already",
                detail={"server": endpoint.shown},
                hint="Choose another name, or drop that database if nobody needs it.",
            ) from None
        except _NO_LOCALE as error:
            raise Refused(
                f"this server cannot have a database with locale {_locale(properties)}",
                detail={"server": endpoint.shown, "said": error.diag.message_primary},
                hint="Install that locale on the server's machine, or restore to another server.",
            ) from error
        except psycopg.errors.UndefinedObject as error:
            raise Refused(
                f"database {name} cannot be created: {error.diag.message_primary}",
                detail={"server": endpoint.shown},
                hint="Create on that server what is missing, or restore to another one.",
            ) from error
        if is_temporary(name):
            _mark(session, name)
        grants = properties.grants or ()
        if properties.grants is not None and {role for row in grants for role in row[:2] if role} <= there:
            _apply(session, name, _only_grants(properties))


def _mark(session: Connection, name: str) -> None:
    database = sql.Identifier(name)
    with session.transaction():
        session.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(database, sql.Literal(marked(None))))
        session.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT -1").format(database))


def _only_grants(properties: DatabaseProperties) -> DatabaseProperties:
    return replace(
        properties, settings=(), comment=None, connection_limit=-1, is_template=False, allow_connections=True
    )


def _locale(properties: DatabaseProperties) -> str:
    shown = f"{properties.collate}/{properties.ctype} in {properties.encoding}"
    if properties.locale_provider == "libc":
        return shown
    return f"{properties.locale} ({properties.locale_provider}), {shown}"


def apply_properties(endpoint: Endpoint, name: str, properties: DatabaseProperties) -> None:
    """Give the restored database `name` its owner, grants, comment, settings and connection limit.

    All or none of them, in one transaction. To be called when everything else is done: a setting or
    the limit may keep our own sessions out. The roles must exist.
    """
    with _session(endpoint) as session, server_errors(endpoint, f"cannot set the properties of {name}"):
        _apply(session, name, properties)


def try_properties(endpoint: Endpoint, name: str, properties: DatabaseProperties) -> None:
    """Do what `apply_properties` does to the new database `name`, enter it then, and take it all back.

    So that what this server cannot take, or this role may not set, is found before the load and not
    after it. Raises Refused for that; ServerError.
    """
    with _session(endpoint) as session, server_errors(endpoint, f"cannot set the properties of {name}"):
        _apply(session, name, properties, keep=False, failure=Refused)
        if properties.settings:
            _try_settings(endpoint.with_database(name), session, properties)


def _try_settings(own: Endpoint, session: Connection, properties: DatabaseProperties) -> None:
    """Open a session of the kind that the settings make: they may preload what is not there."""
    only_settings = replace(_only_grants(properties), grants=None, settings=properties.settings)
    _apply(session, own.database, only_settings)
    try:
        connect(own, purpose=PURPOSE).close()
    except ServerError as error:
        _reset(session, own.database, properties)
        connect(own, purpose=PURPOSE).close()  # it is to fail by the settings, and not anyway
        raise Refused(
            f"no session can be opened under the settings of the database: {error.message}",
            detail=error.detail,
            hint="Install on that server's machine what they name, or choose another server.",
        ) from error
    _reset(session, own.database, properties)


def _reset(session: Connection, name: str, properties: DatabaseProperties) -> None:
    database = sql.Identifier(name)
    session.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(database))
    for role in {role for role, _ in properties.settings if role}:
        reset = sql.SQL("ALTER ROLE {} IN DATABASE {} RESET ALL")
        session.execute(reset.format(sql.Identifier(role), database))


def _apply(
    session: Connection,
    name: str,
    properties: DatabaseProperties,
    *,
    keep: bool = True,
    failure: type[ServerError | Refused] = ServerError,
) -> None:
    owner = sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(properties.owner))
    if is_temporary(name):
        properties = replace(properties, comment=marked(properties.comment))
    shown = statements(_without_values(properties), name)
    with session.transaction(force_rollback=not keep):
        for statement, told in zip(statements(properties, name), shown, strict=True):
            text = told.as_string(session)
            # PostgreSQL would choose as grantor any role of ours that has a grant option.
            as_owner = text.startswith(("GRANT ", "REVOKE "))
            try:
                if as_owner:
                    session.execute(owner)
                session.execute(statement)
                if as_owner:
                    session.execute("RESET ROLE")
            except _CANNOT_HAVE as error:
                may_not = isinstance(error, psycopg.errors.InsufficientPrivilege)
                raise failure(
                    f"database {name} cannot be made like its source: {error.diag.message_primary}",
                    detail={"statement": text},
                    hint=_MAY_NOT if may_not else _LACKS,
                ) from error


def _without_values(properties: DatabaseProperties) -> DatabaseProperties:
    """The same to be shown: the values of some settings are secrets."""
    named = ((role, setting.partition("=")[0]) for role, setting in properties.settings)
    return replace(properties, settings=tuple((role, f"{parameter}=…") for role, parameter in named))


def analyze(endpoint: Endpoint, name: str, *, timeout_s: float = 0.0) -> tuple[str, ...]:
    """Let the planner know the tables of `name`: a restored database has no statistics. 0 is no limit.

    Returns what it does not get to know, and why, in words: a function of the database's own, which an
    index or statistics call, may fail here. The copy is complete all the same.
    """
    own = endpoint.with_database(name)
    try:
        with contextlib.closing(connect(own, statement_timeout_s=timeout_s, purpose=PURPOSE)) as session:
            try:
                session.execute("ANALYZE")
            except psycopg.Error as error:
                told = () if session.closed else _analyze_each(own, session)
                return told or (f"ANALYZE failed: {_primary(error)}",)
    except ServerError as error:
        return (f"ANALYZE failed: {error.message}",)
    return ()


def try_analyze(endpoint: Endpoint, name: str) -> tuple[str, ...]:
    """What `analyze` will fail at: only tables are analyzed for whose statistics functions are called."""
    own = endpoint.with_database(name)
    with contextlib.closing(connect(own, statement_timeout_s=0, purpose=PURPOSE)) as session:
        return _analyze_each(own, session, only_computed=True)


def _analyze_each(endpoint: Endpoint, session: Connection, *, only_computed: bool = False) -> tuple[str, ...]:
    """Analyze table by table, and tell of those that fail: ANALYZE of all ends at the first."""
    with server_errors(endpoint, "cannot list the tables"):
        tables = session.execute(
            "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c"
            " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
            " WHERE c.relkind IN ('r', 'p', 'm') AND c.oid >= 16384 AND n.nspname !~ '^pg_(toast|temp)'"
            " AND (NOT %s OR EXISTS (SELECT FROM pg_catalog.pg_statistic_ext s WHERE s.stxrelid = c.oid)"
            " OR EXISTS (SELECT FROM pg_catalog.pg_index i"
            " WHERE i.indrelid = c.oid AND i.indexprs IS NOT NULL))"
            " ORDER BY n.nspname, c.relname",
            [only_computed],
        ).fetchall()
    return tuple(_failing(session, tables))


def _failing(session: Connection, tables: Iterable[tuple[object, ...]]) -> Iterator[str]:
    for schema, table in tables:
        try:
            session.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(str(schema), str(table))))
        except psycopg.Error as error:
            yield f"ANALYZE of {schema}.{table} failed: {_primary(error)}"
            if session.closed:
                return


def _primary(error: psycopg.Error) -> str:
    return without_values(error.diag.message_primary or " ".join(str(error).split())).strip()


def drop_database(endpoint: Endpoint, name: str, *, force: bool = False) -> bool:
    """Drop the database `name`; return whether it was there. With `force`, its sessions are ended.

    Raises Refused for `postgres`, the templates and the database of `endpoint`; ServerError when
    sessions, subscriptions or replication slots in use hold it.
    """
    if name in {NEUTRAL_DATABASE, "template0", "template1", endpoint.database}:
        raise Refused(f"database {name} is not dropped: the server, or this session, needs it")
    with _session(endpoint) as session, server_errors(endpoint, f"cannot drop database {name}"):
        found = session.execute("SELECT FROM pg_catalog.pg_database WHERE datname = %s", [name]).fetchone()
        session.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} {}").format(
                sql.Identifier(name), sql.SQL("WITH (FORCE)" if force else "")
            )
        )
    return found is not None


def drop_temporary(endpoint: Endpoint, name: str, *, force: bool = True) -> None:
    """Drop an unfinished database, a template too, and subscriptions in it, which never connected.

    With `force`, sessions in it are ended.
    """
    with _session(endpoint) as session, server_errors(endpoint, f"cannot drop database {name}"):
        template = "SELECT 1 FROM pg_catalog.pg_database WHERE datname = %s AND datistemplate"
        if session.execute(template, [name]).fetchone():
            session.execute(sql.SQL("ALTER DATABASE {} IS_TEMPLATE false").format(sql.Identifier(name)))
        rows = session.execute(
            "SELECT s.subname FROM pg_catalog.pg_subscription s"
            " JOIN pg_catalog.pg_database d ON d.oid = s.subdbid WHERE d.datname = %s",
            [name],
        ).fetchall()
    if rows:
        own = endpoint.with_database(name)
        with (
            contextlib.closing(connect(own, purpose=PURPOSE)) as inside,
            server_errors(own, f"cannot drop {name}"),
        ):
            for (subscription,) in rows:
                identifier = sql.Identifier(str(subscription))
                # The slot at the publisher is the source's, and must outlive this copy.
                inside.execute(sql.SQL("ALTER SUBSCRIPTION {} SET (slot_name = NONE)").format(identifier))
                inside.execute(sql.SQL("DROP SUBSCRIPTION {}").format(identifier))
    drop_database(endpoint, name, force=force)


@contextlib.contextmanager
def _session(endpoint: Endpoint) -> Iterator[Connection]:
    with contextlib.closing(connect(endpoint, purpose=PURPOSE)) as session:
        yield session
