"""Errors as they are shown: names that people chose may hold anything, a terminal must not obey it."""

import pytest

from backup_pipeline.errors import BackupError, Refused

EVIL = "no\x1b[2Jsuch\nHINT: run rm -rf /\r\u202e\udc80"


def test_an_error_is_a_line_then_its_facts_then_what_to_do() -> None:
    error = Refused("target exists", detail={"rows": 3, "server": "db1"}, hint="Choose another name.")
    assert str(error) == "target exists\n  rows: 3\n  server: db1\nHINT: Choose another name."


@pytest.mark.parametrize("error", [BackupError(EVIL), Refused("x", hint=EVIL), Refused(EVIL, hint=EVIL)])
def test_a_message_and_a_hint_are_one_line_each_and_hold_no_control_characters(error: BackupError) -> None:
    for text in (error.message, error.hint):
        assert text.isprintable()
    assert str(error).count("\n") == (1 if error.hint else 0)


def test_facts_of_several_lines_are_set_in_and_cannot_pass_for_ours() -> None:
    error = Refused("x", detail={"stderr": f"first\n    second {EVIL}", EVIL: 1})
    lines = str(error).split("\n")
    assert lines[1] == "  stderr: first"
    assert lines[2].startswith("    second no\ufffd[2Jsuch")
    assert lines[3].startswith("    HINT: run rm")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 5
    assert "\x1b" not in str(error.detail["stderr"])
