"""What the documents quote, the code says."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from backup_pipeline.cli import cli
from backup_pipeline.errors import EXIT_CODES

CHECKOUT = Path(__file__).parents[1]
RESTORE = (CHECKOUT / "docs" / "restore.md").read_text(encoding="utf-8")
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
PAGES = (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md")))
REFUSALS = re.findall(r"^\| (`.*?) \|", RESTORE.partition("## When it refuses")[2], re.MULTILINE)


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts of a module, with … for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.fixture(scope="module")
def said() -> str:
    sources = (CHECKOUT / "backup_pipeline").rglob("*.py")
    return "\n".join(text for path in sources for text in texts(ast.parse(path.read_text(encoding="utf-8"))))


def test_there_are_refusals_to_look_up() -> None:
    assert len(REFUSALS) > 5


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_that_the_restore_page_explains_is_one_of_ours(said: str, refusal: str) -> None:
    for quoted in re.findall(r"`([^`]+)`", refusal):
        for piece in filter(None, map(str.strip, re.split(r"…|: ", quoted))):
            assert piece in said


# --- the command line ----------------------------------------------------------------------


def commands(text: str) -> Iterator[str]:
    """The whole commands that a page tells: in blocks, and in code within a line."""
    joined = text.replace("\\\n", " ")
    yield from re.findall(r"^    [^#\n]*?\bbackup-pipeline ([a-z-].*)$", joined, re.MULTILINE)
    yield from re.findall(r"`backup-pipeline ([^`]+)`", joined)


def parsed(words: list[str]) -> str:
    """The command that these words name, once all of them are understood. Nothing is run."""
    context = click.Context(cli, info_name="backup-pipeline")
    name, *rest = cli.make_parser(context).parse_args(words)[1]
    command = cli.commands[name]
    command.make_context(name, rest, parent=context)
    return name


def options(name: str) -> set[str]:
    return {word for parameter in cli.commands[name].params for word in parameter.opts if word[:2] == "--"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_tells_is_understood(page: Path) -> None:
    for told in commands(page.read_text(encoding="utf-8")):
        try:
            parsed(shlex.split(told, comments=True))
        except (click.UsageError, KeyError) as error:
            pytest.fail(f"backup-pipeline {told}: {error}")


def test_the_readme_and_the_restore_page_do_tell_commands() -> None:
    assert {parsed(shlex.split(told, comments=True)) for told in commands(README)} >= {
        "init",
        "check",
        "undo",
    }
    assert len(list(commands(RESTORE))) > 5


def test_the_readme_s_table_is_the_command_line() -> None:
    table = README.partition("## The command line")[2].partition("Exit codes:")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    told = [re.sub(r"[\[\]]", "", told) for cell in cells for told in re.findall(r"`([^`]+)`", cell)]
    assert sorted(parsed(shlex.split(words)) for words in told) == sorted(cli.commands)
    without = {name for name in cli.commands if "--json" not in options(name)}
    (sentence,) = (line for line in table.splitlines() if line.startswith("`--json`"))
    assert set(re.findall(r"`([a-z]+)`", sentence)) == without


def test_the_readme_s_exit_codes_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", README.partition("Exit codes:")[2], re.MULTILINE)
    assert [(int(code), meaning) for code, meaning in rows] == list(EXIT_CODES)
