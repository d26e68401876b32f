"""Push one file of pg_wal into the archive: PostgreSQL's contract for archive_command, on any store.

Called by the agent, by `backup-pipeline wal push` where there is none, and by the receiver. When it returns,
the file is in the store, durable and whole. The same bytes again are done already; other bytes under one name
are refused, and nothing is written. What fetches is fetch.py; exit codes are the doors'.

Source: PostgreSQL, "Continuous Archiving", "Setting Up WAL Archiving".
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backup_pipeline.domain.layout import (
    ArchivedWal,
    parse_wal_key,
    wal_identity_key,
    wal_key,
    wal_name_prefix,
)
from backup_pipeline.domain.wal import (
    HEADER_BYTES,
    WalKind,
    WalName,
    check_segment,
    parse_history,
    parse_wal_name,
    read_segment_header,
)
from backup_pipeline.domain.wal_archive import ArchiveIdentity
from backup_pipeline.errors import ConfigError, ObjectExists, ObjectNotFound, Refused, StoreError
from backup_pipeline.storage.store import ObjectInfo, Store
from backup_pipeline.wal.identity import Door, read_identity, read_system_identifier
from backup_pipeline.wal.packing import CHUNK_BYTES, opened, packed, read

MAX_TEXT_BYTES = 1024 * 1024
"""So long may a history, or a backup's label, be at most; they have some hundred bytes."""


@dataclass(frozen=True)
class Pushed:
    """One file that is in the archive; `already` when it had been there before."""

    name: str
    key: str
    plain_bytes: int
    stored_bytes: int
    already: bool = False


