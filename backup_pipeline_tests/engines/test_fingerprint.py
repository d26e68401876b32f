"""Fingerprints of real databases: equal after a dump and a restore, and different after any change."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from psycopg import sql

from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.fingerprint import (
    Fingerprint,
    Statement,
    fingerprint_from_json,
    fingerprint_to_json,
)
from backup_pipeline.domain.proof import Comparison, compare, verdict_of
from backup_pipeline.engines.postgres import contents, fingerprint
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.properties import read_properties
from backup_pipeline.engines.postgres.schema import archive_sequences
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.snapshot import Relation
from backup_pipeline.errors import ConfigError, ServerError
from backup_pipeline_tests.engines.zoo import (
    HOSTILE_NAMES,
    ZOO,
    backup,
    execute,
    hold_against,
    rendering,
    restore,
    tool,
)
from backup_pipeline_tests.servers.postgres import fresh_database


@dataclass(frozen=True)
class Restored:
    """A zoo's backup and its restored copy, for tests that change the copy and put it back."""

    cluster: LocalCluster
    source: Fingerprint
    archive: Path
    copy: Endpoint
    rendered: tuple[Statement, ...]

    def compare(self, *, contents: bool = True) -> Comparison:
        found = fingerprint.of_database(self.copy, pg_dump=tool("pg_dump"), contents=contents)
        sequences = archive_sequences(tool("pg_restore"), self.archive, self.copy)
        return compare(self.source, found, sequences, rendered=self.rendered)


@pytest.fixture(scope="module")
def restored(postgres: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restored]:
    archive = tmp_path_factory.mktemp("zoo") / "database.dump"
    with fresh_database(postgres) as database, fresh_database(postgres) as copy:
        execute(database, "CREATE ROLE keeper; CREATE ROLE guest;" + ZOO)
        execute(database, "GRANT SELECT ON t, listed TO guest; GRANT UPDATE (b) ON dropped TO guest, keeper;")
        execute(database, "GRANT SELECT ON LARGE OBJECT 7002 TO guest; ALTER TABLE t OWNER TO keeper;")
        source = backup(database, archive)
        restore(archive, copy)
        source = fingerprint_from_json(fingerprint_to_json(source), "key")
        yield Restored(postgres, source, archive, copy, rendering(source, postgres))
    with closing(connect(postgres.endpoint())) as session:
        session.execute("DROP ROLE keeper, guest")


def test_a_restored_zoo_is_proven(restored: Restored) -> None:
    comparison = restored.compare()
    assert comparison.differences == ()
    assert verdict_of(comparison, "content") is Verdict.PROVEN
    assert comparison.checked[:3] == (
        "22 tables, 44 rows equal row for row",
        "4 large objects, 5.4 MiB equal byte for byte, with their owners and grants",
        "4 sequences where the dump set them",
    )
    assert "materialized view public.counted: filled anew by a restore, and not compared" in comparison.notes


