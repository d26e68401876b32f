"""Whether a restored database equals its source: fingerprints in, differences and a verdict out. Pure.

Called by the action that proves a backup. Each difference is one line for a tired person: what it is
of, what was expected, what was found.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from backup_pipeline.domain.backup import DatabaseProperties, Verdict
from backup_pipeline.domain.findings import Findings, share
from backup_pipeline.domain.fingerprint import Fingerprint, LargeObjectGroup, Statement, TableContent
from backup_pipeline.domain.proof_schema import compare_schema
from backup_pipeline.units import show_bytes, show_count, show_line

ArchiveSequences = Mapping[tuple[str, str], tuple[int, bool]]
"""(schema, name) to (last_value, is_called), as the dump itself sets them."""

MAX_DIFFERENCES = 100
"""More are counted, not listed: a verdict is a small record."""

_SHOWN_CHARACTERS = 160
_CYCLES = re.compile(r"^ +CYCLE;?$", re.MULTILINE)  # as pg_dump writes it, of identities too
# A restore takes these from where it restores to; the name is the operator's choice.
_PLACEMENT = ("name", "tablespace", "allow_connections", "is_template")


@dataclass(frozen=True)
class Comparison:
    """What was found equal, each as a sentence with numbers; what was not; what cannot be compared.

    `contents` says that rows were compared, not only counted; `whole`, that all else of the source was.
    """

    differences: tuple[str, ...]
    checked: tuple[str, ...]
    notes: tuple[str, ...]
    contents: bool = True
    whole: bool = True


def compare(
    source: Fingerprint,
    restored: Fingerprint,
    archive_sequences: ArchiveSequences,
    *,
    rendered: Iterable[Statement] | None = None,
    archived: Iterable[Statement] = (),
    archived_anew: Iterable[Statement] = (),
) -> Comparison:
    """Hold a restored database's fingerprint against its source's.

    `archive_sequences` is what the dump sets sequences to: they ignore snapshots, so the source's
    own values only bound them. `rendered` is the source's schema, of before and of after, as a server
    renders it after having read it once: PostgreSQL writes some expressions differently the second time.
    `archived` is the schema as the dump itself holds it, which speaks for what changed while the dump was
    taken, and `archived_anew` that one rendered. engines/postgres/schema.py makes them all; without
    differences in the schema they are not needed.
    """
    findings = Findings()
    _compare_tables(source, restored, findings)
    _compare_critical(source, restored, findings)
    _compare_newest(source, restored, findings)
    _compare_large_objects(source, restored, findings)
    _compare_sequences(source, restored, archive_sequences, findings)
    compare_schema(
        source, restored, findings, rendered=rendered, archived=archived, archived_anew=archived_anew
    )
    _compare_validity(source, restored, findings)
    _compare_extensions(source, restored, findings)
    _compare_properties(source.properties, restored.properties, findings)
    found = [show_line(line) for line in findings.differences]
    if len(found) > MAX_DIFFERENCES:
        found = [*found[:MAX_DIFFERENCES], f"and {len(found) - MAX_DIFFERENCES:,} more differences"]
    notes = dict.fromkeys(show_line(line) for line in (*source.notes, *findings.notes))
    checked = tuple(show_line(line) for line in findings.checked)
    contents = source.has_contents and restored.has_contents
    return Comparison(tuple(found), checked, tuple(notes), contents, findings.whole)


def verdict_of(comparison: Comparison, mode: str) -> Verdict:
    """FAILED with any difference; PROVEN when contents were to be compared ("content") and they and all
    else were; else RESTORED.
    """
    if comparison.differences:
        return Verdict.FAILED
    proven = mode == "content" and comparison.contents and comparison.whole
    return Verdict.PROVEN if proven else Verdict.RESTORED


def schema_differs(source: Fingerprint, restored: Fingerprint) -> bool:
    """Whether `compare` needs `rendered`, `archived` and `archived_anew`: it cannot do without them here."""
    return not compare_schema(source, restored, Findings())


def _compare_tables(source: Fingerprint, restored: Fingerprint, findings: Findings) -> None:
    expected = {(table.schema, table.name): table for table in source.tables}
    found = {(table.schema, table.name): table for table in restored.tables}
    equal: list[TableContent] = []
    for key, table in expected.items():
        if key not in found:
            findings.differences.append(
                f"table {table}: expected {table.rows:,} rows, found no such table in the restored database"
            )
        elif difference := _table_difference(table, found[key]):
            findings.differences.append(f"table {table}: {difference}")
        else:
            equal.append(table)
    for key in found.keys() - expected.keys():
        findings.differences.append(f"table {found[key]}: not in the source, found in the restored database")
    hashed = source.has_contents and restored.has_contents
    how = "equal row for row" if hashed else "with equal numbers of rows; their contents were not compared"
    findings.checked.append(
        f"{share(len(equal), len(expected), 'table')}, {sum(table.rows for table in equal):,} rows {how}"
    )


def _table_difference(expected: TableContent, found: TableContent) -> str:
    if expected.rows != found.rows:
        return f"expected {expected.rows:,} rows, found {found.rows:,}"
    if expected.digest and found.digest and expected.digest != found.digest:
        return f"{found.rows:,} rows as expected, but their content differs"
    return ""


def _compare_critical(source: Fingerprint, restored: Fingerprint, findings: Findings) -> None:
    """Say how many rows each has; where they differ, the tables' own comparison has said so."""
    found = {item.table: item.rows for item in restored.critical}
    for item in source.critical:
        if found.get(item.table) == item.rows:
            findings.checked.append(f"critical table {item.table}: {show_count(item.rows, 'row')}")
        if not item.rows:
            findings.notes.append(f"critical table {item.table} was empty in the source: is that meant?")


