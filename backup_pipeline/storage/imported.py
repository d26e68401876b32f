"""Dumps of an older layout, `<tier>/backup_<tier>_YYYYMMDD_HHMMSS.sql.gz`, read as backups.

They lie in a store of their own and have no manifest; verdicts and pins of them lie in our catalog.
Whatever their names say, most of them are pg_dump's custom format: actions/fetch.py looks inside. Their
times are read as UTC.
"""

import re

from backup_pipeline.domain.backup import (
    IMPORTED_PREFIX,
    Backup,
    BackupId,
    CatalogListing,
    is_subject_name,
    newest_first,
)
from backup_pipeline.domain.layout import Beside, catalog_key
from backup_pipeline.errors import BackupNotFound, ConfigError, ObjectNotFound
from backup_pipeline.storage.catalog import Marks, imported_marks, load_marks
from backup_pipeline.storage.store import ObjectInfo, Store

_KEY = re.compile(
    r"(?P<tier>[a-z0-9-]{1,31})/backup_(?P=tier)_(?P<date>[0-9]{8})_(?P<time>[0-9]{6})\.sql\.gz"
)
_LOOKS_LIKE_ONE = re.compile(r"(.*/)?backup_[^/]*\.sql\.gz")


def list_imported(imports: Store, store: Store, database: str, *, fresh: bool = False) -> CatalogListing:
    """The dumps in `imports`, newest first, as backups of `database`; verdicts and pins from `store`."""
    marks = imported_marks(store, database, fresh=fresh)
    backups, unreadable = [], []
    for info in imports.list(""):
        named = _named(info.key, database)
        if named is not None:
            backup = marks.get(named, Marks()).on(_backup(info, named))
            backups.append(backup)
            if backup.unreadable_verdict:
                unreadable.append((catalog_key(backup.id, Beside.VERDICT), backup.unreadable_verdict))
        elif _LOOKS_LIKE_ONE.fullmatch(info.key):
            unreadable.append((info.key, "it looks like a dump, but its name has another form"))
    return CatalogListing(newest_first(backups), tuple(unreadable))


def load_imported(imports: Store, store: Store, backup: BackupId) -> Backup:
    """One imported dump as it is now. Raises BackupNotFound."""
    key = imported_key(backup)
    try:
        info = imports.head(key)
    except ObjectNotFound:
        raise BackupNotFound(f"there is no imported dump {key}", detail={"store": imports.url}) from None
    return load_marks(store, backup).on(_backup(info, backup))


def imported_key(backup: BackupId) -> str:
    """Where the dump of this id lies in its own store. Raises BackupNotFound for an id of ours."""
    if not backup.imported:
        raise BackupNotFound(f"{backup} is not an imported dump")
    tier = backup.stamp[17:].removeprefix(IMPORTED_PREFIX)
    return f"{tier}/backup_{tier}_{backup.stamp[:8]}_{backup.stamp[9:15]}.sql.gz"


def _named(key: str, database: str) -> BackupId | None:
    match = _KEY.fullmatch(key)
    if match is None or not is_subject_name(match["tier"]):
        return None
    try:
        return BackupId(database, f"{match['date']}T{match['time']}Z-{IMPORTED_PREFIX}{match['tier']}")
    except ConfigError:  # no such date
        return None


def _backup(info: ObjectInfo, backup: BackupId) -> Backup:
    return Backup(
        id=backup,
        tier=backup.stamp[17:].removeprefix(IMPORTED_PREFIX),
        taken_at=backup.taken_at,
        size_bytes=info.size_bytes,
        manifest=None,
        imported_key=info.key,
    )
