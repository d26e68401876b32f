"""What a database contains, read from a server into a Fingerprint.

Called by the action that takes a dump, beside pg_dump in the same snapshot, and by the one that proves a
backup, over the restored database. Everything is hashed on the server; only digests travel. What two
fingerprints say of each other is domain/proof.py's.
"""

import contextlib
import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from backup_pipeline.domain.fingerprint import (
    Fingerprint,
    LargeObjectGroup,
    LargeObjects,
    NewestValue,
    SequenceValue,
    TableContent,
)
from backup_pipeline.engines.postgres.schema import Schema, capture
from backup_pipeline.engines.postgres.server import Connection, Endpoint, connect, server_errors
from backup_pipeline.engines.postgres.snapshot import (
    Relation,
    Snapshot,
    exported_snapshot,
    list_relations,
    snapshot_errors,
)
from backup_pipeline.errors import ConfigError, ToolError

Progress = Callable[[int, int], None]
"""Called with the bytes of tables read so far, and in total."""

MAX_LARGE_OBJECTS = 10_000
"""Of more, neighbours share a digest: a difference then names a range of OIDs."""

_GROUPS = 4096
_SEQUENCES_PER_QUERY = 100
_NAMES_SHOWN = 5

# A row as text, whatever its columns and casts are called; sorted by name, because a restore may give an
# inherited table another order of columns. A hash follows the collation of its text: "C" is always the same.
_ROW = sql.SQL('hashtextextended(textin(record_out(ROW({}))) COLLATE "C", 0)')
# Where a row is longer than the gigabyte that text may have: column by column.
_LONG_ROW = sql.SQL('hashtextextended(ARRAY[{}]::bigint[]::text COLLATE "C", 0)')
_LONG_COLUMN = sql.SQL(
    "CASE WHEN {0} IS DISTINCT FROM NULL THEN hashtextextended(format('%s', {0}) COLLATE \"C\", 0) END"
)
_TOO_LONG = ("54000", "XX000")

# Lets the planner give a table all the workers it may have, once they are worth their start.
_PARALLEL = {
    "max_parallel_workers_per_gather": "{workers}",
    "min_parallel_table_scan_size": "'1MB'",
    "parallel_setup_cost": "0",
    "parallel_tuple_cost": "0",
}

_COLUMNS = """
    SELECT a.attrelid, a.attname,
           a.atttypid IN ('date'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype)
      FROM pg_attribute a
     WHERE a.attrelid = ANY (%s::oid[]) AND a.attnum > 0 AND NOT a.attisdropped
     ORDER BY a.attrelid, a.attname COLLATE "C"
"""

# One row at a time (OFFSET 0 keeps the steps apart): open, seek to the end, close.
_LARGE_OBJECTS = """
    WITH measured AS MATERIALIZED (
        SELECT b.oid, b.owner, b.acl, b.size, lo_close(b.descriptor)
          FROM (SELECT a.*, lo_lseek64(a.descriptor, 0, 2) AS size
                  FROM (SELECT m.oid, pg_get_userbyid(m.lomowner) AS owner,
                               coalesce(m.lomacl, acldefault('L', m.lomowner)) AS acl,
                               lo_open(m.oid, 262144) AS descriptor
                          FROM pg_largeobject_metadata m OFFSET 0) a OFFSET 0) b),
    contents AS MATERIALIZED (
        SELECT m.oid, sha256(string_agg(sha256(lo_get(m.oid, n * 1048576, 1048576)), '' ORDER BY n)) AS digest
          FROM measured m, generate_series(0, (m.size - 1) / 1048576) n
         WHERE %(contents)s
         GROUP BY m.oid)
    SELECT m.oid::bigint / %(width)s * %(width)s, count(*), sum(m.size)::bigint,
           sum(hashtextextended(concat_ws(':', m.oid, m.size, encode(c.digest, 'hex')) COLLATE "C", 0))::text,
           sum(hashtextextended(concat_ws(':', m.oid, m.owner, d.description, (
               SELECT string_agg(format('%%s/%%s/%%s/%%s', pg_get_userbyid(x.grantor),
                                        pg_get_userbyid(x.grantee), x.privilege_type, x.is_grantable), ','
                                 ORDER BY pg_get_userbyid(x.grantor), pg_get_userbyid(x.grantee),
                                          x.privilege_type)
                 FROM aclexplode(m.acl) x)) COLLATE "C", 0))::text
      FROM measured m LEFT JOIN contents c ON c.oid = m.oid
      LEFT JOIN pg_description d ON d.classoid = 'pg_largeobject'::regclass AND d.objoid = m.oid
     GROUP BY 1 ORDER BY 1
"""

