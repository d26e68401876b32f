"""Bring a backup's objects from the store to a private folder, every byte checked.

Called by restores, proofs and recoveries, which thereby open the same files in the same way. A digest that
differs is Corrupt, raised before any PostgreSQL tool has seen the file.
"""

import gzip
import hashlib
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline.actions.report import Progress, Report
from backup_pipeline.domain.backup import Backup, Manifest, ObjectDigest, ObjectRole
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.domain.file_list import MAX_BYTES
from backup_pipeline.engines.postgres.archive import HEADER_BYTES, ArchiveHeader, parse_header
from backup_pipeline.errors import Corrupt
from backup_pipeline.spool import require_free
from backup_pipeline.storage.store import Store
from backup_pipeline.units import show_bytes

ARCHIVE_NAME = "database.dump"
DIRECTORY_NAME = "dump"
_CUSTOM_MAGIC = b"PGDMP"
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Fetched:
    """A dump on local disk: the custom-format file or the directory that pg_restore reads."""

    archive: Path
    size_bytes: int


def fetch_dump(store: Store, manifest: Manifest, into: Path, report: Report) -> Fetched:
    """Bring the dump itself. Raises Corrupt, ObjectNotFound, Refused when the disk is too small."""
    objects = manifest.of_role(ObjectRole.DUMP)
    total = sum(item.size_bytes for item in objects)
    require_free(into, total, f"fetching {manifest.id}")
    started, done = time.monotonic(), 0
    for item in objects:
        path = _inside(into, item.name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("xb") as file:
            for chunk in verified(store, item):
                file.write(chunk)
                done += len(chunk)
                report.progress(Progress(f"fetch {manifest.id}", done, total, time.monotonic() - started))
    name = ARCHIVE_NAME if manifest.format == "custom" else DIRECTORY_NAME
    return Fetched(into / name, total)


def fetch_small(store: Store, item: ObjectDigest) -> bytes:
    """One small object, checked. Raises Corrupt, ObjectNotFound."""
    return b"".join(verified(store, item))


def fetch_backup_manifest(store: Store, manifest: BaseManifest) -> bytes:
    """PostgreSQL's own manifest of a base backup, checked. Raises Corrupt, ObjectNotFound."""
    (item,) = manifest.of_role(ObjectRole.FILE_LIST)
    if item.size_bytes > MAX_BYTES:
        raise Corrupt(f"{item.key} is too long for a list of files: {show_bytes(item.size_bytes)}")
    return fetch_small(store, item)


def imported_header(store: Store, backup: Backup) -> ArchiveHeader:
    """What a dump of an older layout says of itself, read without any tool of PostgreSQL.

    Raises Corrupt when it is not a custom-format archive, plain or inside gzip; ToolError, ObjectNotFound.
    """
    data = store.read_range(backup.imported_key, offset=0, length=HEADER_BYTES)
    if data.startswith(_GZIP_MAGIC):
        try:
            data = zlib.decompressobj(wbits=31).decompress(data, HEADER_BYTES)
        except zlib.error as error:
            raise Corrupt(f"{backup.imported_key}: the gzip stream is broken: {error}") from error
    return parse_header(data, backup.imported_key)


def fetch_imported(store: Store, backup: Backup, into: Path, report: Report) -> Fetched:
    """Bring a dump of an older layout, of which no digest is known.

    Raises Corrupt when it is not a custom-format archive, plain or inside gzip.
    """
    require_free(into, backup.size_bytes, f"fetching {backup.id}")
    path, total, started, done = into / ARCHIVE_NAME, backup.size_bytes, time.monotonic(), 0
    with path.open("xb") as file:
        for chunk in store.read(backup.imported_key):
            file.write(chunk)
            done += len(chunk)
            report.progress(Progress(f"fetch {backup.id}", done, total, time.monotonic() - started))
    if _head(path, len(_GZIP_MAGIC)) == _GZIP_MAGIC:
        path = _unzip(path, into / "unzipped.dump", backup)
    if _head(path, len(_CUSTOM_MAGIC)) != _CUSTOM_MAGIC:
        raise Corrupt(
            f"{backup.imported_key}: expected an archive of pg_dump's custom format, found something else",
            hint="A plain SQL dump is not replayed, because it can run commands; use psql by hand.",
        )
    return Fetched(path, total)


def verified(store: Store, item: ObjectDigest) -> Iterator[bytes]:
    """The bytes of one object; raises Corrupt at the end when they are not those that were written."""
    digest, size_bytes = hashlib.sha256(), 0
    for chunk in store.read(item.key):
        digest.update(chunk)
        size_bytes += len(chunk)
        yield chunk
    if size_bytes != item.size_bytes or digest.hexdigest() != item.sha256:
        raise Corrupt(
            f"{item.key}: the stored bytes are not those that were written",
            detail={
                "expected": f"{item.size_bytes} bytes, sha256 {item.sha256}",
                "found": f"{size_bytes} bytes, sha256 {digest.hexdigest()}",
            },
            hint="Restore another backup; look at the store for who changed this object.",
        )


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise Corrupt(f"a manifest names a file outside its folder: {name}")
    return path


def _head(path: Path, length: int) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


def _unzip(path: Path, into: Path, backup: Backup) -> Path:
    try:
        with gzip.open(path, "rb") as packed, into.open("xb") as file:
            while chunk := packed.read(1024 * 1024):
                file.write(chunk)
    except (OSError, EOFError) as error:
        raise Corrupt(f"{backup.imported_key}: the gzip stream is broken: {error}") from error
    path.unlink()
    return into
