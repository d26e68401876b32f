"""A local directory as a store: durable, atomic, and safe against what others plant in it.

Opened through store.open_store. Bytes go to a private file in `.partial/`, are fsynced, then
renamed (or linked) into place, and every folder above is fsynced. All paths are walked folder by
folder on descriptors, so no symbolic link below the root is ever followed. What a directory can
and cannot do is told by bucket.py; what lies in it is not known here.
"""

import contextlib
import errno
import os
import secrets
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

from backup_pipeline.errors import ConfigError, ObjectExists, ObjectNotFound, StoreError
from backup_pipeline.storage import files
from backup_pipeline.storage.store import SPOOL, ObjectInfo, check_key, check_prefix

STALE_AFTER_S = 24 * 3600
"""How long nothing was written to an unpublished file before it counts as left by a crash."""

_RACES = 100
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_PERMISSION_HINT = "Let the user that runs this read and write the store's folder and all below it."
_HINTS = {
    errno.ENOSPC: "Free space on the disk of the store, or give it a larger one.",
    errno.EDQUOT: "Raise the quota of the user that runs this.",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f).",
    errno.EACCES: _PERMISSION_HINT,
    errno.EPERM: _PERMISSION_HINT,
    errno.EROFS: "The file system is mounted read-only: mount it for writing, or choose another place.",
    errno.ENOTDIR: "A file or a symbolic link stands where a folder is needed; move it away.",
    errno.EISDIR: "A folder stands where the object is to lie; move it away.",
    errno.EXDEV: "All of the store must lie on one file system; unmount what is mounted below its folder.",
}


def folder_of(url: str) -> Path:
    """The folder that a file:// URL names. Raises ConfigError unless it is an absolute local path."""
    path = unquote(url.removeprefix("file://"))
    if not path.startswith("/") or "\0" in path:
        raise ConfigError(
            f"store URL {url!r} does not name an absolute path on this machine",
            hint="Write it with three slashes: file:///srv/backups.",
        )
    return Path(path)


