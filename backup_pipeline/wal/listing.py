"""What a WAL archive holds, in one listing: read for windows, plans and `wal status`.

The value, and what may be asked of it, is domain/wal_archive.py's.
"""

import time
from collections.abc import Iterator, Sequence

from backup_pipeline.domain.layout import ArchivedWal, parse_wal_key, wal_system_prefix
from backup_pipeline.domain.wal import (
    HEADER_BYTES,
    TimelineHistory,
    WalKind,
    check_segment,
    parse_history,
    read_segment_header,
)
from backup_pipeline.domain.wal_archive import ArchiveIdentity, ArchiveListing, ListedWal, list_archive
from backup_pipeline.errors import BackupNotFound, Corrupt, ObjectArchived, ObjectNotFound
from backup_pipeline.storage.store import Store
from backup_pipeline.wal.archive import MAX_TEXT_BYTES
from backup_pipeline.wal.identity import read_identity
from backup_pipeline.wal.settling import Pause, may_be_filled, settled
from backup_pipeline.zstd import ZstdDecompressor, ZstdError

_HEAD_BYTES = 256 * 1024  # more than the first block of a zstd frame, which the header is in
_TRIED = 5


def read_archive(store: Store, cluster: str, *, system_identifier: str = "") -> ArchiveListing:
    """The archive of the system that archives as `cluster` now, or of an earlier one of it.

    A request for each thousand files, and one for each history; of an earlier system a segment is begun to be
    read, for its size. Raises BackupNotFound where there is no archive; StoreError, Corrupt.
    """
    identity = read_identity(store, cluster)
    if identity is None:
        raise BackupNotFound(
            f"there is no WAL archive of {cluster} in {store.url}",
            hint=f"`backup-pipeline wal setup {cluster}` says how to begin one.",
        )
    system = system_identifier or identity.system_identifier
    objects = list(_objects(store, wal_system_prefix(cluster, system)))
    histories: dict[int, TimelineHistory] = {}
    unreadable: list[tuple[str, str]] = []
    for each in objects:
        found = parse_wal_key(each.key)
        if found is not None and found.name.kind is WalKind.HISTORY:
            try:
                data = store.read_range(each.key, offset=0, length=MAX_TEXT_BYTES)
                histories[found.name.timeline] = parse_history(found.name.timeline, data)
            except (Corrupt, ObjectArchived, ObjectNotFound) as error:
                unreadable.append((each.key, error.message))
    size = _segment_bytes(store, identity, system, objects)
    return list_archive(identity, system, objects, histories, unreadable, segment_bytes=size)


def read_settled_archive(
    store: Store, cluster: str, *, system_identifier: str = "", pause: Pause = time.sleep
) -> ArchiveListing:
    """`read_archive`, again while a gap near the end of a timeline may be filled, for half a minute."""

    def may_fill(listing: ArchiveListing) -> bool:
        return any(
            may_be_filled(sum(number > gap.last for number in listing.numbers(gap.timeline)))
            for gap in listing.gaps()
        )

    return settled(
        lambda: read_archive(store, cluster, system_identifier=system_identifier), may_fill, pause=pause
    )


def _segment_bytes(store: Store, identity: ArchiveIdentity, system: str, objects: Sequence[ListedWal]) -> int:
    """The size of one system's segments. Of an earlier system the archive's record does not tell it: its
    segments do. Raises Corrupt when none that is tried can be read.
    """
    if system == identity.system_identifier:
        return identity.segment_bytes
    parsed = ((each.key, parse_wal_key(each.key)) for each in objects)
    found = [
        (key, wal)
        for key, wal in parsed
        if wal is not None and wal.name.kind in (WalKind.SEGMENT, WalKind.PARTIAL)
    ]
    reason = ""
    for key, wal in found[:: max(1, len(found) // _TRIED)]:
        try:
            return _size_by_header(store, key, wal)
        except (Corrupt, ObjectNotFound) as error:
            reason = error.message
    if not found:
        return identity.segment_bytes  # nothing is counted
    raise Corrupt(
        f"how large the segments of system {system} are, which archived as {identity.cluster} before, "
        f"cannot be told: {reason}",
        hint="As far as was looked, they are damaged: look for other versions, or a copy, of these objects; "
        f"or, to recover nothing from them, move {wal_system_prefix(identity.cluster, system)} away.",
    )


def _size_by_header(store: Store, key: str, wal: ArchivedWal) -> int:
    try:
        head = ZstdDecompressor().decompress(
            store.read_range(key, offset=0, length=_HEAD_BYTES), HEADER_BYTES
        )
    except ZstdError as error:
        raise Corrupt(f"{key} is not what was archived: {error}") from error
    header = read_segment_header(head, wal.name.text)
    check_segment(wal.name, header, size_bytes=header.segment_bytes, system_identifier=wal.system_identifier)
    return header.segment_bytes


def _objects(store: Store, prefix: str) -> Iterator[ListedWal]:
    return (ListedWal(info.key, info.size_bytes, info.modified_at) for info in store.list(prefix))
