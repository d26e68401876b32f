"""The agent's work: pushes that were asked for, and those that PostgreSQL will ask for next.

Called by agent.py. PostgreSQL hands over one file at a time and waits; the names of those that follow lie in
`archive_status`. A few of them are archived meanwhile, and their results kept until they are asked for. A
result is believed only while the file is the one that was pushed.
"""

import heapq
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from backup_pipeline.domain.wal import WalKind, parse_wal_name
from backup_pipeline.errors import BackupError, ConfigError
from backup_pipeline.wal.archive import Pushed

WORKERS = 2
"""More bought nothing on two processors, and would take them from PostgreSQL on more."""

AHEAD = 8
_SCANNED = 64  # names that are remembered of one look into the folder, as PostgreSQL's archiver does
_READY = ".ready"

FileState = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Job:
    """One push: of which file in which state, and what comes of it."""

    path: Path
    state: FileState
    result: "Future[Pushed]"
    asked: bool


class Pusher:
    """Pushes files with a few threads. Safe to be called from any number of them."""

    def __init__(
        self, push: Callable[[Path], Pushed], *, log: Callable[[str], object], ahead: int = AHEAD
    ) -> None:
        self._push, self._log, self._ahead = push, log, ahead
        self._lock = threading.Lock()
        self._jobs: dict[Path, _Job] = {}
        self._names: list[str] = []  # to come, as the folder was when it was looked at
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="wal push")
        self._paused = False
        self.done = self.failed = 0

    def push(self, path: Path) -> "Future[Pushed]":
        """Have `path` archived, or learn that it was; and go on with what will be asked for next.

        Raises ConfigError when there is no such file, RuntimeError after `close`.
        """
        state = _state(path)
        with self._lock:
            job = self._jobs.pop(path, None)
            if job is None or job.state != state or _has_failed(job.result):
                job = self._begin(path, state, asked=True)
            if not job.result.done():
                self._jobs[path] = replace(job, asked=True)  # whoever asks meanwhile waits for the same
            if not self._paused:
                self._look_ahead(path)
        return job.result

    def close(self) -> None:
        """Finish what was begun, drop what was not, and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """How many results are kept, or under way."""
        return len(self._jobs)

    def _begin(self, path: Path, state: FileState, *, asked: bool) -> _Job:
        return _Job(path, state, self._pool.submit(self._carry_out, path, asked), asked)

    def _carry_out(self, path: Path, asked: bool) -> Pushed:
        try:
            pushed = self._push(path)
        except BaseException as error:
            self.failed += 1
            self._paused = True  # what fails is asked for again; others would fail as it did
            if asked or not isinstance(error, BackupError):
                self._log(f"{path.name} was not archived: {error}")
            raise
        finally:
            with self._lock:
                job = self._jobs.get(path)
                if job is not None and job.asked:
                    del self._jobs[path]  # those who asked hold it
        self.done += 1
        self._paused = False
        return pushed

    def _look_ahead(self, path: Path) -> None:
        """Begin pushes of files that are ready, so that AHEAD of them are done or under way."""
        folder = path.parent
        status = folder / "archive_status"
        for known, job in list(self._jobs.items()):
            if job.result.done() if job.asked else not (status / f"{known.name}{_READY}").exists():
                del self._jobs[known]  # told to whoever asked; archived by someone else, or no longer there
        wanted = self._ahead - sum(not job.asked for job in self._jobs.values())
        if wanted > 0 and not self._names:
            self._names = _ready_names(status)
        while wanted > 0 and self._names:
            next_path = folder / self._names.pop(0)
            if next_path in self._jobs or next_path == path:
                continue
            with suppress(ConfigError):
                if (status / f"{next_path.name}{_READY}").exists():
                    self._jobs[next_path] = self._begin(next_path, _state(next_path), asked=False)
                    wanted -= 1


def _state(path: Path) -> FileState:
    """What changes when a file is another one, or was written to. Raises ConfigError."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _has_failed(result: "Future[Pushed]") -> bool:
    return result.done() and (result.cancelled() or result.exception() is not None)


def _ready_names(status: Path) -> list[str]:
    """The first files that are ready, in PostgreSQL's order: histories, then by name."""
    found: list[tuple[bool, str]] = []
    with suppress(OSError), os.scandir(status) as entries:
        for entry in entries:
            name = entry.name.removesuffix(_READY)
            if name != entry.name:
                with suppress(ConfigError):
                    found.append((parse_wal_name(name).kind is not WalKind.HISTORY, name))
    return [name for _, name in heapq.nsmallest(_SCANNED, found)]
