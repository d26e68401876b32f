"""What a database contains, read from a server into a Fingerprint.

Called by the action that takes a dump, beside pg_dump in the same snapshot, and by the one that proves a
backup, over the restored database. Everything is hashed on the server; only digests travel. What two
fingerprints say of each other is domain/proof.py's.
"""

import contextlib
import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from backup_pipeline.domain.fingerprint import CriticalTable, Fingerprint, SequenceValue, TableContent
from backup_pipeline.engines.postgres.contents import Progress, Reader
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.schema import Schema, capture
from backup_pipeline.engines.postgres.server import Connection, connect, server_errors
from backup_pipeline.engines.postgres.snapshot import Relation, Snapshot, exported_snapshot, list_relations
from backup_pipeline.errors import ConfigError, ToolError

# The snapshot holds these locks already: pg_dump waits only behind somebody who waits for them.
_LOCK_TIMEOUT_S = 5.0
_SEQUENCES_PER_QUERY = 100
_NAMES_SHOWN = 5

# Lets the planner give a table all the workers it may have, once they are worth their start.
_PARALLEL = {
    "max_parallel_workers_per_gather": "{workers}",
    "min_parallel_table_scan_size": "'1MB'",
    "parallel_setup_cost": "0",
    "parallel_tuple_cost": "0",
}

_OF_USERS = sql.SQL("""
    left(n.nspname, 3) <> 'pg_' AND n.nspname <> 'information_schema' AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = r.oid
           AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e')
""")
_CONSTRAINTS = sql.SQL("""
    SELECT count(*) FILTER (WHERE c.convalidated),
           coalesce(array_agg(n.nspname || '.' || r.relname || ' ' || c.conname)
                    FILTER (WHERE NOT c.convalidated), '{{}}')
      FROM pg_constraint c JOIN pg_class r ON r.oid = c.conrelid JOIN pg_namespace n ON n.oid = r.relnamespace
     WHERE c.contype NOT IN ('n', 't') AND {}
""").format(_OF_USERS)
_INDEXES = sql.SQL("""
    SELECT count(*) FILTER (WHERE i.indisvalid),
           coalesce(array_agg(n.nspname || '.' || x.relname) FILTER (WHERE NOT i.indisvalid), '{{}}')
      FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
      JOIN pg_class r ON r.oid = i.indrelid JOIN pg_namespace n ON n.oid = r.relnamespace
     WHERE {}
""").format(_OF_USERS)

_BELOW = """
    WITH RECURSIVE below AS (
        SELECT top, top AS oid FROM unnest(%s::oid[]) top
        UNION SELECT b.top, i.inhrelid FROM below b JOIN pg_inherits i ON i.inhparent = b.oid)
    SELECT top, oid FROM below
"""


@dataclass(frozen=True)
class Prepared:
    """What was read before the dump, and what `take` and `finish` go on from."""

    endpoint: Endpoint
    pg_dump: str
    critical_tables: tuple[str, ...]
    contents: bool
    sequences: tuple[SequenceValue, ...]
    schema: Schema
    in_snapshot: bool
    stall_s: float


def prepare(
    endpoint: Endpoint,
    *,
    pg_dump: str,
    critical_tables: Sequence[str] = (),
    contents: bool = True,
    stall_s: float = 900.0,
    snapshot: Snapshot | None = None,
) -> Prepared:
    """Read what the rows' own reading leaves out: sequences, which no snapshot holds still, and the schema.

    Of a database that others change, to be called with the `snapshot`, right before its dump: what
    changes between the two readings would be in neither. `critical_tables` are names, with or without
    a schema; without `contents` rows are only counted; a pg_dump that is silent for `stall_s` seconds
    counts as hung. Raises ConfigError for a critical table that does not exist, ServerError, ToolError.
    """
    with contextlib.closing(connect(endpoint, purpose="fingerprint")) as session:
        relations = snapshot.relations if snapshot else tuple(list_relations(session))
        find_tables(critical_tables, relations)
        sequences = _sequences(endpoint, session, relations)
    if snapshot is None:
        schema = capture(pg_dump, endpoint, stall_s=stall_s)
    else:
        schema = _capture_in(snapshot, pg_dump, stall_s)
    in_snapshot = snapshot is not None
    return Prepared(
        endpoint, pg_dump, tuple(critical_tables), contents, sequences, schema, in_snapshot, stall_s
    )


