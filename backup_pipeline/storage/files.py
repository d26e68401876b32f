"""Files and folders by descriptor: durable, and never through a symbolic link.

directory.py is built on these, and recoveries lay out files by them. They raise OSError as it comes and know
nothing of objects.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
FOLDER_MODE, FILE_MODE = 0o700, 0o600
READ_BYTES = 4 * 1024 * 1024

_COPY_BYTES = 256 * 1024 * 1024
_NO_KERNEL_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def sync_file(file: int) -> None:
    """Have the disk hold what was written to `file`."""
    if sys.platform == "darwin":
        import fcntl  # not on every system

        fcntl.fcntl(file, fcntl.F_FULLFSYNC)
    else:
        os.fsync(file)


def sync_folder(folder: int) -> None:
    """Have the disk hold the names in `folder`, where the file system can be asked for it."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise


@contextlib.contextmanager
def folder_at(path: Path) -> Iterator[int]:
    """A descriptor of a folder, symbolic links followed."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


def sync_names(folder: Path) -> None:
    """Have the disk hold the names in a folder, symbolic links to it followed."""
    with folder_at(folder) as handle:
        sync_folder(handle)


def open_below(parent: int, name: str, *, create: bool) -> int:
    """A descriptor of the folder `name` in `parent`, made if need be."""
    try:
        return os.open(name, FOLDER, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, FOLDER_MODE, dir_fd=parent)
    return os.open(name, FOLDER, dir_fd=parent)


def rename(name: str, target: str, spool: int, folder: int) -> None:
    """Move `name` in `spool` to `target` in `folder`, replacing what is there."""
    os.replace(name, target, src_dir_fd=spool, dst_dir_fd=folder)


def link(name: str, target: str, spool: int, folder: int) -> None:
    """Give `name` in `spool` the name `target` in `folder` too, unless that is taken."""
    os.link(name, target, src_dir_fd=spool, dst_dir_fd=folder, follow_symlinks=False)


def remove(spool: int, name: str) -> None:
    """Remove a file if that is possible."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=spool)


def collect_stale(spool: int, before: float) -> None:
    """Remove unpublished files that nothing was written to since `before` (the file system's clock)."""
    with os.scandir(spool) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(name, dir_fd=spool, follow_symlinks=False).st_mtime < before:
                remove(spool, name)


def write_all(file: int, chunk: bytes) -> None:
    """Write all of `chunk`."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(file, rest) :]


def copy_bytes(source: int, target: int) -> None:
    """Copy a whole file; in the kernel where it can, so that blocks are shared where they can be."""
    if sys.platform == "linux":
        try:
            while os.copy_file_range(source, target, _COPY_BYTES):
                pass
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
        else:
            return
        os.lseek(source, 0, os.SEEK_SET)
        os.lseek(target, 0, os.SEEK_SET)
    while chunk := os.read(source, READ_BYTES):
        write_all(target, chunk)
