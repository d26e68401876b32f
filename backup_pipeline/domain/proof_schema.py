"""Whether a restored schema equals its source's, statement by statement. Pure.

Called by proof.py, whose `compare` says what the statements are.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import zip_longest

from backup_pipeline.domain.findings import Findings, share
from backup_pipeline.domain.fingerprint import Fingerprint, Statement
from backup_pipeline.units import show_count

_SHOWN_CHARACTERS = 160

# Texts as pg_dump and the server write them, with doubled quotes; and where a quote begins none.
_QUOTED = re.compile(
    r"""--[^\n]*|"[^"]*"|(?P<apostrophe>')(?:[^']++|'')*+(?:'|\Z)"""
    r"""|(?P<dollar>(?<![\w$])\$(?:[A-Za-z_\x80-\U0010ffff]\w*)?\$).*?(?:(?P=dollar)|\Z)""",
    re.DOTALL,
)


def compare_schema(
    source: Fingerprint,
    restored: Fingerprint,
    findings: Findings,
    *,
    rendered: Iterable[Statement] | None = None,
    archived: Iterable[Statement] = (),
    archived_anew: Iterable[Statement] = (),
) -> bool:
    """Write down what differs; return whether every statement is equal.

    A restored statement equals the source's of before or after the dump, or its rendering; or the dump's
    own, or that one's rendering, where the source's two differ or know nothing of it. Which statements
    there must be, the reading in the snapshot says, where there is one. Between versions
    that may write statements differently, only names are compared unless there is a rendering, though it
    be empty.
    """
    if not source.client_version or not restored.client_version:
        findings.notes.append("the schema was not compared: it was not read on both sides")
        findings.whole = False
        return True
    before, after, found, anew, dumped, dumped_anew = (
        _by_identity(items)
        for items in (
            source.schema_before,
            source.schema_after,
            restored.schema_before,
            rendered or (),
            archived,
            archived_anew,
        )
    )
    majors = {source.server_version // 10000, restored.server_version // 10000}
    clients = {source.client_version // 10000, restored.client_version // 10000}
    comparable = rendered is not None or len(majors) == len(clients) == 1
    equal = total = 0
    for key in sorted(before.keys() | after.keys() | found.keys()):
        seen, bodies = (before[key], after[key]), found[key]
        still = source.schema_read_after and any(seen) and Counter(seen[0]) == Counter(seen[1])
        moved = [] if still else dumped[key]
        counts = {len(each) for each in (*seen, *filter(None, [moved]))}
        if source.schema_in_snapshot:
            counts = {len(seen[0])}
        total += max(min(counts), min(len(bodies), max(counts)))
        steady = Counter(seen[0]) | Counter(seen[1]) | Counter(anew[key])
        acceptable = steady | Counter(moved) | Counter(dumped_anew[key] if moved else [])
        strange = list((Counter(bodies) - acceptable).elements())
        if len(bodies) > max(counts):
            findings.differences.append(f"{_title(key)}: not in the source, found in the restored database")
        elif len(bodies) < min(counts):
            findings.differences.append(f"{_title(key)}: not found in the restored database")
        elif strange and comparable:
            wanted = next(iter((acceptable - Counter(bodies)).elements()), "")
            findings.differences.append(f"{_title(key)}: {_first_difference(wanted, strange[0])}")
        elif not strange:
            equal += len(bodies)
            if Counter(bodies) - steady:
                findings.notes.append(f"{_title(key)} {_moved(source)}; it is restored as the dump has it")
                findings.whole &= source.schema_read_after
    findings.checked.append(f"{share(equal, total, 'schema statement')} equal")
    if not comparable and equal < total:
        findings.whole = False
        findings.notes.append(
            f"{show_count(total - equal, 'schema statement')} written differently by PostgreSQL "
            f"{max(majors | clients)} than by {min(majors | clients)}: compared by name only"
        )
    return equal == total and not findings.differences


def _by_identity(statements: Iterable[Statement]) -> defaultdict[tuple[str, str, str], list[str]]:
    bodies: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for statement in statements:
        bodies[statement.identity].append(statement.body)
    return bodies


def _moved(source: Fingerprint) -> str:
    if not source.schema_read_after:
        return "is not written as before the dump, and was not read again after it"
    if source.schema_in_snapshot:
        return "was changed, and changed again, while the dump was taken"
    return "was changed just before the dump and again during it"


def _title(identity: tuple[str, str, str]) -> str:
    kind, schema, name = identity
    return f"{kind.lower()} {schema}.{name}" if schema else f"{kind.lower()} {name}"


def _first_difference(expected: str, found: str) -> str:
    """The first lines that one has and the other lacks, without what is quoted: it may be a secret."""
    ours, theirs = (
        [line for line in _QUOTED.sub(_without_text, text).splitlines() if line.strip()]
        for text in (expected, found)
    )
    missing = list((Counter(ours) - Counter(theirs)).elements())
    extra = list((Counter(theirs) - Counter(ours)).elements())
    if missing or extra:
        return f"expected {_shown(missing)}, found {_shown(extra)}"
    if ours != theirs:
        return "the same lines in another order"
    pairs = zip_longest(expected.split("\n"), found.split("\n"))
    number = next(number for number, (line, other) in enumerate(pairs, 1) if line != other)
    return f"line {number} differs, within quotes"


def _without_text(quoted: re.Match[str]) -> str:
    mark = quoted["dollar"] or quoted["apostrophe"]
    return f"{mark}…{mark}" if mark else quoted[0]


def _shown(lines: list[str]) -> str:
    if not lines:
        return "no such line"
    text = " ".join(lines[0].split())
    return f"`{text[:_SHOWN_CHARACTERS]}…`" if len(text) > _SHOWN_CHARACTERS else f"`{text}`"
