"""The demo's database: its schema, and rows made by the server itself, so that gigabytes take no longer
than their disk. Called by the demo, the benchmarks and the tests; the SQL lies in sql/, and what keeps
changing the rows afterwards is writer.py.
"""

import contextlib
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from psycopg import sql

from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect, server_errors

DATABASE = "agentweave"
OWNER = "agentweave_owner"
APPLICATION = "agentweave_app"
SEED = 20260301
ROWS = 100_000
"""Some 45 MB with their indexes: enough to see something move, and made in 3 seconds."""

_MONTHS = 6
_SHARES = {"users": 0.01, "workflows": 0.02, "executions": 0.22, "audit_log": 0.1}
_FEWEST = 20
_FOLDER = Path(__file__).with_name("sql")

_PROPERTIES = """
COMMENT ON DATABASE {database} IS 'AgentWeave: workflows of agents, and what they did';
ALTER DATABASE {database} SET timezone = 'UTC';
ALTER DATABASE {database} SET default_text_search_config = 'pg_catalog.english';
REVOKE ALL ON DATABASE {database} FROM PUBLIC;
GRANT CONNECT ON DATABASE {database} TO agentweave_app, agentweave_readonly;
"""


@dataclass(frozen=True)
class Filled:
    """What a database holds: rows over all tables, about, and bytes on the server's disk."""

    rows: int
    size_bytes: int


def create_database(server: Endpoint, name: str = DATABASE) -> None:
    """An empty database with its owner, comment, settings and grants, and the roles that it needs."""
    database = sql.Identifier(name)
    create = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0")
    with contextlib.closing(connect(server)) as session, server_errors(server, f"cannot create {name}"):
        session.execute(_read("roles"))
        session.execute(create.format(database, sql.Identifier(OWNER)))
        session.execute(sql.SQL(_PROPERTIES).format(database=database))


def fill(endpoint: Endpoint, *, rows: int, today: date, seed: int = SEED) -> Filled:
    """Make the schema in an empty database, and about `rows` rows of the months before `today`.

    A row takes some 500 bytes with its indexes. Equal arguments make equal contents.
    """
    first = (today.replace(day=1) - timedelta(days=30 * (_MONTHS - 1))).replace(day=1)
    settings = {name: str(max(_FEWEST, int(rows * share))) for name, share in _SHARES.items()}
    settings |= {"seed": str(seed), "months": str(_MONTHS + 2)}
    settings |= {"first": f"{first} 00:00+00", "last": f"{today} 00:00+00"}
    with (
        contextlib.closing(connect(endpoint, statement_timeout_s=0)) as session,
        server_errors(endpoint, "cannot fill"),
    ):
        session.execute("SET search_path = public")
        for name, value in settings.items():
            session.execute("SELECT pg_catalog.set_config(%s, %s, false)", [f"demo.{name}", value])
        for part in ("tables", "rows", "rest"):
            session.execute(_read(part))
        session.execute("VACUUM (ANALYZE)")
        return measure(session)


def measure(session: Connection) -> Filled:
    """What the session's database holds, by its statistics."""
    row = session.execute(
        "SELECT pg_catalog.sum(reltuples)::bigint, pg_catalog.pg_database_size(pg_catalog.current_database())"
        " FROM pg_catalog.pg_class WHERE relkind = 'r' AND reltuples > 0"
        " AND relnamespace = 'public'::pg_catalog.regnamespace"
    ).fetchone()
    rows, size_bytes = row or (0, 0)
    return Filled(int(str(rows or 0)), int(str(size_bytes)))


def _read(part: str) -> bytes:
    return (_FOLDER / f"{part}.sql").read_bytes()