@pytest.mark.parametrize(
    ("change", "undo", "difference"),
    [
        (
            "UPDATE texts SET t = 'other' WHERE v = 'x'",
            "UPDATE texts SET t = repeat('long ', 400000) WHERE v = 'x'",
            "table public.texts: 4 rows as expected, but their content differs",
        ),
        (
            "UPDATE numbers SET f8 = 0 WHERE f8 = '-0'",
            "UPDATE numbers SET f8 = '-0' WHERE f8 = 0",
            "table public.numbers: 4 rows as expected, but their content differs",
        ),
        (
            # The sums of duplicates must not cancel out.
            "DELETE FROM duplicates WHERE ctid IN (SELECT ctid FROM duplicates LIMIT 2)",
            "INSERT INTO duplicates VALUES ('same'), ('same')",
            "table public.duplicates: expected 6 rows, found 4",
        ),
        (
            "INSERT INTO nothing DEFAULT VALUES",
            "TRUNCATE nothing; INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES",
            "table public.nothing: expected 2 rows, found 3",
        ),
        (
            "UPDATE t SET t = 'y' WHERE t = 'x'",  # a cast of the row to text hides this
            "UPDATE t SET t = 'x' WHERE t = 'y'",
            "table public.t: 2 rows as expected, but their content differs",
        ),
        (
            "CREATE TABLE extra (id int); DROP TABLE extra; ALTER TABLE empty RENAME TO vacant",
            "ALTER TABLE vacant RENAME TO empty",
            "table public.empty: expected 0 rows, found no such table in the restored database",
        ),
        (
            "SELECT nextval('down')",
            "SELECT setval('down', 10)",
            "sequence public.down: expected 10 as the dump sets it, found 7",
        ),
        (
            "SELECT nextval('untouched')",
            "SELECT setval('untouched', 1, false)",
            "sequence public.untouched: expected 1 (not used yet) as the dump sets it, found 1",
        ),
        (
            "SELECT lo_put(7004, 1000000, 'x')",
            "SELECT lo_put(7004, 1000000, '\\000')",
            "large object 7004: 2,500,003 bytes as expected, but their content differs",
        ),
        (
            "SELECT lo_unlink(7001)",
            "SELECT lo_create(7001)",
            "large object 7001: expected 0 B, found none",
        ),
        (
            "REVOKE SELECT ON LARGE OBJECT 7002 FROM guest",
            "GRANT SELECT ON LARGE OBJECT 7002 TO guest",
            "large object 7002: its owner, grants or comment differ",
        ),
        (
            "REVOKE SELECT ON listed FROM guest",
            "GRANT SELECT ON listed TO guest",
            "acl public.TABLE listed: not found in the restored database",
        ),
        (
            "GRANT INSERT ON listed TO guest",
            "REVOKE INSERT ON listed FROM guest",
            "acl public.TABLE listed: expected `GRANT SELECT ON TABLE public.listed TO guest;`, "
            "found `GRANT SELECT,INSERT ON TABLE public.listed TO guest;`",
        ),
        (
            "ALTER TABLE t OWNER TO guest",
            "ALTER TABLE t OWNER TO keeper; GRANT SELECT ON t TO guest",
            "table public.t: expected `ALTER TABLE public.t OWNER TO keeper;`, "
            "found `ALTER TABLE public.t OWNER TO guest;`",
        ),
        (
            "ALTER TABLE listed DROP CONSTRAINT listed_v_check",
            "ALTER TABLE listed ADD CHECK (v IN ('a', 'b'))",
            "table public.listed: expected `v character varying(9),`, found `v character varying(9)`",
        ),
        (
            "DELETE FROM loose; ALTER TABLE loose VALIDATE CONSTRAINT loose_id_check",
            "ALTER TABLE loose DROP CONSTRAINT loose_id_check; INSERT INTO loose VALUES (-1);"
            " ALTER TABLE loose ADD CHECK (id > 0) NOT VALID",
            "table public.loose: expected 1 rows, found 0",
        ),
        (
            "DROP INDEX listed_v_idx",
            "CREATE INDEX ON listed (v) WHERE v IN ('a', 'b')",
            "index public.listed_v_idx: not found in the restored database",
        ),
        (
            "ALTER TABLE audited DISABLE TRIGGER audit",
            "ALTER TABLE audited ENABLE TRIGGER audit",
            "trigger public.audited audit: expected no such line, "
            "found `ALTER TABLE public.audited DISABLE TRIGGER audit;`",
        ),
        (
            "COMMENT ON TABLE t IS 'other'",
            "COMMENT ON TABLE t IS E'--\\n-- Name: t; Type: COMMENT; Schema: public; Owner: x\\n--\\n\\n\\n"
            "SET default_tablespace = '",
            "comment public.TABLE t: line 1 differs, within quotes",
        ),
        (
            "DROP EXTENSION isn CASCADE",
            "CREATE EXTENSION isn; ALTER TABLE documents ADD e ean13;"
            " UPDATE documents SET e = '978-0-393-04002-9' WHERE u IS NOT NULL",
            "extension isn: not found in the restored database",
        ),
    ],
    ids=lambda text: text[:24],
)
def test_one_change_is_found(restored: Restored, change: str, undo: str, difference: str) -> None:
    execute(restored.copy, change)
    try:
        comparison = restored.compare()
    finally:
        execute(restored.copy, undo)
    assert difference in comparison.differences
    assert verdict_of(comparison, "content") is Verdict.FAILED