def _compare_newest(source: Fingerprint, restored: Fingerprint, findings: Findings) -> None:
    found = {(item.table, item.column): item.value for item in restored.newest}
    for item in source.newest:
        value = found.get((item.table, item.column), item.value)  # not asked for: the rows' digest holds it
        if value == item.value:
            findings.checked.append(f"newest data: {item.table}.{item.column} {value or 'none'}")
        else:
            findings.differences.append(
                f"newest {item.table}.{item.column}: expected {item.value or 'none'}, found {value or 'none'}"
            )


def _compare_large_objects(source: Fingerprint, restored: Fingerprint, findings: Findings) -> None:
    expected, found = source.large_objects, restored.large_objects
    before = len(findings.differences)
    if expected.width != found.width:
        findings.differences.append(
            f"large objects: expected {expected.count:,} ({show_bytes(expected.size_bytes)}), "
            f"found {found.count:,} ({show_bytes(found.size_bytes)})"
        )
    else:
        theirs = {group.first_oid: group for group in found.groups}
        ours = {group.first_oid: group for group in expected.groups}
        for oid in sorted(ours.keys() | theirs.keys()):
            if difference := _large_object_difference(ours.get(oid), theirs.get(oid)):
                title = f"large object {oid}" if expected.width == 1 else _range(oid, expected.width)
                findings.differences.append(f"{title}: {difference}")
    if expected.count and len(findings.differences) == before:
        hashed = all(group.content for group in (*expected.groups, *found.groups))
        how = "equal byte for byte" if hashed else "of equal sizes; their contents were not compared"
        findings.checked.append(
            f"{show_count(expected.count, 'large object')}, {show_bytes(expected.size_bytes)} {how}, "
            "with their owners and grants"
        )


def _large_object_difference(expected: LargeObjectGroup | None, found: LargeObjectGroup | None) -> str:
    if expected is None:
        return "not in the source, found in the restored database"
    if found is None:
        return f"expected {show_bytes(expected.size_bytes)}, found none"
    if (expected.count, expected.size_bytes) != (found.count, found.size_bytes):
        count = "" if expected.count == found.count == 1 else f"{expected.count:,} with "
        other = "" if expected.count == found.count == 1 else f"{found.count:,} with "
        return f"expected {count}{expected.size_bytes:,} bytes, found {other}{found.size_bytes:,}"
    if expected.content and found.content and expected.content != found.content:
        return f"{found.size_bytes:,} bytes as expected, but their content differs"
    if expected.rights != found.rights:
        return "its owner, grants or comment differ"
    return ""


def _compare_sequences(
    source: Fingerprint, restored: Fingerprint, archive: ArchiveSequences, findings: Findings
) -> None:
    before, after, found = (
        {(item.schema, item.name): (item.last_value, item.is_called) for item in items}
        for items in (source.sequences_before, source.sequences_after, restored.sequences_before)
    )
    cycling = _cycling_sequences(source)
    equal = gone = 0
    for key in sorted(before.keys() | after.keys() | found.keys()):
        name = ".".join(key)
        bounds = [values[key] for values in (before, after) if key in values]
        expected = archive.get(key)
        if key not in found and len(bounds) == 1 and expected is None:
            gone += 1  # created or dropped while the dump was taken
        elif key not in found:
            findings.differences.append(f"sequence {name}: not found in the restored database")
        elif not bounds:
            findings.differences.append(f"sequence {name}: not in the source, found in the restored database")
        elif expected is None:
            findings.differences.append(f"sequence {name}: the dump does not set it")
        elif expected != found[key]:
            findings.differences.append(
                f"sequence {name}: expected {_position(expected)} as the dump sets it, "
                f"found {_position(found[key])}"
            )
        else:
            equal += 1
            if len(set(bounds)) == 1 and len(bounds) == 2 and expected != bounds[0] and key not in cycling:
                findings.whole = False
                findings.notes.append(
                    f"sequence {name} stood at {_position(bounds[0])} before and after the dump was taken, "
                    f"and at {_position(expected)} in the dump: nothing tells if it was set there and back"
                )
            elif not min(bounds) <= expected <= max(bounds):
                findings.notes.append(f"sequence {name} {_moved(bounds, expected, cycles=key in cycling)}")
    total = len(before.keys() | after.keys()) - gone
    if total:
        findings.checked.append(f"{share(equal, total, 'sequence')} where the dump set them")


