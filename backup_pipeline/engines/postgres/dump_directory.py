"""pg_dump in the directory format, with several workers: through a spool, file by file.

Called by the action that takes a dump. A file is handed on once pg_dump has closed it, and removed after
that; the last one comes only from a pg_dump that has ended well.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.engines.postgres.dump import DumpOptions, Watch, Watched, running
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.errors import Refused
from backup_pipeline.units import show_bytes

SPOOL_RESERVE_BYTES = 256 * 1024 * 1024
"""A spool's file system is never filled beyond this."""

_POLL_S = 0.2
_TOC = "toc.dat"


@dataclass(frozen=True)
class SpooledFile:
    """One complete file of a directory dump. It is removed when the next one is asked for."""

    name: str
    path: Path
    size_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, 1 MiB at a time."""
        with self.path.open("rb", buffering=0) as file:
            while chunk := file.read(process.CHUNK_BYTES):
                yield chunk


@contextlib.contextmanager
def dump_directory(
    pg_dump: str,
    endpoint: Endpoint,
    snapshot: Watched,
    *,
    spool: Path,
    jobs: int,
    compress_option: str,
    stall_s: float = 900.0,
) -> Iterator[Iterator[SpooledFile]]:
    """Run pg_dump with `jobs` workers into `spool` (private, ours) and yield each file once it is closed.

    Each file is removed when the next one is asked for, so the spool holds what is being written and
    what waits for its upload. `toc.dat` comes last, and only from a pg_dump that has ended well: what
    was yielded before is no dump without it. Otherwise as dump.stream_custom; raises Refused when the
    spool's disk has less than 256 MiB left.
    """
    directory = spool / "dump"
    _require_space(spool)
    how = DumpOptions(compress_option, stall_s, directory, jobs)
    with contextlib.ExitStack() as workers, running(pg_dump, endpoint, snapshot, how) as watch:

        def keep_workers() -> None:  # they are all there before the first file
            workers.callback(_kill, _children(watch.child.pid))

        workers.callback(shutil.rmtree, directory, ignore_errors=True)
        yield _files(directory, watch, keep_workers)


def _files(directory: Path, watch: Watch, keep_workers: Callable[[], None]) -> Iterator[SpooledFile]:
    started, written = False, -1
    while watch.child.poll() is None:
        present = _present(directory)
        if present and not started:
            started = True
            keep_workers()
        total = sum(size for _, size in present)
        if total != written:
            written = total
            watch.spoke()
        watch.look()
        _require_space(directory.parent)
        closed = [path for path, _ in present if path.name != _TOC and _is_closed(path)]
        for path in closed:
            yield from _hand_over(path)
        if closed:
            watch.spoke()
        else:
            time.sleep(_POLL_S)
    watch.finish()
    for path, _ in sorted(_present(directory), key=lambda item: item[0].name == _TOC):
        yield from _hand_over(path)


def _children(pid: int) -> list[int]:
    """Handles of a process's children; they stay theirs when a number is used again. Linux; else none."""
    handles = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                handles.append(os.pidfd_open(int(child)))
    return handles


def _kill(handles: Iterable[int]) -> None:
    """End pg_dump's workers: without their leader they would write to the end of their tables."""
    for handle in handles:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def _hand_over(path: Path) -> Iterator[SpooledFile]:
    yield SpooledFile(path.name, path, path.stat().st_size)
    path.unlink()


def _present(directory: Path) -> list[tuple[Path, int]]:
    try:
        with os.scandir(directory) as entries:
            return sorted((Path(entry.path), entry.stat().st_size) for entry in entries)
    except FileNotFoundError:
        return []


def _is_closed(path: Path) -> bool:
    """Whether nobody has `path` open for writing: the kernel gives a read lease only then.

    pg_dump opens each file once, when it creates it, so what was closed is complete. False where
    there are no leases (not Linux, some network file systems): then files wait for pg_dump's end.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    with path.open("rb", buffering=0) as file:
        try:
            # Whoever breaks a lease signals its holder; ours lasts microseconds, but SIGIO would kill us.
            fcntl.fcntl(file, getattr(fcntl, "F_SETSIG", 10), signal.SIGURG)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
    return True


def _require_space(spool: Path) -> None:
    free = shutil.disk_usage(spool).free
    if free < SPOOL_RESERVE_BYTES:
        raise Refused(
            f"the spool {spool} has {show_bytes(free)} free, and needs {show_bytes(SPOOL_RESERVE_BYTES)}",
            hint="Set jobs = 1, which needs no spool, or TMPDIR to a folder on a larger disk.",
        )
