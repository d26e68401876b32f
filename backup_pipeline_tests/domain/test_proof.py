"""Fingerprints against each other: what is equal is counted, what is not is one line each."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.fingerprint import (
    CriticalTable,
    Fingerprint,
    LargeObjectGroup,
    LargeObjects,
    NewestValue,
    SequenceValue,
    Statement,
    TableContent,
)
from backup_pipeline.domain.proof import MAX_DIFFERENCES, compare, verdict_of
from backup_pipeline_tests.domain.fingerprints import (
    ARCHIVE,
    INDEX,
    PROPERTIES,
    RESTORED,
    SOURCE,
    TABLE,
    differences,
)


def test_equal_is_a_checklist() -> None:
    comparison = compare(SOURCE, RESTORED, ARCHIVE)
    assert comparison.differences == ()
    assert comparison.notes == SOURCE.notes
    assert comparison.checked == (
        "2 tables, 12,345 rows equal row for row",
        "newest data: app.runs.started_at 2026-03-01 02:00:00+00",
        "newest data: app.runs.d none",
        "2 large objects, 3.0 MiB equal byte for byte, with their owners and grants",
        "2 sequences where the dump set them",
        "2 schema statements equal",
        "3 constraints and 2 indexes valid",
        "2 extensions present: hstore, plpgsql",
        "the database's owner, encoding, locale, comment, connection limit, 1 setting and grants equal",
    )


def test_verdicts() -> None:
    equal = compare(SOURCE, RESTORED, ARCHIVE)
    assert verdict_of(equal, "content") is Verdict.PROVEN
    assert verdict_of(equal, "counts") is Verdict.RESTORED
    different = replace(equal, differences=("x",))
    assert verdict_of(replace(equal, contents=False), "content") is Verdict.RESTORED
    assert verdict_of(different, "content") is verdict_of(different, "counts") is Verdict.FAILED


def test_without_its_schema_compared_a_backup_is_restored_at_most() -> None:
    for source, restored in (
        (replace(SOURCE, client_version=0), RESTORED),
        (SOURCE, replace(RESTORED, client_version=0)),
    ):
        comparison = compare(source, restored, ARCHIVE)
        assert not comparison.differences
        assert verdict_of(comparison, "content") is Verdict.RESTORED


def test_each_critical_table_is_named_with_its_rows() -> None:
    critical = (CriticalTable("app.runs", 12_345), CriticalTable("app.users", 0))
    source = replace(SOURCE, critical=critical)
    equal = compare(source, replace(RESTORED, critical=critical), ARCHIVE)
    assert "critical table app.runs: 12,345 rows" in equal.checked
    assert "critical table app.users: 0 rows" in equal.checked
    assert "critical table app.users was empty in the source: is that meant?" in equal.notes
    fewer = replace(RESTORED, critical=(CriticalTable("app.runs", 12_344), critical[1]))
    assert "critical table app.runs" not in "\n".join(compare(source, fewer, ARCHIVE).checked)


def with_tables(*tables: TableContent) -> Fingerprint:
    return replace(RESTORED, tables=tables)


def test_tables() -> None:
    runs, users = RESTORED.tables
    assert differences(with_tables(runs)) == (
        "table public.users: expected 345 rows, found no such table in the restored database",
    )
    assert differences(with_tables(runs, replace(users, rows=344))) == (
        "table public.users: expected 345 rows, found 344",
    )
    assert differences(with_tables(runs, replace(users, digest="row:4"))) == (
        "table public.users: 345 rows as expected, but their content differs",
    )
    assert differences(with_tables(runs, users, TableContent("x", "y", 1, "row:1"))) == (
        "table x.y: not in the source, found in the restored database",
    )
    assert compare(SOURCE, with_tables(users), ARCHIVE).checked[0] == (
        "1 of 2 tables, 345 rows equal row for row"
    )


def test_counted_rows_are_not_called_equal() -> None:
    counted = with_tables(*(replace(table, digest="") for table in RESTORED.tables))
    comparison = compare(SOURCE, counted, ARCHIVE)
    assert comparison.differences == ()
    assert not comparison.contents
    assert comparison.checked[0] == (
        "2 tables, 12,345 rows with equal numbers of rows; their contents were not compared"
    )


def test_newest_values() -> None:
    older = replace(RESTORED, newest=(NewestValue("app.runs", "started_at", "2026-02-01 02:00:00+00"),))
    assert differences(older) == (
        "newest app.runs.started_at: expected 2026-03-01 02:00:00+00, found 2026-02-01 02:00:00+00",
    )
    assert differences(replace(RESTORED, newest=())) == ()


def with_large_objects(*groups: LargeObjectGroup, width: int = 1) -> Fingerprint:
    return replace(RESTORED, large_objects=LargeObjects(width, groups))


def test_large_objects() -> None:
    first, second = RESTORED.large_objects.groups
    assert differences(with_large_objects(first)) == ("large object 7002: expected 0 B, found none",)
    assert differences(with_large_objects(first, replace(second, size_bytes=5))) == (
        "large object 7002: expected 0 bytes, found 5",
    )
    assert differences(with_large_objects(replace(first, content="9"), second)) == (
        "large object 7001: 3,145,728 bytes as expected, but their content differs",
    )
    assert differences(with_large_objects(replace(first, rights="9"), second)) == (
        "large object 7001: its owner, grants or comment differ",
    )
    assert differences(with_large_objects(first, second, replace(second, first_oid=7))) == (
        "large object 7: not in the source, found in the restored database",
    )
    assert differences(with_large_objects(replace(first, count=20), width=64)) == (
        "large objects: expected 2 (3.0 MiB), found 20 (3.0 MiB)",
    )


def test_large_objects_in_groups() -> None:
    group = LargeObjectGroup(128, 20, 4000, "1", "2")
    source = replace(SOURCE, large_objects=LargeObjects(64, (group,)))
    assert differences(with_large_objects(replace(group, count=19, size_bytes=3800), width=64), source) == (
        "large objects 128 to 191: expected 20 with 4,000 bytes, found 19 with 3,800",
    )


def with_sequences(*values: SequenceValue) -> Fingerprint:
    return replace(RESTORED, sequences_before=values)


def test_sequences() -> None:
    ids, still = RESTORED.sequences_before
    assert differences(with_sequences(replace(ids, last_value=45), still)) == (
        "sequence app.ids: expected 44 as the dump sets it, found 45",
    )
    assert differences(with_sequences(ids, replace(still, is_called=True))) == (
        "sequence app.still: expected 1 (not used yet) as the dump sets it, found 1",
    )
    assert differences(with_sequences(ids)) == ("sequence app.still: not found in the restored database",)
    assert differences(with_sequences(ids, still, SequenceValue("x", "y", 1, True))) == (
        "sequence x.y: not in the source, found in the restored database",
    )
    assert compare(SOURCE, RESTORED, {("app", "ids"): (44, True)}).differences == (
        "sequence app.still: the dump does not set it",
    )


def test_a_sequence_that_stood_still_is_not_proven_elsewhere() -> None:
    """It may have been set there and back while the dump was taken: no difference, and no proof."""
    moved = with_sequences(RESTORED.sequences_before[0], SequenceValue("app", "still", 2, True))
    found = compare(SOURCE, moved, {**ARCHIVE, ("app", "still"): (2, True)})
    assert found.differences == ()
    assert verdict_of(found, "content") is Verdict.RESTORED
    assert found.notes[-1] == (
        "sequence app.still stood at 1 (not used yet) before and after the dump was taken, and at 2 in the "
        "dump: nothing tells if it was set there and back"
    )
    assert len(compare(SOURCE, moved, ARCHIVE).differences) == 1  # the copy is not as the dump sets it


def test_a_sequence_that_cycles_may_come_back_to_where_it_stood() -> None:
    cycling = Statement(
        "SEQUENCE", "app", "still", "keeper", "CREATE SEQUENCE app.still\n    CACHE 1\n    CYCLE;"
    )
    source = replace(SOURCE, schema_before=(TABLE, INDEX, cycling), schema_after=(TABLE, INDEX, cycling))
    ids, moved = RESTORED.sequences_before[0], SequenceValue("app", "still", 2, True)
    restored = replace(with_sequences(ids, moved), schema_before=(TABLE, INDEX, cycling))
    comparison = compare(source, restored, {**ARCHIVE, ("app", "still"): (2, True)})
    assert comparison.differences == ()
    assert comparison.notes[-1] == (
        "sequence app.still cycles: it stood at 1 (not used yet) before and after the dump was taken, "
        "and at 2 in the dump"
    )
    assert len(compare(source, restored, ARCHIVE).differences) == 1  # the copy is not as the dump sets it


def test_a_sequence_set_anew_during_the_dump_is_a_note() -> None:
    moved = with_sequences(SequenceValue("app", "ids", 3, True), RESTORED.sequences_before[1])
    comparison = compare(SOURCE, moved, {**ARCHIVE, ("app", "ids"): (3, True)})
    assert comparison.differences == ()
    assert comparison.notes[-1] == (
        "sequence app.ids was set anew while the dump was taken: it stood at 40 before and 50 after, "
        "at 3 in the dump"
    )


def test_sequences_that_came_or_went_during_the_dump() -> None:
    ids, still = SOURCE.sequences_before
    came = replace(SOURCE, sequences_before=(still,))
    assert compare(came, RESTORED, {**ARCHIVE, ("app", "ids"): (44, True)}).differences == ()
    went = compare(
        replace(SOURCE, sequences_after=(still,)), with_sequences(still), {("app", "still"): (1, False)}
    )
    assert went.differences == ()
    assert "1 sequence where the dump set them" in went.checked
    assert ids.last_value == 40


def test_validity() -> None:
    assert differences(replace(RESTORED, unvalidated=("app.runs loose", "app.runs other"))) == (
        "constraint app.runs other: expected to be validated, found NOT VALID",
    )
    assert differences(replace(RESTORED, invalid_indexes=("app.idx",))) == (
        "index app.idx: expected to be valid, found INVALID",
    )
    assert differences(replace(RESTORED, unvalidated=())) == ()


def test_extensions() -> None:
    newer = compare(SOURCE, replace(RESTORED, extensions=(("hstore", "1.9"), ("plpgsql", "1.0"))), ARCHIVE)
    assert newer.differences == ()
    assert newer.notes[-1] == "extension hstore is 1.8 in the source, 1.9 here"
    assert differences(replace(RESTORED, extensions=(("plpgsql", "1.0"),))) == (
        "extension hstore: not found in the restored database",
    )


def test_properties() -> None:
    elsewhere = replace(PROPERTIES, name="scratch", tablespace="slow", allow_connections=False)
    assert differences(replace(RESTORED, properties=elsewhere)) == ()
    changed = replace(PROPERTIES, connection_limit=5, comment="new", grants=None)
    assert differences(replace(RESTORED, properties=changed)) == (
        "the database's connection limit: expected -1, found 5",
        "the database's comment: expected none, found new",
        "the database's grants: expected (('keeper', '', 'CONNECT', False),), found none",
    )
    assert "the database's owner, settings and grants were not compared" in (
        compare(SOURCE, replace(RESTORED, properties=None), ARCHIVE).notes
    )


def test_settings_are_named_and_their_values_kept() -> None:
    shared = ("", "app.jwt_secret=hunter2")
    expected = (shared, ("", "lock_timeout=9s"), ("", "work_mem=8MB"), ("keeper", "app.key=a=b"))
    found = (shared, ("", "app.url=x:hunter2@y"), ("", "work_mem=9MB"), ("keeper", "app.key=a=c"))
    source = replace(SOURCE, properties=replace(PROPERTIES, settings=expected))
    comparison = compare(source, replace(RESTORED, properties=replace(PROPERTIES, settings=found)), ARCHIVE)
    assert comparison.differences == (
        "the database's setting app.url: not in the source, found in the restored database",
        "the database's setting lock_timeout: not found in the restored database",
        "the database's setting work_mem: its value differs",
        "the database's setting app.key of role keeper: its value differs",
    )
    assert not [line for line in comparison.checked if line.startswith("the database's")]


def test_a_verdict_stays_small_and_printable() -> None:
    many = tuple(TableContent("s", f"t\n\x1b[31m{n}\udcff", 1, "row:1") for n in range(250))
    found = differences(with_tables(*RESTORED.tables, *many))
    assert len(found) == MAX_DIFFERENCES + 1
    assert found[-1] == "and 150 more differences"
    assert all(line.isprintable() for line in found)


NAMES = st.text(max_size=5)
TABLES = st.lists(
    st.builds(TableContent, NAMES, NAMES, st.integers(0, 9), st.sampled_from(["", "row:1", "row:2"])),
    unique_by=lambda table: (table.schema, table.name),
    max_size=6,
).map(tuple)


@given(TABLES, TABLES)
def test_tables_are_equal_exactly_when_nothing_is_said(
    expected: tuple[TableContent, ...], found: tuple[TableContent, ...]
) -> None:
    source = Fingerprint(170010, 170010, expected)
    said = compare(source, Fingerprint(170010, 170010, found), {}).differences
    counted = {(table.schema, table.name): table for table in found}
    equal = len(expected) == len(found) and all(
        (other := counted.get((table.schema, table.name))) is not None
        and table.rows == other.rows
        and (table.digest == other.digest or not table.digest or not other.digest)
        for table in expected
    )
    assert equal == (said == ())
    assert compare(source, source, {}).differences == ()
