"""The Unix socket that archive_command's and restore_command's client talks to: one line each way.

Used by the agent beside PostgreSQL, and by a recovery while it runs. What is answered is theirs; how lines
are written is protocol.py's.
"""

import os
import socket as sockets
import socketserver
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from backup_pipeline.process import Identity
from backup_pipeline.wal.protocol import MAX_LINE_BYTES, Answer, answer_line

_AT_ONCE = 32
_READ_WITHIN_S = 10.0


class Served(Protocol):
    """What answers."""

    def answer(self, line: bytes, pulse: Callable[[], object]) -> Answer | None:
        """What to say to a line; None: nothing, and the client does without. `pulse` shows work."""
        ...

    def say(self, line: str) -> object:
        """Take a line for the log."""
        ...


class Listener(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A thread for each client of the socket, and no more than can be served.

    The socket lets in its owner alone: `owner`, or this user.
    """

    daemon_threads = False
    block_on_close = True
    request_queue_size = _AT_ONCE

    def __init__(self, served: Served, socket: Path, *, owner: Identity | None = None) -> None:
        self.served = served
        self._free = threading.BoundedSemaphore(_AT_ONCE)
        old = os.umask(0o177)
        try:
            super().__init__(str(socket), _Connection)
        finally:
            os.umask(old)
        if owner is not None:
            os.chown(socket, owner.uid, owner.gid)

    def verify_request(self, request: object, client_address: object) -> bool:  # noqa: ARG002 - socketserver's
        """Turn away whoever is one too many: the client does without."""
        return self._free.acquire(blocking=False)

    def process_request_thread(
        self, request: sockets.socket | tuple[bytes, sockets.socket], client_address: object
    ) -> None:
        """As it is, and free the place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - socketserver's
        """A client that went away in the middle is no news: what it asked for goes on."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.served.say(f"a request failed: {error!r}")


class _Connection(socketserver.StreamRequestHandler):
    timeout = _READ_WITHIN_S

    def handle(self) -> None:
        server = self.server
        if not isinstance(server, Listener):
            raise TypeError
        line = self.rfile.readline(MAX_LINE_BYTES)
        answer = server.served.answer(line, lambda: self.wfile.write(b"\n")) if line.endswith(b"\n") else None
        if answer is not None:
            self.wfile.write(answer_line(answer))
