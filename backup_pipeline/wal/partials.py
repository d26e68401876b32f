"""What the archive holds of a segment that was still being written: which object goes furthest, and how far.

Called by fetch.py at the end of the archive, and by the receiver, which ships them. Each is a file of a whole
segment's size, with zeros behind what was written, as PostgreSQL's own `.partial`.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backup_pipeline.domain.layout import wal_key
from backup_pipeline.domain.wal import (
    HEADER_BYTES,
    WalName,
    check_segment,
    parse_wal_name,
    read_segment_header,
)
from backup_pipeline.errors import Corrupt, ObjectNotFound, Refused, StoreError
from backup_pipeline.storage.store import Store
from backup_pipeline.wal.archive import WalArchive, objects_of
from backup_pipeline.wal.packing import CHUNK_BYTES, packed_chunks
from backup_pipeline.wal.unpacking import check, unfinished, unpack

_LOOKS = 5  # a receiver that ships meanwhile removes what is being read
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class PartialFound:
    """The object that goes furthest; `keys` are all that there are of the segment."""

    key: str
    plain_bytes: int
    content_bytes: int  # up to the last byte that is not zero
    content_sha256: str  # of these bytes
    keys: tuple[str, ...]


def partial_name(segment: WalName) -> WalName:
    """How a segment is named while it is not finished."""
    return parse_wal_name(f"{segment.text}.partial")


def push_partial(archive: WalArchive, segment: WalName, file: IO[bytes], system: str, *, length: int) -> str:
    """Archive the first `length` bytes of an open file of a segment's size; the key, durable on return.

    What is written behind them meanwhile is not looked at. Raises as WalArchive.push does.
    """
    name, size_bytes = partial_name(segment), os.fstat(file.fileno()).st_size
    header = read_segment_header(os.pread(file.fileno(), HEADER_BYTES, 0), name.text)
    check_segment(name, header, size_bytes=size_bytes, system_identifier=system)
    archive.enter(system)
    with packed_chunks(_padded(file, length, size_bytes)) as (packed, digest, _):
        key = wal_key(archive.cluster, system, name, digest)
        stored_bytes = packed.seek(0, os.SEEK_END)
        packed.seek(0)
        archive.store.put(key, iter(lambda: packed.read(CHUNK_BYTES), b""), size_hint_bytes=stored_bytes)
    if archive.store.head(key).size_bytes != stored_bytes:
        raise StoreError(
            f"{key} has another size than what was written to {archive.store.url}",
            hint="The store lost what it had acknowledged: look at it before anything else.",
        )
    archive.enter(system)  # again: a disk that was unmounted meanwhile took the archive with it
    return key


def _padded(file: IO[bytes], length: int, size_bytes: int) -> Iterator[bytes]:
    for offset in range(0, length, _CHUNK_BYTES):
        yield os.pread(file.fileno(), min(_CHUNK_BYTES, length - offset), offset)
    for offset in range(length, size_bytes, _CHUNK_BYTES):
        yield bytes(min(_CHUNK_BYTES, size_bytes - offset))


def measure_partial(store: Store, cluster: str, system: str, segment: WalName) -> PartialFound | None:
    """How far what is archived of an unfinished segment goes; None when there is nothing of it.

    Raises Corrupt, Refused, StoreError.
    """
    with tempfile.TemporaryDirectory(prefix="backup-partial-") as folder:
        return fetch_partial(store, cluster, system, segment, Path(folder) / segment.text)


def fetch_partial(
    store: Store, cluster: str, system: str, segment: WalName, target: Path
) -> PartialFound | None:
    """Put at `target` the object of an unfinished segment that goes furthest; None when there is none.

    Raises Refused when one is not the beginning of another; Corrupt, StoreError.
    """
    for _ in range(_LOOKS):
        objects = objects_of(store, cluster, system, partial_name(segment))
        if not objects:
            return None
        found = [(info.key, archived.sha256) for info, archived in objects]
        try:
            return _furthest(store, system, segment, found, target)
        except ObjectNotFound:  # a newer one, or the whole segment, took its place
            continue
    raise Corrupt(
        f"the parts of {segment.text} in the archive of {cluster} change each time they are read",
        hint="A receiver ships it faster than it can be read: try again, or stop the receiver meanwhile.",
    )


def _furthest(
    store: Store, system: str, segment: WalName, objects: list[tuple[str, str]], target: Path
) -> PartialFound:
    name, best = partial_name(segment), None
    with unfinished(target) as kept, unfinished(target) as other:
        for key, sha256 in objects:
            plain_bytes = unpack(store, key, other, sha256)
            check(name, other, system)
            content_bytes = content_of(other)
            if best is not None:
                _refuse_diverged(kept, other, min(best.content_bytes, content_bytes), segment)
            if best is None or content_bytes > best.content_bytes:
                keys = tuple(key for key, _ in objects)
                with other.open("rb") as file:
                    content_sha256 = digest_of(file, content_bytes)
                best = PartialFound(key, plain_bytes, content_bytes, content_sha256, keys)
                os.replace(other, kept)
            else:
                other.unlink()
        if best is None:
            raise ObjectNotFound(f"there is no part of {segment.text}")
        os.replace(kept, target)
    return best


def content_of(path: Path) -> int:
    """How many bytes of a file come before the zeros that it ends with."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        while end > 0:
            begin = max(0, end - _CHUNK_BYTES)
            file.seek(begin)
            if data := file.read(end - begin).rstrip(b"\0"):
                return begin + len(data)
            end = begin
    return 0


def digest_of(file: IO[bytes], length: int) -> str:
    """The SHA-256 of the first `length` bytes of an open file, wherever it stands."""
    summed = hashlib.sha256()
    for offset in range(0, length, _CHUNK_BYTES):
        summed.update(os.pread(file.fileno(), min(_CHUNK_BYTES, length - offset), offset))
    return summed.hexdigest()


def _refuse_diverged(one: Path, other: Path, length: int, segment: WalName) -> None:
    with one.open("rb") as first, other.open("rb") as second:
        while length > 0:
            size = min(length, _CHUNK_BYTES)
            if first.read(size) != second.read(size):
                raise Refused(
                    f"two parts of {segment.text} are archived, and neither is the beginning of the other",
                    hint="Two servers archived as one cluster. Move away what is not of this history.",
                )
            length -= size
