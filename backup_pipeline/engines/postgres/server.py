"""Where a PostgreSQL server is, how to reach it, what it is, and one lock on it.

Called by everything that talks to PostgreSQL: our own sessions through `connect`, the client tools
through `Endpoint.environment`. Both get the same parameters, so that a dump and its fingerprint can
never come from two servers. What is asked of a server, and why, does not belong here.
"""

import contextlib
import getpass
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from backup_pipeline.config import Secret
from backup_pipeline.errors import Busy, ConfigError, ServerError

APPLICATION = "backup_pipeline"
"""Begins the application_name of each of our sessions and tools, as pg_stat_activity shows it."""

NEUTRAL_DATABASE = "postgres"
"""Where `advisory_lock` locks first: a rename of any other database does not disturb it."""

Connection = psycopg.Connection[tuple[object, ...]]

_CONNECT_TIMEOUT_S = 10
_KEEPALIVES = {
    "keepalives": "1",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "6",
}
# What keepalives do not see: a query that never arrives. Not for tools: a busy server may leave data waiting.
_USER_TIMEOUT_MS = 90_000
_SOCKET_FOLDERS = ("/var/run/postgresql", "/tmp")  # noqa: S108 - where builds listen
# Where operators keep connections and passwords. No other variable of ours reaches a session or a tool.
_HONOURED = ("PGSERVICE", "PGSERVICEFILE", "PGSYSCONFDIR", "PGPASSFILE")
# What libpq takes from no variable, and whoever lists processes may see.
_SHOWABLE = ("tcp_user_timeout", "oauth_issuer", "oauth_client_id", "oauth_scope", *_KEEPALIVES)
# libpq refuses "" for these, and has no default of its own to give back.
_NEUTRAL = {"sslcertmode": "allow", "min_protocol_version": "3.0", "max_protocol_version": "3.0"}


@dataclass(frozen=True)
class Endpoint:
    """A database on a server: a DSN (URI or key=value), and its password when that is kept apart.

    Frozen, and safe to show: neither `repr` nor `shown` holds the DSN, which may hold a password.
    Raises ConfigError for a DSN that libpq cannot read.
    """

    dsn: str = field(repr=False)
    password: Secret | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _ = self._given

    def __repr__(self) -> str:
        return f"Endpoint({self.shown})"

    @cached_property
    def _given(self) -> Mapping[str, str]:
        try:
            given = conninfo_to_dict(self.dsn)
        except psycopg.ProgrammingError:
            # libpq's own message quotes the part that it did not understand: perhaps a password.
            raise ConfigError(
                "a DSN cannot be read: neither a URI nor key=value pairs",
                hint="Write postgresql://user@host:5432/database, or host=… port=… dbname=… user=…; in URIs, "
                "special characters are percent-encoded; elsewhere, values with spaces are quoted with '.",
            ) from None
        return {name: str(value) for name, value in given.items() if value is not None}

    @property
    def database(self) -> str:
        """The database's name, as libpq would choose it; what a service file says is known to `resolved`."""
        return self._given.get("dbname") or self.user

    @property
    def user(self) -> str:
        """The role's name, as libpq would choose it; what a service file says is known to `resolved`."""
        return self._given.get("user") or getpass.getuser()

    @property
    def named(self) -> bool:
        """Whether `database` and `user` are what libpq would choose: not where a service file may say it."""
        return not _service(self._given) or {"dbname", "user"} <= self._given.keys()

    @property
    def shown(self) -> str:
        """`user@host:port/database`, for messages."""
        given = self._given
        if service := _service(given):
            return f"service {service}" + (f", database {given['dbname']}" if "dbname" in given else "")
        host = given.get("host") or given.get("hostaddr") or _socket_folder(given)
        return f"{self.user}@{host}:{given.get('port') or '5432'}/{self.database}"

    def with_database(self, name: str) -> "Endpoint":
        """The same server and role, another database."""
        return Endpoint(make_conninfo(self.dsn, dbname=name), self.password)

    @property
    def conninfo(self) -> dict[str, str]:
        """Keywords for psycopg. Holds the password."""
        wanted = self._wanted(overriding=_planted())
        return wanted | {"client_encoding": "UTF8"}

    def environment(self) -> dict[str, str]:
        """Variables for pg_dump, pg_restore and the other tools. Holds the password.

        The database comes this way too, and `tool_dbname` as the tools' `--dbname`, so that no name
        that people chose is ever parsed as an option or a connection string.
        """
        variables = {item.keyword.decode(): item.envvar for item in pq.Conninfo.get_defaults()}
        environment = {name: os.environ[name] for name in _HONOURED if name in os.environ}
        for keyword, value in self._wanted(overriding={}).items():
            variable = variables.get(keyword)
            if variable is not None and keyword != "client_encoding":  # it would recode the dump
                environment[variable.decode()] = value
        return environment

    @property
    def tool_dbname(self) -> str:
        """The `--dbname` of a tool beside `environment()`: what libpq takes from no variable. Not secret.

        Beside a service it says again what the DSN says: a service file wins over variables. But not its
        `options`, which come in PGOPTIONS beside those of the tool's caller. Raises ConfigError for what
        the tools can only be given in sight of all, `sslpassword` say.
        """
        variables = {item.keyword.decode() for item in pq.Conninfo.get_defaults() if item.envvar is not None}
        given = {name: value for name, value in self._given.items() if name != "fallback_application_name"}
        hidden = sorted(given.keys() - variables - {*_SHOWABLE})
        if hidden:
            raise ConfigError(
                f"the DSN of {self.shown} has {', '.join(hidden)}, which cannot be given to pg_dump unseen",
                hint="Say it in a service file, which only its owner may read, or do without it.",
            )
        beside = {"password", "service", "client_encoding", "options"} if _service(given) else variables
        said = {name: value for name, value in (_KEEPALIVES | given).items() if name not in beside}
        return make_conninfo("", **said)

    def _wanted(self, *, overriding: Mapping[str, str]) -> dict[str, str]:
        given = dict(self._given)
        wanted = {} if _service(given) else dict(overriding)  # what a service file says would lose against it
        wanted |= {"connect_timeout": str(_CONNECT_TIMEOUT_S), "application_name": APPLICATION, **_KEEPALIVES}
        if not _service(given):
            wanted |= {"dbname": self.database, "user": self.user}
            if not given.get("host") and not given.get("hostaddr"):
                wanted["host"] = _socket_folder(given)
        wanted |= given
        if self.password is not None:
            wanted["password"] = self.password.reveal()
        return wanted


