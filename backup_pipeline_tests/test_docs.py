"""What the documents quote, the code says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
RESTORE = (CHECKOUT / "docs" / "restore.md").read_text(encoding="utf-8")
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
