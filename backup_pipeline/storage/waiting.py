"""Base backups that are whole but for WAL which is not archived yet: what is said beside their objects.

Called by base_backups.py and actions/. When one is listed, actions/waiting_base_backup.py decides.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseManifest, base_from_json, base_to_json
from backup_pipeline.domain.layout import Beside, base_copy_key, base_waiting_key
from backup_pipeline.errors import Corrupt
from backup_pipeline.storage.catalog_publish import read_or_none
from backup_pipeline.storage.store import Store


@dataclass(frozen=True)
class Waiting:
    """The records of those that wait, and what is said of one and cannot be read, each with why."""

    manifests: tuple[BaseManifest, ...]
    unreadable: tuple[tuple[str, str], ...] = ()


def keep_waiting(store: Store, manifest: BaseManifest) -> None:
    """Say beside the objects what they are, before their WAL is there; durable on return."""
    store.put(base_waiting_key(manifest.id), [base_to_json(manifest)])


def forget_waiting(store: Store, backup: BackupId) -> None:
    """It is listed: what was said meanwhile goes, where this process may delete."""
    store.delete([base_waiting_key(backup)])


def read_waiting(store: Store, unlisted: Iterable[BackupId]) -> Waiting:
    """Those of some that are not listed that wait. What cannot be read is told: nobody can list it."""
    manifests: list[BaseManifest] = []
    unreadable: list[tuple[str, str]] = []
    for backup in unlisted:
        key = base_waiting_key(backup)
        data = read_or_none(store, key)
        try:
            if data is not None:
                manifests.append(base_from_json(data, base_copy_key(backup, Beside.MANIFEST)))
        except Corrupt as error:
            unreadable.append((key, error.message))
    return Waiting(tuple(manifests), tuple(unreadable))
