"""The names of kept copies: they fit, are told from others, and the newest is known."""

from datetime import timedelta

import pytest

from backup_pipeline.domain.names import NAME_BYTES
from backup_pipeline.engines.postgres.swap import (
    CopyKind,
    DatabaseCopy,
    choose_copy,
    copies_of,
    copy_name,
    read_copy,
)
from backup_pipeline.errors import BackupNotFound, Refused
from backup_pipeline_tests.engines.pairs import AT


@pytest.mark.parametrize("live", ["app", "a" * 63, "é" * 31, "x" * 39, "x" * 40, "日本" * 10, "a\n=b'"])
@pytest.mark.parametrize("kind", CopyKind)
def test_a_copy_s_name_fits_needs_no_quotes_and_reads_back(live: str, kind: CopyKind) -> None:
    name = copy_name(live, kind, AT)
    assert len(name.encode()) <= NAME_BYTES
    assert name.endswith(f"_{kind}_20260301t020000z")
    assert read_copy(name, live) == DatabaseCopy(name, kind, AT)


def test_long_names_that_begin_alike_keep_apart() -> None:
    one, other = "a" * 50 + "1", "a" * 50 + "2"
    name = copy_name(one, CopyKind.BEFORE, AT)
    assert name != copy_name(other, CopyKind.BEFORE, AT)
    assert read_copy(name, other) is None


@pytest.mark.parametrize(
    "name",
    [
        "app",
        "app_before_20261301t020000z",
        "app_before_20260301t020000z_x",
        "app_before_20260301t020000z_1",
        "app_after_20260301t020000z",
        "xapp_before_20260301t020000z",
    ],
)
def test_other_names_are_no_copies(name: str) -> None:
    assert read_copy(name, "app") is None


def test_a_name_of_the_older_form_is_still_read() -> None:
    copy = read_copy("app_before_20260301T020000Z", "app")
    assert copy == DatabaseCopy("app_before_20260301T020000Z", CopyKind.BEFORE, AT)


def test_copies_of_one_second_are_numbered() -> None:
    names: list[str] = []
    for _ in range(11):
        names.append(copy_name("a" * 60, CopyKind.BEFORE, AT, names))
    assert names[1].endswith("_before_20260301t020000z_2")
    assert len(set(names)) == 11
    assert [copy.name for copy in copies_of("a" * 60, names)] == names[::-1]


def test_the_newest_copy_of_one_second_is_known_whatever_the_kinds() -> None:
    before = copy_name("app", CopyKind.BEFORE, AT)
    undone = copy_name("app", CopyKind.UNDONE, AT, [before])  # the undo took `before` away: it is live again
    again = copy_name("app", CopyKind.BEFORE, AT + timedelta(milliseconds=900), [undone])
    assert choose_copy("app", copies_of("app", [undone, again])).name == again


def test_the_newest_copy_is_known_whatever_clocks_their_makers_have() -> None:
    ahead = copy_name("app", CopyKind.BEFORE, AT + timedelta(hours=2))
    late = copy_name("app", CopyKind.BEFORE, AT, [ahead])
    assert late == f"{ahead}_2"
    assert choose_copy("app", copies_of("app", [ahead, late])).name == late
    undone = copy_name("app", CopyKind.UNDONE, AT, [ahead])  # the undo took `late` away
    with pytest.raises(Refused, match="undone already"):
        choose_copy("app", copies_of("app", [ahead, undone]))


def copies(*kinds: CopyKind) -> tuple[DatabaseCopy, ...]:
    """Copies of these kinds, newest first."""
    ages = [AT - timedelta(days=number) for number in range(len(kinds))]
    names = [copy_name("app", kind, at) for kind, at in zip(kinds, ages, strict=True)]
    return copies_of("app", names)


def test_an_undo_takes_the_newest_kept_copy_whatever_else_there_is() -> None:
    finished, newest, _older = found = copies(CopyKind.FINISHED, CopyKind.BEFORE, CopyKind.BEFORE)
    assert choose_copy("app", found) == newest
    assert choose_copy("app", found, finished.name) == finished


def test_an_undo_is_not_repeated_by_itself() -> None:
    undone, older = found = copies(CopyKind.UNDONE, CopyKind.BEFORE)
    with pytest.raises(Refused, match="the last swap of app was undone already, at 2026-03-01T02") as caught:
        choose_copy("app", found)
    assert undone.name in caught.value.hint
    assert older.name in caught.value.hint
    assert choose_copy("app", found, older.name) == older
    assert choose_copy("app", found, undone.name) == undone


@pytest.mark.parametrize("named", ["", "app", "app_before_20200101t000000z", "other"])
def test_what_is_no_copy_is_not_swapped_in(named: str) -> None:
    found = copies(CopyKind.UNDONE, CopyKind.FINISHED)
    with pytest.raises(BackupNotFound) as caught:
        choose_copy("app", found, named)
    assert found[0].name in str(caught.value)
