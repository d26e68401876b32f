"""Fingerprints against each other: what is equal is counted, what is not is one line each."""

import json
from dataclasses import replace
from typing import Any

import pytest
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
    fingerprint_from_json,
    fingerprint_to_json,
)
from backup_pipeline.domain.proof import MAX_DIFFERENCES, compare, schema_differs, verdict_of
from backup_pipeline.errors import Corrupt, NotProvable
from backup_pipeline_tests.domain import values

PROPERTIES = replace(
    values.PROPERTIES,
    owner="keeper",
    comment=None,
    settings=(("", "work_mem=8MB"),),
    grants=(("keeper", "", "CONNECT", False),),
)
TABLE = Statement("TABLE", "public", "runs", "keeper", "CREATE TABLE public.runs (\n    id integer\n);")
INDEX = Statement("INDEX", "public", "runs_idx", "keeper", "CREATE INDEX runs_idx ON public.runs (id);")
VIEW = Statement("VIEW", "public", "v", "keeper", "CREATE VIEW public.v AS\n SELECT 1;")
SOURCE = Fingerprint(
    server_version=170010,
    client_version=170010,
    tables=(TableContent("app", "runs", 12000, "row:17"), TableContent("public", "users", 345, "row:-4")),
    newest=(
        NewestValue("app.runs", "started_at", "2026-03-01 02:00:00+00"),
        NewestValue("app.runs", "d", None),
    ),
    large_objects=LargeObjects(
        1, (LargeObjectGroup(7001, 1, 3145728, "1", "2"), LargeObjectGroup(7002, 1, 0, "3", "4"))
    ),
    sequences_before=(SequenceValue("app", "ids", 40, True), SequenceValue("app", "still", 1, False)),
    sequences_after=(SequenceValue("app", "ids", 50, True), SequenceValue("app", "still", 1, False)),
    schema_before=(TABLE, INDEX),
    schema_after=(TABLE, INDEX),
    properties=PROPERTIES,
    extensions=(("hstore", "1.8"), ("plpgsql", "1.0")),
    constraints=3,
    unvalidated=("app.runs loose",),
    indexes=2,
    invalid_indexes=(),
    notes=("foreign table app.remote: kept elsewhere, and neither dumped nor compared",),
)
ARCHIVE = {("app", "ids"): (44, True), ("app", "still"): (1, False)}
RESTORED = replace(
    SOURCE,
    sequences_before=(SequenceValue("app", "ids", 44, True), SequenceValue("app", "still", 1, False)),
    sequences_after=(),
    schema_after=(),
    notes=(),
)


def differences(restored: Fingerprint, source: Fingerprint = SOURCE) -> tuple[str, ...]:
    return compare(source, restored, ARCHIVE).differences


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


def with_schema(*statements: Statement) -> Fingerprint:
    return replace(RESTORED, schema_before=statements)


def test_schema() -> None:
    assert differences(with_schema(TABLE)) == ("index public.runs_idx: not found in the restored database",)
    assert differences(with_schema(TABLE, INDEX, VIEW)) == (
        "view public.v: not in the source, found in the restored database",
    )
    other = replace(TABLE, body="CREATE TABLE public.runs (\n    id bigint\n);")
    assert differences(with_schema(other, INDEX)) == (
        "table public.runs: expected `id integer`, found `id bigint`",
    )
    turned = replace(TABLE, body="\n".join(reversed(TABLE.body.splitlines())))
    assert differences(with_schema(turned, INDEX)) == ("table public.runs: the same lines in another order",)
    assert schema_differs(SOURCE, with_schema(TABLE))
    assert not schema_differs(SOURCE, with_schema(INDEX, TABLE))


QUOTED = {
    # a statement with something secret in it: how its change is named
    "CREATE FUNCTION public.f() RETURNS text\n    LANGUAGE sql\n    AS $$\n  -- it's\n  SELECT '{}' $$;": (
        "line 5 differs, within quotes"
    ),
    "CREATE FUNCTION public.f() AS $_$ SELECT $$ {} $$ $_$;": "line 1 differs, within quotes",
    "CREATE SERVER \"public.f\" FOREIGN DATA WRAPPER w (\n    host 'h',\n    password 'it''s {}'\n);": (
        "line 3 differs, within quotes"
    ),
    "CREATE VIEW public.f AS\n SELECT * FROM dblink('x\npassword={}'::text, 'q'::text) t(n);": (
        "line 3 differs, within quotes"
    ),
    "COMMENT ON TABLE public.f IS E'a\\\\''\n{}';": "line 2 differs, within quotes",
    "CREATE TABLE public.f (\n    \"it's\" text DEFAULT '{}'::text\n);": "line 2 differs, within quotes",
}


