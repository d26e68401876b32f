"""The one form of every record that we keep as JSON: versioned, sealed, strict about types.

domain/manifest.py says what each record holds; this module knows only the form:

    {
      "kind": "backup-pipeline manifest",
      "version": 1,
      "requires": [],
      ...
      "sha256": "<of all lines before this one: head -n -2 FILE | sha256sum>"
    }

The seal finds damage, in any byte; it is no signature, and does not stop a forger. `requires`
names what a reader must know to understand the record. Fields that a reader does not know are
skipped: what may not be skipped goes into `requires`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from backup_pipeline.errors import Corrupt

VERSION = 1
INCREMENTAL = "incremental"
KNOWN_FEATURES = frozenset({INCREMENTAL})
"""What `requires` may name for this version to understand the record."""

_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z")
_SEAL = re.compile(rb'  "sha256": "([0-9a-f]{64})"\n\}\n')
_SEAL_BYTES = len('  "sha256": ""\n}\n') + 64


class Unreadable(ValueError):
    """Why a record cannot be read, in plain words; becomes errors.Corrupt with the key."""


def seal(kind: str, values: Mapping[str, object], *, requires: Sequence[str] = ()) -> bytes:
    """The record as bytes. Equal values make equal bytes."""
    document = {"kind": kind, "version": VERSION, "requires": list(requires), **values}
    body = (_dump(document).removesuffix("\n}") + ",\n").encode()
    return body + f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def open_sealed(data: bytes, kind: str) -> "Fields":
    """The values of a record of this kind. Raises Unreadable."""
    if not data:
        raise Unreadable("it is empty, or far too long")
    try:
        document = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except ValueError as error:  # of decoding, of JSON, or ours
        raise Unreadable(f"it is not JSON as we write it ({error})") from error
    if not isinstance(document, dict):
        raise Unreadable("it is not a JSON object")
    fields = Fields(document)
    if fields.text("kind") != kind:
        raise Unreadable(f"it is a {fields.text('kind')!r}, not a {kind!r}")
    if fields.integer("version") != VERSION:
        raise Unreadable(f"a newer version wrote it: its form is {document['version']}, not {VERSION}")
    unknown = sorted(set(fields.texts("requires")) - KNOWN_FEATURES)
    if unknown:
        raise Unreadable(f"a newer version wrote it: it requires {', '.join(unknown)}")
    match = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if match is None or hashlib.sha256(data[:-_SEAL_BYTES]).hexdigest().encode() != match[1]:
        raise Unreadable("its sha256 does not agree with its text: it is damaged, or was edited")
    return fields


def corrupt(what: str, key: str, reason: object) -> Corrupt:
    """The error for a record that cannot be read."""
    hint = "Run `backup-pipeline rebuild`: the copy beside the backup's objects may be whole."
    if "newer version" in str(reason):
        hint = "Upgrade backup-pipeline here."
    return Corrupt(
        f"the {what} {key} cannot be read: {reason}", detail={"key": key, "reason": str(reason)}, hint=hint
    )


def moment_text(moment: datetime) -> str:
    """ISO 8601 in UTC with a Z; fractions only when there are some."""
    if moment.tzinfo is None:
        raise ValueError(f"a time without a time zone: {moment}")
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


class Fields:
    """The values of a JSON object, each asked for by name and type. All methods raise Unreadable."""

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        self._values = values
        self._path = path

    def text(self, name: str) -> str:
        value = self._value(name)
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        return value

    def optional_text(self, name: str) -> str | None:
        return None if self._value(name) is None else self.text(name)

    def integer(self, name: str, *, minimum: int = 0) -> int:
        value = self._value(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self._wrong(name, f"a whole number from {minimum}")
        return value

    def seconds(self, name: str) -> float:
        value = self._value(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
            raise self._wrong(name, "a number of seconds")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._value(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def moment(self, name: str) -> datetime:
        text = self.text(name)
        try:
            if _MOMENT.fullmatch(text):
                return datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        raise self._wrong(name, "a time like 2026-03-01T02:00:00Z")

    def optional_moment(self, name: str) -> datetime | None:
        return None if self._value(name) is None else self.moment(name)

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._list(name)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(name, "a list of texts")
        return tuple(str(value) for value in values)

    def section(self, name: str) -> "Fields":
        value = self._value(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Fields(value, f"{self._path}{name}.")

    def optional_section(self, name: str) -> "Fields | None":
        return None if self._value(name) is None else self.section(name)

    def sections(self, name: str) -> tuple["Fields", ...]:
        found = []
        for number, value in enumerate(self._list(name)):
            if not isinstance(value, dict):
                raise self._wrong(f"{name}[{number}]", "an object")
            found.append(Fields(value, f"{self._path}{name}[{number}]."))
        return tuple(found)

    def optional_sections(self, name: str) -> "tuple[Fields, ...] | None":
        return None if self._value(name) is None else self.sections(name)

    def _list(self, name: str) -> list[object]:
        value = self._value(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def _value(self, name: str) -> object:
        if name not in self._values:
            raise Unreadable(f"{self._path}{name} is missing")
        return self._values[name]

    def _wrong(self, name: str, expected: str) -> Unreadable:
        return Unreadable(f"{self._path}{name} is not {expected}")


def _dump(document: Mapping[str, object]) -> str:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, of a name in a database without an encoding
        return json.dumps(document, indent=2, allow_nan=False)
    return text


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise Unreadable("a name stands twice in one object")
    return values


def _refuse_constant(name: str) -> object:
    raise Unreadable(f"{name} is not a number")
