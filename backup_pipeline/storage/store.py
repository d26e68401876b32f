"""The one seam between backups and the place that holds them.

`Store` is what every place can do; `open_store` picks the implementation by URL. A store knows
objects by key and nothing of backups. Keys are relative to the store's prefix, use `/` between
parts, and are made by domain/layout.py. This module imports no client of any place.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from backup_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from backup_pipeline.config import StoreConfig

SPOOL = ".partial"
"""The first part of no key: where a directory keeps what is not yet published."""

_KEY_BYTES = 900  # S3 allows 1,024, the store's own prefix included
_PART_BYTES = 255


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of one object. `etag` changes whenever the bytes may have changed."""

    key: str
    size_bytes: int
    etag: str
    modified_at: datetime


class Store(Protocol):
    """A place for objects.

    Every method raises StoreError when the place fails or does not answer within a bounded
    time; no error text holds a secret. An object is visible only when it is whole, and durable when
    its writer returns (see `settle`); a read never sees a mixture of two writes. A key that
    `check_key` refuses is a ConfigError. A key that is also the folder of another key (`a` beside
    `a/b`) is not portable: some places refuse it.
    """

    @property
    def url(self) -> str:
        """Where the objects lie, fit to be shown: no secret in it."""
        ...

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        """Store the concatenated `chunks`; durable on return, replacing what was there.

        Memory is bounded whatever the length. When `chunks` raises, nothing becomes visible and
        its exception comes through unchanged. `size_hint_bytes` is the expected length, used
        to choose part sizes that fit the longest object. `storage_class` is S3's word; a
        place without classes ignores it.
        """
        ...

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Store a small object, durable on return, unless the key is taken: then ObjectExists.

        Some S3 servers ignore the condition (see the probe), so no safety rests on it alone.
        """
        ...

    def settle(self, key: str) -> None:
        """Have an object that was seen be durable on return, whoever wrote it and whatever became of them.

        Of a writer that died in mid-write a directory may show what a power cut would still take away.
        To be called before another's object is relied on as if one had written it oneself. A directory
        raises ObjectNotFound when the object is gone; S3, where what is visible is durable, is not asked.
        """
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """The object's bytes in chunks of a few MiB, none of them empty.

        Raises ObjectNotFound at the first chunk. An object that is replaced meanwhile is read to
        its end as it was, or the reading fails.
        """
        ...

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end of the object, none beyond it."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """What a listing would say of this object. Raises ObjectNotFound."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, in the order of their keys' UTF-8, page by page.

        An object that comes or goes meanwhile may be told or not; every other is told once.
        """
        ...

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """Delete objects, absent ones included; return, per key that could not be deleted, why.

        Durable on return; in no particular order within one call.
        """
        ...

    def copy(self, source: str, target: str, *, storage_class: str = "") -> None:
        """Copy one object within the store, without moving its bytes through us.

        The copy is an independent object, durable on return, replacing what was there. Raises
        CopyUnsupported where the place cannot, ObjectNotFound when the source is absent.
        """
        ...


def read_all(store: Store, key: str) -> bytes:
    """The whole of a small object."""
    return b"".join(store.read(key))


def check_key(key: str) -> tuple[str, ...]:
    """The parts of a key that every place can hold. Raises ConfigError for any other."""
    parts = tuple(key.split("/"))
    try:
        encoded = [part.encode() for part in parts]
    except UnicodeEncodeError:
        raise _bad_key(key, "is not valid Unicode") from None
    if parts[0] == SPOOL:
        raise _bad_key(key, f"begins with {SPOOL}, which is reserved")
    if any(part in ("", ".", "..") for part in parts):
        raise _bad_key(key, "has an empty part, or one that is . or ..")
    if any(char < " " or char == "\x7f" for char in key):
        raise _bad_key(key, "holds a control character")
    if max(len(part) for part in encoded) > _PART_BYTES:
        raise _bad_key(key, f"has a part of more than {_PART_BYTES} bytes")
    if len(key.encode()) > _KEY_BYTES:
        raise _bad_key(key, f"is longer than {_KEY_BYTES} bytes")
    return parts


def check_prefix(prefix: str) -> None:
    """Refuse, as `check_key` does, what no key could begin with; anything may follow its last part."""
    if prefix:
        check_key(prefix + "x" if prefix.endswith(("/", ".")) else prefix)


def open_store(config: "StoreConfig") -> Store:
    """The store that `config.url` names: `file:///folder` or `s3://bucket/prefix`.

    A folder must exist; a bucket is looked at with the first request. Raises ConfigError for a
    URL that is neither, StoreError for a folder that is missing.
    """
    if config.url.startswith("file://"):
        from backup_pipeline.storage.directory import (  # only the one that is used
            DirectoryStore,
            folder_of,
        )

        return DirectoryStore(folder_of(config.url))
    if config.url.startswith("s3://"):
        from backup_pipeline.storage.s3 import S3Store  # boto3 costs 0.6 s

        return S3Store(config.located())
    raise ConfigError(
        f"store URL {config.url!r} is neither s3://bucket/prefix nor file:///folder",
        hint="Write the place for backups as s3://bucket/prefix, or as file:// and an absolute path.",
    )


def _bad_key(key: str, why: str) -> ConfigError:
    return ConfigError(f"object key {key[:200]!r} {why}")