@pytest.mark.parametrize("body", QUOTED)
def test_what_is_quoted_is_not_shown(body: str) -> None:
    ours, theirs = (replace(TABLE, body=body.replace("{}", secret)) for secret in ("hush1", "hush2"))
    source = replace(SOURCE, schema_before=(ours, INDEX), schema_after=(ours, INDEX))
    assert differences(with_schema(theirs, INDEX), source) == (f"table public.runs: {QUOTED[body]}",)
    longer = replace(theirs, body=theirs.body.replace("public.f", "public.g"))
    (shown,) = differences(with_schema(longer, INDEX), source)
    assert "hush" not in shown
    assert "public.g" in shown


def test_lines_are_shown_without_what_is_quoted() -> None:
    ours = replace(TABLE, body="CREATE TABLE public.runs (\n    a text DEFAULT 'hush'::text\n);")
    theirs = replace(TABLE, body="CREATE TABLE public.runs (\n    a text DEFAULT 'hush'::text NOT NULL\n);")
    source = replace(SOURCE, schema_before=(ours, INDEX), schema_after=(ours, INDEX))
    assert differences(with_schema(theirs, INDEX), source) == (
        "table public.runs: expected `a text DEFAULT '…'::text`, found `a text DEFAULT '…'::text NOT NULL`",
    )


def test_schema_that_changed_during_the_dump() -> None:
    changed = replace(VIEW, body="CREATE VIEW public.v AS\n SELECT 2;")
    third = replace(VIEW, body="CREATE VIEW public.v AS\n SELECT 3;")
    source = replace(SOURCE, schema_before=(TABLE, INDEX, VIEW), schema_after=(TABLE, INDEX, changed))
    assert differences(with_schema(TABLE, INDEX, VIEW), source) == ()
    assert differences(with_schema(TABLE, INDEX, changed), source) == ()
    assert len(differences(with_schema(TABLE, INDEX, third), source)) == 1
    assert len(differences(with_schema(TABLE, INDEX), source)) == 1
    came = replace(SOURCE, schema_after=(TABLE, INDEX, VIEW))
    assert differences(with_schema(TABLE, INDEX), came) == ()
    assert differences(with_schema(TABLE, INDEX, VIEW), came) == ()


def views(count: int) -> list[Statement]:
    return [replace(VIEW, body=f"CREATE VIEW public.v AS\n SELECT {number};") for number in range(count)]


def test_what_changed_before_the_dump_and_again_during_it_is_as_the_dump_has_it() -> None:
    first, dumped, last, other = views(4)
    restored = with_schema(TABLE, INDEX, dumped)
    moved = replace(SOURCE, schema_before=(TABLE, INDEX, first), schema_after=(TABLE, INDEX, last))
    short_lived = SOURCE
    for source in (moved, short_lived):
        assert schema_differs(source, restored)
        found = compare(source, restored, ARCHIVE, archived=[TABLE, INDEX, dumped])
        assert found.differences == ()
        assert found.notes[-1].startswith(
            "view public.v was changed just before the dump and again during it"
        )
        assert "3 schema statements equal" in found.checked
        # Only what the dump holds counts, and all that it holds.
        assert len(compare(source, restored, ARCHIVE, archived=[TABLE, INDEX, other]).differences) == 1
        twice = with_schema(TABLE, INDEX, dumped, dumped)
        assert len(compare(source, twice, ARCHIVE, archived=[TABLE, INDEX, dumped]).differences) == 1
    lost = with_schema(TABLE, INDEX)
    assert len(compare(moved, lost, ARCHIVE, archived=[TABLE, INDEX, dumped]).differences) == 1


