"""The backups of one database: its own, and those of an older layout beside them.

Called by every door that lists, finds or names a backup. Reading manifests is storage/catalog.py's.
"""

import contextlib
from collections.abc import Iterable, Sequence
from datetime import datetime

from backup_pipeline.actions.protected import Protected
from backup_pipeline.domain.backup import Backup, BackupId, CatalogListing, newest_first
from backup_pipeline.domain.choice import find as choose
from backup_pipeline.errors import BackupNotFound, ConfigError, StoreError
from backup_pipeline.storage import catalog, imported
from backup_pipeline.storage.store import Store


def listing(protected: Protected, *, fresh: bool = False) -> CatalogListing:
    """All backups of the database, newest first. Raises StoreError."""
    return _together(
        [catalog.list_backups(protected.store, protected.name, fresh=fresh), _older(protected, fresh=fresh)]
    )


def listing_of_all(store: Store, databases: Iterable[Protected]) -> CatalogListing:
    """Whatever the store holds, also of databases that are not configured, and their imported dumps."""
    return _together([catalog.list_backups(store), *map(_older, databases)])


def _older(protected: Protected, *, fresh: bool = False) -> CatalogListing:
    """The dumps of an older layout. That they cannot be reached hides no backup that is ours."""
    try:
        return imported_listing(protected, fresh=fresh)
    except StoreError as error:
        return CatalogListing((), ((protected.config.import_from, error.message),))


def imported_listing(protected: Protected, *, fresh: bool = False) -> CatalogListing:
    """The dumps of an older layout. Raises StoreError."""
    if protected.imports is None:
        return CatalogListing(())
    return imported.list_imported(protected.imports, protected.store, protected.name, fresh=fresh)


def _together(listings: Sequence[CatalogListing]) -> CatalogListing:
    return CatalogListing(
        newest_first(backup for each in listings for backup in each.backups),
        tuple(dict.fromkeys(item for each in listings for item in each.unreadable)),
    )


def find(protected: Protected, text: str) -> Backup:
    """The backup that `text` names: an id, a stamp or its beginning, a time, "latest" or "proven".

    Raises BackupNotFound naming the nearest; StoreError when it may be one that cannot be reached.
    """
    try:
        return choose(listing(protected), text)
    except BackupNotFound:
        imported_listing(protected)
        raise


def find_pinned(protected: Protected, text: str) -> BackupId:
    """The backup to unpin: as `find`, or by its whole id where only its pin is left of it.

    Raises BackupNotFound.
    """
    try:
        return find(protected, text).id
    except BackupNotFound:
        with contextlib.suppress(ConfigError):  # not a whole id
            backup = BackupId.parse(text)
            if catalog.has_pin(protected.store, backup):
                return backup
        raise


def dump_sizes(protected: Protected, backup: Backup) -> tuple[int, tuple[int, ...]]:
    """The bytes of this dump, and of those of its kind before it, the newest first.

    Backups that share one dump count once. Raises StoreError.
    """
    before: dict[datetime, int] = {}
    for each in listing(protected).backups:
        if _moment(each) < _moment(backup) and each.id.imported is backup.id.imported:
            before.setdefault(_moment(each), _dump_bytes(each))
    return _dump_bytes(backup), tuple(before.values())


def _moment(backup: Backup) -> datetime:
    return backup.manifest.snapshot_at if backup.manifest else backup.taken_at


def _dump_bytes(backup: Backup) -> int:
    return backup.manifest.dump_bytes if backup.manifest else backup.size_bytes


def load(protected: Protected, backup: BackupId) -> Backup:
    """One backup as it is now. Raises BackupNotFound, Corrupt, StoreError."""
    if not backup.imported:
        return catalog.load(protected.store, backup)
    if protected.imports is None:
        raise BackupNotFound(
            f"{backup} is of an older layout, and no import_from is configured for {protected.name}",
            hint=f"Set databases.{protected.name}.import_from to where those dumps lie.",
        )
    return imported.load_imported(protected.imports, protected.store, backup)