def _capture_in(snapshot: Snapshot, pg_dump: str, stall_s: float) -> Schema:
    try:
        return capture(
            pg_dump,
            snapshot.endpoint,
            lock_timeout_s=_LOCK_TIMEOUT_S,
            stall_s=stall_s,
            snapshot_id=snapshot.id,
        )
    except ToolError as error:
        contention = snapshot.contention()
        if contention is None:
            raise
        contention.detail["pg_dump"] = error.detail.get("stderr", error.message)
        raise contention from error


def take(
    prepared: Prepared,
    snapshot: Snapshot,
    *,
    connections: int = 1,
    progress: Progress = lambda *_: None,
) -> Fingerprint:
    """Read everything in the snapshot, beside the dump; return its fingerprint.

    One session reads; with more `connections` the others are its parallel workers. What fails here
    makes the snapshot's `check` fail. Raises ServerError, also when the server stands still for `stall_s`
    of `prepare`, and after `snapshot.cancel()`.
    """
    with snapshot.reading() as session, snapshot.watched(prepared.stall_s) as watchdog:
        for name, value in _PARALLEL.items():
            session.execute(f"SET LOCAL {name} = {value.format(workers=max(0, connections - 1))}".encode())
        critical = find_tables(prepared.critical_tables, snapshot.relations)
        reader = Reader(session, snapshot, critical, prepared.contents, progress, watchdog)
        tables = reader.tables()
        constraints, unvalidated = _validity(session, _CONSTRAINTS)
        indexes, invalid_indexes = _validity(session, _INDEXES)
        return Fingerprint(
            server_version=session.info.server_version,
            client_version=prepared.schema.client_version,
            tables=tables,
            newest=reader.newest(),
            critical=tuple(_critical(session, critical, snapshot, tables)),
            large_objects=reader.large_objects(),
            sequences_before=prepared.sequences,
            sequences_after=prepared.sequences,
            schema_before=prepared.schema.statements,
            schema_after=prepared.schema.statements,
            schema_in_snapshot=prepared.in_snapshot,
            extensions=_extensions(session),
            constraints=constraints,
            unvalidated=unvalidated,
            indexes=indexes,
            invalid_indexes=invalid_indexes,
            notes=(*_notes(snapshot), *reader.notes),
        )


def finish(fingerprint: Fingerprint, prepared: Prepared) -> Fingerprint:
    """Read once more what `prepare` read, once dump and snapshot have ended (`snapshot.release()`).

    What the dump holds was seen in between. Where the schema cannot be read, as while a long ALTER
    runs, the fingerprint and a note say so. Raises ServerError.
    """
    with contextlib.closing(connect(prepared.endpoint, purpose="fingerprint")) as session:
        sequences = _sequences(prepared.endpoint, session, tuple(list_relations(session)))
    try:
        schema = capture(prepared.pg_dump, prepared.endpoint, stall_s=prepared.stall_s)
    except ToolError as error:
        note = f"the schema was read before the dump, and not once more after it: {error.message}"
        notes = (*fingerprint.notes, note)
        return replace(fingerprint, sequences_after=sequences, schema_read_after=False, notes=notes)
    return replace(fingerprint, sequences_after=sequences, schema_after=schema.statements)


def of_database(
    endpoint: Endpoint,
    *,
    pg_dump: str,
    critical_tables: Sequence[str] = (),
    contents: bool = True,
    connections: int = 1,
    lock_timeout_s: float = 60.0,
    stall_s: float = 900.0,
    progress: Progress = lambda *_: None,
) -> Fingerprint:
    """The fingerprint of a database that nobody changes: one that was restored.

    A critical table that is not there is left out: comparing finds that it is missing.
    """
    with contextlib.closing(connect(endpoint, purpose="fingerprint")) as session:
        relations, present = tuple(list_relations(session)), []
    for name in critical_tables:
        with contextlib.suppress(ConfigError):
            present += [str(relation) for relation in find_tables([name], relations)]
    prepared = prepare(endpoint, pg_dump=pg_dump, critical_tables=present, contents=contents, stall_s=stall_s)
    with exported_snapshot(endpoint, lock_timeout_s=lock_timeout_s) as snapshot:
        return take(prepared, snapshot, connections=connections, progress=progress)


def check_critical_tables(session: Connection, names: Sequence[str]) -> None:
    """For a preflight check: raise ConfigError unless the session's database has all of these tables."""
    find_tables(names, list_relations(session))


