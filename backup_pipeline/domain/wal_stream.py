"""The messages of a stream of WAL, both ways, as values. Pure.

Read and sent by engines/postgres/wal_stream.py.

Source: PostgreSQL, "Streaming Replication Protocol", START_REPLICATION.
"""

import struct
from dataclasses import dataclass
from datetime import UTC, datetime

from backup_pipeline.domain.wal import Lsn
from backup_pipeline.errors import ServerError

_DATA = struct.Struct(">cQQq")  # 'w', where it begins, where the server's WAL ends, its clock
_KEEPALIVE = struct.Struct(">cQq?")  # 'k', where the server's WAL ends, its clock, answer at once
_STATUS = struct.Struct(">cQQQq?")  # 'r', written, flushed, applied, our clock, answer at once
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


NOWHERE = Lsn(0)
"""No position: PostgreSQL's invalid one."""


@dataclass(frozen=True)
class WalData:
    """A piece of the log, as it is written to the file."""

    start: Lsn
    data: bytes


@dataclass(frozen=True)
class Keepalive:
    """A sign of life. One asks for an answer that waits for us in order to end, or has not heard from us for
    half of its wal_sender_timeout.
    """

    end: Lsn
    asks: bool


@dataclass(frozen=True)
class Ended:
    """The server has sent all of this timeline. `timeline` goes on at `start`; 0 when it shuts down."""

    timeline: int = 0
    start: Lsn = NOWHERE


Message = WalData | Keepalive | Ended


def read_message(data: memoryview) -> WalData | Keepalive:
    """One message of the server. Raises ServerError for an unknown one."""
    kind = bytes(data[:1])
    if kind == b"w" and len(data) >= _DATA.size:
        _, start, _end, _clock = _DATA.unpack_from(data)
        return WalData(Lsn(start), bytes(data[_DATA.size :]))
    if kind == b"k" and len(data) >= _KEEPALIVE.size:
        _, end, _clock, asks = _KEEPALIVE.unpack_from(data)
        return Keepalive(Lsn(end), asks)
    raise ServerError(f"the server sent a message of {len(data)} bytes and an unknown kind, {kind!r}")


def status_update(*, received: Lsn, durable: Lsn, at: datetime, ask: bool) -> bytes:
    """What tells the server how far we are: it may forget what lies before `durable`.

    A `durable` of 0 says nothing; so does what is applied, for nothing is. With `ask` it answers at once.
    """
    clock_us = (at - _EPOCH) // _MICROSECOND
    return _STATUS.pack(b"r", received.value, durable.value, 0, clock_us, ask)


_MICROSECOND = datetime.resolution
