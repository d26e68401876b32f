"""Deleting one backup, or objects that no manifest names, in an order that may stop anywhere.

Called by actions/prune.py with what a logged plan gave up; nothing is decided here, but whatever
came up since the plan stops the deletion. Why that is safe is written in leases.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from backup_pipeline.domain.backup import Backup, Lease
from backup_pipeline.domain.layout import Beside, catalog_key, copy_key, data_prefix
from backup_pipeline.domain.manifest import manifest_from_json
from backup_pipeline.domain.retention import UnlistedObjects
from backup_pipeline.errors import StoreError
from backup_pipeline.storage import leases
from backup_pipeline.storage.catalog import exists, load_marks
from backup_pipeline.storage.catalog_publish import read_or_none
from backup_pipeline.storage.store import Store

Clock = Callable[[], datetime]


@dataclass(frozen=True)
class Deletion:
    """What became of one deletion. `kept` says why the backup is still there, "" when it is gone;
    `denied` are the objects that the store would not delete, and why.
    """

    kept: str = ""
    denied: Mapping[str, str] = field(default_factory=dict)
    freed_bytes: int = 0


def delete(store: Store, backup: Backup, *, clock: Clock) -> Deletion:
    """Delete a backup that a logged plan gave up, in an order that may stop anywhere.

    The copy of the manifest, the manifest, the verdict, then the objects. Right after the manifest
    it looks again for what speaks against it (a lease, a pin, another verdict), and puts the
    manifest back when there is something. What a crash leaves is collected as unlisted objects by
    a later prune. Raises Corrupt when the manifest has become unreadable.
    """
    key, copy = catalog_key(backup.id), copy_key(backup.id, backup.tier, Beside.MANIFEST)
    with leases.claim(store, backup.id, clock=clock) as others:
        if others:
            return Deletion(kept=in_use(others))
        data = read_or_none(store, key)
        if data is None:
            return Deletion(kept="its manifest is gone already: another prune is or was at it")
        if manifest_from_json(data, key) != backup.manifest:
            return Deletion(kept="its manifest is not the one that was planned with")
        reason = _speaks_against(store, backup, clock())
        if reason:
            return Deletion(kept=reason)
        denied = store.delete([copy]) or store.delete([key])
        try:
            reason = (
                "the store does not let go of its manifest"
                if denied
                else _speaks_against(store, backup, clock())
            )
        except StoreError:
            _put_back(store, {copy: data, key: data})
            raise
        if reason:
            _put_back(store, {copy: data, key: data})
            return Deletion(kept=reason, denied=denied)
        denied = store.delete([catalog_key(backup.id, Beside.VERDICT)])
        objects = {info.key: info.size_bytes for info in store.list(data_prefix(backup.id, backup.tier))}
        denied |= store.delete(list(objects)) if objects else {}
        return Deletion(
            denied=denied, freed_bytes=sum(size for item, size in objects.items() if item not in denied)
        )


def delete_imported(imports: Store, store: Store, backup: Backup, *, clock: Clock) -> Deletion:
    """Delete an imported dump from `imports`, then what `store` keeps of it."""
    with leases.claim(store, backup.id, clock=clock) as others:
        reason = in_use(others) if others else _speaks_against(store, backup, clock())
        if reason:
            return Deletion(kept=reason)
        denied = imports.delete([backup.imported_key])
        if denied:
            return Deletion(kept="the store does not let go of it", denied=denied)
        return Deletion(
            denied=store.delete([catalog_key(backup.id, Beside.VERDICT)]), freed_bytes=backup.size_bytes
        )


def collect(store: Store, found: UnlistedObjects, *, clock: Clock) -> Deletion:
    """Delete objects that no manifest names, unless they were published or claimed meanwhile."""
    with leases.claim(store, found.id, clock=clock) as others:
        if others:
            return Deletion(kept=in_use(others))
        for key in (
            catalog_key(found.id),
            copy_key(found.id, found.tier, Beside.MANIFEST),
            catalog_key(found.id, Beside.PIN),
        ):
            if exists(store, key):
                return Deletion(kept=f"{key} is there now")
        denied = store.delete([catalog_key(found.id, Beside.VERDICT)])
        denied |= store.delete(found.keys)
        return Deletion(denied=denied, freed_bytes=0 if denied else found.size_bytes)


def _put_back(store: Store, records: Mapping[str, bytes]) -> None:
    for key, data in records.items():
        if read_or_none(store, key) != data:
            store.put(key, [data])


def _speaks_against(store: Store, backup: Backup, now: datetime) -> str:
    """What came up since the plan was made that forbids deleting; "" if nothing."""
    others = [lease for lease in leases.others(store, backup.id, now=now) if lease.purpose != leases.PRUNE]
    if others:
        return in_use(others)
    marks = load_marks(store, backup.id)
    if marks.pinned:
        return "it was pinned meanwhile"
    if marks.unreadable_verdict or (marks.record and marks.record.standing) != backup.proof:
        return "its verdict changed meanwhile"
    return ""


def in_use(found: Iterable[Lease]) -> str:
    """Who holds a backup, in words."""
    return "in use: " + ", ".join(
        sorted(f"{lease.purpose} until {lease.until:%Y-%m-%dT%H:%M:%SZ}" for lease in found)
    )
