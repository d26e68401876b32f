"""Which slot is a new one: not all WAL before it is known to be in the archive.

Called by receive.py. A server's slot does not tell it, and a receiver may be killed at any moment: so it is
kept in the archive. It is overwritten, never deleted: a receiver's keys need not be good for that.
"""

from backup_pipeline.domain.layout import wal_slot_key
from backup_pipeline.storage.catalog_publish import read_or_none
from backup_pipeline.storage.store import Store

_NEW = b"new: the last segments before it may be missing\n"
_CONFIRMED = b"confirmed: all WAL before it is archived, or a gap that was accepted\n"


def begin(store: Store, cluster: str, slot: str) -> None:
    """Say that the slot is new, before it is made; durable on return. Raises StoreError."""
    store.put(wal_slot_key(cluster, slot), [_NEW])


def is_new(store: Store, cluster: str, slot: str) -> bool:
    """Whether the slot was not confirmed since it was made. Raises StoreError."""
    return read_or_none(store, wal_slot_key(cluster, slot)) == _NEW


def confirm(store: Store, cluster: str, slot: str) -> None:
    """Say that all before what the slot may ever fall back to is archived. Raises StoreError."""
    store.put(wal_slot_key(cluster, slot), [_CONFIRMED])
