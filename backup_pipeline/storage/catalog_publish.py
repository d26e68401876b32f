"""Making a finished backup one that is listed: the record last, once every object is seen to be there.

Called by catalog.py for dumps and by base_backups.py for base backups; what a record holds is in domain/.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from backup_pipeline.domain.backup import BackupId, ObjectDigest
from backup_pipeline.domain.layout import COPY_NAMES, Beside, catalog_key
from backup_pipeline.errors import Busy, ObjectExists, ObjectNotFound, Refused
from backup_pipeline.storage import leases
from backup_pipeline.storage.store import Store, read_all


def publish_record(
    store: Store,
    backup: BackupId,
    data: bytes,
    objects: Sequence[ObjectDigest],
    *,
    prefix: str,
    at: datetime,
) -> None:
    """List a finished backup whose objects lie below `prefix`: the copy beside them first, the catalog's
    record last.

    Durable on return, and may be run again. Raises Refused when an object is missing or another record
    has this id, Busy when a prune is collecting the objects.
    """
    _refuse_missing(store, backup, objects, prefix)
    copy = prefix + COPY_NAMES[Beside.MANIFEST]
    written = _put_once(store, copy, data)
    now = leases.written_at(store, copy, at) if written else leases.store_time(store, backup.database)
    # From here on a prune that collects unlisted objects sees the copy; see leases.py.
    for lease in leases.others(store, backup, now=now):
        if lease.purpose == leases.PRUNE:
            raise Busy(f"{backup} is being collected by a prune, as objects that nobody published")
    _refuse_missing(store, backup, objects, prefix)
    _put_once(store, catalog_key(backup), data)


def missing_objects(objects: Sequence[ObjectDigest], present: Mapping[str, int]) -> str:
    """Which of a backup's objects is missing or of another size, given the sizes in the store; "" if none."""
    for item in objects:
        if item.key not in present:
            return f"its object {item.key} is missing"
        if present[item.key] != item.size_bytes:
            return f"its object {item.key} has {present[item.key]} bytes instead of {item.size_bytes}"
    return ""


def read_or_none(store: Store, key: str) -> bytes | None:
    """The whole of a small object, None when there is none."""
    try:
        return read_all(store, key)
    except ObjectNotFound:
        return None


def _refuse_missing(store: Store, backup: BackupId, objects: Sequence[ObjectDigest], prefix: str) -> None:
    present = {info.key: info.size_bytes for info in store.list(prefix)}
    problem = missing_objects(objects, present)
    if problem:
        raise Refused(
            f"{backup} is not published: {problem}",
            hint="Take the backup again; what is unlisted is collected.",
        )


def _put_once(store: Store, key: str, data: bytes) -> bool:
    """Whether it was not there yet."""
    before = read_or_none(store, key)
    if before is None:
        try:
            store.put_if_absent(key, data)
            return True
        except ObjectExists:  # another's, or our own whose answer was lost
            before = read_or_none(store, key)
    if before != data:
        raise Refused(
            f"{key} holds another manifest", hint="Manifests are never overwritten: take the backup again."
        )
    return False
