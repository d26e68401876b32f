"""What a database contains, in one comparable value, and that value as JSON, both ways.

engines/postgres/fingerprint.py takes it, domain/proof.py compares two of them, and it lies in the store
beside the dump that was taken from the same snapshot. Nothing in it depends on which server holds the
database: no OIDs but those of large objects, names as text, sets in the order of their names.
"""

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from backup_pipeline.domain.backup import DatabaseProperties
from backup_pipeline.errors import Corrupt, NotProvable

KIND = "backup-pipeline fingerprint"
FORMAT = 1

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")

_GRANTS = ("ACL", "DEFAULT ACL")
_OWNER = re.compile(r'^ALTER [^;]* OWNER TO (?:"(?:[^"]|"")*"|[^";]*);\n*', re.MULTILINE)


@dataclass(frozen=True, order=True)
class Statement:
    """One entry of `pg_dump --schema-only`: an object's definition, its comment, or its grants."""

    kind: str  # as pg_dump names it: "TABLE", "FK CONSTRAINT", "ACL"
    schema: str  # "" for what lies in no schema
    name: str
    owner: str
    body: str

    @property
    def identity(self) -> tuple[str, str, str]:
        """What two statements share that describe the same thing."""
        return self.kind, self.schema, self.name

    def __str__(self) -> str:
        return f"{self.kind} {self.schema}.{self.name}" if self.schema else f"{self.kind} {self.name}"


@dataclass(frozen=True, order=True)
class TableContent:
    """The rows of one table itself, without its partitions and children.

    `digest` does not depend on the order of the rows or columns, and is empty where rows were only
    counted.
    """

    schema: str
    name: str
    rows: int
    digest: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, order=True)
class NewestValue:
    """The highest value of one date or time column of a critical table; None when it has none."""

    table: str
    column: str
    value: str | None


@dataclass(frozen=True, order=True)
class CriticalTable:
    """The rows of one critical table, those of its partitions and children among them."""

    table: str
    rows: int


@dataclass(frozen=True, order=True)
class LargeObjectGroup:
    """The large objects whose OIDs lie in [first_oid, first_oid + width) of the LargeObjects."""

    first_oid: int
    count: int
    size_bytes: int
    content: str  # digest of OIDs, sizes and bytes; empty where they were only counted
    rights: str  # digest of OIDs, owners, grants and comments


@dataclass(frozen=True)
class LargeObjects:
    """All large objects, in groups: one group each (`width` 1) until there are very many."""

    width: int = 1
    groups: tuple[LargeObjectGroup, ...] = ()

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(group.count for group in self.groups)

    @property
    def size_bytes(self) -> int:
        """Their sizes together."""
        return sum(group.size_bytes for group in self.groups)


@dataclass(frozen=True, order=True)
class SequenceValue:
    """Where a sequence stands: its next value is `last_value` itself unless that `is_called`."""

    schema: str
    name: str
    last_value: int
    is_called: bool


@dataclass(frozen=True)
class Fingerprint:
    """What a database contains. Sequences ignore snapshots, and how an object is rendered may change
    while the snapshot stands: both are taken before the dump and after it has read them.

    Older versions read the schema before the snapshot was taken: what `schema_before` holds may have
    changed until then.
    """

    server_version: int  # server_version_num
    client_version: int  # of the pg_dump that rendered the schema, in the same form; 0: none did
    tables: tuple[TableContent, ...]
    newest: tuple[NewestValue, ...] = ()
    critical: tuple[CriticalTable, ...] = ()
    large_objects: LargeObjects = LargeObjects()
    sequences_before: tuple[SequenceValue, ...] = ()
    sequences_after: tuple[SequenceValue, ...] = ()
    schema_before: tuple[Statement, ...] = ()
    schema_after: tuple[Statement, ...] = ()
    schema_in_snapshot: bool = False  # schema_before holds exactly what the snapshot does
    schema_read_after: bool = True  # false: it could not be, and schema_after repeats schema_before
    properties: DatabaseProperties | None = None
    extensions: tuple[tuple[str, str], ...] = ()  # (name, version)
    constraints: int = 0  # validated ones
    unvalidated: tuple[str, ...] = ()  # constraints marked NOT VALID
    indexes: int = 0  # valid ones
    invalid_indexes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what is not in here, in plain words

    @property
    def critical_tables(self) -> tuple[str, ...]:
        """Their names; `critical` is missing from what older versions wrote."""
        named = (*(item.table for item in self.critical), *(item.table for item in self.newest))
        return tuple(dict.fromkeys(named))

    @property
    def rows(self) -> int:
        """The rows of all tables."""
        return sum(table.rows for table in self.tables)

    @property
    def has_contents(self) -> bool:
        """Whether rows were hashed; false when they were only counted."""
        digests = [
            *(each.digest for each in self.tables),
            *(each.content for each in self.large_objects.groups),
        ]
        return all(digests)


