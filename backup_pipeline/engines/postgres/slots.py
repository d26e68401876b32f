"""The physical replication slot that keeps WAL on the server until it is in the archive.

Made and read over a replication session by wal/receive.py; looked at over a plain one by `wal status`. What
such a session tells of the server itself is asked here too, also by base_backup.py.

Source: PostgreSQL, "Replication Slots", "pg_replication_slots".
"""

from dataclasses import dataclass

from backup_pipeline.domain.wal import Lsn, TimelineHistory, parse_history
from backup_pipeline.engines.postgres.replication import Session
from backup_pipeline.engines.postgres.server import Connection
from backup_pipeline.errors import ServerError

OLDEST_MAJOR = 15
"""Older servers do not tell a slot's timeline."""

LOST = "lost"


@dataclass(frozen=True)
class ServerPosition:
    """Which system a server is of, and the timeline that it writes, or replays, up to `lsn`."""

    system_identifier: str
    timeline: int
    lsn: Lsn


@dataclass(frozen=True)
class SlotPosition:
    """Up to where a slot was confirmed: what lies before may be gone. One that holds nothing has no `lsn`:
    it was lost, or never used.
    """

    timeline: int = 0
    lsn: Lsn | None = None


@dataclass(frozen=True)
class SlotStatus:
    """A slot as pg_replication_slots tells it. `kept_bytes` is what it holds back on the server."""

    name: str
    active: bool
    confirmed: Lsn | None
    wal_status: str  # reserved, extended, unreserved, lost
    safe_bytes: int | None  # how much more may be written before it is lost; None without a limit
    kept_bytes: int


@dataclass(frozen=True)
class SlotLook:
    """What a server says of one slot, None where it has none, and its limit for all: -1 is none."""

    status: SlotStatus | None
    max_keep_mb: int


def identify(session: Session) -> ServerPosition:
    """Which server this is. Raises ServerError."""
    ((system, timeline, lsn, *_),) = session.ask("IDENTIFY_SYSTEM")
    return ServerPosition(system or "", int(timeline or 0), Lsn.parse(lsn or ""))


def read_setting(session: Session, name: str) -> str:
    """A setting as the server shows it. Raises ServerError."""
    ((text,),) = session.ask(f"SHOW {name}")
    return text or ""


def read_segment_bytes(session: Session) -> int:
    """The size of the server's segments. Raises ServerError."""
    text = read_setting(session, "wal_segment_size")
    factor = {"MB": 1 << 20, "GB": 1 << 30}.get(text[-2:])
    if factor is None or not text[:-2].isdigit():
        raise ServerError(f"the server's wal_segment_size cannot be read: {text!r}")
    return int(text[:-2]) * factor


def read_position(session: Session, slot: str) -> SlotPosition | None:
    """Where a slot stands; None where there is none. Raises ServerError."""
    ((kind, lsn, timeline),) = session.ask(f'READ_REPLICATION_SLOT "{slot}"')
    if kind is None:
        return None
    if kind != "physical":
        raise ServerError(f"the slot {slot} is a {kind} one", hint="Name another slot, or drop it.")
    if lsn is None or timeline is None:
        return SlotPosition()
    return SlotPosition(int(timeline), Lsn.parse(lsn))


def create(session: Session, slot: str) -> None:
    """Make the slot; from then on the server keeps its WAL, since its last checkpoint. Raises ServerError."""
    session.ask(f'CREATE_REPLICATION_SLOT "{slot}" PHYSICAL (RESERVE_WAL)')


def drop(session: Session, slot: str) -> None:
    """Have the server forget a slot, and the WAL that it keeps for it. Raises ServerError."""
    session.send(f'DROP_REPLICATION_SLOT "{slot}"')
    while (result := session.result()) is not None:
        session.checked(result, "DROP_REPLICATION_SLOT")


def read_history(session: Session, timeline: int) -> tuple[bytes, TimelineHistory]:
    """The history file of a timeline, and what it says; timeline 1 has none. Raises ServerError, Corrupt."""
    if timeline == 1:
        return b"", TimelineHistory(1)
    return history_from(session.ask(f"TIMELINE_HISTORY {timeline}"), timeline)


def history_from(rows: list[tuple[str | None, ...]], timeline: int) -> tuple[bytes, TimelineHistory]:
    """The answer to TIMELINE_HISTORY. Raises Corrupt."""
    ((_name, content),) = rows
    data = (content or "").encode("utf-8", "surrogateescape")
    return data, parse_history(timeline, data)


def look_at(session: Connection, slot: str) -> SlotLook:
    """The slot as any role may see it. Raises ServerError."""
    row = session.execute(
        "SELECT (SELECT setting::int FROM pg_catalog.pg_settings WHERE name = 'max_slot_wal_keep_size'),"
        " s.active, s.restart_lsn::text, s.wal_status, s.safe_wal_size, pg_catalog.pg_wal_lsn_diff("
        "CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()"
        " ELSE pg_catalog.pg_current_wal_lsn() END, s.restart_lsn)::bigint"
        " FROM (SELECT 1) AS one LEFT JOIN pg_catalog.pg_replication_slots AS s ON s.slot_name = %s",
        [slot],
    ).fetchone()
    if row is None:
        raise ServerError("the server did not say what slots it has")
    limit, active, confirmed, wal_status, safe, kept = row
    keep_mb = int(str(limit)) if limit is not None else -1
    if active is None:
        return SlotLook(None, keep_mb)
    status = SlotStatus(
        slot,
        bool(active),
        Lsn.parse(str(confirmed)) if confirmed else None,
        str(wal_status or ""),
        int(str(safe)) if safe is not None else None,
        max(0, int(str(kept or 0))),
    )
    return SlotLook(status, keep_mb)
