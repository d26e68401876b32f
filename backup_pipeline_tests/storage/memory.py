"""A store in memory, for tests of what is built on a store; it counts requests by page and by read."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime

from backup_pipeline.errors import ObjectExists, ObjectNotFound
from backup_pipeline.storage.store import ObjectInfo, check_key

PAGE = 1000

MODIFIED = datetime(2026, 1, 1, tzinfo=UTC)


class MemoryStore:
    """A Store. `requests` counts what S3 would bill; `locked` keys cannot be deleted, with the reason."""

    url = "memory://test"

    def __init__(self, clock: Callable[[], datetime] = lambda: MODIFIED) -> None:
        self.objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self.requests: Counter[str] = Counter()
        self.locked: dict[str, str] = {}
        self._clock = clock
        self._version = 0
        self._lock = threading.Lock()

    def put(
        self,
        key: str,
        chunks: Iterable[bytes],
        *,
        size_hint_bytes: int = 0,  # noqa: ARG002 - the protocol's
        storage_class: str = "",  # noqa: ARG002
    ) -> None:
        data = b"".join(chunks)
        check_key(key)
        with self._lock:
            self.requests["put"] += 1
            self._version += 1
            self.objects[key] = (data, ObjectInfo(key, len(data), f"v{self._version}", self._clock()))

    def put_if_absent(self, key: str, data: bytes) -> None:
        if key in self.objects:
            raise ObjectExists(f"{key} exists")
        self.put(key, [data])

    def settle(self, key: str) -> None:
        check_key(key)

    def read(self, key: str) -> Iterator[bytes]:
        with self._lock:
            self.requests["read"] += 1
            data = self._get(key)[0]
        yield data

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        return self._get(key)[0][offset : offset + length]

    def head(self, key: str) -> ObjectInfo:
        self.requests["head"] += 1
        return self._get(key)[1]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._lock:
            found = [self.objects[key][1] for key in sorted(self.objects) if key.startswith(prefix)]
            self.requests["list"] += len(found) // PAGE + 1
        yield from found

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        with self._lock:
            self.requests["delete"] += 1
            for key in keys:
                if key not in self.locked:
                    self.objects.pop(key, None)
        return {key: self.locked[key] for key in keys if key in self.locked}

    def copy(self, source: str, target: str, *, storage_class: str = "") -> None:  # noqa: ARG002
        self.put(target, [self._get(source)[0]])

    def _get(self, key: str) -> tuple[bytes, ObjectInfo]:
        if key not in self.objects:
            raise ObjectNotFound(f"there is no {key}")
        return self.objects[key]
