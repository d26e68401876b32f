"""How a database that a restore is building is told from every other: by its name, and by a mark in it.

The name alone is no proof: anybody may choose such a one. What bears no mark is never dropped.
"""

import re

MARK = "backup-pipeline is restoring this database; without a restore at work it may be dropped"
"""Begins the comment of an unfinished database; the comment that it is to have in the end follows."""

MARKING_LIMIT = 1_918_989_171
"""The connection limit with which such a database is created: no kill comes between it and the mark."""

NAME_INFIX = ".restoring-"
TOKEN_BYTES = 4
_TEMPORARY = re.compile(rf".+{re.escape(NAME_INFIX)}[0-9a-f]{{{2 * TOKEN_BYTES}}}", re.DOTALL)


def is_temporary(name: str) -> bool:
    """Whether a database of this name may be one that a restore was building."""
    return _TEMPORARY.fullmatch(name) is not None


def marked(comment: str | None) -> str:
    """The comment that a database bears while it is built, of the one that it is to have."""
    return MARK if comment is None else f"{MARK}\n{comment}"


def is_marked(comment: str | None) -> bool:
    """Whether a database of this comment is unfinished."""
    return comment is not None and (comment == MARK or comment.startswith(f"{MARK}\n"))


def unmarked(comment: str | None) -> str | None:
    """The comment that a database is to have in the end."""
    if comment is None or not is_marked(comment):
        return comment
    return comment[len(MARK) + 1 :] if comment != MARK else None