class WalArchive:
    """The archive of one cluster, for pushing. Safe to use from several threads."""

    def __init__(self, store: Store, cluster: str, *, data_directory: Path | None = None) -> None:
        self.store, self.cluster = store, cluster
        self._door = Door(store, cluster)
        self._data_directory = data_directory
        self._known: set[tuple[str, int]] = set()  # systems' timelines whose history is archived

    def look(self) -> str:
        """Ask the store once, which opens its clients; whose the archive is. Raises StoreError, Corrupt."""
        first = next(self.store.list(wal_identity_key(self.cluster)), None)
        identity = read_identity(self.store, self.cluster) if first else None
        if identity is None:
            return f"nobody: it has not begun; `backup-pipeline wal setup {self.cluster} --apply` begins it"
        return f"PostgreSQL system {identity.system_identifier}"

    def push(self, path: Path) -> Pushed:
        """Archive the file at `path`, absolute, in pg_wal of a data directory. Durable on return.

        Raises Refused for another system's WAL, and for other bytes under a name that is taken; Corrupt for a
        file that is not what its name says; StoreError, also where no archive was begun; ConfigError.
        """
        name = parse_wal_name(path.name)
        system = read_system_identifier(self._source(path))
        with opened(path) as file:
            if name.kind is WalKind.HISTORY:
                _check(name, file, system)
                return self.push_history(name.timeline, read(file, MAX_TEXT_BYTES), system)
            return self.push_file(
                name, file, system, before=lambda: self._push_history_of(name.timeline, path.parent, system)
            )

    def push_file(
        self, name: WalName, file: IO[bytes], system: str, *, before: Callable[[], object] = lambda: None
    ) -> Pushed:
        """Archive an open file of the cluster `system` under `name`; `before` archives what comes first.

        Raises as `push` does.
        """
        segment_bytes = _check(name, file, system)
        identity = self._door.enter(system)
        if segment_bytes not in (0, identity.segment_bytes):
            raise Refused(
                f"{name.text} has {segment_bytes} bytes; the archive of {self.cluster} takes segments "
                f"of {identity.segment_bytes}",
                hint="After a change of --wal-segsize, take a base backup behind "
                f"`backup-pipeline wal setup {self.cluster} --adopt`.",
            )
        before()
        with packed(file) as (pack, digest, plain_bytes):
            pushed = self._store(name, system, pack, digest, plain_bytes)
        self._door.enter(system)  # again: a disk that was unmounted meanwhile took the archive with it
        return pushed

    def push_history(self, timeline: int, data: bytes, system: str) -> Pushed:
        """Archive where a timeline came from. Raises as `push` does."""
        self._door.enter(system)
        pushed = self._push_history(parse_wal_name(f"{timeline:08X}.history"), system, data)
        self._door.enter(system)
        return pushed

    def enter(self, system: str) -> ArchiveIdentity:
        """The record of the archive, if it takes this system's WAL. Raises Refused, StoreError, Corrupt."""
        return self._door.enter(system)

    def _push_history_of(self, timeline: int, pg_wal: Path, system: str) -> None:
        """Archive where a timeline came from before its first segment: without it none can be recovered.

        A server that was recovered with archiving off, and has it on now, never hands the file over.
        """
        path = pg_wal / f"{timeline:08X}.history"
        if (system, timeline) in self._known or timeline == 1 or not path.exists():
            return
        with opened(path) as file:
            self._push_history(parse_wal_name(path.name), system, read(file, MAX_TEXT_BYTES))
        self._known.add((system, timeline))

    def _source(self, path: Path) -> Path:
        """The data directory whose pg_wal `path` lies in."""
        if not path.is_absolute():
            raise ConfigError(f"{path} is not absolute")
        found = path.parent.parent
        wanted = self._data_directory
        with suppress(OSError):
            if wanted is None or os.path.samefile(found, wanted):
                return found
        raise Refused(
            f"{path} is not in pg_wal of {wanted}, the data directory of cluster {self.cluster}",
            hint=f"Correct data_directory of clusters.{self.cluster}, or the name in archive_command.",
        )

    def _store(self, name: WalName, system: str, packed: IO[bytes], digest: str, plain_bytes: int) -> Pushed:
        key = wal_key(self.cluster, system, name, digest)
        size_bytes = packed.seek(0, os.SEEK_END)
        found = self._found(name, system, digest)
        # Of another length it is torn, or another zstd packed it. Writing it again does no harm: its key says
        # which plain bytes it holds.
        if found is not None and found.size_bytes == size_bytes:
            self.store.settle(key)
            return Pushed(name.text, key, plain_bytes, size_bytes, already=True)
        packed.seek(0)
        self.store.put(key, iter(lambda: packed.read(CHUNK_BYTES), b""), size_hint_bytes=size_bytes)
        # Asked again: a server may say yes and keep nothing, and another writer may have come in between.
        found = self._found(name, system, digest)
        if found is None or found.size_bytes != size_bytes:
            there = f"has {found.size_bytes} bytes" if found else "is not there"
            raise StoreError(
                f"{key} {there} after {size_bytes} bytes were written to {self.store.url}",
                hint="The store lost what it had acknowledged: look at it before anything else.",
            )
        return Pushed(name.text, key, plain_bytes, size_bytes)

    def _found(self, name: WalName, system: str, digest: str) -> ObjectInfo | None:
        """The object of this name and digest; None when there is none. Raises Refused for another digest."""
        objects = objects_of(self.store, self.cluster, system, name)
        others = [archived for _, archived in objects if archived.sha256 != digest]
        if others and name.kind is not WalKind.PARTIAL:  # of which each is the beginning of the same
            raise Refused(
                f"{name.text} is in the archive of {self.cluster} already, with other bytes",
                detail={"there": ", ".join(sorted(one.sha256 for one in others)), "here": digest},
                hint="Two servers archive as one cluster, as a copy and its source do, or this was reset. "
                "Nothing was overwritten, and what is archived may be the copy's: look with pg_waldump "
                "which is the right one, and stop the other's archiving. If the archive has the wrong one, "
                "move that and what follows it away, and take a base backup.",
            )
        return next((info for info, archived in objects if archived.sha256 == digest), None)

    def _push_history(self, name: WalName, system: str, data: bytes) -> Pushed:
        parse_history(name.timeline, data)
        key = wal_key(self.cluster, system, name, "")
        pushed = Pushed(name.text, key, len(data), len(data))
        with suppress(ObjectNotFound):
            self._compare_history(key, name, data)
            return Pushed(name.text, key, len(data), len(data), already=True)
        with suppress(ObjectExists):
            self.store.put_if_absent(key, data)
        self._compare_history(key, name, data)
        return pushed

    def _compare_history(self, key: str, name: WalName, data: bytes) -> None:
        """Raise Refused unless exactly these bytes are there, durable; ObjectNotFound when nothing is."""
        if self.store.read_range(key, offset=0, length=MAX_TEXT_BYTES + 1) != data:
            raise Refused(
                f"{name.text} is in the archive of {self.cluster} already, with other bytes",
                hint="Two servers were promoted to one timeline: nothing was overwritten. Promote one of "
                "them anew, so that it takes the next number, or give it an archive of its own.",
            )
        self.store.settle(key)


def objects_of(
    store: Store, cluster: str, system_identifier: str, name: WalName
) -> list[tuple[ObjectInfo, ArchivedWal]]:
    """The objects of one name, of which there should be one at most."""
    listed = store.list(wal_name_prefix(cluster, system_identifier, name))
    parsed = ((info, parse_wal_key(info.key)) for info in listed)
    return [(info, archived) for info, archived in parsed if archived and archived.name == name]


def _check(name: WalName, file: IO[bytes], system: str) -> int:
    """Raise Corrupt unless the file is what its name says; the size of segments, 0 when it does not tell."""
    size_bytes = os.fstat(file.fileno()).st_size
    if name.kind in (WalKind.SEGMENT, WalKind.PARTIAL):
        header = read_segment_header(read(file, HEADER_BYTES), name.text)
        check_segment(name, header, size_bytes=size_bytes, system_identifier=system)
        file.seek(0)
        return header.segment_bytes
    if not 0 < size_bytes <= MAX_TEXT_BYTES:
        raise Refused(f"{name.text} has {size_bytes} bytes, and should be a short text")
    return 0