def test_a_schema_of_the_snapshot_says_what_there_must_be() -> None:
    source = replace(SOURCE, schema_before=(TABLE, INDEX, VIEW), schema_in_snapshot=True)
    assert differences(with_schema(TABLE, INDEX), source) == (
        "view public.v: not found in the restored database",  # dropped since: the dump holds it all the same
    )
    assert differences(with_schema(TABLE, INDEX, VIEW), source) == ()
    came = replace(SOURCE, schema_after=(TABLE, INDEX, VIEW), schema_in_snapshot=True)
    assert differences(with_schema(TABLE, INDEX), came) == ()
    for source in (came, replace(SOURCE, schema_in_snapshot=True)):
        found = compare(source, with_schema(TABLE, INDEX, VIEW), ARCHIVE, archived=[TABLE, INDEX, VIEW])
        assert found.differences == ("view public.v: not in the source, found in the restored database",)


def test_a_schema_of_the_snapshot_may_be_written_in_three_ways() -> None:
    first, dumped, last, other = views(4)
    source = replace(
        SOURCE,
        schema_before=(TABLE, INDEX, first),
        schema_after=(TABLE, INDEX, last),
        schema_in_snapshot=True,
    )
    for view in (first, dumped, last):
        found = compare(source, with_schema(TABLE, INDEX, view), ARCHIVE, archived=[TABLE, INDEX, dumped])
        assert found.differences == ()
        assert verdict_of(found, "content") is Verdict.PROVEN
        noted = "view public.v was changed, and changed again, while the dump was taken" in str(found.notes)
        assert noted == (view is dumped)
    found = compare(source, with_schema(TABLE, INDEX, other), ARCHIVE, archived=[TABLE, INDEX, dumped])
    assert len(found.differences) == 1


def test_a_schema_that_was_not_read_again_is_as_the_dump_has_it() -> None:
    first, dumped, other = views(3)
    both = (TABLE, INDEX, first)
    unread = replace(SOURCE, schema_before=both, schema_after=both, schema_read_after=False)
    in_snapshot = replace(unread, schema_in_snapshot=True)
    for source in (unread, in_snapshot):
        same = compare(source, with_schema(*both), ARCHIVE)
        assert verdict_of(same, "content") is Verdict.PROVEN
        restored = with_schema(TABLE, INDEX, dumped)
        found = compare(source, restored, ARCHIVE, archived=[TABLE, INDEX, dumped])
        assert found.differences == ()
        assert verdict_of(found, "content") is Verdict.RESTORED
        assert found.notes[-1] == (
            "view public.v is not written as before the dump, and was not read again after it; "
            "it is restored as the dump has it"
        )
        assert len(compare(source, restored, ARCHIVE, archived=[TABLE, INDEX, other]).differences) == 1
    lost = compare(in_snapshot, with_schema(TABLE, INDEX), ARCHIVE, archived=[TABLE, INDEX])
    assert lost.differences == ("view public.v: not found in the restored database",)


def test_a_dump_does_not_speak_for_what_stood_still() -> None:
    other = replace(TABLE, body="CREATE TABLE public.runs (\n    id bigint\n);")
    restored = with_schema(other, INDEX)
    assert len(compare(SOURCE, restored, ARCHIVE, archived=[other, INDEX]).differences) == 1
    lost = with_schema(TABLE)
    assert len(compare(SOURCE, lost, ARCHIVE, archived=[TABLE]).differences) == 1


def test_a_schema_that_is_written_differently_the_second_time() -> None:
    anew = replace(VIEW, body="CREATE VIEW public.v AS\n SELECT (1);")
    source = replace(SOURCE, schema_before=(TABLE, INDEX, VIEW), schema_after=(TABLE, INDEX, VIEW))
    restored = with_schema(TABLE, INDEX, anew)
    assert schema_differs(source, restored)
    assert compare(source, restored, ARCHIVE, rendered=[TABLE, INDEX, anew]).differences == ()
    extra = with_schema(TABLE, INDEX, anew, anew)
    assert len(compare(source, extra, ARCHIVE, rendered=[TABLE, INDEX, anew]).differences) == 1