def _cycling_sequences(source: Fingerprint) -> frozenset[tuple[str, str]]:
    statements = (*source.schema_before, *source.schema_after)
    return frozenset(
        (each.schema, each.name)
        for each in statements
        if each.kind == "SEQUENCE" and _CYCLES.search(each.body)
    )


def _moved(bounds: list[tuple[int, bool]], expected: tuple[int, bool], *, cycles: bool) -> str:
    before, after = map(_position, (bounds[0], bounds[-1]))
    if cycles and before == after:
        stood = f"cycles: it stood at {before} before and after the dump was taken, and"
    elif cycles:
        stood = f"cycles: it stood at {before} before the dump was taken and at {after} after it,"
    else:
        stood = f"was set anew while the dump was taken: it stood at {before} before and {after} after,"
    return f"{stood} at {_position(expected)} in the dump"


def _position(value: tuple[int, bool]) -> str:
    return f"{value[0]:,}" if value[1] else f"{value[0]:,} (not used yet)"


def _compare_validity(source: Fingerprint, restored: Fingerprint, findings: Findings) -> None:
    before = len(findings.differences)
    for name in sorted(set(restored.unvalidated) - set(source.unvalidated)):
        findings.differences.append(f"constraint {name}: expected to be validated, found NOT VALID")
    for name in sorted(set(restored.invalid_indexes) - set(source.invalid_indexes)):
        findings.differences.append(f"index {name}: expected to be valid, found INVALID")
    if len(findings.differences) == before:
        findings.checked.append(
            f"{show_count(restored.constraints, 'constraint')} and "
            f"{show_count(restored.indexes, 'index', 'indexes')} valid"
        )


def _compare_extensions(source: Fingerprint, restored: Fingerprint, findings: Findings) -> None:
    found = dict(restored.extensions)
    for name, version in source.extensions:
        if name not in found:
            findings.differences.append(f"extension {name}: not found in the restored database")
        elif found[name] != version:
            findings.notes.append(f"extension {name} is {version} in the source, {found[name]} here")
    if source.extensions:
        present = [name for name, _ in source.extensions if name in found]
        findings.checked.append(
            f"{share(len(present), len(source.extensions), 'extension')} present: {', '.join(present)}"
        )


def _compare_properties(
    expected: DatabaseProperties | None, found: DatabaseProperties | None, findings: Findings
) -> None:
    if expected is None or found is None:
        findings.notes.append("the database's owner, settings and grants were not compared")
        return
    before = len(findings.differences)
    for name in (item.name for item in fields(DatabaseProperties)):
        if name in (*_PLACEMENT, "settings") or getattr(expected, name) == getattr(found, name):
            continue
        findings.differences.append(
            f"the database's {name.replace('_', ' ')}: expected {_shown(getattr(expected, name))}, "
            f"found {_shown(getattr(found, name))}"
        )
    _compare_settings(expected.settings, found.settings, findings)
    if len(findings.differences) == before:
        owner, grants = ("owner, ", " and grants") if expected.owner else ("", "")
        findings.checked.append(
            f"the database's {owner}encoding, locale, comment, connection limit, "
            f"{show_count(len(expected.settings), 'setting')}{grants} equal"
        )


def _compare_settings(
    expected: Iterable[tuple[str, str]], found: Iterable[tuple[str, str]], findings: Findings
) -> None:
    """Name what differs; values stay out of it, which may be secrets."""
    ours, theirs = (
        {(role, text.partition("=")[0]): text for role, text in each} for each in (expected, found)
    )
    for role, name in sorted(ours.keys() | theirs.keys()):
        setting = f"the database's setting {name}{role and f' of role {role}'}"
        if (role, name) not in theirs:
            findings.differences.append(f"{setting}: not found in the restored database")
        elif (role, name) not in ours:
            findings.differences.append(f"{setting}: not in the source, found in the restored database")
        elif ours[role, name] != theirs[role, name]:
            findings.differences.append(f"{setting}: its value differs")


def _shown(value: object) -> str:
    if value is None or value in ("", ()):
        return "none"
    return str(value) if len(str(value)) <= _SHOWN_CHARACTERS else f"{str(value)[:_SHOWN_CHARACTERS]}…"


def _range(oid: int, width: int) -> str:
    return f"large objects {oid} to {oid + width - 1}"
