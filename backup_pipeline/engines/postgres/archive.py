"""What an archive says of itself in its first bytes: for dumps that have no manifest.

Called by restores and proofs of imported dumps, which choose their pg_restore by it. No PostgreSQL
program opens the file here: an imported dump has no digest, and only tools without a known hole should
(tools.known_vulnerable).
"""

import io
import re
from dataclasses import dataclass

from backup_pipeline.errors import Corrupt, ToolError

_MAGIC = b"PGDMP"
_CUSTOM = 1
_OLDEST = (1, 10)  # PostgreSQL 8.0: from then on it says who wrote it
_NEWEST = (1, 16)  # PostgreSQL 17 and 18
_NAMES_METHOD = (1, 15)  # how it is compressed is a byte; before, a number
_DATE_NUMBERS = 7

HEADER_BYTES = 64 * 1024
"""More than any header takes."""


@dataclass(frozen=True)
class ArchiveHeader:
    """The beginning of an archive. Versions as majors, 17 for 17.10."""

    database: str
    server_major: int
    client_major: int


def parse_header(data: bytes, name: str) -> ArchiveHeader:
    """The header of the custom-format archive `name`, from its first HEADER_BYTES.

    Raises Corrupt when it has none, ToolError when its format is newer than what is understood here.
    Source: ReadHead in src/bin/pg_dump/pg_backup_archiver.c.
    """
    version = tuple(data[len(_MAGIC) : len(_MAGIC) + 2])
    try:
        return _parse(io.BytesIO(data))
    except ValueError as error:
        if data.startswith(_MAGIC) and version > _NEWEST:
            raise ToolError(
                f"{name}: its archive format {'.'.join(map(str, version))} is newer than what is known here",
                hint="Upgrade backup-pipeline here, or restore it with pg_restore by hand.",
            ) from error
        raise Corrupt(
            f"{name}: expected an archive of pg_dump's custom format: {error}",
            hint="A plain SQL dump is not replayed, because it can run commands; use psql by hand.",
        ) from error


def _parse(file: io.BytesIO) -> ArchiveHeader:
    if _take(file, len(_MAGIC)) != _MAGIC:
        raise ValueError("it begins otherwise")
    major, minor, _revision, int_bytes, _offset_bytes, form = _take(file, 6)
    if (major, minor) < _OLDEST or form != _CUSTOM:
        raise ValueError(f"found format {major}.{minor}, kind {form}")
    if (major, minor) >= _NAMES_METHOD:
        _take(file, 1)
    else:
        _number(file, int_bytes)
    for _ in range(_DATE_NUMBERS):
        _number(file, int_bytes)
    database, server, client = (_text(file, int_bytes) for _ in range(3))
    return ArchiveHeader(database, _major(server), _major(client))


def _take(file: io.BytesIO, length: int) -> bytes:
    taken = file.read(length)
    if len(taken) != length:
        raise ValueError("it ends within its header")
    return taken


def _number(file: io.BytesIO, int_bytes: int) -> int:
    sign, *rest = _take(file, 1 + int_bytes)
    value = int.from_bytes(bytes(rest), "little")
    return -value if sign else value


def _text(file: io.BytesIO, int_bytes: int) -> str:
    return _take(file, max(0, _number(file, int_bytes))).decode(errors="replace")


def _major(version: str) -> int:
    found = re.match(r"\d+", version)
    if found is None:
        raise ValueError(f'found version "{version[:20]}"')
    return int(found[0])