def without_owners(fingerprint: Fingerprint) -> Fingerprint:
    """The same as far as a restore brings it that leaves out owners and grants."""
    objects = fingerprint.large_objects
    return replace(
        fingerprint,
        schema_before=statements_without_owners(fingerprint.schema_before),
        schema_after=statements_without_owners(fingerprint.schema_after),
        large_objects=replace(objects, groups=tuple(replace(group, rights="") for group in objects.groups)),
        properties=None,
    )


def statements_without_owners(statements: Iterable[Statement]) -> tuple[Statement, ...]:
    """The same without grants, and without what says whom an object belongs to."""
    return tuple(
        replace(statement, owner="", body=_OWNER.sub("", statement.body).rstrip())
        for statement in statements
        if statement.kind not in _GRANTS
    )


def fingerprint_to_json(fingerprint: Fingerprint) -> bytes:
    """The fingerprint for fingerprint_from_json. Equal fingerprints make equal bytes."""
    values: dict[str, object] = {"kind": KIND, "format": FORMAT, **asdict(fingerprint)}
    if fingerprint.schema_after == fingerprint.schema_before:
        values["schema_after"] = None
    return json.dumps(values, indent=1, allow_nan=False).encode() + b"\n"


def fingerprint_from_json(data: bytes, key: str) -> Fingerprint:
    """The fingerprint that lies at `key`; fields that are not known here are skipped.

    Raises Corrupt; NotProvable when a newer version wrote it.
    """
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise ValueError("it is not a fingerprint")
        form = values.get("format")
        if type(form) is int and form > FORMAT:
            raise NotProvable(
                f"the fingerprint {key} was written by a newer version: form {form}, known is {FORMAT}",
                detail={"key": key},
                hint="Upgrade backup-pipeline here.",
            )
        if form != FORMAT:
            raise ValueError(f"its form is {form}, known is {FORMAT}")
        if values.get("schema_after", ()) is None:
            values["schema_after"] = values.get("schema_before")
        return _read_dataclass(Fingerprint, values, "it")
    except (ValueError, RecursionError) as error:  # of decoding, of JSON, or ours
        raise Corrupt(
            f"the fingerprint {key} cannot be read: {error}",
            detail={"key": key},
            hint="The backup can still be restored with --check none, and cannot be proven; take another.",
        ) from error


def _read(wanted: Any, value: object, path: str) -> object:
    """`value`, of JSON, as the type `wanted`: a dataclass, a tuple, an optional, or a scalar."""
    if is_dataclass(wanted) and isinstance(wanted, type):
        return _read_dataclass(wanted, value, path)
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        return None if value is None else _read(inner[0], value, path)
    if origin is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            return tuple(_read(inner[0], item, f"{path}[{number}]") for number, item in enumerate(value))
        if len(inner) == len(value):
            return tuple(_read(kind, item, path) for kind, item in zip(inner, value, strict=True))
    if isinstance(wanted, type) and type(value) is wanted:
        return value
    raise ValueError(f"{path} is not of the expected form")


def _read_dataclass(wanted: type[_T], value: object, path: str) -> _T:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} is not an object")
    hints = typing.get_type_hints(wanted)
    found = {}
    for field in fields(wanted):
        if field.name in value:
            found[field.name] = _read(hints[field.name], value[field.name], f"{path}.{field.name}")
        elif field.default is MISSING:
            raise ValueError(f"{path}.{field.name} is missing")
    return wanted(**found)