def _service(given: Mapping[str, str]) -> str:
    return given.get("service") or os.environ.get("PGSERVICE", "")


def _socket_folder(given: Mapping[str, str]) -> str:
    """The local socket's folder. Left to libpq, psycopg and Debian's tools would look in two places."""
    name = f".s.PGSQL.{given.get('port') or '5432'}"
    for folder in _SOCKET_FOLDERS:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(f"{folder}/{name}").st_mode):
                return folder
    return "localhost"


def _planted() -> dict[str, str]:
    """What undoes the variables around us that libpq would read into a session of ours."""
    undo = {}
    for option in pq.Conninfo.get_defaults():
        variable, keyword = (option.envvar or b"").decode(), option.keyword.decode()
        if variable in os.environ and variable not in _HONOURED:
            undo[keyword] = (option.compiled or b"").decode() or _NEUTRAL.get(keyword, "")
    return undo


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
    conninfo = {"tcp_user_timeout": str(_USER_TIMEOUT_MS)} | endpoint.conninfo
    if purpose:
        conninfo["application_name"] = f"{APPLICATION} {purpose}"
    with server_errors(endpoint, "cannot connect"):
        connection: Connection = psycopg.Connection.connect(
            make_conninfo("", **conninfo), autocommit=True, prepare_threshold=None
        )
        try:
            _settle(connection, statement_timeout_s, lock_timeout_s, local=False)
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


def _settle(session: Connection, statement_timeout_s: float, lock_timeout_s: float, *, local: bool) -> None:
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
            hint=_hint(error.sqlstate or "", said) or diagnosis.message_hint or "",
        ) from error


OUT_OF_LOCKS = "max_locks_per_transaction"
"""What PostgreSQL and its tools speak of when a server has no room for another lock."""

OUT_OF_LOCKS_HINT = (
    f"Raise {OUT_OF_LOCKS} on that server and restart it: pg_dump and the session beside it hold a lock on "
    "each table, all at the same time."
)