def test_all_changes_were_undone(restored: Restored) -> None:
    assert restored.compare().differences == ()


PAIRS = (
    ("text", "NULL", "''"),
    ("text", "'a'", "'a '"),
    ("varchar", "'1'", "'01'"),
    ("json", "NULL", "'null'"),
    ("json", "'{\"a\":1}'", "'{\"a\": 1}'"),
    ("jsonb", "NULL", "'null'"),
    ("jsonb", "'1.0'", "'1.00'"),  # equal, to =
    ("numeric", "1.0", "1.00"),  # equal, to =
)


def test_values_that_look_alike_are_told_apart(database: Endpoint) -> None:
    for number, (kind, *values) in enumerate(PAIRS):
        for side, value in zip("ab", values, strict=True):
            execute(
                database,
                f"CREATE TABLE t{number}{side} (v {kind}); INSERT INTO t{number}{side} VALUES ({value})",
            )
    digests = {
        table.name: table.digest
        for table in fingerprint.of_database(database, pg_dump=tool("pg_dump")).tables
    }
    for number, pair in enumerate(PAIRS):
        assert digests[f"t{number}a"] != digests[f"t{number}b"], pair


def test_counting_reads_no_contents(restored: Restored) -> None:
    execute(restored.copy, "UPDATE t SET fp = 3 WHERE fp = 2")
    comparison = restored.compare(contents=False)
    execute(restored.copy, "UPDATE t SET fp = 2 WHERE fp = 3")
    assert comparison.differences == ()
    assert verdict_of(comparison, "counts") is Verdict.RESTORED
    assert comparison.checked[0].endswith("with equal numbers of rows; their contents were not compared")


def test_hostile_names(postgres: LocalCluster, tmp_path: Path) -> None:
    archive = tmp_path / "database.dump"
    with (
        _roles(postgres, HOSTILE_NAMES),
        fresh_database(postgres) as database,
        fresh_database(postgres) as copy,
    ):
        execute(database, "CREATE SCHEMA other")
        for name in HOSTILE_NAMES:
            execute(database, _filling(name))
        source = backup(database, archive, critical_tables=[f"{name}.{name}" for name in HOSTILE_NAMES])
        restore(archive, copy)
        comparison = hold_against(source, archive, copy, postgres)
    assert comparison.differences == ()
    count = len(HOSTILE_NAMES)
    assert comparison.checked[0] == f"{count} tables, {2 * count} rows equal row for row"
    assert {item.value for item in source.newest} == {"2026-01-01 00:00:00+00"}
    assert [item.last_value for item in source.sequences_before] == [5] * count
    assert all(text.isprintable() for text in comparison.checked)


@contextmanager
def _roles(cluster: LocalCluster, names: Sequence[str]) -> Iterator[None]:
    for name in names:
        execute(cluster.endpoint(), sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)).as_string())
    try:
        yield
    finally:
        for name in names:
            execute(cluster.endpoint(), sql.SQL("DROP ROLE {}").format(sql.Identifier(name)).as_string())


def _filling(name: str) -> str:
    statements = """
        CREATE SCHEMA {name};
        CREATE TABLE {name}.{name} ({name} text, at timestamptz, n int);
        INSERT INTO {name}.{name} VALUES ({text}, '2026-01-01', 1), (NULL, NULL, 2);
        CREATE SEQUENCE other.{name};
        COMMENT ON SEQUENCE other.{name} IS {text};
        GRANT SELECT ON {name}.{name} TO {name};
        COMMENT ON COLUMN {name}.{name}.{name} IS {text};
        SELECT setval({sequence}, 5);
    """
    sequence = sql.Literal(sql.Identifier("other", name).as_string())
    names = {"name": sql.Identifier(name), "text": sql.Literal(name), "sequence": sequence}
    return sql.SQL(statements).format(**names).as_string()


LIMITS = {
    "timezone": "'Asia/Kathmandu'",
    "datestyle": "'German'",
    "intervalstyle": "iso_8601",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "xmlbinary": "hex",
    "quote_all_identifiers": "on",
    "row_security": "on",
    "standard_conforming_strings": "off",
    "search_path": "public",
    "statement_timeout": "3000",
    "idle_in_transaction_session_timeout": "100",
}


