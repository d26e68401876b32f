"""The heartbeat's table in a database: made, written, read. One small table in a schema of ours.

Called by `heartbeat`, the agent beside PostgreSQL and the receiver, which write it, and by drills, which read
it. What the rows say of a recovery is domain/heartbeat.py's.
"""

from datetime import UTC, datetime, timedelta
from typing import LiteralString

import psycopg
from psycopg import sql

from backup_pipeline.domain.heartbeat import GRACE, CopyBeats, Heartbeat, SourceBeats
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, server_errors
from backup_pipeline.errors import ServerError

STATEMENT_TIMEOUT_S = 5.0
LOCK_TIMEOUT_S = 1.0

_NEAR = timedelta(days=1)
# The function is its owner's: whoever may only execute it can neither forge a row nor delete one of the last
# day. A schema that somebody else made could hold a table whose triggers would run as that owner.
_SETUP = """\
CREATE SCHEMA IF NOT EXISTS backup_pipeline;
DO $$ BEGIN
    IF (SELECT nspowner <> current_user::pg_catalog.regrole FROM pg_catalog.pg_namespace
            WHERE nspname = 'backup_pipeline') THEN
        RAISE EXCEPTION 'the schema backup_pipeline belongs to another role';
    END IF;
END $$;
CREATE TABLE IF NOT EXISTS backup_pipeline.heartbeat (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp());
CREATE INDEX IF NOT EXISTS heartbeat_at ON backup_pipeline.heartbeat (at);
CREATE OR REPLACE FUNCTION backup_pipeline.beat(keep interval) RETURNS timestamptz
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        DELETE FROM backup_pipeline.heartbeat
            WHERE at < pg_catalog.clock_timestamp() - GREATEST(keep, interval '1 day');
        INSERT INTO backup_pipeline.heartbeat DEFAULT VALUES RETURNING at;
    END;
REVOKE ALL ON SCHEMA backup_pipeline FROM PUBLIC;
REVOKE ALL ON FUNCTION backup_pipeline.beat(interval) FROM PUBLIC;
"""
_GRANTS = """\
GRANT USAGE ON SCHEMA backup_pipeline TO {role};
GRANT SELECT ON backup_pipeline.heartbeat TO {role};
GRANT EXECUTE ON FUNCTION backup_pipeline.beat(interval) TO {role};
"""
_NOT_SET_UP = ("42P01", "3F000", "42883")  # no table, no schema, no function
_STEPPED = """\
SELECT id, at FROM (
    SELECT id, at, lag(at) OVER (ORDER BY id) AS previous FROM backup_pipeline.heartbeat) AS each
WHERE at < previous AND (at BETWEEN %(from)s AND %(to)s OR previous BETWEEN %(from)s AND %(to)s)
ORDER BY id LIMIT 1"""


def setup_sql(role: str = "") -> str:
    """What makes the table, and lets `role` write and read it; may be run again."""
    grants = sql.SQL(_GRANTS).format(role=sql.Identifier(role)).as_string() if role else ""
    return _SETUP + grants


def set_up(session: Connection, endpoint: Endpoint, role: str = "") -> None:
    """Make what `setup_sql` says, all of it or nothing. Raises ServerError."""
    with server_errors(endpoint, "cannot make the heartbeat's table"), session.transaction():
        session.execute(setup_sql(role).encode())


def beat(session: Connection, endpoint: Endpoint, keep: timedelta) -> datetime:
    """Write one row, and delete those that are older than `keep`, and than a day; returns its time.

    Raises ServerError, saying what to do where it was not set up.
    """
    try:
        row = session.execute("SELECT backup_pipeline.beat(%s)", [keep]).fetchone()
    except psycopg.Error as error:
        hint = ""
        if error.sqlstate in _NOT_SET_UP:
            hint = "Run `backup-pipeline heartbeat CLUSTER --setup --apply` once, as a role that may create."
        elif error.sqlstate == "25006":
            hint = "This is a standby: name the primary, or write the heartbeat there."
        elif error.sqlstate == "42501":
            hint = (
                "Let the role in: `backup-pipeline heartbeat CLUSTER --setup --role ROLE` shows the grants."
            )
        said = error.diag.message_primary or " ".join(str(error).split())
        raise ServerError(f"no heartbeat was written ({endpoint.shown}): {said}", hint=hint) from error
    if row is None or not isinstance(row[0], datetime):
        raise ServerError(f"no heartbeat was written ({endpoint.shown}): the function says nothing")
    return row[0].astimezone(UTC)


def read_source(session: Connection, target_at: datetime) -> SourceBeats | None:
    """The rows around `target_at`; None where there is no such table, or the role may not read it."""
    try:
        before = _one(session, "WHERE at <= %s ORDER BY at DESC, id DESC", target_at - GRACE)
        after = _one(session, "WHERE at > %s ORDER BY at, id", target_at)
        span = {"from": target_at - _NEAR, "to": target_at + _NEAR}
        stepped = session.execute(_STEPPED.encode(), span).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None
    except psycopg.errors.InsufficientPrivilege:
        return None
    return SourceBeats(before, after, _beat(stepped))


def read_copy(session: Connection, source: SourceBeats | None) -> CopyBeats | None:
    """The newest row of a recovered copy, and which of the source's are in it; None without the table."""
    try:
        newest = _one(session, "ORDER BY at DESC, id DESC")
        has = [
            beat is not None and _one(session, "WHERE id = %s AND at = %s", beat.number, beat.at) is not None
            for beat in (source.before if source else None, source.after if source else None)
        ]
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None
    return CopyBeats(newest, has_before=has[0], has_after=has[1])


def _one(session: Connection, which: LiteralString, *values: object) -> Heartbeat | None:
    query = sql.SQL("SELECT id, at FROM backup_pipeline.heartbeat {} LIMIT 1").format(sql.SQL(which))
    return _beat(session.execute(query, values).fetchone())


def _beat(row: tuple[object, ...] | None) -> Heartbeat | None:
    if row is None or not isinstance(row[1], datetime):
        return None
    return Heartbeat(int(str(row[0])), row[1].astimezone(UTC))
