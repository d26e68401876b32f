"""One moment of a database, held still for a dump and its fingerprint.

Called by the action that takes a dump, and by fingerprint.py for databases that have been restored.
Tables are locked before the snapshot is taken, so that no TRUNCATE or rewriting ALTER can come between
and show a table empty to whoever opens it later under the same snapshot. The session that holds locks
and snapshot is also the fingerprint's first reader: it never waits behind an ALTER that waits for it.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import psycopg
from psycopg import IsolationLevel, sql

from backup_pipeline.engines.postgres.endpoint import APPLICATION, Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect, server_errors
from backup_pipeline.engines.postgres.stall import Watchdog, answering, hang_up
from backup_pipeline.errors import BackupError, ServerError
from backup_pipeline.units import show_line

DUMP_PURPOSE = "dump"
"""What pg_dump calls itself after APPLICATION, so that its sessions are found in pg_stat_activity."""

_ATTEMPTS = 20
_LOCKS_PER_STATEMENT = 200
_CHECK_TIMEOUT_S = 30.0
_ANSWER_S = 60.0
_CANCEL_S = 10.0
_TAKE_S = 600.0  # beside the wait for locks; a hundred thousand tables are listed and locked in it

# Everything that shapes how a value becomes text, and what a session may see.
_PINNED = {
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "jit": "off",
    "lc_monetary": "C",
    "quote_all_identifiers": "off",
    "row_security": "off",  # a role that may not see every row gets an error, not a part of them
    "standard_conforming_strings": "on",
    "xmlbinary": "base64",
}

# As pg_dump chooses: nothing of the system's, of extensions only what they mark as configuration.
_RELATIONS = sql.SQL("""
    SELECT c.oid, n.nspname, c.relname, c.relkind, c.relpersistence, x.condition
      FROM pg_catalog.pg_class c
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
      LEFT JOIN (SELECT pg_catalog.unnest(extconfig) AS oid, pg_catalog.unnest(extcondition) AS condition
                   FROM pg_catalog.pg_extension) x ON x.oid = c.oid
     WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
       AND pg_catalog.left(n.nspname, 3) <> 'pg_' AND n.nspname <> 'information_schema'
       AND (x.oid IS NOT NULL OR NOT EXISTS (
            SELECT FROM pg_catalog.pg_depend d
             WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
               AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND d.deptype = 'e'))
""")

# One statement, so that the list is of the very snapshot that is exported.
_EXPORT = sql.SQL("""
    WITH exported AS MATERIALIZED (
        SELECT pg_catalog.pg_export_snapshot() AS id, pg_catalog.clock_timestamp() AS taken_at)
    SELECT e.id, e.taken_at, pg_catalog.pg_is_in_recovery(), r.*
      FROM exported e LEFT JOIN ({}) r ON true
""").format(_RELATIONS)

_BLOCKERS = """
    SELECT n.nspname || '.' || c.relname, l.pid, l.granted, coalesce(a.usename, x.owner), a.application_name,
           a.state, coalesce(a.xact_start, x.prepared), x.gid
      FROM pg_catalog.pg_locks l
      JOIN pg_catalog.pg_class c ON c.oid = l.relation
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
      LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
      LEFT JOIN pg_catalog.pg_locks t  -- each transaction holds its own number: so does a prepared one
        ON l.pid IS NULL AND t.pid IS NULL AND t.locktype = 'transactionid'
       AND t.virtualtransaction = l.virtualtransaction
      LEFT JOIN pg_catalog.pg_prepared_xacts x ON x.transaction = t.transactionid
     WHERE l.mode = 'AccessExclusiveLock' AND l.relation = ANY (%s::oid[])
       AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
       AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
     ORDER BY l.granted DESC, 7
"""

# Running and not held up by its client, or busy with something else than a while ago.
_WORKING = """
    SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity
     WHERE application_name = %s AND datname = pg_catalog.current_database() AND usename = current_user
       AND ((state = 'active' AND coalesce(wait_event_type, '') NOT IN ('Client', 'Lock'))
            OR state_change > pg_catalog.now() - pg_catalog.make_interval(secs => %s))
"""


# The same of the session that reads, and of its parallel workers.
_READING = """
    SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity
     WHERE %s IN (pid, leader_pid)
       AND ((state = 'active' AND coalesce(wait_event_type, '') NOT IN ('Client', 'Lock'))
            OR state_change > pg_catalog.now() - pg_catalog.make_interval(secs => %s))