def test_settings_of_the_database_change_nothing(postgres: LocalCluster, tmp_path: Path) -> None:
    archive = tmp_path / "database.dump"
    with fresh_database(postgres, "pinned") as database, fresh_database(postgres) as copy:
        execute(database, ZOO)
        execute(
            database, "CREATE TABLE moments (a timestamptz DEFAULT '2020-01-01Z', b bytea DEFAULT '\\x00ff')"
        )
        for name, value in LIMITS.items():
            execute(database, f"ALTER DATABASE pinned SET {name} = {value}")
        source = backup(database, archive)
        restore(archive, copy)
        assert hold_against(source, archive, copy, postgres).differences == ()


def test_properties_belong_to_it(database: Endpoint, postgres: LocalCluster, tmp_path: Path) -> None:
    source = backup(database, tmp_path / "database.dump")
    with closing(connect(database)) as session:
        properties = read_properties(session, database.database)
    with fresh_database(postgres) as copy:
        execute(copy, f"ALTER DATABASE {copy.database} SET work_mem = '8MB'")
        execute(copy, f"COMMENT ON DATABASE {copy.database} IS 'a copy'")
        with closing(connect(copy)) as session:
            found = replace(
                fingerprint.of_database(copy, pg_dump=tool("pg_dump")),
                properties=read_properties(session, copy.database),
            )
    assert compare(replace(source, properties=properties), found, {}).differences == (
        "the database's comment: expected none, found a copy",
        "the database's setting work_mem: not in the source, found in the restored database",
    )


def test_an_extension_brings_its_tables(database: Endpoint, postgres: LocalCluster, tmp_path: Path) -> None:
    """Of an extension's tables only what it marks as configuration is dumped, and compared."""
    execute(
        database,
        "CREATE EXTENSION tcn; CREATE TABLE own (id int); CREATE TABLE config (id int, std boolean);"
        "INSERT INTO own VALUES (1); INSERT INTO config VALUES (1, true), (2, false);"
        "ALTER EXTENSION tcn ADD TABLE own; ALTER EXTENSION tcn ADD TABLE config;"
        "UPDATE pg_extension SET extconfig = ARRAY['config'::regclass::oid],"
        " extcondition = ARRAY['WHERE NOT config.std'] WHERE extname = 'tcn'",
    )
    source = backup(database, tmp_path / "database.dump")
    assert [(str(table), table.rows) for table in source.tables] == [("public.config", 1)]


def test_large_objects_are_grouped_when_many(
    database: Endpoint, postgres: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "MAX_LARGE_OBJECTS", 10)
    monkeypatch.setattr(contents, "_GROUPS", 4)
    archive = tmp_path / "database.dump"
    execute(database, "SELECT lo_from_bytea(20000 + n, 'x') FROM generate_series(0, 30) n")
    source = backup(database, archive)
    with fresh_database(postgres) as copy:
        restore(archive, copy)
        assert hold_against(source, archive, copy, postgres).differences == ()
        execute(copy, "SELECT lo_put(20017, 0, 'y')")
        assert hold_against(source, archive, copy, postgres).differences == (
            "large objects 20016 to 20023: 8 bytes as expected, but their content differs",
        )


def test_a_role_that_may_not_see_all_rows_is_refused(
    database: Endpoint, postgres: LocalCluster, tmp_path: Path
) -> None:
    execute(
        database,
        "CREATE ROLE reader LOGIN; GRANT pg_read_all_data TO reader; CREATE TABLE secret (id int);"
        "ALTER TABLE secret ENABLE ROW LEVEL SECURITY; INSERT INTO secret VALUES (1)",
    )
    reader = postgres.endpoint(database.database, user="reader")
    with pytest.raises(ServerError, match=r"cannot read table public\.secret.*row-level security"):
        fingerprint.of_database(reader, pg_dump=tool("pg_dump"))
    execute(database, "DROP OWNED BY reader; DROP ROLE reader")


