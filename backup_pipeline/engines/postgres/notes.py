"""What a restore of a database will not bring, or will bring changed: found in its catalogs, in plain words.

Called when a source is read, for its manifest; shown before a restore and beside a proof. Nothing here
refuses anything: what keeps a dump from being whole is preflight.py's.
"""

# ruff: noqa: S608 - the queries are joined from constants of this module

from dataclasses import dataclass

from backup_pipeline.engines.postgres.server import Connection
from backup_pipeline.units import show_count

_SHOWN_NAMES = 5

_USERS_RELATION = """
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
   WHERE pg_catalog.left(n.nspname, 3) <> 'pg_' AND n.nspname <> 'information_schema'
"""
_NAME = "pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)"
_HERE = "(SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"
_MEMBER = """
    SELECT FROM pg_catalog.pg_depend x
     WHERE x.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND x.deptype = 'e'
"""


@dataclass(frozen=True)
class _Kind:
    """One kind of thing to say: how many, the names that `query` finds, then what becomes of them."""

    one: str
    becomes: str
    query: str
    many: str = ""


# What pg_dump takes for the system's own, by its schema.
_IN_SYSTEM_SCHEMAS = f"""
    SELECT DISTINCT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(o.name)
      FROM (SELECT 'pg_catalog.pg_proc'::pg_catalog.regclass, oid, pronamespace, proname
              FROM pg_catalog.pg_proc
            UNION ALL SELECT 'pg_catalog.pg_class'::pg_catalog.regclass, oid, relnamespace, relname
              FROM pg_catalog.pg_class WHERE relkind NOT IN ('i', 'I')
            UNION ALL SELECT 'pg_catalog.pg_operator'::pg_catalog.regclass, oid, oprnamespace, oprname
              FROM pg_catalog.pg_operator
            UNION ALL SELECT 'pg_catalog.pg_type'::pg_catalog.regclass, oid, typnamespace, typname
              FROM pg_catalog.pg_type WHERE typrelid = 0 AND typcategory <> 'A') o (class, oid, space, name)
      JOIN pg_catalog.pg_namespace n ON n.oid = o.space
     WHERE o.oid >= 16384 AND n.nspname IN ('pg_catalog', 'information_schema')
       AND NOT EXISTS ({_MEMBER} AND x.classid = o.class AND x.objid = o.oid)
"""