_OF_USERS = """
    left(n.nspname, 3) <> 'pg_' AND n.nspname <> 'information_schema' AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = r.oid
           AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e')
"""
_CONSTRAINTS = f"""
    SELECT count(*) FILTER (WHERE c.convalidated),
           coalesce(array_agg(n.nspname || '.' || r.relname || ' ' || c.conname)
                    FILTER (WHERE NOT c.convalidated), '{{}}')
      FROM pg_constraint c JOIN pg_class r ON r.oid = c.conrelid JOIN pg_namespace n ON n.oid = r.relnamespace
     WHERE c.contype NOT IN ('n', 't') AND {_OF_USERS}
"""  # noqa: S608 - a constant
_INDEXES = f"""
    SELECT count(*) FILTER (WHERE i.indisvalid),
           coalesce(array_agg(n.nspname || '.' || x.relname) FILTER (WHERE NOT i.indisvalid), '{{}}')
      FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
      JOIN pg_class r ON r.oid = i.indrelid JOIN pg_namespace n ON n.oid = r.relnamespace
     WHERE {_OF_USERS}
"""  # noqa: S608 - a constant


@dataclass(frozen=True)
class Prepared:
    """What was read before the snapshot, and what `take` and `finish` go on from."""

    endpoint: Endpoint
    pg_dump: str
    critical_tables: tuple[str, ...]
    contents: bool
    sequences: tuple[SequenceValue, ...]
    schema: Schema


def prepare(
    endpoint: Endpoint, *, pg_dump: str, critical_tables: Sequence[str] = (), contents: bool = True
) -> Prepared:
    """Read what no snapshot holds still, or what would need locks beside it: sequences and the schema.

    To be called before the snapshot is taken. `critical_tables` are names, with or without a schema;
    without `contents` rows are only counted. Raises ConfigError for a critical table that does not
    exist, ServerError, ToolError.
    """
    with contextlib.closing(connect(endpoint, purpose="fingerprint")) as session:
        check_critical_tables(session, critical_tables)
        sequences = _sequences(endpoint, session)
    schema = capture(pg_dump, endpoint)
    return Prepared(endpoint, pg_dump, tuple(critical_tables), contents, sequences, schema)


