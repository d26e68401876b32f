"""The databases under measurement: made by the demo's generator once, and kept in the bench's folder."""

import contextlib
import sys
from datetime import date
from pathlib import Path

from psycopg import sql

from backup_pipeline.demo import filler
from backup_pipeline.demo.servers import Servers
from backup_pipeline.engines.postgres.server import connect
from benchmarks.contenders import Bench

LARGE_ROWS = 4_200_000
SMALL_ROWS = 420_000
_TODAY = date(2026, 3, 1)


def bench_of(running: Servers, folder: Path, rows: int) -> tuple[Bench, int]:
    """The database of that many rows, made when it is not there yet, and its size."""
    name = f"bench_{rows}"
    with contextlib.closing(connect(running.postgres.endpoint(), statement_timeout_s=0)) as session:
        query = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s"
        found = session.execute(query, [name]).fetchone()
        if found is None or not str(found[0]).startswith("complete"):
            print(f"making {name}", file=sys.stderr, flush=True)
            session.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
            filler.create_database(running.postgres.endpoint(), name)
            filler.fill(running.database(name), rows=rows, today=_TODAY)
            session.execute(sql.SQL("COMMENT ON DATABASE {} IS 'complete'").format(sql.Identifier(name)))
        session.execute("CHECKPOINT")
        size = session.execute("SELECT pg_catalog.pg_database_size(%s)", [name]).fetchone()
    return Bench(running, name, folder), int(str(size[0])) if size else 0
