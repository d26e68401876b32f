"""An object of the archive as the plain file that was archived, verified by the digest of its key.

Called by fetch.py and partials.py. Which object is meant is theirs to say.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from backup_pipeline.domain.wal import HEADER_BYTES, WalName, check_segment, read_segment_header
from backup_pipeline.errors import BackupError, ConfigError, Corrupt
from backup_pipeline.storage.store import Store
from backup_pipeline.zstd import ZstdDecompressor, ZstdError

_MAX_PLAIN_BYTES = 1 << 30  # PostgreSQL's largest segment
_CHUNK_BYTES = 1024 * 1024


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
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


def unpack(store: Store, key: str, path: Path, sha256: str) -> int:
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


def check(name: WalName, path: Path, system: str) -> None:
    """See that a segment, or a part of one, is what its name says: the digest is of what was archived, the
    header says that this was right. Raises Corrupt.
    """
    with path.open("rb") as file:
        header = read_segment_header(file.read(HEADER_BYTES), name.text)
    check_segment(name, header, size_bytes=path.stat().st_size, system_identifier=system)
