"""The one seam between backups and the place that holds them.

`Store` is what every place can do; `open_store` picks the implementation by URL. A store knows
objects by key and nothing of backups. Keys are relative to the store's prefix, use `/` between
parts, and are made by domain/layout.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


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
    time; no error text holds a secret. An object is visible only when it is whole and durable,
    and a read never sees a mixture of two writes.
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
        """Store a small object unless the key is taken, then raise ObjectExists.

        Some S3 servers ignore the condition (see the probe), so no safety rests on it alone.
        """
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """The object's bytes in chunks of a few MiB. Raises ObjectNotFound at the first chunk."""
        ...

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end of the object."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """What a listing would say of this object. Raises ObjectNotFound."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, in the order of their keys, page by page."""
        ...

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """Delete objects, absent ones included; return, per key that could not be deleted, why."""
        ...

    def copy(self, source: str, target: str, *, storage_class: str = "") -> None:
        """Copy one object within the store, without moving its bytes through us.

        Raises CopyUnsupported where the place cannot, ObjectNotFound when the source is absent.
        """
        ...


def read_all(store: Store, key: str) -> bytes:
    """The whole of a small object."""
    return b"".join(store.read(key))
