"""What a directory is and can do, beyond what every place is tried for. bucket.py calls it."""

import os
from collections.abc import Sequence
from pathlib import Path

from backup_pipeline.errors import StoreError
from backup_pipeline.storage.bucket import Check, ProbeResult, failed, limited, ok
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import SPOOL

_LITTLE = 0.1
_GIB = 1024**3


def checks(store: DirectoryStore) -> Sequence[Check]:
    """What a directory is tried for."""
    root = store.root
    return (
        Check("durable folders", lambda: _durable(root), "A power cut may take the newest backups with it."),
        Check("one file system", lambda: _one_file_system(root), "Objects cannot be published there."),
        Check("free space", lambda: _free_space(root), "It is unknown whether backups still fit."),
        Check("private", lambda: _private(root), "Others may read the backups."),
        Check("a place of its own", _own_place, ""),
    )


def _durable(root: Path) -> ProbeResult:
    """Files were synced when the round trip was made; some file systems cannot sync folders."""
    folder = os.open(root / SPOOL, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        return limited(
            "durable folders",
            f"this file system does not sync folders: {error.strerror}",
            "A power cut may take the newest backups with it.",
        )
    finally:
        os.close(folder)
    return ok("durable folders", "files and folders are synced before a backup counts")


def _one_file_system(root: Path) -> ProbeResult:
    device = (root / SPOOL).stat().st_dev
    mounted = [
        entry.name
        for entry in _entries(root)
        if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_dev != device
    ]
    links = [entry.name for entry in _entries(root) if entry.is_symlink()]
    if mounted or links:
        names = ", ".join(sorted([*mounted, *links]))
        return failed(
            "one file system",
            f"within the folder, these are links or other file systems: {names}",
            "Objects cannot be published there; move the whole store instead.",
        )
    return ok("one file system", "all of the store lies on one file system")


def _entries(root: Path) -> Sequence[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            return tuple(entries)
    except OSError as error:
        raise StoreError(f"cannot list {root}: {error.strerror}") from error


def _free_space(root: Path) -> ProbeResult:
    told = os.statvfs(root)
    total, free = told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize
    found = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free"
    if told.f_files and told.f_favail < _LITTLE * told.f_files:
        found += f", and {told.f_favail} of {told.f_files} files"
    elif free >= _LITTLE * total:
        return ok("free space", found)
    return limited("free space", found, "Backups fail when it is used up; give it more room.")


def _private(root: Path) -> ProbeResult:
    mode = root.stat().st_mode & 0o777
    if mode & 0o077:
        return limited(
            "private",
            f"the folder's mode is {mode:o}: others can list it",
            "Objects are private (600) all the same; `chmod 700` closes the folder too.",
        )
    return ok("private", "only its owner can enter the folder")


def _own_place() -> ProbeResult:
    return limited(
        "a place of its own",
        "the backups lie in a folder of this machine",
        "What takes the machine, or whoever rules it, takes the backups too: keep them elsewhere as well.",
    )
