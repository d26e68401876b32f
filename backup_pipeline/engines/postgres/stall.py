"""The end of a wait for a server that stands still, while its connection stays open.

Called by snapshot.py for its session, whose queries may rightly take hours: no time limit on a statement
would do, and one that the server keeps is none when the server itself has stopped.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psycopg

from backup_pipeline.engines.postgres.server import Connection
from backup_pipeline.errors import ServerError
from backup_pipeline.units import show_seconds

_PATIENCE = 8  # as long as the dump's own
_SLOWEST_BYTES_PER_S = 4 * 1024 * 1024
_POLL_S = 1.0


def hang_up(session: Connection) -> None:
    """Close a session's connection under whoever waits for it in another thread: that wait fails now."""
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(session.fileno())) as connection,
    ):
        connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def answering(session: Connection, *, within_s: float) -> Iterator[None]:
    """Hang up when the block, of queries that are answered at once, takes longer."""
    timer = threading.Timer(within_s, hang_up, [session])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass
class Watchdog:
    """Looks whether a long reading gets on: tell it what `begins`.

    After `stall_s` seconds with one thing, `working` is asked with the seconds since when; the wait goes
    on while it is true, up to eight times as long, and longer for what is large. Then `give_up`.
    """

    stall_s: float
    working: Callable[[float], bool]
    give_up: Callable[[ServerError], None]
    _what: str = "its first answer"
    _patience_s: float = 0.0
    _began_at: float = field(default_factory=time.monotonic)
    _asked_at: float = field(default_factory=time.monotonic)
    _ended: threading.Event = field(default_factory=threading.Event)

    def begins(self, what: str, size_bytes: int = 0) -> None:
        """What was read before is done, and this comes next."""
        self._patience_s = _PATIENCE * self.stall_s + size_bytes / _SLOWEST_BYTES_PER_S
        self._what = what
        self._began_at = self._asked_at = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look while the block runs."""
        self.begins(self._what)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(_POLL_S, self.stall_s)):
            now = time.monotonic()
            if now - self._asked_at < self.stall_s:
                continue
            self._asked_at, began_at, what = now, self._began_at, self._what
            too_long = now - began_at >= self._patience_s
            if (too_long or not self.working(min(60.0, self.stall_s))) and began_at == self._began_at:
                if not self._ended.is_set():
                    self.give_up(_standing_still(what, now - began_at))
                return


def _standing_still(what: str, silent_s: float) -> ServerError:
    return ServerError(
        f"the server stands still: {what} was waited for {show_seconds(silent_s)}",
        hint="Look at its disks, locks and load, then try again; raise stall_timeout where it is only slow.",
    )
