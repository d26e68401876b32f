"""What answers restore_command while a cluster of ours recovers: files of the archive, fetched ahead.

Called by actions/replay.py, which knows from its plan what PostgreSQL will ask for. Files are fetched whole
and verified (fetch.py) into a spool on pg_wal's own file system, and renamed to where PostgreSQL wants them.
An archive that cannot be reached is waited for; after that, and whatever else is wrong, the answer ends the
recovery: it is never one that PostgreSQL reads as the end of the WAL.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from backup_pipeline.domain.wal import WalKind, parse_wal_name
from backup_pipeline.errors import BackupError, ConfigError, NotArchived, Refused
from backup_pipeline.process import Identity
from backup_pipeline.wal.fetch import ABSENT, FATAL, restore_exit_code
from backup_pipeline.wal.listener import Listener
from backup_pipeline.wal.protocol import PULSE_S, Answer, read_request

_TARGETS = ("RECOVERYXLOG", "RECOVERYHISTORY")
AHEAD = 8
WORKERS = 2
_RETRY_S = 1.0

Fetch = Callable[[str, Path], object]
"""Puts the archived file of a name at a path; see fetch.fetch."""


@dataclass
class Prefetch:
    """Serves one recovery. `bring` is called by one client at a time, the rest from any thread.

    `order` are the segments that the plan knows of, in the order of the replay: none of them may be missing,
    and no other one exists for this recovery, whatever the archive has got since, or has of another branch.
    The spool lies in pg_wal, and files are put there alone. `patience_s` is how long an archive that does
    not answer is waited for.
    """

    fetch: Fetch
    order: Sequence[str]
    spool: Path
    owner: Identity | None = None
    patience_s: float = 300.0
    tell: Callable[[str], object] = lambda _: None
    brought: list[str] = field(default_factory=list)
    failure: BackupError | None = None
    _places: dict[str, int] = field(default_factory=dict, init=False)
    _under_way: dict[str, "Future[None]"] = field(default_factory=dict, init=False)
    _pool: ThreadPoolExecutor = field(init=False)
    _ended: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        self._places = {name: place for place, name in enumerate(self.order)}
        self._pool = ThreadPoolExecutor(WORKERS, "prefetch")
        self.spool.mkdir(mode=0o700)

    def answer(self, line: bytes, pulse: Callable[[], object]) -> Answer | None:
        """Do what restore_command's client asks for."""
        try:
            request = read_request(line)
        except ConfigError as error:
            return Answer(FATAL, error.message)
        if request.op != "fetch":
            return Answer(FATAL, f"a recovery knows no {request.op}", request.name)
        code, said = self.bring(request.name, Path(request.path), pulse)
        return Answer(code, said, request.name)

    def say(self, line: str) -> object:
        """Take a line for the log."""
        return self.tell(line)

    def bring(self, name: str, target: Path, pulse: Callable[[], object] = lambda: None) -> tuple[int, str]:
        """Put the file at `target`; (restore_command's exit code, what to say), with a `pulse` meanwhile."""
        try:
            if target.name not in _TARGETS:
                raise Refused(f"{target} is no place that PostgreSQL wants WAL at")
            if name not in self._places and parse_wal_name(name).kind is not WalKind.HISTORY:
                return ABSENT, ""
            future = self._under_way.pop(name, None) or self._submit(name)
            self._look_ahead(name)
            _await(future, pulse)
            os.replace(self.spool / name, self.spool.parent / target.name)
        except NotArchived as error:
            if name not in self._places:
                return restore_exit_code(error), ""
            missing = Refused(f"{name}, which the plan needs, is no longer in the archive", hint=error.hint)
            return self._fatal(missing)
        except BackupError as error:
            return self._fatal(error)
        except OSError as error:
            return self._fatal(BackupError(f"cannot put {name} at {target}: {error.strerror}"))
        self.brought.append(name)
        return 0, ""

    def close(self) -> None:
        """Give up what is under way."""
        self._ended.set()
        self._pool.shutdown(cancel_futures=True)

    def _fatal(self, error: BackupError) -> tuple[int, str]:
        self.failure = error
        return FATAL, str(error)

    def _look_ahead(self, name: str) -> None:
        place = self._places.get(name)
        if place is None:
            return
        for following in self.order[place + 1 : place + 1 + AHEAD]:
            if following not in self._under_way:
                self._under_way[following] = self._submit(following)

    def _submit(self, name: str) -> "Future[None]":
        return self._pool.submit(self._fetch, name)

    def _fetch(self, name: str) -> None:
        path = self.spool / name
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                self.fetch(name, path)
                if self.owner is not None:
                    os.chown(path, self.owner.uid, self.owner.gid)
                return
            except BackupError as error:
                if not error.retryable or time.monotonic() > deadline:
                    raise
                self.tell(f"{name}: {error.message}; trying again")
            if self._ended.wait(_RETRY_S):
                raise Refused(f"{name} was not fetched: the recovery ended")


@contextlib.contextmanager
def serving(prefetch: Prefetch, socket: Path) -> Iterator[None]:
    """Answer at `socket` while the block runs."""
    with Listener(prefetch, socket, owner=prefetch.owner) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        try:
            yield
        finally:
            prefetch.close()
            listener.shutdown()
            thread.join()
            socket.unlink(missing_ok=True)


def _await(future: "Future[None]", pulse: Callable[[], object]) -> None:
    while not wait([future], timeout=PULSE_S).done:
        pulse()
    future.result()
