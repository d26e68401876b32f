"""How unfinished databases are told from others."""

import pytest

from backup_pipeline.domain.unfinished import MARK, is_marked, is_temporary, marked, unmarked


@pytest.mark.parametrize("comment", [None, "", "what the shop lives on", "\n", MARK])
def test_a_mark_comes_and_goes_with_the_comment_kept(comment: str | None) -> None:
    assert is_marked(marked(comment))
    assert unmarked(marked(comment)) == comment


@pytest.mark.parametrize("comment", [None, "", "a comment", f"{MARK}, it says", f" {MARK}"])
def test_what_bears_no_mark_stays_as_it_is(comment: str | None) -> None:
    assert not is_marked(comment)
    assert unmarked(comment) == comment


@pytest.mark.parametrize(
    ("name", "temporary"),
    [
        ("app.restoring-0123abcd", True),
        ("a\nb.restoring-0123abcd", True),
        ("app", False),
        ("app.restoring-0123abc", False),
        ("app.restoring-0123ABCD", False),
        (".restoring-0123abcd", False),
    ],
)
def test_names_of_unfinished_databases(name: str, temporary: bool) -> None:
    assert is_temporary(name) is temporary
