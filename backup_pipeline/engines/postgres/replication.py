"""A session that speaks PostgreSQL's replication protocol, and never holds Python still while it waits.

Called by base_backup.py, slots.py and wal_stream.py. Reads are non-blocking: whoever waits for the server
waits on its socket, with a deadline, and other threads go on. What is asked over the session does not belong
here.

Source: PostgreSQL, "Streaming Replication Protocol".
"""

import contextlib
import select
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo

from backup_pipeline.engines.postgres.endpoint import APPLICATION, Endpoint
from backup_pipeline.engines.postgres.server import USER_TIMEOUT_MS, hint_for
from backup_pipeline.errors import ServerError

NOTICES = 50
"""No more notices of one session are kept: the rest is counted."""

_GOOD = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.COPY_OUT)
_NO_REPLICATION = "Let the role read WAL and take base backups: ALTER ROLE … REPLICATION."
_WHOLE = "The server does not know what has changed since the parent: take a whole base backup."
_HINTS = (
    # (part of the message, what to do), looked at before what a plain session may meet.
    (
        "no pg_hba.conf entry for replication",
        "Allow this role from this host in the server's pg_hba.conf, in a line whose database is "
        "`replication`: `all` does not cover it.",
    ),
    (
        "number of requested standby connections exceeds",
        "Raise max_wal_senders on that server and restart it, or end a replication connection that is not "
        "needed; pg_stat_replication lists them.",
    ),
    ("permission denied to start wal sender", _NO_REPLICATION),
    ("must be superuser or replication role", _NO_REPLICATION),
    (
        "all replication slots are in use",
        "Raise max_replication_slots on that server and restart it, or drop a slot that nobody needs; "
        "pg_replication_slots lists them.",
    ),
    ("wal level not sufficient", "Set wal_level = replica on that server and restart it."),
    ("full_page_writes=off", "Set full_page_writes = on on the primary, then take the backup again."),
    (
        "unless wal summarization is enabled",
        "Set summarize_wal = on on that server, and reload it; `backup-pipeline wal setup` does.",
    ),
    ("wal summaries are required", _WHOLE),
    ("wal summarization is not progressing", _WHOLE),
    ("found in manifest, but not in this server's history", _WHOLE),
    ("manifest requires wal from", _WHOLE),
    ("standby was promoted", "Take the backup again, from the server that was promoted."),
)


