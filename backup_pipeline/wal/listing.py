"""What a WAL archive holds, in one listing: read for windows, plans and `wal status`.

The value, and what may be asked of it, is domain/wal_archive.py's.
"""

import time
from collections.abc import Iterator

from backup_pipeline.domain.layout import parse_wal_key, wal_system_prefix
from backup_pipeline.domain.wal import TimelineHistory, WalKind, parse_history
from backup_pipeline.domain.wal_archive import ArchiveListing, ListedWal, list_archive
from backup_pipeline.errors import BackupNotFound, Corrupt, ObjectNotFound
from backup_pipeline.storage.store import Store
from backup_pipeline.wal.archive import MAX_TEXT_BYTES
from backup_pipeline.wal.identity import read_identity
from backup_pipeline.wal.settling import Pause, may_be_filled, settled


def read_archive(store: Store, cluster: str, *, system_identifier: str = "") -> ArchiveListing:
    """The archive of the system that archives as `cluster` now, or of an earlier one of it.

    A request for each thousand files, and one for each history. Raises BackupNotFound where there is no
    archive; StoreError, Corrupt.
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
            except (Corrupt, ObjectNotFound) as error:
                unreadable.append((each.key, error.message))
    return list_archive(identity, system, objects, histories, unreadable)


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


def _objects(store: Store, prefix: str) -> Iterator[ListedWal]:
    return (ListedWal(info.key, info.size_bytes, info.modified_at) for info in store.list(prefix))
