"""PostgreSQL's own backup_manifest, read: every file of a base backup, its size and its SHA-256. Pure.

Called by engines/postgres/unpack.py, which believes no file that is not in it.

Source: PostgreSQL, "Backup Manifest Format".
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from backup_pipeline.domain.base_backup import FILE_LIST_OBJECT, WalPoint
from backup_pipeline.domain.wal import Lsn
from backup_pipeline.errors import ConfigError, Corrupt

MAX_BYTES = 1 << 30
"""No list is longer: that would be of some seven million files."""

_VERSIONS = (1, 2)  # 2, from PostgreSQL 17 on, names the system
_LAST_LINE = re.compile(rb'"Manifest-Checksum": "(?P<sha256>[0-9a-f]{64})"\}\n')
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """What a file of the backup must be."""

    size_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class WalRange:
    """WAL that a recovery of the backup needs, on one timeline."""

    start: WalPoint
    end: Lsn


@dataclass(frozen=True)
class FileList:
    """All files of a backup by their path below the data directory, `/` between its parts."""

    files: Mapping[bytes, ListedFile]
    wal_ranges: tuple[WalRange, ...]
    system_identifier: str = ""  # "" from servers older than 17


def parse_file_list(data: bytes) -> FileList:
    """Read a backup_manifest, once its own checksum was found right. Raises Corrupt."""
    try:
        return _parse(data)
    except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        said = error.message if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise Corrupt(
            f"{FILE_LIST_OBJECT} is not one that PostgreSQL wrote: {said}",
            hint="Take another backup; look for who changed this one.",
        ) from error


def _parse(data: bytes) -> FileList:
    body, last = _cut(data)
    match = _LAST_LINE.fullmatch(last)
    if match is None:
        raise ValueError("it does not end with its checksum")
    if hashlib.sha256(body).hexdigest().encode() != match["sha256"]:
        raise ValueError("its checksum does not agree with its text: it is damaged, or was edited")
    document = json.loads(data.decode())
    if document["PostgreSQL-Backup-Manifest-Version"] not in _VERSIONS:
        raise ValueError(f"its version is {document['PostgreSQL-Backup-Manifest-Version']!r}")
    files: dict[bytes, ListedFile] = {}
    for item in document["Files"]:
        path = bytes.fromhex(item["Encoded-Path"]) if "Encoded-Path" in item else item["Path"].encode()
        if path in files:
            raise ValueError(f"it lists {path!r} twice")
        files[path] = _file(path, item)
    ranges = tuple(_range(item) for item in document["WAL-Ranges"])
    return FileList(files, ranges, str(document.get("System-Identifier", "")))


def _cut(data: bytes) -> tuple[bytes, bytes]:
    """All lines but the last, and the last."""
    end = data.rfind(b"\n", 0, len(data) - 1) + 1
    return data[:end], data[end:]


def _file(path: bytes, item: Mapping[str, object]) -> ListedFile:
    size_bytes, checksum = item["Size"], item.get("Checksum")
    if not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or size_bytes < 0:
        raise ValueError(f"the size of {path!r} is {size_bytes!r}")
    if item.get("Checksum-Algorithm") != "SHA256" or not isinstance(checksum, str):
        raise ValueError(f"{path!r} has no SHA256")
    if _SHA256.fullmatch(checksum) is None:
        raise ValueError(f"the SHA256 of {path!r} is {checksum!r}")
    return ListedFile(size_bytes, bytes.fromhex(checksum))


def _range(item: Mapping[str, object]) -> WalRange:
    timeline = item["Timeline"]
    if not isinstance(timeline, int) or timeline < 1:
        raise ValueError(f"a timeline is {timeline!r}")
    return WalRange(WalPoint(timeline, Lsn.parse(str(item["Start-LSN"]))), Lsn.parse(str(item["End-LSN"])))
