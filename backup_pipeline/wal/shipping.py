"""What a receiver has read of the WAL, on its way into the archive: segments, and the one that is begun.

Called by receive.py, by one thread; the pushes run in a few of its own. Segments lie meanwhile in files that
nobody else sees, and that are gone with this process: until they are durable in the store, the server keeps
them too. `durable` says how far it may forget them.
"""

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from backup_pipeline.domain.layout import wal_name_prefix
from backup_pipeline.domain.wal import HEADER_BYTES, Lsn, WalName, WalSegment, parse_wal_name
from backup_pipeline.domain.wal_stream import NOWHERE
from backup_pipeline.errors import BackupError, ConfigError, Corrupt, Refused, ServerError
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.partials import PartialFound, digest_of, measure_partial, partial_name, push_partial

WORKERS = 2
AHEAD = 8
"""So many segments may wait for the store; then no more is read, and WAL stays on the server."""

_PAUSE_S = 0.2
_RETRY_S = 1.0
_LAST_RETRY_S = 10.0


@dataclass
class _Begun:
    """The segment that is being read. `keys` are parts of it that are in the store, `shipped` bytes long.

    `found_sha256` is of those bytes, while they are another life's and were not compared with what is read.
    """

    segment: WalSegment
    name: WalName
    file: IO[bytes]
    written: int = 0
    shipped: int = 0
    keys: Sequence[str] = ()
    found_sha256: str = ""
    keeps_parts: bool = False  # those that are there cannot be used: nobody knows whose they are
    part: "Future[str] | None" = None
    part_bytes: int = 0