"""


@dataclass(frozen=True)
class Relation:
    """Something in pg_class that a dump reads. `condition` is the WHERE of an extension's table."""

    oid: int
    schema: str
    name: str
    kind: str  # pg_class.relkind
    unlogged: bool
    condition: str = ""

    @property
    def lockable(self) -> bool:
        """Whether pg_dump locks it: tables and partitioned tables."""
        return self.kind in ("r", "p")

    @property
    def identifier(self) -> sql.Identifier:
        """Its name, quoted."""
        return sql.Identifier(self.schema, self.name)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass
class Snapshot:
    """An exported snapshot: `id` is for pg_dump, `relations` are as the snapshot sees them.

    Its session is in a transaction of the snapshot and holds ACCESS SHARE on every table. Use it in
    `reading`, one thread at a time.
    """

    id: str
    taken_at: datetime
    in_recovery: bool
    relations: tuple[Relation, ...]
    endpoint: Endpoint
    _session: Connection = field(repr=False)
    _busy: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _failure: BaseException | None = field(default=None, repr=False)
    _given_up: bool = field(default=False, repr=False)
    _released: bool = field(default=False, repr=False)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """The session, for one thread. What fails in here makes `check` fail, and so ends the dump."""
        with self._busy:
            if self._given_up or self._released:
                raise ServerError("the snapshot was given up")
            try:
                with snapshot_errors(self.endpoint, "cannot read in the snapshot"):
                    yield self._session
            except BaseException as error:
                reason, self._failure = self._failure, self._failure or error
                if isinstance(reason, ServerError):  # what hung up
                    raise reason from error
                raise

    @contextlib.contextmanager
    def watched(self, stall_s: float) -> Iterator[Watchdog]:
        """In `reading`: end it when the server stands still for `stall_s` seconds or more."""
        watchdog = Watchdog(
            stall_s, lambda within_s: self._is_working(_READING, self._pid, within_s), self._abandon
        )
        with watchdog.watching():
            yield watchdog

    def _abandon(self, failure: ServerError) -> None:
        """Have `reading` fail now, and the server's side of it end as soon as it can."""
        self._failure = self._failure or failure
        self._given_up = True
        hang_up(self._session)
        with contextlib.suppress(ServerError, psycopg.Error):
            self._ask("SELECT pg_catalog.pg_terminate_backend(%s)", self._pid)

    @property
    def _pid(self) -> int:
        return self._session.info.backend_pid

    def check(self) -> None:
        """Raise ServerError when the session that holds the locks is gone, or reading in it failed."""
        if isinstance(self._failure, BackupError):
            raise self._failure
        if self._failure is not None:
            raise ServerError(f"reading beside the dump failed: {self._failure}") from self._failure
        if self._busy.acquire(blocking=False):  # else a reader uses it, and will notice
            try:
                if not self._released:
                    lost = "the session that holds the dump's locks was lost"
                    with snapshot_errors(self.endpoint, lost), answering(self._session, within_s=_ANSWER_S):
                        self._session.execute("SELECT 1")
            finally:
                self._busy.release()

    def release(self) -> None:
        """End the snapshot and let go of its locks, once dump and fingerprint are complete.

        Raises ServerError, as `check`, when it had not lived until now.
        """
        self.check()
        with (
            self._busy,
            snapshot_errors(self.endpoint, "the snapshot's session was lost"),
            answering(self._session, within_s=_ANSWER_S),
        ):
            self._session.rollback()
            self._released = True

    def dump_is_working(self, *, within_s: float) -> bool:
        """Ask the server whether a silent pg_dump still gets somewhere: one of its sessions runs, not
        waiting for pg_dump or a lock, or began something new `within_s` seconds ago.
        """
        return self._is_working(_WORKING, f"{APPLICATION} {DUMP_PURPOSE}", within_s)

    def _is_working(self, query: str, *values: object) -> bool:
        try:
            return bool(self._ask(query, *values))
        except (ServerError, psycopg.Error):
            return False

    def _ask(self, query: str, *values: object) -> object:
        """The one value that a query gives, in a session of its own."""
        with (
            contextlib.closing(connect(self.endpoint, statement_timeout_s=_CHECK_TIMEOUT_S)) as session,
            answering(session, within_s=2 * _CHECK_TIMEOUT_S),
        ):
            row = session.execute(query.encode(), values).fetchone()
        return row and row[0]

    def contention(self) -> ServerError | None:
        """What kept pg_dump from a table, if somebody did: it cannot come past a session that waits for
        a lock which this snapshot holds, and that one waits for us.
        """
        locked = [relation for relation in self.relations if relation.lockable]
        try:
            with contextlib.closing(connect(self.endpoint, statement_timeout_s=_CHECK_TIMEOUT_S)) as session:
                return _contended(self.endpoint, session, locked)
        except (ServerError, psycopg.Error):
            return None

    def cancel(self) -> None:
        """End whatever is being read in this snapshot, and begin nothing new: readers raise ServerError.

        A server that does not hear of it within ten seconds is left to itself.
        """
        self._given_up = True
        deadline = time.monotonic() + _CANCEL_S
        while not self._busy.acquire(timeout=0.2):
            if time.monotonic() > deadline:
                hang_up(self._session)
                return
            with contextlib.suppress(psycopg.Error):
                self._session.cancel_safe(timeout=5.0)
        self._busy.release()


