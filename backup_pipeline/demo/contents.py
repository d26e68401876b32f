"""What is in a database, looked at from the side: by plain SQL that shares nothing with the proof.

The demo decides by these whether what was lost is back. Called by story.py and the tests.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from psycopg import sql

from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect

_OBJECTS = """
SELECT CASE relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence'
                    WHEN 'i' THEN 'index' WHEN 'I' THEN 'index' ELSE 'table' END, relname::text
FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S', 'i', 'I')
UNION ALL
SELECT CASE contype WHEN 'f' THEN 'foreign key' ELSE 'constraint' END, conname || ' of ' || conrelid::regclass
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'trigger', tgname || ' of ' || tgrelid::regclass FROM pg_trigger WHERE NOT tgisinternal
UNION ALL
SELECT 'function', proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""


@dataclass(frozen=True, order=True)
class Named:
    """One thing in the schema: ("table", "users")."""

    kind: str
    name: str


@dataclass(frozen=True)
class Rows:
    """All rows of one table: how many, and a digest of all their values in the order of the key."""

    count: int
    md5: str


def named(endpoint: Endpoint) -> frozenset[Named]:
    """Everything in the schema `public` that has a name."""
    with contextlib.closing(connect(endpoint)) as session:
        return frozenset(Named(str(kind), str(name)) for kind, name in session.execute(_OBJECTS.encode()))


def rows(endpoint: Endpoint, table: str) -> Rows:
    """The contents of one table of the schema `public`."""
    query = sql.SQL(
        "SELECT count(*), md5(coalesce(string_agg(row, '' ORDER BY row), ''))"
        " FROM (SELECT md5(t::text) AS row FROM public.{} AS t) AS rows"
    )
    with contextlib.closing(connect(endpoint)) as session:
        found = session.execute(query.format(sql.Identifier(table))).fetchone()
    count, digest = found or (0, "")
    return Rows(int(str(count)), str(digest))


def counted(things: Iterable[Named]) -> str:
    """ "1 table, 1 view, 9 foreign keys"."""
    counts = Counter(thing.kind for thing in things)
    order = (
        "table",
        "view",
        "materialized view",
        "foreign key",
        "index",
        "constraint",
        "trigger",
        "sequence",
    )
    known = [kind for kind in order if kind in counts] + sorted(set(counts) - set(order))
    return ", ".join(f"{counts[kind]} {_plural(kind) if counts[kind] > 1 else kind}" for kind in known)


def _plural(kind: str) -> str:
    return {"index": "indexes"}.get(kind, f"{kind}s")
