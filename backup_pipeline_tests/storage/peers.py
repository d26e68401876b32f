"""Loopback peers that misbehave: what no well-meaning server can be asked to do."""

import contextlib
import http.client
import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What it is told."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Fault(StrEnum):
    """What a proxy does to one request instead of passing it on and its answer back."""

    NONE = "none"
    BUSY = "answers 503 itself"
    DENIED = "answers 403 itself"
    DROPPED = "closes the connection before the server sees the request"
    LOST = "lets the server do it, and closes the connection without an answer"
    CUT = "passes on half of the answer's body, and closes the connection"
    SILENT = "reads the request and never answers"
    STALLED = "passes on half of the answer's body and nothing more"


@contextlib.contextmanager
def answering(answer: Callable[[Request], Answer]) -> Iterator[str]:
    """An HTTP server that answers by `answer`; its address."""

    class Handler(_Handler):
        def respond(self, request: Request) -> None:
            self.send(answer(request))

    with _serving(Handler) as address:
        yield address


@contextlib.contextmanager
def proxy(server: str, fault: Callable[[int, Request], Fault]) -> Iterator[str]:
    """A proxy before `server` that treats the n-th request (from 0) by `fault`; its address.

    The Host header is passed on, so signatures made for the proxy hold at the server.
    """
    numbers = iter(range(10**9))
    lock = threading.Lock()
    over = threading.Event()

    class Handler(_Handler):
        def respond(self, request: Request) -> None:
            with lock:
                number = next(numbers)
            kind = fault(number, request)
            if kind in (Fault.DROPPED, Fault.SILENT):
                if kind is Fault.SILENT:
                    over.wait()
                self.close_connection = True
                return
            if kind is Fault.BUSY:
                self.send(Answer(503, b"<Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>"))
                return
            if kind is Fault.DENIED:
                self.send(Answer(403, b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>"))
                return
            answer = _forward(server, request)
            if kind is Fault.LOST:
                self.close_connection = True
            elif kind in (Fault.CUT, Fault.STALLED):
                self.send(answer, only=len(answer.body) // 2)
                self.wfile.flush()
                if kind is Fault.STALLED:
                    over.wait()
                self.close_connection = True
            else:
                self.send(answer)

    with _serving(Handler) as address:
        try:
            yield address
        finally:
            over.set()


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A TCP server that accepts every connection and never says anything; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in accepted:
                connection.close()


def refusing() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def respond(self, request: Request) -> None:
        raise NotImplementedError

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()
            return
        self.close_connection = True

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.respond(Request(self.command, self.path, dict(self.headers.items()), body))

    def __getattr__(self, name: str) -> object:
        if name.startswith("do_"):  # BaseHTTPRequestHandler calls do_GET, do_PUT and so on
            return self._any
        raise AttributeError(name)

    def send(self, answer: Answer, *, only: int | None = None) -> None:
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body))} | answer.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:only])

    def log_message(self, format: str, *args: object) -> None:
        pass


def _forward(server: str, request: Request) -> Answer:
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(request.body)
        response = connection.getresponse()
        kept = {
            name: value
            for name, value in response.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "date", "server")
        }
        return Answer(response.status, response.read(), kept)


@contextlib.contextmanager
def _serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
