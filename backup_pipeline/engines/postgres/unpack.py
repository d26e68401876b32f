"""A base backup made a data directory again: in a new place, named only when every file was checked.

Called by actions/unpack.py, which brings the streams. Each file is compared, as it is written, with
PostgreSQL's own list of files; links of tablespaces are made here and never taken from an archive.
Recovering what was unpacked does not belong here.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backup_pipeline.domain.base_backup import Tablespace
from backup_pipeline.domain.file_list import FileList, ListedFile
from backup_pipeline.engines.postgres.tar import Entry, entries
from backup_pipeline.errors import BackupError, ConfigError, Corrupt, Refused, ToolError
from backup_pipeline.process import Identity

TABLESPACE_MAP = "tablespace_map"
LINKS = "pg_tblspc"
_UNFINISHED = ".unfinished"
_TAMPERED = "Do not use this backup; look for who changed it."


@dataclass(frozen=True)
class Places:
    """Where a base backup goes: its data directory, and each tablespace by oid."""

    data: Path
    tablespaces: Mapping[int, Path]

    @property
    def all(self) -> tuple[Path, ...]:
        """Every directory that will be made; the data directory last."""
        return (*self.tablespaces.values(), self.data)


def tablespaces_beside(data: Path) -> Path:
    """The folder of a data directory's tablespaces that were mapped nowhere."""
    return data.with_name(f"{data.name}.tablespaces")


def plan_places(
    data: Path, tablespaces: Iterable[Tablespace], mapped: Mapping[int, Path] | None = None
) -> Places:
    """Tablespaces go to `<data>.tablespaces/<oid>`, or where `mapped` says; nothing may be there yet.

    A tablespace that lay within the data directory stays there. Raises ConfigError, Refused.
    """
    data, given = data.absolute(), dict(mapped or {})
    beside = tablespaces_beside(data)
    outside = [item for item in tablespaces if item.location.startswith("/")]
    unknown = sorted(given.keys() - {item.oid for item in outside})
    if unknown:
        raise ConfigError(
            f"the backup has no tablespace {', '.join(map(str, unknown))}",
            hint=f"Its tablespaces: {', '.join(str(item.oid) for item in outside) or 'none'}.",
        )
    places = Places(
        data, {item.oid: (given.get(item.oid) or beside / str(item.oid)).absolute() for item in outside}
    )
    _refuse_overlap(places)
    for place in places.all:
        if any(char in os.fsencode(place) for char in b"\n\r") or not place.name:
            raise ConfigError(f"{place} cannot be the place of a data directory or a tablespace")
        if place.is_symlink() or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
            raise Refused(
                f"{place} is there already, and is not an empty directory",
                hint="Name a new directory; nothing was touched.",
            )
        if place.is_mount():
            raise Refused(
                f"{place} is where a file system is mounted, and could not be named last",
                hint="Name a directory within it; nothing was touched.",
            )
    return places


def _refuse_overlap(places: Places) -> None:
    for number, place in enumerate(places.all):
        for other in places.all[number + 1 :]:
            if place.is_relative_to(other) or other.is_relative_to(place):
                raise ConfigError(f"{place} and {other} would lie within one another")


