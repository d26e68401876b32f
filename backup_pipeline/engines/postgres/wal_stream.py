"""START_REPLICATION: a server's WAL as it is written, and what it is told of how far we are.

Called by wal/receive.py, over a replication session. What is received is judged and stored there; the
messages are domain/wal_stream.py's. Why not pg_receivewal is in docs/adr/009.

Source: PostgreSQL, "Streaming Replication Protocol".
"""

import select
import time
from dataclasses import dataclass, field

import psycopg
from psycopg import pq

from backup_pipeline.domain.wal import Lsn
from backup_pipeline.domain.wal_stream import Ended, Message, read_message
from backup_pipeline.engines.postgres.replication import Session, message_of, sqlstate_of
from backup_pipeline.errors import Busy, ServerError

_IN_USE = "55006"
_REMOVED = "58P01"
_INVALIDATED = ("has been invalidated", "can no longer get changes")
_UNUSABLE = "can no longer access replication slot"  # 18 on, as after idle_replication_slot_timeout
_SEND_WITHIN_S = 30.0


class WalRemoved(ServerError):
    """The server no longer has the WAL that it was asked for."""

    retryable = False


class SlotInvalidated(ServerError):
    """The server does not let a slot be used again, and may have the WAL yet."""

    retryable = False


@dataclass
class WalStream:
    """A stream under way on `session`; `begin_stream` makes one. Used by one thread."""

    session: Session
    heard_at_s: float = field(default_factory=time.monotonic)  # when the server last sent anything

    def receive(self, wait_s: float) -> Message | None:
        """The next message; None when none came for `wait_s`. Raises ServerError, also WalRemoved."""
        connection = self.session.connection
        try:
            length, data = connection.get_copy_data(1)
            if length == 0:
                if not self._wait(select.POLLIN, wait_s):
                    return None
                connection.consume_input()
                length, data = connection.get_copy_data(1)
        except psycopg.Error as error:
            raise self.session.failed(str(error)) from error
        self.heard_at_s = time.monotonic()
        if length > 0 and data is not None:
            return read_message(data)
        return None if length == 0 else self._ended()

    def send(self, message: bytes) -> None:
        """Tell the server something. Raises ServerError when it does not take it."""
        connection = self.session.connection
        try:
            connection.put_copy_data(message)
            self._flush()
        except psycopg.Error as error:
            raise self.session.failed(str(error)) from error

    def _flush(self) -> None:
        connection, deadline_s = self.session.connection, time.monotonic() + _SEND_WITHIN_S
        while connection.flush():
            if time.monotonic() > deadline_s:
                raise self.session.failed("it does not read what it is told")
            self._wait(select.POLLOUT, 1.0)

    def _ended(self) -> Ended:
        """What follows the last of a timeline's WAL: the next timeline, or nothing when the server ends."""
        session, connection = self.session, self.session.connection
        try:
            result = session.result()
            if result is not None and result.status in (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_BOTH):
                connection.put_copy_end()
                self._flush()
                result = session.result()
            found = Ended()
            while result is not None:
                if result.status == pq.ExecStatus.TUPLES_OK and result.ntuples == 1:
                    timeline, start = (result.get_value(0, column) or b"" for column in range(2))
                    found = Ended(int(timeline), Lsn.parse(start.decode()))
                elif result.status != pq.ExecStatus.COMMAND_OK:
                    raise _refused(session, result)
                result = session.result()
        except psycopg.Error as error:
            raise session.failed(str(error)) from error
        return found

    def _wait(self, events: int, wait_s: float) -> bool:
        poll = select.poll()
        poll.register(self.session.connection.socket, events)
        return bool(poll.poll(wait_s * 1000))


def begin_stream(session: Session, slot: str, start: Lsn, timeline: int) -> WalStream:
    """Have the server send `timeline` from `start` on, through `slot`.

    Raises Busy while somebody else reads through the slot, SlotInvalidated, WalRemoved, ServerError.
    """
    session.send(start_command(slot, start, timeline))
    result = session.result()
    if result is None or result.status != pq.ExecStatus.COPY_BOTH:
        while session.result() is not None:  # or the session could not be asked anything else
            pass
        if result is not None and result.status == pq.ExecStatus.TUPLES_OK:
            raise session.failed(f"timeline {timeline} ends before {start}")
        raise _refused(session, result)
    return WalStream(session)


def start_command(slot: str, start: Lsn, timeline: int) -> str:
    """The statement."""
    return f'START_REPLICATION SLOT "{slot}" PHYSICAL {start} TIMELINE {timeline}'


def _refused(session: Session, result: pq.abc.PGresult | None) -> ServerError | Busy:
    if result is None:
        return session.failed("the server ended the stream")
    state, said = sqlstate_of(result), message_of(result)
    if state == _IN_USE:
        return Busy(
            f"somebody else receives the WAL of {session.endpoint.shown}: {said}",
            hint="One receiver is enough. That of a machine that went away without a word is given up by the "
            "server after its wal_sender_timeout.",
        )
    failed = session.failed(said, sqlstate=state)
    if _UNUSABLE in said:
        return SlotInvalidated(
            failed.message,
            detail=failed.detail,
            hint="Drop the slot with pg_drop_replication_slot, and start again: a new one is made, and what "
            "is not archived is read as far as the server has it. For the server not to do so again, set its "
            "idle_replication_slot_timeout to 0.",
        )
    if state == _REMOVED or any(part in said for part in _INVALIDATED):
        return WalRemoved(failed.message, detail=failed.detail, hint=failed.hint)
    return failed
