"""Stores that count what is done to them, and that die before it is done.

A kill test runs an action once on a `CountingStore` to learn how many effects it has, then once
for each of them on a `DyingStore`, and looks at what the dead left behind.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from backup_pipeline.storage.store import ObjectInfo, Store


class Died(BaseException):
    """The process ended here; nothing but the test may catch it."""


class CountingStore:
    """A Store in front of another, which notes every effect, in order: `effects` is their list.

    Deletes are carried out, and noted, key by key in the order given. Reading has no effect.
    """

    def __init__(self, store: Store) -> None:
        self.effects: list[str] = []
        self._store = store
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The URL of the store behind."""
        return self._store.url

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        """Noted when the stream is complete, as nothing is visible before."""

        def noting() -> Iterator[bytes]:
            yield from chunks
            self._note("put", key)

        self._look()
        self._store.put(key, noting(), size_hint_bytes=size_hint_bytes, storage_class=storage_class)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Noted, also when the key is taken."""
        self._note("put_if_absent", key)
        self._store.put_if_absent(key, data)

    def settle(self, key: str) -> None:
        """Not noted: nothing that can be seen changes."""
        self._look()
        self._store.settle(key)

    def read(self, key: str) -> Iterator[bytes]:
        """Not noted."""
        self._look()
        return self._store.read(key)

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        """Not noted."""
        self._look()
        return self._store.read_range(key, offset=offset, length=length)

    def head(self, key: str) -> ObjectInfo:
        """Not noted."""
        self._look()
        return self._store.head(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Not noted."""
        self._look()
        return self._store.list(prefix)

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """Noted, and done, key by key."""
        refused: dict[str, str] = {}
        for key in keys:
            self._note("delete", key)
            refused |= self._store.delete([key])
        return refused

    def copy(self, source: str, target: str, *, storage_class: str = "") -> None:
        """Noted under the target."""
        self._note("copy", target)
        self._store.copy(source, target, storage_class=storage_class)

    def _note(self, effect: str, key: str) -> None:
        with self._lock:
            self._look()
            self.effects.append(f"{effect} {key}")

    def _look(self) -> None:
        """Called before anything is done."""


class DatedStore(CountingStore):
    """A store whose clock stands at `at`, as whoever puts a lease, and asks for it, sees it."""

    def __init__(self, store: Store, *, at: datetime) -> None:
        super().__init__(store)
        self._at = at

    def head(self, key: str) -> ObjectInfo:
        """A lease as if it had been put now."""
        info = super().head(key)
        return replace(info, modified_at=self._at) if key.startswith("leases/") else info


class DyingStore(CountingStore):
    """A Store that dies before its n-th effect, counted from 1, and stays dead.

    `effects` holds those that happened. After its death it does not even read, so that no
    cleaning up in a `finally` helps a process that could not have done it.
    """

    def __init__(self, store: Store, *, before: int) -> None:
        super().__init__(store)
        self.dead = False
        self._before = before

    def _note(self, effect: str, key: str) -> None:
        with self._lock:
            self._look()
            if len(self.effects) + 1 >= self._before:
                self.dead = True
                raise Died(f"before effect {self._before}: {effect} {key}")
            self.effects.append(f"{effect} {key}")

    def _look(self) -> None:
        if self.dead:
            raise Died("already dead")
