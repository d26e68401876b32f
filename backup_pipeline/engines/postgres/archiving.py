"""What a server says of its WAL archiving, and its settings changed by ALTER SYSTEM.

Called by `wal setup` and `wal status`. What the settings should be is decided in wal/setup.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg import sql

from backup_pipeline.domain.wal import Lsn
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, server_errors
from backup_pipeline.errors import ServerError

SETTINGS = (
    "wal_level",
    "archive_mode",
    "archive_command",
    "archive_library",
    "archive_timeout",
    "summarize_wal",
)
"""The settings that archiving hangs on, and incremental base backups: summarize_wal from PostgreSQL 17 on."""


@dataclass(frozen=True)
class Archiving:
    """A server's settings as they are in force, and what it is. `pending` wait for a restart."""

    settings: Mapping[str, str]
    pending: tuple[str, ...]
    data_directory: str  # "" where the role may not see it
    segment_bytes: int


@dataclass(frozen=True)
class ArchiverCounts:
    """pg_stat_archiver, the files that wait (None where the role may not see them), and where WAL is."""

    archived: int
    last_archived: str
    last_archived_at: datetime | None
    failed: int
    last_failed: str
    last_failed_at: datetime | None
    timeline: int
    lsn: Lsn
    ready: int | None
    oldest_ready_at: datetime | None

    @property
    def is_failing(self) -> bool:
        """Whether the last thing that the archiver met was a failure."""
        if self.last_failed_at is None:
            return False
        return self.last_archived_at is None or self.last_failed_at > self.last_archived_at


def read_archiving(session: Connection) -> Archiving:
    """Ask for the settings. archive_command comes as it is written, also while archiving is off.

    Raises ServerError when the role may not read them.
    """
    rows = session.execute(
        "SELECT name, CASE name WHEN 'archive_command' THEN reset_val ELSE setting END, pending_restart"
        " FROM pg_catalog.pg_settings WHERE name = ANY(%s)",
        [list(SETTINGS)],
    ).fetchall()
    where = session.execute(
        "SELECT (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'data_directory'),"
        " (SELECT setting FROM pg_catalog.pg_settings WHERE name = 'wal_segment_size')"
    ).fetchone()
    if where is None:
        raise ServerError("the server did not say where its data directory is")
    return Archiving(
        settings={str(name): str(value or "") for name, value, _ in rows},
        pending=tuple(sorted(str(name) for name, _, pending in rows if pending)),
        data_directory=str(where[0] or ""),
        segment_bytes=int(str(where[1])),
    )


def find_missing(session: Connection, paths: Sequence[str]) -> tuple[str, ...] | None:
    """Which of these files the server does not see on its machine; None where the role may not ask."""
    row = session.execute(
        "SELECT pg_catalog.has_function_privilege('pg_catalog.pg_stat_file(text, boolean)', 'EXECUTE')"
        " AND pg_catalog.pg_has_role('pg_read_server_files', 'USAGE')"
    ).fetchone()
    if row is None or not row[0]:
        return None
    return tuple(path for path in paths if not _sees(session, path))


def _sees(session: Connection, path: str) -> bool:
    query = "SELECT (pg_catalog.pg_stat_file(%s, true)).modification IS NOT NULL"
    try:
        row = session.execute(query, [path]).fetchone()
    except psycopg.errors.InsufficientPrivilege:  # a folder above it is closed to the server's user
        return False
    return row is not None and bool(row[0])


def alter_system(session: Connection, endpoint: Endpoint, values: Mapping[str, str]) -> None:
    """Have the server keep these settings, and read them; some take effect with a restart only.

    Raises ServerError; the settings before the one that failed are kept then.
    """
    with server_errors(endpoint, "cannot change the server's settings"):
        for name, value in values.items():
            session.execute(
                sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value))
            )
        session.execute("SELECT pg_catalog.pg_reload_conf()")


def read_archiver(session: Connection) -> ArchiverCounts:
    """Ask the archiver's statistics, and how far WAL was written (on a standby: replayed)."""
    row = session.execute(
        "SELECT archived_count, last_archived_wal, last_archived_time,"
        " failed_count, last_failed_wal, last_failed_time,"
        " CASE WHEN pg_catalog.pg_is_in_recovery()"
        " THEN (SELECT lpad(to_hex(timeline_id), 8, '0') FROM pg_catalog.pg_control_checkpoint())"
        " ELSE left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8) END,"
        " CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()"
        " ELSE pg_catalog.pg_current_wal_lsn() END::text,"
        " pg_catalog.has_function_privilege('pg_catalog.pg_ls_archive_statusdir()', 'EXECUTE')"
        " FROM pg_catalog.pg_stat_archiver"
    ).fetchone()
    if row is None:
        raise ServerError("the server has no pg_stat_archiver")
    archived, last, last_at, failed, last_failed, last_failed_at, timeline, lsn, may_look = row
    ready, oldest = _ready(session) if may_look else (None, None)
    return ArchiverCounts(
        archived=int(str(archived)),
        last_archived=str(last or ""),
        last_archived_at=_moment(last_at),
        failed=int(str(failed)),
        last_failed=str(last_failed or ""),
        last_failed_at=_moment(last_failed_at),
        timeline=int(str(timeline), 16),
        lsn=Lsn.parse(str(lsn)),
        ready=ready,
        oldest_ready_at=oldest,
    )


def _ready(session: Connection) -> tuple[int, datetime | None]:
    row = session.execute(
        "SELECT count(*), min(modification) FROM pg_catalog.pg_ls_archive_statusdir()"
        " WHERE name LIKE '%%.ready'",
        [],
    ).fetchone()
    return (int(str(row[0])), _moment(row[1])) if row else (0, None)


def _moment(value: object) -> datetime | None:
    return value if isinstance(value, datetime) else None