def test_a_role_that_only_reads(database: Endpoint, postgres: LocalCluster, tmp_path: Path) -> None:
    execute(database, "CREATE ROLE reader LOGIN; GRANT pg_read_all_data TO reader")
    execute(database, "CREATE SCHEMA private; CREATE TABLE private.t (id serial)")
    execute(database, "INSERT INTO private.t VALUES (7)")
    archive = tmp_path / "database.dump"
    try:
        source = backup(postgres.endpoint(database.database, user="reader"), archive)
        with fresh_database(postgres) as copy:
            restore(archive, copy)
            assert hold_against(source, archive, copy, postgres).differences == ()
    finally:
        execute(database, "DROP OWNED BY reader; DROP ROLE reader")


def test_critical_tables(database: Endpoint, tmp_path: Path) -> None:
    execute(
        database,
        "CREATE TABLE runs (id int, started_at timestamptz, day date, note text);"
        "INSERT INTO runs VALUES (1, '2026-02-03 04:05:06+00', '2026-02-01'), (2, '2026-01-01', NULL);"
        "CREATE TABLE none (at timestamp); CREATE SCHEMA s;"
        "CREATE TABLE s.events (at timestamp) PARTITION BY RANGE (at);"
        "CREATE TABLE s.e1 PARTITION OF s.events DEFAULT; INSERT INTO s.events VALUES ('2026-03-04')",
    )
    source = backup(database, tmp_path / "database.dump", critical_tables=("runs", "public.none", "events"))
    assert [(item.table, item.column, item.value) for item in source.newest] == [
        ("public.none", "at", None),
        ("public.runs", "day", "2026-02-01"),
        ("public.runs", "started_at", "2026-02-03 04:05:06+00"),
        ("s.events", "at", "2026-03-04 00:00:00"),
    ]
    comparison = compare(source, fingerprint.of_database(database, pg_dump=tool("pg_dump")), {})
    assert comparison.differences == ()
    assert "newest data: public.runs.started_at 2026-02-03 04:05:06+00" in comparison.checked


def test_a_missing_critical_table_is_named_with_its_like(database: Endpoint) -> None:
    execute(database, "CREATE TABLE executions (id int); CREATE TABLE users (id int)")
    with closing(connect(database)) as session:
        fingerprint.check_critical_tables(session, ["executions", "public.users"])
        with pytest.raises(ConfigError, match=r"execution does not exist; nearest: public\.executions"):
            fingerprint.check_critical_tables(session, ["users", "execution"])


def test_a_table_in_two_schemas_must_be_named_in_full() -> None:
    tables = [Relation(n, schema, "t", "r", unlogged=False) for n, schema in enumerate(("a", "b"))]
    with pytest.raises(ConfigError, match=r"critical table t: expected one, found a\.t, b\.t"):
        fingerprint.find_tables(["t"], tables)
    assert fingerprint.find_tables(["b.t"], tables) == (tables[1],)
    in_public = Relation(9, "public", "t", "r", unlogged=False)
    assert fingerprint.find_tables(["t"], [*tables, in_public]) == (in_public,)


def test_progress_reaches_the_total(restored: Restored) -> None:
    seen: list[tuple[int, int]] = []
    fingerprint.of_database(
        restored.copy, pg_dump=tool("pg_dump"), progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.slow
def test_a_row_longer_than_a_gigabyte_as_text(
    database: Endpoint, postgres: LocalCluster, tmp_path: Path
) -> None:
    """Quotes are doubled in a row's text: this one has 1.2 GB, while COPY writes 600 MB."""
    archive = tmp_path / "database.dump"
    execute(database, "CREATE DOMAIN words AS text; CREATE TABLE long (a words, b words, c text)")
    execute(database, "INSERT INTO long SELECT repeat('\"', 300000000), repeat('\"', 300000000), NULL")
    source = backup(database, archive)
    assert source.tables[0].digest.startswith("columns:")
    assert "rows of public.long are too long to be hashed whole: hashed column by column" in source.notes
    with fresh_database(postgres) as copy:
        restore(archive, copy)
        assert hold_against(source, archive, copy, postgres).differences == ()
        execute(copy, "UPDATE long SET c = ''")
        assert hold_against(source, archive, copy, postgres).differences == (
            "table public.long: 1 rows as expected, but their content differs",
        )
