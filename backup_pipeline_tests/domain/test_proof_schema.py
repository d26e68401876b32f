"""Schemas against each other: also one that changed during the dump, or is written in another way."""

from dataclasses import replace
from typing import Any

import pytest

from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.fingerprint import (
    Statement,
)
from backup_pipeline.domain.proof import compare, schema_differs, verdict_of
from backup_pipeline_tests.domain.fingerprints import (
    ARCHIVE,
    INDEX,
    RESTORED,
    SOURCE,
    TABLE,
    VIEW,
    differences,
    with_schema,
)


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