_KINDS = (
    _Kind(
        "unlogged table",
        "in the dump with its rows, which a crash of the restored server loses",
        f"SELECT {_NAME} {_USERS_RELATION} AND c.relkind = 'r' AND c.relpersistence = 'u'",
    ),
    _Kind(
        "materialized view",
        "computed anew by the restore, and may then differ",
        f"SELECT {_NAME} {_USERS_RELATION} AND c.relkind = 'm' AND c.relispopulated",
    ),
    _Kind(
        "invalid index",
        "not in the dump; REINDEX or drop it",
        f"""SELECT {_NAME} FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
              JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE NOT (i.indisvalid AND i.indisready) AND c.relkind = 'i'
               AND pg_catalog.left(n.nspname, 3) <> 'pg_'""",
        many="invalid indexes",
    ),
    _Kind(
        "partition half detached",
        "attached again in the dump, so that queries find its rows; end it with DETACH PARTITION … FINALIZE",
        f"""SELECT {_NAME} FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
              JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE i.inhdetachpending""",
        many="partitions half detached",
    ),
    _Kind(
        "table with foreign key triggers disabled or set ALWAYS",
        "set as by default in a restore, which fails where rows break a foreign key",
        f"""SELECT {_NAME} {_USERS_RELATION} AND EXISTS (
              SELECT FROM pg_catalog.pg_trigger t
               WHERE t.tgrelid = c.oid AND t.tgisinternal AND t.tgconstraint <> 0 AND t.tgenabled <> 'O')""",
        many="tables with foreign key triggers disabled or set ALWAYS",
    ),
    _Kind(
        "object in a schema of the system's",
        "not in the dump: pg_dump takes it for a part of PostgreSQL",
        _IN_SYSTEM_SCHEMAS,
        many="objects in schemas of the system's",
    ),
    _Kind(
        "foreign table",
        "only the definition is in the dump, the rows stay where they are",
        f"SELECT {_NAME} {_USERS_RELATION} AND c.relkind = 'f'",
    ),
    _Kind(
        "table of an extension",
        "rows not in the dump: the extension does not mark them as configuration",
        f"""SELECT {_NAME} {_USERS_RELATION} AND c.relkind = 'r'
               AND EXISTS ({_MEMBER} AND x.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                                     AND x.objid = c.oid)
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_extension e WHERE c.oid = ANY (e.extconfig))
               AND pg_catalog.pg_relation_size(c.oid) > 0""",
        many="tables of extensions",
    ),
    _Kind(
        "subscription",
        "restored disabled; enabled, it would read from the slot that the source reads from",
        f"SELECT pg_catalog.quote_ident(subname) FROM pg_catalog.pg_subscription WHERE subdbid = {_HERE}",
    ),
    _Kind(
        "logical replication slot",
        "stays with the server: whoever reads from it must begin anew",
        """SELECT slot_name::pg_catalog.text FROM pg_catalog.pg_replication_slots
            WHERE database = pg_catalog.current_database() AND NOT temporary""",
    ),
    _Kind(
        "event trigger",
        "only a superuser can restore them",
        f"""SELECT pg_catalog.quote_ident(t.evtname) FROM pg_catalog.pg_event_trigger t
             WHERE NOT EXISTS ({_MEMBER} AND x.classid = 'pg_catalog.pg_event_trigger'::pg_catalog.regclass
                                         AND x.objid = t.oid)""",
    ),
    _Kind(
        "publication",
        "restored, but no one subscribes to the restored database",
        "SELECT pg_catalog.quote_ident(pubname) FROM pg_catalog.pg_publication",
    ),
    _Kind(
        "prepared transaction",
        "what it changed is not in the dump",
        """SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()""",
    ),
    _Kind(
        "library of functions",
        "to be installed where the dump is restored",
        f"""SELECT DISTINCT p.probin::pg_catalog.text FROM pg_catalog.pg_proc p
              JOIN pg_catalog.pg_language l ON l.oid = p.prolang
             WHERE l.lanname = 'c' AND p.oid >= 16384 AND p.probin IS NOT NULL
               AND NOT EXISTS ({_MEMBER} AND x.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                                         AND x.objid = p.oid)""",
        many="libraries of functions",
    ),
    _Kind(
        "security label",
        "its provider must be loaded where the dump is restored",
        "SELECT DISTINCT provider FROM pg_catalog.pg_seclabels",
    ),
)


def read_notes(connection: Connection) -> tuple[str, ...]:
    """A sentence for each kind of thing in this database that a restore will not bring as it is."""
    notes = []
    for kind in _KINDS:
        names = sorted(str(name) for (name,) in connection.execute(kind.query.encode()))
        if names:
            notes.append(
                f"{show_count(len(names), kind.one, kind.many)} ({first_few(names)}): {kind.becomes}"
            )
    return (*notes, *_large_objects(connection), *_collation(connection))


def first_few(names: list[str]) -> str:
    """The first names of a sorted list, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _large_objects(connection: Connection) -> list[str]:
    row = connection.execute("SELECT count(*) FROM pg_catalog.pg_largeobject_metadata").fetchone()
    count = int(str(row[0])) if row else 0
    return [f"{show_count(count, 'large object')}: restored under the same numbers"] if count else []


def _collation(connection: Connection) -> list[str]:
    row = connection.execute(
        "SELECT datcollversion, pg_catalog.pg_database_collation_actual_version(oid)"
        f" FROM pg_catalog.pg_database WHERE oid = {_HERE}".encode()
    ).fetchone()
    if row is None or row[0] is None or row[1] is None or row[0] == row[1]:
        return []
    return [
        f"the collation was version {row[0]} when the database was made and is {row[1]} now: "
        "indexes on text may be out of order there; the restored ones are built anew"
    ]
