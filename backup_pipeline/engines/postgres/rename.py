"""Renaming databases that are in use: all renames of a call happen, or none.

Called by swap.py, which decides on the names.

`ALTER DATABASE ... RENAME` first takes a lock that every new connection to that database waits for,
then gives the sessions inside five seconds to leave, and goes on when none is left. So one session
renames all databases in one transaction, while another ends the sessions of whichever database the
first has locked. Nothing is committed before the end: a process that is killed at any step leaves an
open transaction, which the server rolls back by itself. Switching ALLOW_CONNECTIONS off instead
would have to be committed, and a kill would leave it off.

Source: the manual's ALTER DATABASE; PostgreSQL's RenameDatabase and CountOtherDBBackends.
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import psycopg
from psycopg import sql

from backup_pipeline.domain.names import NAME_BYTES
from backup_pipeline.domain.unfinished import is_marked, unmarked
from backup_pipeline.engines.postgres.endpoint import APPLICATION, Endpoint
from backup_pipeline.engines.postgres.lock import NEUTRAL_DATABASE
from backup_pipeline.engines.postgres.server import Connection, connect, server_errors
from backup_pipeline.errors import OutcomeUnknown, Refused, ServerError

SWAP_PURPOSE = "swap"
"""What pg_stat_activity shows of sessions that look before a swap."""

_PURPOSE = "rename"
_ATTEMPTS = 3
_LOCK_TIMEOUT_S = 10.0
_STATEMENT_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 30.0
_POLL_S = 0.02
_OURS = (f"{APPLICATION} {_PURPOSE}", f"{APPLICATION} {SWAP_PURPOSE}")  # on their way out already
_IN_THE_WAY = (
    psycopg.errors.ObjectInUse,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.QueryCanceled,
    psycopg.errors.DeadlockDetected,
)


@dataclass(frozen=True)
class Renamable:
    """A database that exists and is to be renamed."""

    name: str
    oid: int
    owner: str
    is_owner: bool  # the role is, or inherits it
    owner_is_superuser: bool


def check_name(name: str) -> None:
    """Raise Refused when no database can have this name."""
    if not name or len(name.encode()) > NAME_BYTES or "\0" in name:
        raise Refused(f"not a name for a database: {name!r}", hint=f"It may have 1 to {NAME_BYTES} bytes.")


def rename_session(endpoint: Endpoint) -> Connection:
    """A session to rename from; its statements and locks are bounded, and end when we do."""
    session = connect(
        endpoint, statement_timeout_s=_STATEMENT_TIMEOUT_S, lock_timeout_s=_LOCK_TIMEOUT_S, purpose=_PURPOSE
    )
    # Without it the lock of a process that was killed would keep newcomers waiting for seconds.
    with contextlib.suppress(psycopg.errors.InvalidParameterValue):  # a platform that cannot tell
        session.execute("SET client_connection_check_interval = '200ms'")
    return session


def find_renamable(
    endpoint: Endpoint, session: Connection, names: Sequence[str], *, vacant: str | None = None
) -> tuple[Renamable, ...]:
    """The databases of these `names`; `vacant`, if it is known already, is to become the name of one.

    Raises Refused when one is missing or cannot be renamed from here, or `vacant` is taken.
    """
    with server_errors(endpoint, "cannot list the databases"):
        rows = session.execute(
            "SELECT d.datname, d.oid, r.rolname, pg_catalog.pg_has_role(r.oid, 'USAGE'), r.rolsuper"
            " FROM pg_catalog.pg_database d JOIN pg_catalog.pg_roles r ON r.oid = d.datdba"
        ).fetchall()
    there = {
        str(name): Renamable(str(name), int(str(oid)), str(owner), bool(own), bool(superuser))
        for name, oid, owner, own, superuser in rows
    }
    for name in names:
        if name not in there:
            raise Refused(f"database {name} does not exist", detail={"server": endpoint.shown})
        if name in {endpoint.database, NEUTRAL_DATABASE}:
            raise Refused(
                f"database {name} cannot be renamed: sessions of ours are in it",
                hint=f"Connect to {NEUTRAL_DATABASE}; {NEUTRAL_DATABASE} itself is never renamed.",
            )
    if len(set(names)) < len(names):
        raise Refused(f"database {names[0]} cannot be swapped with itself")
    if vacant is not None:
        check_name(vacant)
    if vacant in there:
        raise Refused(
            f"database {vacant} exists already",
            detail={"server": endpoint.shown},
            hint="Choose another name, or drop that database if nobody needs it.",
        )
    return tuple(there[name] for name in names)


def check_rights(endpoint: Endpoint, session: Connection, databases: Sequence[Renamable]) -> None:
    """Raise Refused, naming what puts it right, when these databases could not be renamed."""
    with server_errors(endpoint, "cannot look at the role's rights"):
        row = session.execute(
            "SELECT rolname, rolsuper, rolcreatedb, pg_catalog.pg_is_in_recovery()"
            " FROM pg_catalog.pg_roles WHERE rolname = current_user"
        ).fetchone()
        role, superuser, createdb, standby = row or ("", False, False, False)
        if standby:
            raise Refused("the server is a standby: nothing is renamed there", hint="Connect to the primary.")
        _check_prepared(session, databases)
        if not superuser:
            _check_ownership(session, databases, str(role), bool(createdb))


def _named(databases: Iterable[Renamable]) -> str:
    return " and ".join(each.name for each in databases)


def _check_prepared(session: Connection, databases: Sequence[Renamable]) -> None:
    prepared = session.execute(
        "SELECT gid, owner, database FROM pg_catalog.pg_prepared_xacts"
        " WHERE database = ANY(%s) ORDER BY prepared",
        [[each.name for each in databases]],
    ).fetchall()
    if prepared:
        raise Refused(
            f"prepared transactions keep {_named(databases)} from being renamed",
            detail={
                f"transaction {gid!r}": f"of {owner}, in {database}" for gid, owner, database in prepared
            },
            hint="Have their transaction manager end them, or ROLLBACK PREPARED each in its database.",
        )


def _check_ownership(session: Connection, databases: Sequence[Renamable], role: str, createdb: bool) -> None:
    foreign = [each for each in databases if not each.is_owner]
    sessions = session.execute(
        "SELECT a.pid, r.rolname, r.rolsuper, pg_catalog.pg_has_role(r.oid, 'USAGE')"
        " OR pg_catalog.pg_has_role('pg_signal_backend', 'USAGE')"
        " FROM pg_catalog.pg_stat_activity a JOIN pg_catalog.pg_roles r ON r.oid = a.usesysid"
        " WHERE a.datid = ANY(%s)",
        [[each.oid for each in databases]],
    ).fetchall()
    superusers = [f"pid {pid} of role {user}" for pid, user, is_superuser, _ in sessions if is_superuser]
    if superusers or any(each.owner_is_superuser for each in foreign):
        raise Refused(
            f"role {role} may not rename {_named(databases)}: only a superuser may",
            detail={each.name: f"belongs to {each.owner}" for each in foreign}
            | ({"sessions of superusers": "; ".join(superusers)} if superusers else {}),
            hint="Connect as a superuser, or end those sessions and have a plain role own the databases.",
        )
    fixes = [] if createdb else [sql.SQL("ALTER ROLE {} CREATEDB;").format(sql.Identifier(role))]
    grants = list(dict.fromkeys(each.owner for each in foreign))
    if not all(may for _, _, _, may in sessions):
        grants.append("pg_signal_backend")
    fixes += [
        sql.SQL("GRANT {} TO {};").format(sql.Identifier(each), sql.Identifier(role)) for each in grants
    ]
    if fixes:
        raise Refused(
            f"role {role} may not rename {_named(databases)}",
            detail={each.name: f"belongs to {each.owner}" for each in foreign},
            hint=f"As a superuser: {' '.join(fix.as_string(session) for fix in fixes)}",
        )


def rename(endpoint: Endpoint, session: Connection, renames: Sequence[tuple[Renamable, str]]) -> int:
    """Make all `renames`, in this order and in one transaction; return how many sessions were ended.

    What was unfinished is finished then: the mark of it goes.
    Tried again, a few times, when sessions outlive the server's five seconds. Raises ServerError, and
    then nothing was changed; OutcomeUnknown when the server was lost at the commit and stayed away.
    """
    names, ended = _named(database for database, _ in renames), 0
    for attempt in range(1, _ATTEMPTS + 1):
        clearing = _Clearing(session.info.backend_pid, tuple(database.oid for database, _ in renames))
        try:
            # Newcomers may enter from the commit on: whoever ends sessions has stopped by then.
            with session.transaction(), clearing.running(endpoint):
                for database, name in renames:
                    _unmark(session, database)
                    statement = sql.SQL("ALTER DATABASE {} RENAME TO {}")
                    session.execute(statement.format(sql.Identifier(database.name), sql.Identifier(name)))
            return ended + len(clearing.ended)
        except _IN_THE_WAY as error:
            ended += len(clearing.ended)
            if attempt == _ATTEMPTS:
                raise ServerError(
                    f"{names} could not be renamed: sessions did not end; nothing was changed",
                    detail={
                        "said": error.diag.message_detail or error.diag.message_primary or "",
                        "attempts": attempt,
                        "sessions ended": ended,
                    }
                    | ({"not ended": "; ".join(sorted(clearing.refused))} if clearing.refused else {}),
                    hint="Find them in pg_stat_activity, end them or stop what holds them, and try again.",
                ) from error
        except psycopg.OperationalError as error:
            pid = session.info.backend_pid
            session.close()  # its end is waited for
            if _took_effect(endpoint, pid, renames):
                return ended + len(clearing.ended)
            raise ServerError(
                f"the session that renamed {names} was lost; nothing was changed",
                detail={"server": endpoint.shown, "said": " ".join(str(error).split())},
                hint="Try again.",
            ) from error
        except psycopg.Error as error:
            raise ServerError(
                f"{names} could not be renamed: {error.diag.message_primary or error}; nothing was changed",
                detail={"server": endpoint.shown},
            ) from error
    raise AssertionError("the last attempt returns or raises")


def _unmark(session: Connection, database: Renamable) -> None:
    """Take the mark of an unfinished database from one that is getting its name."""
    query = "SELECT pg_catalog.shobj_description(%s::bigint::oid, 'pg_database')"
    row = session.execute(query, [database.oid]).fetchone()
    comment = None if row is None or row[0] is None else str(row[0])
    if is_marked(comment):
        statement = sql.SQL("COMMENT ON DATABASE {} IS {}")
        session.execute(statement.format(sql.Identifier(database.name), sql.Literal(unmarked(comment))))


def _took_effect(endpoint: Endpoint, renamer_pid: int, renames: Sequence[tuple[Renamable, str]]) -> bool:
    """Whether a commit whose answer was lost was made. The server may be away for a moment.

    Raises OutcomeUnknown, naming what each database may be called.
    """
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        try:
            return _names_are(endpoint, renamer_pid, renames, deadline)
        except ServerError as error:
            if time.monotonic() > deadline:
                names = _named(database for database, _ in renames)
                each = {f"database of oid {it.oid}": f"{it.name} or {name}" for it, name in renames}
                raise OutcomeUnknown(
                    f"whether {names} were renamed is not known: the server was lost at the commit",
                    detail={"server": endpoint.shown, **each, "said": error.message},
                    hint="When the server answers, `psql -l` shows the names.",
                ) from error
        time.sleep(_POLL_S)


def _names_are(
    endpoint: Endpoint, renamer_pid: int, renames: Sequence[tuple[Renamable, str]], deadline: float
) -> bool:
    """Whether the databases have their new names, once the session that renamed them is gone."""
    alive = "SELECT FROM pg_catalog.pg_stat_activity WHERE pid = %s AND application_name = %s"
    with (
        contextlib.closing(rename_session(endpoint)) as session,
        server_errors(endpoint, "cannot see the names"),
    ):
        while session.execute(alive, [renamer_pid, f"{APPLICATION} {_PURPOSE}"]).fetchone() is not None:
            if time.monotonic() > deadline:
                raise ServerError(f"the session that renames, pid {renamer_pid}, goes on without us")
            time.sleep(_POLL_S)
        query = "SELECT oid, datname FROM pg_catalog.pg_database WHERE oid = ANY(%s)"
        found = session.execute(query, [[database.oid for database, _ in renames]]).fetchall()
    return {(database.oid, name) for database, name in renames} == set(found)


@dataclass
class _Clearing:
    """Ends the sessions in databases that the renaming backend has locked, from a session beside it.

    Only once the lock is held: until then they would come back, and be ended for nothing.
    """

    renamer_pid: int
    oids: tuple[int, ...]
    ended: set[int] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def running(self, endpoint: Endpoint) -> Iterator[None]:
        stop = threading.Event()
        with contextlib.closing(rename_session(endpoint)) as session:
            thread = threading.Thread(target=self._run, args=(session, stop), daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def _run(self, session: Connection, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self._end_sessions(session)
            except psycopg.Error as error:
                # The rename fails by itself when nobody leaves, and then says this.
                self.refused.add(f"the session that ends others failed: {' '.join(str(error).split())}")
                return
            stop.wait(_POLL_S)

    def _end_sessions(self, session: Connection) -> None:
        # Workers of autovacuum have no role, and are ended by the rename itself.
        found = session.execute(
            "SELECT a.pid, a.usename, a.application_name FROM pg_catalog.pg_stat_activity a"
            " JOIN pg_catalog.pg_locks l ON l.locktype = 'object'"
            " AND l.classid = 'pg_catalog.pg_database'::pg_catalog.regclass AND l.objid = a.datid"
            " WHERE l.pid = %s AND l.mode = 'AccessExclusiveLock' AND l.granted"
            " AND a.datid = ANY(%s) AND a.usesysid IS NOT NULL",
            [self.renamer_pid, list(self.oids)],
        ).fetchall()
        for pid, role, application in found:
            try:
                row = session.execute("SELECT pg_catalog.pg_terminate_backend(%s)", [pid]).fetchone()
            except psycopg.errors.InsufficientPrivilege:
                self.refused.add(f"pid {pid} of role {role}")
                continue
            if row and row[0] and application not in _OURS:
                self.ended.add(int(str(pid)))
