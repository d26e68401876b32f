"""The long-lived process beside PostgreSQL that archive_command's client talks to, on a Unix socket.

Started by `backup-pipeline wal agent`, as PostgreSQL's own user. The socket's folder lets in that user alone.
Lines are protocol.py's, the work ahead.py's. When it is gone, at whatever moment, nothing is lost: what it
had not answered, the client does itself.
"""

import contextlib
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline.errors import BackupError, Busy, ConfigError
from backup_pipeline.wal.ahead import Pusher
from backup_pipeline.wal.archive import Pushed, WalArchive
from backup_pipeline.wal.listener import Listener
from backup_pipeline.wal.protocol import (
    NOT_MINE,
    PULSE_S,
    VERSION,
    Answer,
    Request,
    read_request,
)

FAILED, TOO_LATE = 1, 75
_AT_ONCE = 32
_READ_WITHIN_S = 10.0
_SOCKET_PATH_BYTES = 107  # sun_path, less its closing zero
_POLL_S = 0.2


@dataclass(frozen=True)
class AgentConfig:
    """Where an agent listens, for whom, and how long it works on one file before it says no."""

    socket: Path
    cluster: str
    push_timeout_s: float
    program_version: str = ""


class Agent:
    """Serves one cluster's WAL until it is stopped."""

    def __init__(self, config: AgentConfig, archive: WalArchive, *, log: Callable[[str], object]) -> None:
        self.config, self.say = config, log
        self._archive, self.pusher = archive, Pusher(archive.push, log=log)
        self._since_s = time.monotonic()

    def serve(self, stop: threading.Event) -> None:
        """Listen until `stop` is set; then finish what was begun, answer, and return.

        Raises Busy when another agent listens there, ConfigError for a folder that others may enter.
        """
        with _alone(self.config.socket), Listener(self, self.config.socket) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": _POLL_S})
            thread.start()
            threading.Thread(target=self._look, daemon=True).start()
            self.say(f"agent of {self.config.cluster} listens at {self.config.socket}")
            try:
                stop.wait()
            finally:
                self.say(f"agent of {self.config.cluster} finishes what it has begun")
                server.shutdown()
                thread.join()
                self.config.socket.unlink(missing_ok=True)
                self.pusher.close()

    def _look(self) -> None:
        """Open the store's clients, which takes a second, before the first segment waits for it."""
        try:
            self.say(f"the archive of {self.config.cluster} takes WAL of {self._archive.look()}")
        except BackupError as error:
            self.say(f"the archive of {self.config.cluster} cannot be used: {error}")

    def answer(self, line: bytes, pulse: Callable[[], object]) -> Answer | None:
        """What to say to a line; None: nothing, and the client does without. `pulse` shows work."""
        try:
            request = read_request(line)
        except ConfigError as error:
            return Answer(NOT_MINE, error.message)
        why = self._not_mine(request)
        if why:
            return Answer(NOT_MINE, why, request.name)
        if request.op == "status":
            return Answer(0, told=tuple(self._facts().items()))
        try:
            result = self.pusher.push(Path(request.path))
        except BackupError as error:
            return Answer(FAILED, str(error), request.name)
        except RuntimeError:  # it is closing
            return None
        return self._outcome(request, result, pulse)

    def _not_mine(self, request: Request) -> str:
        if request.version != VERSION:
            return f"this agent speaks version {VERSION}"
        if request.cluster != self.config.cluster:
            return f"this is the agent of cluster {self.config.cluster}, not of {request.cluster}"
        if request.op not in ("push", "status"):
            return f"this agent knows no {request.op}"
        return ""

    def _outcome(
        self, request: Request, result: "Future[Pushed]", pulse: Callable[[], object]
    ) -> Answer | None:
        deadline_s = time.monotonic() + self.config.push_timeout_s
        while not wait((result,), timeout=min(PULSE_S, max(0.0, deadline_s - time.monotonic()))).done:
            if time.monotonic() >= deadline_s:
                said = f"{request.name} was not archived within {self.config.push_timeout_s:g} s"
                return Answer(TOO_LATE, f"{said}; it is still being tried", request.name)
            pulse()
        try:
            result.result()
        except CancelledError:
            return None
        except Exception as error:
            return Answer(FAILED, str(error), request.name)
        return Answer(0, "", request.name)

    def _facts(self) -> dict[str, str]:
        return {
            "program": self.config.program_version,
            "pid": str(os.getpid()),
            "running_s": f"{time.monotonic() - self._since_s:.0f}",
            "archived": str(self.pusher.done),
            "failed": str(self.pusher.failed),
            "ahead": str(self.pusher.waiting),
        }


@contextlib.contextmanager
def _alone(socket: Path) -> Iterator[None]:
    """Be the only agent on `socket`, in a folder that nobody else may enter; a dead one's is removed."""
    if len(os.fsencode(socket)) > _SOCKET_PATH_BYTES:
        raise ConfigError(f"the socket's path {socket} is longer than {_SOCKET_PATH_BYTES} bytes")
    folder = socket.parent
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigError(
                f"the folder of the agent's socket, {folder}, lets in others than this user",
                hint=f"Give it to PostgreSQL's user alone: chmod 700 {folder}; or name another `socket`.",
            )
        lock = os.open(f"{socket}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {socket}: {error.strerror}",
            hint="Make its folder for PostgreSQL's user (the systemd unit does), or name another `socket`.",
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(f"another agent listens at {socket} already", hint="One is enough.") from None
        socket.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)
