"""Private folders for bytes on their way, gone afterwards whatever happens.

They lie below the system's folder for temporary files ($TMPDIR). A folder is held by a lock that
the kernel drops when its process dies, so that the next run collects what a kill left behind.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from backup_pipeline.errors import Refused, ToolError
from backup_pipeline.units import show_bytes

_LOCK = "lock"
_UNCLAIMED_S = 3600.0  # a folder without a lock file was made by a process that died in that moment

Ending = Callable[[Path], object]
"""What is done to an abandoned folder before it is removed."""


@contextlib.contextmanager
def private_folder(
    purpose: str, *, parent: Path | None = None, mode: int = 0o700, ending: Ending = lambda _: None
) -> Iterator[Path]:
    """A new folder `backup-<purpose>-…` below `parent`, gone at the end, or, after a kill, when the
    next one of its purpose is made.

    A lock on a file in it says that its maker lives; the system gives the lock back when it does not.
    """
    place = parent or Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    collect_stale(purpose, place, ending)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(purpose), dir=place))
    try:
        # Locked before it has its name: a collector never sees it without its lock.
        with (folder / "lock.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock.new").rename(folder / _LOCK)
            folder.chmod(mode)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def collect_stale(purpose: str, parent: Path, ending: Ending = lambda _: None) -> tuple[Path, ...]:
    """Remove what killed processes of this user left below `parent`, and return what was removed."""
    removed = []
    for folder in parent.glob(f"{_prefix(purpose)}*"):
        with contextlib.suppress(OSError, ToolError):
            if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
                continue
            if _is_abandoned(folder):
                ending(folder)
                shutil.rmtree(folder)
                removed.append(folder)
    return tuple(removed)


def require_free(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse when `folder`'s file system has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise Refused(
            f"{what}: {show_bytes(needed_bytes)} needed in {folder}, {show_bytes(free)} free",
            hint="Free some space, or set TMPDIR to a folder on a larger disk.",
        )


def _prefix(purpose: str) -> str:
    return f"backup-{purpose}-"


def _is_abandoned(folder: Path) -> bool:
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime > _UNCLAIMED_S
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