def take(
    prepared: Prepared,
    snapshot: Snapshot,
    *,
    connections: int = 1,
    progress: Progress = lambda *_: None,
) -> Fingerprint:
    """Read everything in the snapshot, beside the dump; return its fingerprint.

    One session reads; with more `connections` the others are its parallel workers. What fails here
    makes the snapshot's `check` fail. Raises ServerError, also after `snapshot.cancel()`.
    """
    with snapshot.reading() as session:
        for name, value in _PARALLEL.items():
            session.execute(f"SET LOCAL {name} = {value.format(workers=max(0, connections - 1))}".encode())
        reader = _Reader(session, snapshot, prepared, progress)
        tables = reader.tables()
        constraints, unvalidated = _validity(session, _CONSTRAINTS)
        indexes, invalid_indexes = _validity(session, _INDEXES)
        return Fingerprint(
            server_version=session.info.server_version,
            client_version=prepared.schema.client_version,
            tables=tables,
            newest=reader.newest(),
            large_objects=reader.large_objects(),
            sequences_before=prepared.sequences,
            sequences_after=prepared.sequences,
            schema_before=prepared.schema.statements,
            schema_after=prepared.schema.statements,
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
    runs, a note says so, and only the first reading counts. Raises ServerError.
    """
    with contextlib.closing(connect(prepared.endpoint, purpose="fingerprint")) as session:
        sequences = _sequences(prepared.endpoint, session)
    try:
        schema = capture(prepared.pg_dump, prepared.endpoint)
    except ToolError as error:
        note = f"the schema was read before the dump, and not once more after it: {error.message}"
        return replace(fingerprint, sequences_after=sequences, notes=(*fingerprint.notes, note))
    return replace(fingerprint, sequences_after=sequences, schema_after=schema.statements)


def of_database(
    endpoint: Endpoint,
    *,
    pg_dump: str,
    critical_tables: Sequence[str] = (),
    contents: bool = True,
    connections: int = 1,
    lock_timeout_s: float = 60.0,
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
    prepared = prepare(endpoint, pg_dump=pg_dump, critical_tables=present, contents=contents)
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
    return tuple(found)


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


@dataclass
class _Reader:
    """One pass over all tables and large objects of a snapshot."""

    session: Connection
    snapshot: Snapshot
    prepared: Prepared
    progress: Progress

    def __post_init__(self) -> None:
        self._critical = find_tables(self.prepared.critical_tables, self.snapshot.relations)
        self.notes: list[str] = []
        self._newest: list[NewestValue] = []
        leaves = [relation for relation in self.snapshot.relations if relation.kind == "r"]
        self._tables = [
            relation for relation in leaves if not (relation.unlogged and self.snapshot.in_recovery)
        ]
        oids = [relation.oid for relation in (*leaves, *self._critical)]
        self._columns: dict[int, list[str]] = defaultdict(list)
        self._dates: dict[int, list[str]] = defaultdict(list)
        for oid, name, is_date in self.session.execute(_COLUMNS.encode(), [oids]):
            self._columns[int(str(oid))].append(str(name))
            if is_date:
                self._dates[int(str(oid))].append(str(name))
        sizes = self.session.execute(
            "SELECT oid, pg_table_size(oid) FROM unnest(%s::oid[]) oid", [[each.oid for each in self._tables]]
        )
        self._sizes = {int(str(oid)): int(str(size or 0)) for oid, size in sizes}
        self._done = 0
        self._total = sum(self._sizes.values())

    def tables(self) -> tuple[TableContent, ...]:
        found = []
        for relation in self._tables:
            found.append(self._table(relation))
            self._read(self._sizes[relation.oid])
        return tuple(sorted(found))

    def _read(self, size_bytes: int) -> None:
        self._done += size_bytes
        self.progress(self._done, self._total)

    def _table(self, relation: Relation) -> TableContent:
        with snapshot_errors(self.snapshot.endpoint, f"cannot read table {relation}"):
            if not self.prepared.contents:
                return self._content(relation, "", self._select(relation, sql.SQL("count(*)")))
            names = [sql.Identifier(name) for name in self._columns[relation.oid]]
            try:
                with self.session.transaction():
                    row = _ROW.format(sql.SQL(", ").join(names))
                    return self._content(relation, "row", self._select(relation, _summed(row)))
            except psycopg.Error as error:
                if error.sqlstate not in _TOO_LONG:
                    raise
            # XX000 is every internal error; a real one comes again.
            row = _LONG_ROW.format(sql.SQL(", ").join(_LONG_COLUMN.format(name) for name in names))
            self.notes.append(f"rows of {relation} are too long to be hashed whole: hashed column by column")
            return self._content(relation, "columns", self._select(relation, _summed(row)))

    def _select(self, relation: Relation, wanted: sql.Composable) -> Sequence[object]:
        # No alias: an extension's condition may name its table, and a column may be called like any alias.
        query = sql.SQL("SELECT {} FROM ONLY {} {}").format(
            sql.SQL(", ").join([wanted, *self._maxima(relation)]),
            relation.identifier,
            sql.SQL(relation.condition),
        )
        return self.session.execute(query).fetchone() or ()

    def _maxima(self, relation: Relation) -> list[sql.Composable]:
        if relation not in self._critical:
            return []
        dates = self._dates[relation.oid]
        return [sql.SQL("max({})::text").format(sql.Identifier(name)) for name in dates]

    def _content(self, relation: Relation, how: str, row: Sequence[object]) -> TableContent:
        rows, *others = row
        digest = f"{how}:{others.pop(0)}" if how else ""
        self._keep_newest(relation, others)
        return TableContent(relation.schema, relation.name, int(str(rows)), digest)

    def _keep_newest(self, relation: Relation, values: Sequence[object]) -> None:
        if relation in self._critical:
            for name, value in zip(self._dates[relation.oid], values, strict=True):
                self._newest.append(NewestValue(str(relation), name, None if value is None else str(value)))

    def newest(self) -> tuple[NewestValue, ...]:
        """Of critical tables; those of a partitioned one are asked for here."""
        for relation in self._critical:
            if relation.kind == "p" and (maxima := self._maxima(relation)):
                query = sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(maxima), relation.identifier)
                self._keep_newest(relation, self.session.execute(query).fetchone() or ())
        return tuple(sorted(self._newest, key=lambda item: (item.table, item.column)))

    def large_objects(self) -> LargeObjects:
        extent = self.session.execute(
            "SELECT count(*), coalesce(max(oid::bigint) - min(oid::bigint), 0) FROM pg_largeobject_metadata"
        ).fetchone()
        count, span = (int(str(value)) for value in extent or (0, 0))
        if count == 0:
            return LargeObjects()
        width = 1 if count <= MAX_LARGE_OBJECTS else 1 << (span // _GROUPS).bit_length()
        options = {"width": width, "contents": self.prepared.contents}
        groups = []
        for first, number, size, content, rights in self.session.execute(_LARGE_OBJECTS.encode(), options):
            digest = str(content) if self.prepared.contents else ""
            groups.append(
                LargeObjectGroup(int(str(first)), int(str(number)), int(str(size)), digest, str(rights))
            )
        return LargeObjects(width, tuple(groups))


def _summed(row: sql.Composable) -> sql.Composable:
    return sql.SQL("count(*), coalesce(sum({}), 0)::text").format(row)


def _sequences(endpoint: Endpoint, session: Connection) -> tuple[SequenceValue, ...]:
    with server_errors(endpoint, "cannot read the sequences"):
        row = session.execute("SELECT pg_is_in_recovery()").fetchone()
        on_standby = bool(row and row[0])
        wanted = [
            relation
            for relation in list_relations(session)
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


def _validity(session: Connection, query: str) -> tuple[int, tuple[str, ...]]:
    row = session.execute(query.encode()).fetchone()
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
