"""The advisory lock that keeps two dumps, or a dump and a swap, of one database apart.

Called by actions/dump.py and by swap.py; it holds against runs that do not come from Dagster too.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import psycopg

from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect, server_errors, settle
from backup_pipeline.errors import Busy, ServerError

NEUTRAL_DATABASE = "postgres"
"""Where `advisory_lock` locks first: a rename of any other database does not disturb it."""


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
    stack.callback(_give_back, session)
    with server_errors(endpoint, f"cannot lock {database}"):
        settle(session, 0, wait_s, local=True)
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


def _give_back(session: Connection) -> None:
    """A server's process outlives its connection by a moment: whoever came at once would find it locked."""
    with contextlib.suppress(psycopg.Error):
        session.rollback()


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