@dataclass
class Shipping:
    """One stream's WAL. Whatever was not durable is forgotten with it, and read again."""

    archive: WalArchive
    system: str
    segment_bytes: int
    ship_every_s: float
    log: Callable[[str], object]
    _begun: _Begun | None = field(default=None, init=False)
    _waiting: "deque[tuple[Lsn, Future[None]]]" = field(default_factory=deque, init=False)
    _pool: ThreadPoolExecutor = field(init=False)
    _given_up: threading.Event = field(default_factory=threading.Event, init=False)
    _files: set[IO[bytes]] = field(default_factory=set, init=False)
    _since_s: float | None = field(default=None, init=False)  # when something came that was not shipped yet
    received: Lsn = field(default=NOWHERE, init=False)
    durable: Lsn = field(default=NOWHERE, init=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="wal ship")

    # --- what the receiver does

    def begin(self, timeline: int, start: Lsn) -> None:
        """Take `timeline` from `start` on, the beginning of a segment. Raises StoreError."""
        self.received = start
        begun = self._open(WalSegment.holding(timeline, start, self.segment_bytes))
        found = self._measure(begun)
        if found is not None:
            self.archive.store.settle(found.key)  # a writer that died may not have
            self.archive.enter(self.system)
            # Whoever shipped it read more than we have yet: nothing shorter may take its place.
            begun.shipped, begun.keys = found.content_bytes, found.keys
            begun.found_sha256 = found.content_sha256

    def write(self, start: Lsn, data: bytes) -> None:
        """Take what was read. Raises ServerError when it does not follow what came before, and Refused when
        another history of it is archived.
        """
        if start != self.received:
            raise ServerError(f"the server sent WAL from {start} on, and {self.received} was to come")
        left = memoryview(data)
        while left:
            begun = self._current()
            piece = left[: self.segment_bytes - begun.written]
            try:
                begun.file.write(piece)
            except OSError as error:
                raise ConfigError(
                    f"cannot keep WAL in {tempfile.gettempdir()}: {error.strerror}",
                    hint=f"It takes up to {AHEAD + 1} segments; name another place with TMPDIR.",
                ) from error
            begun.written += len(piece)
            self.received = Lsn(self.received.value + len(piece))
            left = left[len(piece) :]
            if begun.found_sha256 and begun.written >= begun.shipped:
                self._compare(begun, begun.shipped, begun.found_sha256, begun.keys)
                begun.found_sha256 = ""
            if begun.written == self.segment_bytes:
                self._ship(begun)
        begun = self._current()
        if self._since_s is None and begun.written > begun.shipped:
            self._since_s = time.monotonic()

    def tick(self) -> None:
        """See what is durable by now, and ship the segment that is begun when it is time.

        Raises what a push met that another try does not mend.
        """
        while self._waiting and self._waiting[0][1].done():
            end, result = self._waiting.popleft()
            result.result()
            self.durable = max(self.durable, end)
        begun = self._begun
        if begun is None:
            return
        if begun.part is not None and begun.part.done():
            self._part_done(begun, begun.part)
        if begun.written >= begun.shipped > 0 and not self._waiting:
            self.durable = max(self.durable, Lsn(self._start(begun) + begun.shipped))
        is_due = self._since_s is not None and time.monotonic() - self._since_s >= self.ship_every_s
        if is_due and begun.part is None and begun.written >= max(begun.shipped + 1, HEADER_BYTES):
            self._since_s = None
            begun.part_bytes = begun.written
            begun.part = self._pool.submit(self._push_part, begun, begun.written, tuple(begun.keys))

    def hurry(self) -> None:
        """Ship what is there at the next tick."""
        if self._since_s is not None:
            self._since_s = time.monotonic() - self.ship_every_s

    def end_timeline(self) -> None:
        """Ship the last of a timeline: no more of it will come, and its segment is never finished."""
        begun, self._begun, self._since_s = self._begun, None, None
        if begun is not None and begun.written > max(begun.shipped, HEADER_BYTES):
            length, keys = begun.written, tuple(begun.keys)
            result = self._pool.submit(self._surely, lambda: self._push_part(begun, length, keys), begun)
            self._waiting.append((self.received, result))

    @property
    def is_full(self) -> bool:
        """Whether no more should be read: the store is behind."""
        return len(self._waiting) >= AHEAD

    @property
    def is_done(self) -> bool:
        """Whether all that was read is in the store."""
        begun = self._begun
        is_shipped = begun is None or (
            begun.part is None and begun.written <= max(begun.shipped, HEADER_BYTES)
        )
        return not self._waiting and is_shipped

    def pause(self, wait_s: float) -> None:
        """Wait until something may have become durable."""
        under_way: list[Future[Any]] = [result for _, result in self._waiting]
        if self._begun is not None and self._begun.part is not None:
            under_way.append(self._begun.part)
        if under_way:
            wait(under_way, timeout=wait_s, return_when="FIRST_COMPLETED")
        else:
            self._given_up.wait(wait_s)

    def finish(self, within_s: float, *, meanwhile: Callable[[], object] = lambda: None) -> bool:
        """Ship all that was read; whether it is in the store by then. Raises as `tick` does."""
        deadline_s = time.monotonic() + within_s
        while True:
            self.hurry()
            self.tick()
            meanwhile()
            if self.is_done or time.monotonic() > deadline_s:
                return self.is_done
            self.pause(_PAUSE_S)

    def close(self) -> None:
        """Give up what is not durable; what is under way is waited for."""
        self._given_up.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for each in self._files:
            each.close()

    # --- the segment that is begun

    def _current(self) -> _Begun:
        if self._begun is None:
            raise ServerError("the server sent WAL before it was asked for")
        return self._begun

    def _open(self, segment: WalSegment) -> _Begun:
        file = tempfile.TemporaryFile(prefix="backup-receive-", buffering=0)  # noqa: SIM115 - closed once shipped
        self._files.add(file)
        file.truncate(self.segment_bytes)
        self._begun = _Begun(segment, parse_wal_name(segment.name(self.segment_bytes)), file)
        return self._begun

    def _measure(self, begun: _Begun) -> PartialFound | None:
        """How far it is archived already. What cannot be used stays, and what is read goes beside it."""
        try:
            return measure_partial(self.archive.store, self.archive.cluster, self.system, begun.name)
        except (Corrupt, Refused) as error:
            self.log(f"what is archived of {begun.name.text} cannot be used, and stays: {error}")
            begun.keeps_parts = True
            return None

    def _compare(self, begun: _Begun, length: int, sha256: str, keys: Sequence[str]) -> None:
        """Raise Refused unless what is read begins with the part that was found: before it is confirmed."""
        if digest_of(begun.file, length) == sha256:
            return
        raise Refused(
            f"a part of {begun.name.text} is archived with other bytes than the server has, up to "
            f"{Lsn(self._start(begun) + length)}",
            detail={"there": ", ".join(keys)},
            hint="The server was put back to an earlier state, as a snapshot, or two archive as one cluster. "
            "Nothing was confirmed or deleted: the part may be all that is left of its last commits. Recover "
            "from it what is wanted, move it away, start again, and take a base backup.",
        )

    def _start(self, begun: _Begun) -> int:
        return begun.segment.start(self.segment_bytes).value

    def _ship(self, begun: _Begun) -> None:
        result = self._pool.submit(self._surely, lambda: self._push_whole(begun), begun)
        self._waiting.append((self.received, result))
        self._since_s = None
        self._open(WalSegment(begun.segment.timeline, begun.segment.number + 1))

    def _part_done(self, begun: _Begun, result: "Future[str]") -> None:
        begun.part = None
        try:
            begun.keys = (result.result(),)
            begun.shipped = begun.part_bytes
        except BackupError as error:
            if not error.retryable:
                raise
            self.log(f"{begun.name.text} was not shipped as far as it is written: {error.message}")
            self._since_s = time.monotonic()  # again, with what came meanwhile
        if self._since_s is None and begun.written > begun.shipped:
            self._since_s = time.monotonic()

    # --- in the pool's threads

    def _surely(self, push: Callable[[], object], begun: _Begun) -> None:
        """Push until it is done, or given up: the store may be away for long."""
        pause_s = _RETRY_S
        while True:
            try:
                push()
            except BackupError as error:
                if not error.retryable or self._given_up.is_set():
                    raise
                self.log(f"{begun.name.text} was not archived, and is tried again: {error.message}")
            else:
                begun.file.close()
                self._files.discard(begun.file)
                return
            self._given_up.wait(pause_s)
            pause_s = min(_LAST_RETRY_S, 2 * pause_s)

    def _push_whole(self, begun: _Begun) -> None:
        ours = list(begun.keys)
        if begun.part is not None:  # or it would come in behind the removal of the parts
            with suppress(BackupError, CancelledError):
                ours.append(begun.part.result())
        prefix = wal_name_prefix(self.archive.cluster, self.system, partial_name(begun.name))
        there = [info.key for info in self.archive.store.list(prefix)]
        if not begun.keeps_parts and set(there) - set(ours):
            self._look_at_parts(begun)
        begun.file.seek(0)
        self.archive.push_file(begun.name, begun.file, self.system)
        self._remove([key for key in there if key in ours or not begun.keeps_parts])

    def _look_at_parts(self, begun: _Begun) -> None:
        """Have parts that are not of this life be the beginning of what is read, before they are removed."""
        found = self._measure(begun)
        if found is not None:
            self._compare(begun, found.content_bytes, found.content_sha256, found.keys)

    def _push_part(self, begun: _Begun, length: int, older: Sequence[str]) -> str:
        key = push_partial(self.archive, begun.name, begun.file, self.system, length=length)
        self._remove([each for each in older if each != key])
        return key

    def _remove(self, keys: Sequence[str]) -> None:
        """Parts that are not needed any more do no harm."""
        if not keys:
            return
        for key, why in self.archive.store.delete(keys).items():
            self.log(f"{key} could not be deleted, and stays: {why}")