@contextlib.contextmanager
def exported_snapshot(endpoint: Endpoint, *, lock_timeout_s: float = 60.0) -> Iterator[Snapshot]:
    """Lock every table that pg_dump would read, then take and export one snapshot of the database.

    Leaving ends the snapshot and whatever still reads in it; leaving without an exception also makes
    sure that its session lived to the end.

    Raises ServerError: a table stayed locked for `lock_timeout_s` seconds altogether (it names who
    locks it), tables came and went too fast, or the session was lost.
    """
    with contextlib.closing(_open_session(endpoint)) as session:
        with (
            snapshot_errors(endpoint, "cannot take a snapshot"),
            answering(session, within_s=lock_timeout_s + _TAKE_S),
        ):
            snapshot = _take(endpoint, session, lock_timeout_s)
        try:
            yield snapshot
            snapshot.check()
        finally:
            snapshot.cancel()


def _open_session(endpoint: Endpoint) -> Connection:
    """A session whose transactions are REPEATABLE READ, READ ONLY, and render values in one way only."""
    session = connect(endpoint, statement_timeout_s=0, lock_timeout_s=0, purpose="snapshot")
    try:
        with server_errors(endpoint, "cannot settle a session"):
            for name, value in _PINNED.items():
                session.execute("SELECT pg_catalog.set_config(%s, %s, false)", [name, value])
            session.isolation_level = IsolationLevel.REPEATABLE_READ
            session.read_only = True
            session.autocommit = False
    except BaseException:
        session.close()
        raise
    return session


@contextlib.contextmanager
def snapshot_errors(endpoint: Endpoint, what: str) -> Iterator[None]:
    """As server_errors, and say what helps when a standby cancels what is in its replay's way."""
    try:
        with server_errors(endpoint, what):
            yield
    except ServerError as error:
        if "recovery" in f"{error.message}{error.detail.get('said', '')}":
            error.hint = (
                "This is a standby, and replay went over the snapshot: set hot_standby_feedback = on there, "
                "raise max_standby_streaming_delay, or take the dump from the primary."
            )
        raise


def _take(endpoint: Endpoint, session: Connection, lock_timeout_s: float) -> Snapshot:
    deadline = time.monotonic() + lock_timeout_s
    unlocked: list[Relation] = []
    for _ in range(_ATTEMPTS):
        wanted = [relation for relation in list_relations(session) if relation.lockable]
        session.rollback()  # of the listing: the locks' transaction must not have a snapshot yet
        session.execute("SET LOCAL statement_timeout = 0")  # begins it without one
        _lock(endpoint, session, wanted, deadline)
        rows = session.execute(_EXPORT).fetchall()
        relations = tuple(_relation(row[3:]) for row in rows if row[3] is not None)
        locked = _locked(session)
        unlocked = [relation for relation in relations if relation.lockable and relation.oid not in locked]
        if not unlocked:
            identifier, moment, in_recovery = rows[0][:3]
            taken_at = datetime.fromisoformat(str(moment)).astimezone(UTC)
            return Snapshot(str(identifier), taken_at, bool(in_recovery), relations, endpoint, session)
        session.rollback()
    raise ServerError(
        f"tables are created faster than they can be locked ({endpoint.shown})",
        detail={"attempts": _ATTEMPTS, "newest": ", ".join(map(str, unlocked[:5]))},
        hint="Take the dump when no migration or load creates tables, or let it create temporary ones.",
    )


