"""The rows and large objects of one snapshot, hashed where they lie.

Called by fingerprint.py, which decides what else belongs to a fingerprint. Nothing here is read twice,
and nothing but counts, digests and newest values leaves the server.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from backup_pipeline.domain.fingerprint import LargeObjectGroup, LargeObjects, NewestValue, TableContent
from backup_pipeline.engines.postgres.server import Connection
from backup_pipeline.engines.postgres.snapshot import Relation, Snapshot, snapshot_errors
from backup_pipeline.engines.postgres.stall import Watchdog

Progress = Callable[[int, int], None]
"""Called with the bytes of tables read so far, and in total."""

MAX_LARGE_OBJECTS = 10_000
"""Of more, neighbours share a digest: a difference then names a range of OIDs."""

_GROUPS = 4096
_SMALL_BYTES = 1024 * 1024
_SMALL_TOGETHER = 50

# A row as text, whatever its columns and casts are called; sorted by name, because a restore may give an
# inherited table another order of columns. A hash follows the collation of its text: "C" is always the same.
_ROW = sql.SQL('hashtextextended(textin(record_out(ROW({}))) COLLATE "C", 0)')
# Long values are hashed where they lie: as part of a row's text, their quotes would be doubled first.
_HASHED = {
    "text": sql.SQL('hashtextextended({} COLLATE "C", 0)'),
    "json": sql.SQL('hashtextextended(textin(json_out({})) COLLATE "C", 0)'),
    "jsonb": sql.SQL('hashtextextended(textin(jsonb_out({})) COLLATE "C", 0)'),
}
# Where a row is longer than the gigabyte that text may have: column by column.
_LONG_ROW = sql.SQL('hashtextextended(ARRAY[{}]::bigint[]::text COLLATE "C", 0)')
_LONG_COLUMN = sql.SQL(
    "CASE WHEN {0} IS DISTINCT FROM NULL THEN hashtextextended(format('%s', {0}) COLLATE \"C\", 0) END"
)
_SUMMED = sql.SQL("count(*), coalesce(sum({}), 0)::text")
_TOO_LONG = ("54000", "XX000")

_COLUMNS = """
    SELECT a.attrelid, a.attname,
           a.atttypid IN ('date'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype),
           CASE a.atttypid WHEN 'text'::regtype THEN 'text' WHEN 'varchar'::regtype THEN 'text'
                           WHEN 'json'::regtype THEN 'json' WHEN 'jsonb'::regtype THEN 'jsonb' ELSE '' END
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