@dataclass
class Unpacking:
    """Directories that are being filled; `add` each archive, the data directory's first."""

    places: Places
    listed: FileList
    owner: Identity | None
    durable: bool = True
    read_bytes: int = 0
    _missing: dict[bytes, ListedFile] = field(init=False, repr=False)
    _folders: dict[Path, set[bytes]] = field(default_factory=dict, repr=False)
    _named: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._missing = dict(self.listed.files)

    def add(self, tar: str, oid: int, chunks: Iterable[bytes]) -> None:
        """Unpack the tar of the data directory (oid 0) or of a tablespace. Raises Corrupt."""
        inside = f"{LINKS}/{oid}/".encode() if oid else b""
        root = self._root(oid)
        self._make_root(root)
        for entry in entries(chunks, tar):
            path = _below(root, entry.name, tar)
            if entry.name.rpartition(b"/")[0] not in self._folders[root]:
                raise _tampered(tar, entry.name, "lies in a folder that the tar did not make")
            if entry.is_folder:
                self._make_folder(root, path, entry.name, tar)
            else:
                self._write(path, entry, inside + entry.name, tar)

    def _root(self, oid: int) -> Path:
        if oid and oid not in self.places.tablespaces:  # it lies within the data directory
            return unfinished(self.places.data) / LINKS / str(oid)
        return unfinished(self.places.tablespaces[oid] if oid else self.places.data)

    def _make_root(self, root: Path) -> None:
        root.mkdir(mode=0o700)
        self._give(root)
        self._folders[root] = {b""}

    def _make_folder(self, root: Path, path: Path, name: bytes, tar: str) -> None:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise _tampered(tar, name, "is there twice") from None
        self._give(path)
        self._folders[root].add(name)

    def _write(self, path: Path, entry: Entry, listed_as: bytes, tar: str) -> None:
        expected = self._missing.pop(listed_as, None)
        if expected is None:
            twice = listed_as in self.listed.files
            raise _tampered(tar, entry.name, "is there twice" if twice else "is not in the list of files")
        digest = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = os.open(path, flags, 0o600)
        except FileExistsError:
            raise _tampered(tar, entry.name, "is there twice") from None
        with os.fdopen(handle, "wb", buffering=0) as file:
            for piece in entry.data:
                digest.update(piece)
                file.write(piece)
                self.read_bytes += len(piece)
            if self.owner is not None:
                os.fchown(handle, self.owner.uid, self.owner.gid)
        if entry.size_bytes != expected.size_bytes or digest.digest() != expected.sha256:
            raise _tampered(tar, entry.name, "is not the file that the list says, by its size or SHA-256")

    def _finish(self) -> None:
        """All is there: what the archives' own map said of tablespaces is replaced by links of ours."""
        if self._missing:
            first = min(self._missing)
            raise Corrupt(
                f"{len(self._missing)} files of the backup are missing, {os.fsdecode(first)!r} the first",
                hint=_TAMPERED,
            )
        root = unfinished(self.places.data)
        with contextlib.suppress(FileNotFoundError):
            if (root / TABLESPACE_MAP).stat().st_size:  # PostgreSQL would link to the source's places
                (root / TABLESPACE_MAP).unlink()
        for oid, place in self.places.tablespaces.items():
            link = root / LINKS / str(oid)
            link.symlink_to(place)
            if self.owner is not None:
                os.lchown(link, self.owner.uid, self.owner.gid)
        if self.durable:
            for place in self.places.all:
                _sync_below(unfinished(place))
        for place in self.places.all:
            if place.exists():
                place.rmdir()
            unfinished(place).rename(place)
            self._named.append(place)
            if self.durable:
                _sync(place.parent)

    def _give(self, path: Path) -> None:
        if self.owner is not None:
            os.chown(path, self.owner.uid, self.owner.gid)


@contextlib.contextmanager
def unpacking(
    places: Places, listed: FileList, *, owner: Identity | None = None, durable: bool = True
) -> Iterator[Unpacking]:
    """Fill new directories; when the block ends they get their names, whole, the data directory last.

    When it raises, nothing is left of them. `owner` is who the server will run as, if not us. Without
    `durable` a crash of the machine may cost what was written: PostgreSQL makes all of it durable itself
    before it replays.

    Raises Corrupt when a file is missing; Refused when another unpacking is, or died, in the same place.
    """
    for place in places.all:
        if unfinished(place).exists() or unfinished(place).is_symlink():
            raise Refused(
                f"{unfinished(place)} is there: another unpacking is under way, or was killed",
                hint="When none is under way, remove it and begin again.",
            )
    work = Unpacking(places, listed, owner, durable)
    beside = [place.parent for place in places.tablespaces.values() if not place.parent.exists()]
    try:
        for folder in dict.fromkeys(beside):
            folder.mkdir(mode=0o700)
            work._give(folder)
        yield work
        work._finish()
    except BaseException as error:
        _take_away((*map(unfinished, places.all), *work._named), beside)
        if isinstance(error, OSError) and not isinstance(error, BackupError):
            raise ToolError(
                f"cannot unpack into {places.data}: {error.strerror}",
                detail={"path": error.filename} if error.filename else {},
                hint="Look at the space, the rights and the health of that file system; nothing was left.",
            ) from error
        raise


def _take_away(folders: Iterable[Path], parents: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for parent in parents:
        with contextlib.suppress(OSError):
            parent.rmdir()


def unfinished(place: Path) -> Path:
    """What a directory is called until it is whole."""
    return place.with_name(place.name + _UNFINISHED)


def _below(root: Path, name: bytes, tar: str) -> Path:
    parts = name.split(b"/")
    if any(part in (b"", b".", b"..") for part in parts):
        raise _tampered(tar, name, "does not stay below its root")
    return root / os.fsdecode(name)


def _tampered(tar: str, name: bytes, what: str) -> Corrupt:
    return Corrupt(f"{tar}: {name[:200]!r} {what}", hint=_TAMPERED)


def _sync_below(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            if not os.path.islink(f"{folder}/{name}"):
                _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