def list_relations(session: Connection) -> Iterator[Relation]:
    """Everything that a dump of the session's database would read."""
    return (_relation(row) for row in session.execute(_RELATIONS))


def _relation(row: Sequence[object]) -> Relation:
    oid, schema, name, kind, persistence, condition = (str(value or "") for value in row)
    return Relation(int(oid), schema, name, kind, persistence == "u", condition)


def _lock(endpoint: Endpoint, session: Connection, wanted: Sequence[Relation], deadline: float) -> None:
    """Lock what is still there; what has gone is missed by nobody, or by the list of the snapshot."""
    for start in range(0, len(wanted), _LOCKS_PER_STATEMENT):
        batch = wanted[start : start + _LOCKS_PER_STATEMENT]
        try:
            _lock_together(endpoint, session, batch, deadline)
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            for relation in batch:
                with contextlib.suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                    _lock_together(endpoint, session, [relation], deadline)


def _lock_together(
    endpoint: Endpoint, session: Connection, batch: Sequence[Relation], deadline: float
) -> None:
    left_ms = max(1, int((deadline - time.monotonic()) * 1000))
    names = sql.SQL(", ").join(sql.SQL("ONLY {}").format(relation.identifier) for relation in batch)
    try:
        with session.transaction():
            # The one bounds each lock, the other all of them.
            session.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(left_ms)))
            session.execute(sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(left_ms + 1000)))
            session.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(names))
            session.execute("SET LOCAL statement_timeout = 0")
    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
        raise _blocked(endpoint, session, batch) from error


def _blocked(endpoint: Endpoint, session: Connection, batch: Sequence[Relation]) -> ServerError:
    return _contended(endpoint, session, batch) or ServerError(
        f"table {batch[0]} or one of {len(batch) - 1} others stayed locked ({endpoint.shown})",
        hint="Whoever locked it has let go of it just now; try again.",
    )


def _contended(endpoint: Endpoint, session: Connection, relations: Sequence[Relation]) -> ServerError | None:
    """Who holds one of these exclusively, or waits to: nobody comes past either of them."""
    rows = session.execute(_BLOCKERS, [[relation.oid for relation in relations]]).fetchall()
    if not rows:
        return None
    table, pid, granted, user, application, state, since, gid = rows[0]
    began = f" since {since:%Y-%m-%d %H:%M:%S} UTC" if isinstance(since, datetime) else ""
    locked = ", ".join(dict.fromkeys(str(row[0]) for row in rows))
    if pid is None:
        return _prepared(endpoint, table, locked, gid, f"role {user or 'unknown'}{began}")
    how = "holds an exclusive lock" if granted else "waits for an exclusive lock, and all others behind it,"
    return ServerError(
        f"table {table} is locked by another session (pid {pid}, role {user or 'unknown'}, {endpoint.shown})",
        detail={
            "session": f"{application or 'an unknown program'}, {state or 'state unknown'}, {how}{began}",
            "locked": locked,
        },
        hint=f"Try again when it has ended; pg_stat_activity shows it, pg_terminate_backend({pid}) ends it.",
    )


def _prepared(endpoint: Endpoint, table: object, locked: str, gid: object, whose: str) -> ServerError:
    """A lock without a session: of a transaction prepared for two-phase commit, until somebody ends it."""
    name = "unknown, see pg_prepared_xacts" if gid is None else sql.Literal(str(gid)).as_string()
    return ServerError(
        show_line(f"table {table} is locked by a prepared transaction ({name}, {whose}, {endpoint.shown})"),
        detail={"locked": locked},
        hint=f"Whoever prepared it must end it, in database {endpoint.database}: "
        + show_line(f"COMMIT PREPARED {name} or ROLLBACK PREPARED {name}; no restart ends it."),
    )


def _locked(session: Connection) -> frozenset[int]:
    rows = session.execute(
        "SELECT relation FROM pg_catalog.pg_locks WHERE pid = pg_catalog.pg_backend_pid()"
        " AND locktype = 'relation' AND granted"
        " AND database ="
        " (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"
    )
    return frozenset(int(str(oid)) for (oid,) in rows)