_HINTS = (
    # (SQLSTATE, part of libpq's message, what to do); libpq gives no SQLSTATE for a connection that failed.
    ("28P01", "password authentication failed", "Check the role's name and password in the configuration."),
    ("", "no password supplied", "Give the password in the configuration, or in a passfile or service file."),
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


def _hint(sqlstate: str, said: str) -> str:
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


@dataclass(frozen=True)
class HeldLock:
    """An advisory lock that is held as long as its sessions live."""

    sessions: tuple[Connection, ...]

    def still_held(self) -> bool:
        """Ask the servers' sessions: false when one was lost, and the lock with it."""
        try:
            for session in self.sessions:
                session.execute("SELECT 1")
        except psycopg.Error:
            return False
        return True


@contextlib.contextmanager
def advisory_lock(
    endpoint: Endpoint, database: str, *, purpose: str, wait_s: float, renames: bool = False
) -> Iterator[HeldLock]:
    """Hold `database` of the server at `endpoint` against every other dump and swap of it.

    An advisory lock counts only within the database of the session that took it, and a session in a
    database keeps it from being renamed. So the lock is taken in `postgres`, where a swap can hold it
    while it renames, and in `database` too, where roles that may not connect to `postgres` still meet
    each other. With `renames` the second one is waited for and given back at once; the first keeps
    the others out. Its name is a digest of the database's name: a swap does not change it.

    It is held by an open transaction without a snapshot: it needs no cleaning, ends with its
    connection, holds back no vacuum, and stays on one server process behind a pooler too.

    Raises Busy after `wait_s` seconds, naming who holds it; ServerError when neither can be reached.
    """
    with contextlib.ExitStack() as stack:
        held: list[Connection] = []
        neutral = endpoint.with_database(NEUTRAL_DATABASE)
        own = endpoint.with_database(database)
        if database != NEUTRAL_DATABASE:
            try:
                held.append(_take(stack, neutral, database, purpose, wait_s))
            except ServerError:
                if renames:
                    raise
        if renames:
            with contextlib.ExitStack() as passing, contextlib.suppress(ServerError):
                _take(passing, own, database, purpose, wait_s)  # it may not exist, or accept no one
        else:
            held.append(_take(stack, own, database, purpose, wait_s))
        yield HeldLock(tuple(held))


def lock_key(database: str) -> int:
    """The advisory lock of a database, as a signed 64-bit number; the same in every version of us."""
    digest = hashlib.sha256(b"backup_pipeline\0" + database.encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _take(
    stack: contextlib.ExitStack, endpoint: Endpoint, database: str, purpose: str, wait_s: float
) -> Connection:
    key = lock_key(database)
    session = stack.enter_context(
        contextlib.closing(connect(endpoint, autocommit=False, statement_timeout_s=0, purpose=purpose))
    )
    with server_errors(endpoint, f"cannot lock {database}"):
        _settle(session, 0, wait_s, local=True)
        row = session.execute("SELECT pg_catalog.pg_try_advisory_xact_lock(%s)", [key]).fetchone()
        if row and row[0]:
            return session
        try:
            if wait_s > 0:
                session.execute("SELECT pg_catalog.pg_advisory_xact_lock(%s)", [key])
                return session
        except psycopg.errors.LockNotAvailable:
            session.rollback()
        raise Busy(
            f"database {database} is held by another dump or swap; {purpose} waited {wait_s:g} s for it",
            detail={"server": endpoint.shown, "held by": _holder(session, key)},
            hint="Wait for it to end and try again; if it hangs, pg_terminate_backend(pid) ends it.",
        )


def _holder(session: Connection, key: int) -> str:
    row = session.execute(
        "SELECT l.pid, a.application_name, a.usename, a.backend_start"
        " FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid"
        " WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1"
        " AND l.database ="
        " (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"
        " AND l.classid::bigint = %s AND l.objid::bigint = %s",
        [(key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF],
    ).fetchone()
    if row is None:
        return "it was released just now"
    pid, application, user, since = row
    began = f" since {since:%Y-%m-%d %H:%M:%S} UTC" if isinstance(since, datetime) else ""
    return f"{application or 'an unknown program'}, pid {pid}, role {user or 'unknown'}{began}"
