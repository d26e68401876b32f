"""Chunks that are brought by a thread of their own while those before are used.

Called where bytes are fetched, unpacked and written: what takes half of the time each is done at once. What
the chunks are does not belong here.
"""

import contextlib
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from queue import Empty, Queue

_KEPT = 8


@dataclass(frozen=True)
class _End:
    """Nothing follows; `error` is what the producer ended with."""

    error: BaseException | None = None


@contextlib.contextmanager
def read_ahead(chunks: Generator[bytes, None, None]) -> Iterator[Iterator[bytes]]:
    """The same chunks, a few of them ahead. What their producer raises is raised where its chunk would be.

    When the block is left the producer is closed, and the thread has ended.
    """
    queue: Queue[bytes | _End] = Queue(_KEPT)
    left = threading.Event()

    def bring() -> None:
        end = _End()
        try:
            with closing(chunks):
                for chunk in chunks:
                    queue.put(chunk)
                    if left.is_set():
                        return
        except BaseException as error:
            end = _End(error)
        queue.put(end)

    thread = threading.Thread(target=bring, name="read ahead", daemon=True)
    thread.start()
    try:
        yield _taken(queue)
    finally:
        left.set()
        with contextlib.suppress(Empty):  # what waits for a place in the queue goes on, and sees that
            while True:
                queue.get_nowait()
        thread.join()


def _taken(queue: "Queue[bytes | _End]") -> Iterator[bytes]:
    while True:
        found = queue.get()
        if isinstance(found, _End):
            if found.error is not None:
                raise found.error
            return
        yield found
