"""Private folders for bytes on their way, gone afterwards whatever happens.

They lie below the system's folder for temporary files ($TMPDIR). A folder is held by a lock that
the kernel drops when its process dies, so that the next run collects what a kill left behind.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from backup_pipeline.errors import BackupError, Refused
from backup_pipeline.units import show_bytes


def root() -> Path:
    """The folder that holds all of this user's spools, 0700 and ours."""
    folder = Path(tempfile.gettempdir()) / f"backup_pipeline-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise BackupError(
            f"{folder}: expected a private folder of this user, found one that others own or can open",
            hint="Remove it, or set TMPDIR to a folder of your own.",
        )
    return folder


@contextlib.contextmanager
def private_folder(purpose: str) -> Iterator[Path]:
    """An empty folder that only this user can open; removed on leaving."""
    base = root()
    collect(base)
    lock, folder = _claim(base, purpose)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)
        os.close(lock)


def collect(base: Path) -> None:
    """Remove the folders whose process is gone."""
    for path in base.glob("*.lock"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
            finally:
                os.close(lock)


def require_free(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse when `folder`'s file system has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise Refused(
            f"{what}: {show_bytes(needed_bytes)} needed in {folder}, {show_bytes(free)} free",
            hint="Free some space, or set TMPDIR to a folder on a larger disk.",
        )


def _claim(base: Path, purpose: str) -> tuple[int, Path]:
    while True:
        path = base / f"{purpose}-{os.urandom(4).hex()}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A collector may have taken the file between its creation and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == path.stat().st_ino:
                return lock, path.with_suffix("")
        os.close(lock)