def create_root(root: Path) -> None:
    """Make the folder of a store, and those above it, durable and private; an existing one is kept."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        for folder in reversed(missing):
            folder.mkdir(files.FOLDER_MODE, exist_ok=True)
            with files.folder_at(folder) as parent, files.folder_at(folder.parent) as above:
                files.sync_folder(parent)
                files.sync_folder(above)
    except OSError as error:
        raise StoreError(f"cannot create the store's folder {root}: {error.strerror}") from error


class DirectoryStore:
    """A Store in a folder that exists."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with self._open([]):
            pass

    @property
    def url(self) -> str:
        """The folder as a file:// URL."""
        return self.root.absolute().as_uri()

    def put(
        self,
        key: str,
        chunks: Iterable[bytes],
        *,
        size_hint_bytes: int = 0,  # noqa: ARG002 - a disk needs no plan
        storage_class: str = "",  # noqa: ARG002 - a disk has no classes
    ) -> None:
        """See Store."""
        parts = check_key(key)
        with self._unpublished(key) as (spool, name, file):
            for chunk in chunks:
                with self._telling("write", key):
                    files.write_all(file, chunk)
            self._publish(key, parts, spool, name, file, files.rename)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """See Store. Of several writers exactly one succeeds."""
        parts = check_key(key)
        with self._unpublished(key) as (spool, name, file):
            with self._telling("write", key):
                files.write_all(file, data)
            self._publish(key, parts, spool, name, file, files.link)

    def settle(self, key: str) -> None:
        """See Store."""
        *above, _ = check_key(key)
        with self._object(key) as file, self._telling("settle", key), self._open(above) as folders:
            files.sync_file(file)
            for folder in reversed(folders):
                files.sync_folder(folder)

    def read(self, key: str) -> Iterator[bytes]:
        """See Store. What was opened is read to its end, whatever replaces it."""
        with self._object(key) as file:
            while True:
                with self._telling("read", key):
                    chunk = os.read(file, files.READ_BYTES)
                if not chunk:
                    return
                yield chunk

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        """See Store."""
        pieces: list[bytes] = []
        with self._object(key) as file, self._telling("read", key):
            while length > 0 and (piece := os.pread(file, length, offset)):
                pieces.append(piece)
                offset += len(piece)
                length -= len(piece)
        return b"".join(pieces)

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        with self._object(key) as file:
            return _info(key, os.fstat(file))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store. Holds the names of one folder per level in memory, of no more."""
        check_prefix(prefix)
        *above, rest = prefix.split("/")
        with contextlib.ExitStack() as stack:
            try:
                folders = stack.enter_context(self._open(above))
            except OSError as error:
                if error.errno in _ABSENT:
                    return
                raise self._failed("list", prefix, error) from error
            yield from self._walk(folders[-1], "".join(part + "/" for part in above), rest)

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """See Store. Folders that became empty go too."""
        by_folder: dict[tuple[str, ...], list[str]] = {}
        for key in keys:
            *above, name = check_key(key)
            by_folder.setdefault(tuple(above), []).append(name)
        refused: dict[str, str] = {}
        for folder, names in by_folder.items():
            refused |= self._delete_in(folder, names)
        return refused

    def copy(self, source: str, target: str, *, storage_class: str = "") -> None:  # noqa: ARG002 - as in put
        """See Store. Shares blocks where the file system can (a later write to either parts them)."""
        parts = check_key(target)
        with self._object(source) as original, self._unpublished(target) as (spool, name, file):
            with self._telling("copy", target):
                files.copy_bytes(original, file)
            self._publish(target, parts, spool, name, file, files.rename)

    # Folders

    @contextlib.contextmanager
    def _open(self, parts: Sequence[str], *, create: bool = False) -> Iterator[Sequence[int]]:
        """Descriptors of the root and of each folder below it along `parts`."""
        with contextlib.ExitStack() as stack:
            try:
                folders = [os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
            except OSError as error:
                raise self._no_root(error) from error
            stack.callback(os.close, folders[0])
            for part in parts:
                folders.append(files.open_below(folders[-1], part, create=create))
                stack.callback(os.close, folders[-1])
            yield folders

    def _walk(self, folder: int, path: str, rest: str) -> Iterator[ObjectInfo]:
        """The objects below `folder`, whose key is `path`, with names that begin with `rest`."""
        for name, is_folder in self._entries(folder, path, rest):
            if not is_folder:
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        yield _info(path + name, found)
                continue
            try:
                below = os.open(name, files.FOLDER, dir_fd=folder)
            except OSError as error:
                if error.errno in _ABSENT:
                    continue
                raise self._failed("list", path + name, error) from error
            try:
                yield from self._walk(below, f"{path}{name}/", "")
            finally:
                os.close(below)

    def _entries(self, folder: int, path: str, rest: str) -> Sequence[tuple[str, bool]]:
        """(name, is a folder) of what lies in one folder, in the order of the keys below."""
        found: list[tuple[str, bool]] = []
        with self._telling("list", path), os.scandir(folder) as entries:
            for entry in entries:
                is_folder = entry.is_dir(follow_symlinks=False)
                if not entry.name.startswith(rest) or not _is_text(entry.name):
                    continue
                if path or entry.name != SPOOL:
                    found.append((entry.name, is_folder))
        return sorted(found, key=lambda one: (one[0] + "/" if one[1] else one[0]).encode())

    def _delete_in(self, above: tuple[str, ...], names: Sequence[str]) -> dict[str, str]:
        """Delete objects of one folder, durably; then this folder and those above, if empty."""
        path = "".join(part + "/" for part in above)
        refused: dict[str, str] = {}
        try:
            with self._open(above) as folders:
                for name in names:
                    try:
                        os.unlink(name, dir_fd=folders[-1])
                    except OSError as error:
                        if error.errno not in _ABSENT:
                            refused[path + name] = error.strerror or str(error)
                files.sync_folder(folders[-1])
                with contextlib.suppress(OSError):
                    for depth in range(len(above), 0, -1):
                        os.rmdir(above[depth - 1], dir_fd=folders[depth - 1])
        except StoreError:
            raise
        except OSError as error:
            if error.errno not in _ABSENT:
                refused = {path + name: error.strerror or str(error) for name in names}
        return refused

    # Files

    @contextlib.contextmanager
    def _object(self, key: str) -> Iterator[int]:
        """A descriptor of one object."""
        *above, name = check_key(key)
        with contextlib.ExitStack() as stack:
            try:
                folders = stack.enter_context(self._open(above))
                file = os.open(name, files.READ, dir_fd=folders[-1])
                stack.callback(os.close, file)
                regular = stat.S_ISREG(os.fstat(file).st_mode)
            except StoreError:
                raise
            except OSError as error:
                if error.errno in _ABSENT:
                    raise self._absent(key) from None
                raise self._failed("read", key, error) from error
            if not regular:
                raise self._absent(key)
            yield file

    @contextlib.contextmanager
    def _unpublished(self, key: str) -> Iterator[tuple[int, str, int]]:
        """A new, private, hidden file as (its folder, its name there, itself), gone when left."""
        name = secrets.token_hex(16)
        with contextlib.ExitStack() as stack:
            with self._telling("write", key):
                spool = stack.enter_context(self._open([SPOOL], create=True))[-1]
                file = os.open(name, files.CREATE, files.FILE_MODE, dir_fd=spool)
                stack.callback(files.remove, spool, name)
                stack.callback(os.close, file)
                files.collect_stale(spool, os.fstat(file).st_mtime - STALE_AFTER_S)
            yield spool, name, file

    def _publish(
        self,
        key: str,
        parts: Sequence[str],
        spool: int,
        name: str,
        file: int,
        place: Callable[[str, str, int, int], None],
    ) -> None:
        """Make a complete file durable, then visible under its key, then that durable too."""
        with self._telling("write", key):
            files.sync_file(file)
            for _ in range(_RACES):
                try:
                    with self._open(parts[:-1], create=True) as folders:
                        place(name, parts[-1], spool, folders[-1])
                        # Every folder up to the root: another writer may have made one of them
                        # and not yet have synced it.
                        for folder in reversed(folders):
                            files.sync_folder(folder)
                    return
                except FileNotFoundError:
                    continue  # a delete took the empty folder away
                except FileExistsError:
                    raise ObjectExists(f"object {key} is already in {self.url}") from None
        raise StoreError(f"cannot write {key} in {self.url}: its folder or unpublished file kept vanishing")

    # Errors

    @contextlib.contextmanager
    def _telling(self, doing: str, key: str) -> Iterator[None]:
        """Turn the operating system's errors into ours."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            raise self._failed(doing, key, error) from error

    def _absent(self, key: str) -> ObjectNotFound:
        return ObjectNotFound(f"no object {key} in {self.url}")

    def _no_root(self, error: OSError) -> StoreError:
        if error.errno == errno.ENOENT:
            return StoreError(
                f"the store's folder {self.root} does not exist",
                hint=f"Mount its disk, or create it: mkdir -m 700 {shlex.quote(str(self.root))}",
            )
        return StoreError(
            f"the store's folder {self.root} cannot be opened: {error.strerror}",
            hint=_HINTS.get(error.errno or 0, ""),
        )

    def _failed(self, doing: str, key: str, error: OSError) -> StoreError:
        return StoreError(
            f"cannot {doing} {key or 'objects'} in {self.url}: {error.strerror or error}",
            hint=_HINTS.get(error.errno or 0, ""),
        )


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(
        key=key,
        size_bytes=found.st_size,
        etag=f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}",
        modified_at=datetime.fromtimestamp(found.st_mtime, UTC),
    )


def _is_text(name: str) -> bool:
    """Whether a file's name is one that a key can have; others were put there by someone else."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