@dataclass
class Session:
    """One replication connection; `notices` is what the server remarked, in order."""

    endpoint: Endpoint
    stall_s: float
    notices: list[str] = field(default_factory=list)
    notices_left_out: int = 0
    _connection: pq.abc.PGconn | None = field(default=None, repr=False)

    @property
    def connection(self) -> pq.abc.PGconn:
        """What libpq calls a connection."""
        if self._connection is None:
            raise ServerError(f"the replication connection to {self.endpoint.shown} is closed")
        return self._connection

    def close(self) -> None:
        """End the connection, and with it what the server does for it."""
        if self._connection is not None:
            self._connection.notice_handler = None
            self._connection.finish()
            self._connection = None

    def send(self, command: str) -> None:
        """Send one command; its results are asked for with `result`. Raises ServerError."""
        try:
            self.connection.send_query(command.encode())
            self._written()
        except psycopg.Error as error:
            raise self.failed(str(error)) from error

    def result(self, *, stall_s: float | None = None) -> pq.abc.PGresult | None:
        """The next result of the command, None after the last one. Raises ServerError."""
        try:
            while self.connection.is_busy():
                self._wait(writing=False, stall_s=stall_s or self.stall_s)
                self.connection.consume_input()
            return self.connection.get_result()
        except psycopg.Error as error:
            raise self.failed(str(error)) from error

    def rows(self, what: str, *, stall_s: float | None = None) -> list[tuple[str | None, ...]]:
        """The next result, which must be rows. Raises ServerError."""
        found = self.checked(self.result(stall_s=stall_s), what)
        return [
            tuple(_text(found.get_value(row, column)) for column in range(found.nfields))
            for row in range(found.ntuples)
        ]

    def ask(self, command: str) -> list[tuple[str | None, ...]]:
        """The rows that a command of one result gives. Raises ServerError."""
        self.send(command)
        rows = self.rows(command.partition(" ")[0])
        while (rest := self.result()) is not None:
            self.checked(rest, command)
        return rows

    def checked(self, result: pq.abc.PGresult | None, what: str) -> pq.abc.PGresult:
        """`result` unless it is an error, or none. Raises ServerError."""
        if result is None:
            raise self.failed(f"the server ended {what} early")
        if result.status not in _GOOD:
            raise self.failed(message_of(result), sqlstate=sqlstate_of(result))
        return result

    def copied(self) -> memoryview | None:
        """The next message of a COPY, None at its end. Valid until the next call. Raises ServerError."""
        connection = self.connection
        try:
            while True:
                length, data = connection.get_copy_data(1)
                if length > 0 and data is not None:
                    return data
                if length < 0:
                    return None
                self._wait(writing=False, stall_s=self.stall_s)
                connection.consume_input()
        except psycopg.Error as error:
            raise self.failed(str(error)) from error

    def copy_in(self, command: str, chunks: Iterable[bytes]) -> None:
        """Have the server read `chunks` by a command of COPY's kind. Raises ServerError."""
        self.send(command)
        begun = self.result()
        if begun is None or begun.status != pq.ExecStatus.COPY_IN:
            self.checked(begun, command)
            raise self.failed(f"the server does not read for {command}")
        try:
            for chunk in chunks:
                while not self.connection.put_copy_data(chunk):
                    self._written()
                self._written()
            while not self.connection.put_copy_end():
                self._written()
            self._written()
        except psycopg.Error as error:
            raise self.failed(str(error)) from error
        while (rest := self.result()) is not None:
            self.checked(rest, command)

    def _written(self) -> None:
        """Return when libpq has handed on all that it was given."""
        while self.connection.flush():
            self._wait(writing=True, stall_s=self.stall_s)
            self.connection.consume_input()

    def failed(self, said: str, *, sqlstate: str = "") -> ServerError:
        """The error for what the server or libpq said."""
        said = " ".join(said.split())
        detail = {"server": self.endpoint.shown} | ({"sqlstate": sqlstate} if sqlstate else {})
        return ServerError(
            f"the replication connection failed ({self.endpoint.shown}): {said}",
            detail=detail,
            hint=_hint(sqlstate, said),
        )

    def _wait(self, *, writing: bool, stall_s: float) -> None:
        poll = select.poll()
        poll.register(self.connection.socket, select.POLLIN | (select.POLLOUT if writing else 0))
        if not poll.poll(stall_s * 1000):
            raise ServerError(
                f"the server sent nothing for {stall_s:g} s ({self.endpoint.shown})",
                hint="Look at its load and at the network; a longer stall_timeout waits for longer.",
            )

    def _notice(self, result: pq.abc.PGresult) -> None:
        if len(self.notices) < NOTICES:
            self.notices.append(message_of(result))
        else:
            self.notices_left_out += 1


@contextlib.contextmanager
def replication_session(endpoint: Endpoint, *, purpose: str, stall_s: float) -> Iterator[Session]:
    """A replication connection, the same parameters as `endpoint`'s sessions have. Closed at the end, which
    also ends what the server does for it. Raises ServerError.
    """
    parameters = {"tcp_user_timeout": str(USER_TIMEOUT_MS)} | endpoint.conninfo
    parameters.pop("dbname", None)
    parameters |= {"replication": "true", "application_name": f"{APPLICATION} {purpose}"}
    session = Session(endpoint, stall_s)
    connection = pq.PGconn.connect_start(make_conninfo("", **parameters).encode())
    try:
        session._connection = connection
        _connect(session, connection, timeout_s=float(parameters["connect_timeout"]))
        connection.nonblocking = 1
        connection.notice_handler = session._notice
        yield session
    finally:
        session.close()


def _connect(session: Session, connection: pq.abc.PGconn, *, timeout_s: float) -> None:
    events: dict[int, int] = {
        pq.PollingStatus.READING: select.POLLIN,
        pq.PollingStatus.WRITING: select.POLLOUT,
    }
    status: int = pq.PollingStatus.WRITING
    while connection.status != pq.ConnStatus.BAD and status in events:
        poll = select.poll()
        poll.register(connection.socket, events[status])
        if not poll.poll(timeout_s * 1000):
            raise session.failed("timeout expired")
        status = connection.connect_poll()
    if connection.status != pq.ConnStatus.OK:
        raise session.failed(connection.get_error_message() or "it was refused")


def message_of(result: pq.abc.PGresult) -> str:
    """The server's own sentence."""
    said = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.error_message
    return " ".join(said.decode(errors="replace").split())


def sqlstate_of(result: pq.abc.PGresult) -> str:
    """The SQLSTATE of an error, "" without one."""
    return (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()


def _hint(sqlstate: str, said: str) -> str:
    lower = said.lower()
    return next((hint for part, hint in _HINTS if part in lower), "") or hint_for(sqlstate, said)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="surrogateescape")