def find_tables(names: Sequence[str], relations: Iterable[Relation]) -> tuple[Relation, ...]:
    """The tables with these names: `schema.table`, or `table` where only one schema has it, or public.

    Raises ConfigError for one that is not there, naming the nearest.
    """
    tables = [relation for relation in relations if relation.lockable] if names else []
    by_name: dict[str, list[Relation]] = defaultdict(list)
    for relation in tables:
        by_name[relation.name].append(relation)
        by_name[str(relation)].append(relation)
    found = []
    for name in names:
        matches = by_name.get(name, [])
        if len(matches) > 1:
            matches = [relation for relation in matches if relation.schema == "public"] or matches
        if len(matches) != 1:
            raise _no_such_table(name, matches, by_name)
        found.append(matches[0])
    return tuple(dict.fromkeys(found))


def _no_such_table(name: str, matches: Sequence[Relation], by_name: dict[str, list[Relation]]) -> ConfigError:
    if matches:
        several = ", ".join(str(relation) for relation in matches)
        return ConfigError(
            f"critical table {name}: expected one, found {several}",
            hint="Name it with its schema.",
        )
    nearest = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
    near = dict.fromkeys(str(relation) for match in nearest for relation in by_name[match])
    nearest_ones = f"nearest: {', '.join(near)}" if near else "none has a similar name"
    return ConfigError(
        f"critical table {name} does not exist; {nearest_ones}",
        hint="Correct critical_tables in the configuration, or find out who dropped the table.",
    )


def _sequences(
    endpoint: Endpoint, session: Connection, relations: Iterable[Relation]
) -> tuple[SequenceValue, ...]:
    """Where those of `relations` stand that are there now."""
    with server_errors(endpoint, "cannot read the sequences"):
        row = session.execute("SELECT pg_is_in_recovery()").fetchone()
        on_standby = bool(row and row[0])
        wanted = [
            relation
            for relation in relations
            if relation.kind == "S" and not (relation.unlogged and on_standby)
        ]
        found: list[SequenceValue] = []
        for start in range(0, len(wanted), _SEQUENCES_PER_QUERY):
            batch = wanted[start : start + _SEQUENCES_PER_QUERY]
            try:
                found += _read_sequences(session, batch)
            except psycopg.errors.UndefinedTable:  # one of them was dropped
                for relation in batch:
                    with contextlib.suppress(psycopg.errors.UndefinedTable):
                        found += _read_sequences(session, [relation])
    return tuple(sorted(found))


def _read_sequences(session: Connection, batch: Sequence[Relation]) -> list[SequenceValue]:
    query = sql.SQL(" UNION ALL ").join(
        sql.SQL("SELECT {}, last_value, is_called FROM {}").format(sql.Literal(number), relation.identifier)
        for number, relation in enumerate(batch)
    )
    found = []
    for number, last_value, is_called in session.execute(query):
        relation = batch[int(str(number))]
        found.append(SequenceValue(relation.schema, relation.name, int(str(last_value)), bool(is_called)))
    return found


def _critical(
    session: Connection, critical: Sequence[Relation], snapshot: Snapshot, tables: Sequence[TableContent]
) -> Iterator[CriticalTable]:
    """The rows of each critical table, its partitions and children counted in."""
    rows = {(table.schema, table.name): table.rows for table in tables}
    rows_of = {relation.oid: rows.get((relation.schema, relation.name), 0) for relation in snapshot.relations}
    below: dict[int, set[int]] = defaultdict(set)
    for top, oid in session.execute(_BELOW.encode(), [[relation.oid for relation in critical]]):
        below[int(str(top))].add(int(str(oid)))
    for relation in critical:
        yield CriticalTable(str(relation), sum(rows_of.get(oid, 0) for oid in below[relation.oid]))


def _validity(session: Connection, query: sql.Composed) -> tuple[int, tuple[str, ...]]:
    row = session.execute(query).fetchone()
    valid, others = row or (0, ())
    return int(str(valid)), tuple(sorted(map(str, others))) if isinstance(others, list) else ()


def _extensions(session: Connection) -> tuple[tuple[str, str], ...]:
    rows = session.execute("SELECT extname, extversion FROM pg_extension ORDER BY extname")
    return tuple((str(name), str(version)) for name, version in rows)


def _notes(snapshot: Snapshot) -> Iterator[str]:
    for kind, one, what in (
        ("m", "materialized view", "filled anew by a restore, and not compared"),
        ("f", "foreign table", "kept elsewhere, and neither dumped nor compared"),
    ):
        names = [str(relation) for relation in snapshot.relations if relation.kind == kind]
        if names:
            yield f"{_listed(one, names)}: {what}"
    names = [str(relation) for relation in snapshot.relations if relation.unlogged and relation.kind in "rS"]
    if names and snapshot.in_recovery:
        yield f"{_listed('unlogged table or sequence', names)}: empty on a standby, and not dumped"


def _listed(one: str, names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{one}{'' if len(names) == 1 else 's'} {shown}{more}"