def test_what_changed_during_the_dump_may_be_written_differently_too() -> None:
    anew = replace(VIEW, body="CREATE VIEW public.v AS\n SELECT (1);")
    other = replace(VIEW, body="CREATE VIEW public.v AS\n SELECT 3;")
    restored = with_schema(TABLE, INDEX, anew)
    moved = replace(SOURCE, schema_before=(TABLE, INDEX, other))
    for source in (moved, SOURCE):  # it was changed and changed again, or came and went
        given: dict[str, Any] = {"archived": [TABLE, INDEX, VIEW], "archived_anew": [TABLE, INDEX, anew]}
        assert compare(source, restored, ARCHIVE, **given).differences == ()
        twice = with_schema(TABLE, INDEX, anew, anew)
        assert len(compare(source, twice, ARCHIVE, **given).differences) == 1
        given["archived_anew"] = [TABLE, INDEX, other]
        assert len(compare(source, restored, ARCHIVE, **given).differences) == 1
    still = replace(SOURCE, schema_before=(TABLE, INDEX, VIEW), schema_after=(TABLE, INDEX, VIEW))
    assert len(compare(still, restored, ARCHIVE, archived=[VIEW], archived_anew=[anew]).differences) == 1


def test_another_major_version_is_compared_by_name() -> None:
    other = replace(TABLE, body="CREATE TABLE public.runs (id integer);")
    restored = replace(with_schema(other, INDEX), server_version=180004)
    comparison = compare(SOURCE, restored, ARCHIVE)
    assert comparison.differences == ()
    assert comparison.notes[-1] == (
        "1 schema statement written differently by PostgreSQL 18 than by 17: compared by name only"
    )
    assert verdict_of(comparison, "content") is Verdict.RESTORED
    assert schema_differs(SOURCE, restored)
    anew = compare(SOURCE, restored, ARCHIVE, rendered=[other, INDEX])
    assert anew.notes == SOURCE.notes
    assert verdict_of(anew, "content") is Verdict.PROVEN
    assert len(compare(SOURCE, restored, ARCHIVE, rendered=[]).differences) == 1  # nothing could be replayed
    assert "2 schema statements equal" in anew.checked
    assert len(compare(SOURCE, restored, ARCHIVE, rendered=[TABLE, INDEX]).differences) == 1
    assert len(differences(replace(with_schema(TABLE), server_version=180004))) == 1


def test_a_fingerprint_without_schema_says_so() -> None:
    source = replace(SOURCE, client_version=0, schema_before=(), schema_after=())
    comparison = compare(source, RESTORED, ARCHIVE)
    assert comparison.notes[-1] == "the schema was not compared: it was not read on both sides"
    assert comparison.differences == ()
    empty = replace(source, client_version=170010)
    assert len(compare(empty, RESTORED, ARCHIVE).differences) == 2


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


def test_json_keeps_everything() -> None:
    strange = replace(SOURCE, schema_after=(VIEW,), notes=("\udcff", "é\n"), properties=None)
    unread = replace(SOURCE, schema_in_snapshot=True, schema_read_after=False)
    for fingerprint in (SOURCE, strange, unread):
        assert fingerprint_from_json(fingerprint_to_json(fingerprint), "k") == fingerprint


def test_json_holds_an_unchanged_schema_once() -> None:
    assert json.loads(fingerprint_to_json(SOURCE))["schema_after"] is None


def test_json_of_a_later_version() -> None:
    values = json.loads(fingerprint_to_json(SOURCE))
    values["colour"] = "blue"
    values["tables"][0]["weight"] = 3
    del values["newest"], values["extensions"]
    del values["schema_in_snapshot"], values["schema_read_after"]  # as an older version wrote it
    found = fingerprint_from_json(json.dumps(values).encode(), "k")
    assert found == replace(SOURCE, newest=(), extensions=())
    assert (found.schema_in_snapshot, found.schema_read_after) == (False, True)
    values["format"] = 2
    with pytest.raises(NotProvable, match="the fingerprint k was written by a newer version") as caught:
        fingerprint_from_json(json.dumps(values).encode(), "k")
    assert caught.value.hint == "Upgrade backup-pipeline here."


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["tables"], None),
        (["tables", 0, "rows"], "1"),
        (["tables", 0, "rows"], True),
        (["tables", 0], []),
        (["properties", "settings", 0], ["only one"]),
        (["large_objects", "groups"], {}),
        (["server_version"], 17.1),
        (["kind"], "manifest"),
        (["format"], None),
    ],
)
def test_json_of_another_form_is_refused(path: list[str | int], value: object) -> None:
    values = json.loads(fingerprint_to_json(SOURCE))
    place = values
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(Corrupt, match="the fingerprint k cannot be read"):
        fingerprint_from_json(json.dumps(values).encode(), "k")


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"kind": 1, "format": 1}'])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt, match="the fingerprint k cannot be read"):
        fingerprint_from_json(data, "k")


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
