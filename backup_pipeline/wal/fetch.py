"""Fetch one file of the WAL archive: PostgreSQL's contract for restore_command, on any store.

When `fetch` returns, the file is in place, whole, and the one that was archived: its digest is that of its
key. It says NotArchived only where the archive itself was seen and has neither the file nor anything behind
it; whatever else is in the way is another error, because PostgreSQL takes a plain failure for the end of the
WAL and would end its recovery there, without what comes after.

Source: PostgreSQL, "Continuous Archiving", "Recovering Using a Continuous Archive Backup".
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from backup_pipeline.domain.layout import ArchivedWal, parse_wal_key, wal_key, wal_timeline_prefix
from backup_pipeline.domain.wal import (
    HEADER_BYTES,
    WalKind,
    WalName,
    check_segment,
    parse_history,
    parse_wal_name,
    read_segment_header,
)
from backup_pipeline.errors import (
    BackupError,
    ConfigError,
    Corrupt,
    NotArchived,
    ObjectNotFound,
    Refused,
    StoreError,
)
from backup_pipeline.storage.store import ObjectInfo, Store
from backup_pipeline.wal.ahead import AHEAD
from backup_pipeline.wal.archive import MAX_TEXT_BYTES, objects_of
from backup_pipeline.wal.identity import read_identity
from backup_pipeline.wal.settling import Pause, may_be_filled, settled
from backup_pipeline.zstd import ZstdDecompressor, ZstdError

ABSENT, FATAL = 1, 200
"""restore_command's exit codes: PostgreSQL reads 1 to 125 as the end of the WAL, and stops above."""

_MAX_PLAIN_BYTES = 1 << 30  # PostgreSQL's largest segment
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Fetched:
    """One file that was put in place."""

    name: str
    key: str
    plain_bytes: int


def restore_exit_code(error: BaseException | None) -> int:
    """What restore_command ends with: 0 in place, 1 known not to exist, 200 whatever else."""
    if error is None:
        return 0
    return ABSENT if isinstance(error, NotArchived) else FATAL


def fetch(
    store: Store,
    cluster: str,
    text: str,
    target: Path,
    *,
    system_identifier: str = "",
    pause: Pause = time.sleep,
) -> Fetched:
    """Put the archived file named `text` at `target`, replacing what is there, at once and whole.

    `system_identifier` is the recovering cluster's; else the one that archives now. A segment that is missing
    before a few others may be under way: it is waited for, half a minute. Raises NotArchived when the archive
    is known not to have it; Refused for several objects of one name and for a segment that is missing before
    others; Corrupt; ConfigError, StoreError.
    """
    name = parse_wal_name(text)
    identity = read_identity(store, cluster)
    if identity is None:
        raise StoreError(
            f"there is no WAL archive of {cluster} in {store.url}",
            hint="Check the store's URL and that its disk is mounted; nothing is known of its WAL.",
        )
    system = system_identifier or identity.system_identifier
    if name.kind is WalKind.HISTORY:
        return _fetch_history(store, cluster, system, name, target)
    objects = _objects(store, cluster, system, name, pause)
    if len(objects) > 1:
        raise Refused(
            f"{text} is in the archive of {cluster} {len(objects)} times, with different bytes",
            detail={"objects": ", ".join(info.key for info, _ in objects)},
            hint="Two servers archived as one cluster. Move the one that is not of this history away.",
        )
    ((info, archived),) = objects
    with _unfinished(target) as path:
        plain_bytes = _unpack(store, info.key, path, archived.sha256)
        if name.kind is not WalKind.LABEL:
            _check(name, path, system)
        os.replace(path, target)
    return Fetched(text, info.key, plain_bytes)


def _fetch_history(store: Store, cluster: str, system: str, name: WalName, target: Path) -> Fetched:
    key = wal_key(cluster, system, name, "")
    try:
        data = store.read_range(key, offset=0, length=MAX_TEXT_BYTES + 1)
    except ObjectNotFound:
        raise _absent(name, cluster) from None
    parse_history(name.timeline, data)
    with _unfinished(target) as path:
        path.write_bytes(data)
        os.replace(path, target)
    return Fetched(name.text, key, len(data))


def _absent(name: WalName, cluster: str) -> NotArchived:
    return NotArchived(f"{name.text} is not in the archive of {cluster}")


def _objects(
    store: Store, cluster: str, system: str, name: WalName, pause: Pause
) -> list[tuple[ObjectInfo, ArchivedWal]]:
    """The objects of a name, at least one. Raises Refused for a gap, NotArchived."""

    def look() -> tuple[list[tuple[ObjectInfo, ArchivedWal]], list[str]]:
        objects = objects_of(store, cluster, system, name)
        return objects, [] if objects else list(islice(_later(store, cluster, system, name), AHEAD + 1))

    objects, later = settled(look, lambda found: may_be_filled(len(found[1])), pause=pause)
    if later:
        raise Refused(
            f"{name.text} is missing in the archive of {cluster}, which has {later[0]} and perhaps more "
            "behind it",
            hint="Recovery would end here in silence: choose a target before the gap, or a later backup.",
        )
    if not objects:
        raise _absent(name, cluster)
    return objects


def _later(store: Store, cluster: str, system: str, name: WalName) -> Iterator[str]:
    """The later segments of its timeline that are there."""
    if name.kind is not WalKind.SEGMENT:
        return
    for info in store.list(wal_timeline_prefix(cluster, system, name.timeline)):
        found = parse_wal_key(info.key)
        if found and found.name.kind is WalKind.SEGMENT and found.name.text > name.text:
            yield found.name.text


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A name of its own beside `target`, gone when left unless it was renamed."""
    path = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        yield path
    except BackupError:  # some are an OSError too
        raise
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)


def _unpack(store: Store, key: str, path: Path, sha256: str) -> int:
    """Write the plain bytes of an object to a new file. Raises Corrupt unless they have this digest."""
    summed, plain_bytes = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(handle, "wb", buffering=0) as file:
        for chunk in _plain(store, key):
            summed.update(chunk)
            file.write(chunk)
            plain_bytes += len(chunk)
            if plain_bytes > _MAX_PLAIN_BYTES:
                raise _damaged(key, "it is longer than any segment")
    if summed.hexdigest() != sha256:
        raise _damaged(key, "its bytes have another digest")
    return plain_bytes


def _plain(store: Store, key: str) -> Iterator[bytes]:
    unpacker = ZstdDecompressor()
    try:
        for chunk in store.read(key):
            if unpacker.eof:
                raise _damaged(key, "something follows its end")
            yield unpacker.decompress(chunk, _CHUNK_BYTES)
            while not unpacker.needs_input and not unpacker.eof:
                yield unpacker.decompress(b"", _CHUNK_BYTES)
    except ZstdError as error:
        raise _damaged(key, str(error)) from None
    if not unpacker.eof or unpacker.unused_data:
        raise _damaged(key, "something follows its end" if unpacker.eof else "it ends too early")


def _damaged(key: str, why: str) -> Corrupt:
    return Corrupt(
        f"{key} is not what was archived: {why}",
        detail={"key": key},
        hint="Look for an older version, or a copy, of this object; what is behind it cannot be recovered.",
    )


def _check(name: WalName, path: Path, system: str) -> None:
    """The digest is of what was archived; the header says that this was right. Raises Corrupt."""
    with path.open("rb") as file:
        header = read_segment_header(file.read(HEADER_BYTES), name.text)
    check_segment(name, header, size_bytes=path.stat().st_size, system_identifier=system)
