"""A session on a PostgreSQL server, what the server says of itself, and its errors in words of ours.

Called by everything that asks PostgreSQL something. What is asked, and why, does not belong here.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
from psycopg.conninfo import make_conninfo

from backup_pipeline.engines.postgres.endpoint import APPLICATION, Endpoint
from backup_pipeline.errors import ServerError

Connection = psycopg.Connection[tuple[object, ...]]

# What keepalives do not see: a query that never arrives. Not for tools: a busy server may leave data waiting.
USER_TIMEOUT_MS = 90_000


def connect(
    endpoint: Endpoint,
    *,
    autocommit: bool = True,
    statement_timeout_s: float = 300.0,
    lock_timeout_s: float = 60.0,
    purpose: str = "",
) -> Connection:
    """A session on `endpoint`; a timeout of 0 is none. `purpose` is shown in pg_stat_activity.

    The search path is pg_catalog alone, dates are ISO and times UTC, whatever the role, the database
    or the environment say; limits on idle sessions and long transactions are lifted, because a
    snapshot is held for as long as its dump takes.

    Raises ServerError saying what was tried, and how it may be put right.
    """
    conninfo = {"tcp_user_timeout": str(USER_TIMEOUT_MS)} | endpoint.conninfo
    if purpose:
        conninfo["application_name"] = f"{APPLICATION} {purpose}"
    with server_errors(endpoint, "cannot connect"):
        connection: Connection = psycopg.Connection.connect(
            make_conninfo("", **conninfo), autocommit=True, prepare_threshold=None
        )
        try:
            settle(connection, statement_timeout_s, lock_timeout_s, local=False)
            connection.autocommit = autocommit
        except BaseException:
            connection.close()
            raise
    return connection


def resolved(endpoint: Endpoint) -> Endpoint:
    """The same with its database and role named, where only a service file does: a session tells.

    Raises ServerError.
    """
    if endpoint.named:
        return endpoint
    with contextlib.closing(connect(endpoint, purpose="connect")) as session:
        found = session.info
        return Endpoint(make_conninfo(endpoint.dsn, dbname=found.dbname, user=found.user), endpoint.password)


def settle(session: Connection, statement_timeout_s: float, lock_timeout_s: float, *, local: bool) -> None:
    """Give a session, or with `local` its transaction, settings of ours; see `connect`."""
    settings = {
        "search_path": "",
        "DateStyle": "ISO, YMD",
        "IntervalStyle": "postgres",
        "TimeZone": "UTC",
        "statement_timeout": f"{statement_timeout_s * 1000:.0f}",
        "lock_timeout": f"{lock_timeout_s * 1000:.0f}",
        "idle_in_transaction_session_timeout": "0",
        "idle_session_timeout": "0",
        # The server's own side of a dead link: a lock must not outlive its holder for two hours.
        "tcp_keepalives_idle": "60",
        "tcp_keepalives_interval": "10",
        "tcp_keepalives_count": "6",
    }
    if session.info.server_version >= 170000:
        settings["transaction_timeout"] = "0"
    calls = ", ".join(["pg_catalog.set_config(%s, %s, %s)"] * len(settings))
    values = [value for pair in settings.items() for value in (*pair, local)]
    session.execute(f"SELECT {calls}".encode(), values)


@contextlib.contextmanager
def server_errors(endpoint: Endpoint, what: str) -> Iterator[None]:
    """Turn psycopg's errors into ServerError: `what` failed, the server's words, a hint."""
    try:
        yield
    except psycopg.Error as error:
        diagnosis = error.diag
        said = diagnosis.message_primary or " ".join(str(error).split()) or type(error).__name__
        detail = {"server": endpoint.shown}
        if error.sqlstate:
            detail["sqlstate"] = error.sqlstate
        if diagnosis.message_detail:
            detail["said"] = diagnosis.message_detail
        raise ServerError(
            f"{what} ({endpoint.shown}): {said}",
            detail=detail,
            hint=hint_for(error.sqlstate or "", said) or diagnosis.message_hint or "",
        ) from error


OUT_OF_LOCKS = "max_locks_per_transaction"
"""What PostgreSQL and its tools speak of when a server has no room for another lock."""

OUT_OF_LOCKS_HINT = (
    f"Raise {OUT_OF_LOCKS} on that server and restart it: pg_dump and the session beside it hold a lock on "
    "each table, all at the same time."
)

_UNGIVEN_HINT = (
    "Give the password in the configuration, in a passfile or in a service file; for a server that a command "
    "names with --to or --dsn, in PGPASSWORD."
)

_HINTS = (
    # (SQLSTATE, part of libpq's message, what to do); libpq gives no SQLSTATE for a connection that failed.
    ("28P01", "password authentication failed", "Check the role's name and its password."),
    ("", "no password supplied", _UNGIVEN_HINT),
    ("", "no pg_hba.conf entry", "Allow this host, role and database in the server's pg_hba.conf."),
    ("", "authentication failed", "Check the role's name and how pg_hba.conf lets it in."),
    ("3D000", "does not exist", "Check the database's and the role's name; `psql -l` lists the databases."),
    ("", "connection refused", "Check the address and port, and that the server runs and listens there."),
    ("", "no such file", "Check that the server runs on this machine, and where its socket is."),
    ("", "timeout expired", "Check the address, and that no firewall drops the connection."),
    ("", "timed out", "Check the address, and that no firewall drops the connection."),
    ("", "could not translate host", "Check the host's name and the machine's DNS."),
    ("", "failed to resolve host", "Check the host's name and the machine's DNS."),
    ("", "certificate", "Check sslmode and sslrootcert: the server's certificate was not accepted."),
    ("57P03", "starting up", "The server is starting or recovering; try again when it accepts connections."),
    ("53300", "too many clients", "Raise max_connections, or leave reserved connections for this role."),
    ("42501", "permission denied", "Grant the role what it lacks; `backup-pipeline check` lists it."),
    ("57014", "statement timeout", "The server was slower than the deadline; look at its load and locks."),
    ("", "out of shared memory", OUT_OF_LOCKS_HINT),
    ("55P03", "lock timeout", "Another session holds a lock; find it in pg_locks, or try again later."),
)


def hint_for(sqlstate: str, said: str) -> str:
    """What to do about an error of the server or of libpq; "" when nobody knows."""
    lower = said.lower()
    for code, part, hint in _HINTS:
        if (code and code == sqlstate) or part in lower:
            return hint
    return ""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself. `version` is server_version_num: 170010 is 17.10."""

    version: int
    version_text: str
    system_identifier: str  # "" where the role may not read it
    in_recovery: bool
    is_superuser: bool

    @property
    def major(self) -> int:
        """17 for 17.10."""
        return self.version // 10000


def read_server_info(connection: Connection) -> ServerInfo:
    """Ask the server of an open session what it is."""
    row = connection.execute(
        "SELECT pg_catalog.current_setting('server_version_num')::int,"
        " pg_catalog.current_setting('server_version'), pg_catalog.pg_is_in_recovery(),"
        " (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user),"
        " pg_catalog.has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE')"
    ).fetchone()
    if row is None:
        raise ServerError("the server did not say its version")
    version, text, in_recovery, superuser, may_read_control = row
    identifier = ""
    if may_read_control:
        query = "SELECT system_identifier::text FROM pg_catalog.pg_control_system()"
        found = connection.execute(query).fetchone()
        identifier = str(found[0]) if found else ""
    return ServerInfo(int(str(version)), str(text), identifier, bool(in_recovery), bool(superuser))


def is_pooled(connection: Connection) -> bool:
    """Whether a pooler stands between: the process it announced is not the one that answers."""
    row = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
    return row is not None and row[0] != connection.info.backend_pid