@dataclass
class Reader:
    """One pass over all tables and large objects of a snapshot."""

    session: Connection
    snapshot: Snapshot
    critical: tuple[Relation, ...]  # tables whose newest values are wanted
    contents: bool  # false: rows are counted, not hashed
    progress: Progress
    watchdog: Watchdog

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self._newest: list[NewestValue] = []
        leaves = [relation for relation in self.snapshot.relations if relation.kind == "r"]
        self._tables = [
            relation for relation in leaves if not (relation.unlogged and self.snapshot.in_recovery)
        ]
        oids = [relation.oid for relation in (*leaves, *self.critical)]
        self._columns: dict[int, list[str]] = defaultdict(list)
        self._in_row: dict[int, list[sql.Composable]] = defaultdict(list)
        self._dates: dict[int, list[str]] = defaultdict(list)
        for oid, name, is_date, hashed_as in self.session.execute(_COLUMNS.encode(), [oids]):
            column = sql.Identifier(str(name))
            form = _HASHED.get(str(hashed_as))
            self._columns[int(str(oid))].append(str(name))
            self._in_row[int(str(oid))].append(form.format(column) if form else column)
            if is_date:
                self._dates[int(str(oid))].append(str(name))
        sizes = self.session.execute(
            "SELECT oid, pg_table_size(oid) FROM unnest(%s::oid[]) oid", [[each.oid for each in self._tables]]
        )
        self._sizes = {int(str(oid)): int(str(size or 0)) for oid, size in sizes}
        self._done = 0
        self._total = sum(self._sizes.values())

    def tables(self) -> tuple[TableContent, ...]:
        """All tables; those that are small and not critical many at a time."""
        found: list[TableContent] = []
        small: list[Relation] = []
        for relation in self._tables:
            if self._sizes[relation.oid] > _SMALL_BYTES or relation in self.critical:
                found += self._read([relation])
            else:
                small.append(relation)
        for start in range(0, len(small), _SMALL_TOGETHER):
            found += self._read(small[start : start + _SMALL_TOGETHER])
        return tuple(sorted(found))

    def _read(self, batch: Sequence[Relation]) -> Iterator[TableContent]:
        size_bytes = sum(self._sizes[relation.oid] for relation in batch)
        others = f" and {len(batch) - 1} others" if len(batch) > 1 else ""
        self.watchdog.begins(f"table {batch[0]}{others}", size_bytes)
        yield from self._together(batch) if len(batch) > 1 else [self._alone(batch[0])]
        self._done += size_bytes
        self.progress(self._done, self._total)

    def _together(self, batch: Sequence[Relation]) -> list[TableContent]:
        queries = [
            self._query(relation, sql.SQL("{}, {}").format(sql.Literal(number), self._hashed(relation)))
            for number, relation in enumerate(batch)
        ]
        try:
            rows = self._select(sql.SQL(" UNION ALL ").join(queries))
        except psycopg.Error:
            return [self._alone(relation) for relation in batch]  # to treat, or to name, the one
        return [self._content(batch[int(str(number))], self._how, row) for number, *row in rows]

    def _alone(self, relation: Relation) -> TableContent:
        with snapshot_errors(self.snapshot.endpoint, f"cannot read table {relation}"):
            try:
                query = self._query(relation, self._hashed(relation), *self._maxima(relation))
                return self._content(relation, self._how, self._select(query)[0])
            except psycopg.Error as error:
                if error.sqlstate not in _TOO_LONG:
                    raise
            # XX000 is every internal error; a real one comes again.
            self.notes.append(f"rows of {relation} are too long to be hashed whole: hashed column by column")
            query = self._query(relation, self._hashed_by_column(relation), *self._maxima(relation))
            return self._content(relation, "columns", self._select(query)[0])

    @property
    def _how(self) -> str:
        return "row" if self.contents else ""

    def _hashed(self, relation: Relation) -> sql.Composable:
        if not self.contents:
            return sql.SQL("count(*)")
        return _SUMMED.format(_ROW.format(sql.SQL(", ").join(self._in_row[relation.oid])))

    def _hashed_by_column(self, relation: Relation) -> sql.Composable:
        names = map(sql.Identifier, self._columns[relation.oid])
        columns = sql.SQL(", ").join(_LONG_COLUMN.format(name) for name in names)
        return _SUMMED.format(_LONG_ROW.format(columns))

    def _query(self, relation: Relation, *wanted: sql.Composable) -> sql.Composed:
        # No alias: an extension's condition may name its table, and a column may be called like any alias.
        return sql.SQL("SELECT {} FROM ONLY {} {}").format(
            sql.SQL(", ").join(wanted), relation.identifier, sql.SQL(relation.condition)
        )

    def _select(self, query: sql.Composed) -> list[tuple[object, ...]]:
        # Rolled back, which gives back the locks on indexes: the server's room for locks is small.
        with self.session.transaction(force_rollback=True):
            return self.session.execute(query).fetchall()

    def _maxima(self, relation: Relation) -> list[sql.Composable]:
        if relation not in self.critical:
            return []
        dates = self._dates[relation.oid]
        return [sql.SQL("max({})::text").format(sql.Identifier(name)) for name in dates]

    def _content(self, relation: Relation, how: str, row: Sequence[object]) -> TableContent:
        rows, *others = row
        digest = f"{how}:{others.pop(0)}" if how else ""
        self._keep_newest(relation, others)
        return TableContent(relation.schema, relation.name, int(str(rows)), digest)

    def _keep_newest(self, relation: Relation, values: Sequence[object]) -> None:
        if relation in self.critical:
            for name, value in zip(self._dates[relation.oid], values, strict=True):
                self._newest.append(NewestValue(str(relation), name, None if value is None else str(value)))

    def newest(self) -> tuple[NewestValue, ...]:
        """Of critical tables; those of a partitioned one are asked for here."""
        for relation in self.critical:
            if relation.kind == "p" and (maxima := self._maxima(relation)):
                query = sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(maxima), relation.identifier)
                self._keep_newest(relation, self._select(query)[0])
        return tuple(sorted(self._newest, key=lambda item: (item.table, item.column)))

    def large_objects(self) -> LargeObjects:
        """All large objects, with what their owners and grants are."""
        with snapshot_errors(self.snapshot.endpoint, "cannot read large objects"):
            return self._large_objects()

    def _large_objects(self) -> LargeObjects:
        extent = self.session.execute(
            "SELECT count(*), coalesce(max(oid::bigint) - min(oid::bigint), 0) FROM pg_largeobject_metadata"
        ).fetchone()
        count, span = (int(str(value)) for value in extent or (0, 0))
        if count == 0:
            return LargeObjects()
        row = self.session.execute("SELECT pg_table_size('pg_catalog.pg_largeobject')").fetchone()
        self.watchdog.begins("the large objects", int(str(row[0])) if row else 0)
        width = 1 if count <= MAX_LARGE_OBJECTS else 1 << (span // _GROUPS).bit_length()
        options = {"width": width, "contents": self.contents}
        groups = []
        for first, number, size, content, rights in self.session.execute(_LARGE_OBJECTS.encode(), options):
            digest = str(content) if self.contents else ""
            groups.append(
                LargeObjectGroup(int(str(first)), int(str(number)), int(str(size)), digest, str(rights))
            )
        return LargeObjects(width, tuple(groups))
