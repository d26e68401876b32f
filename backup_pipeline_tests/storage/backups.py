"""Backups put into a store, whole, for tests of the catalog and of prune."""

import gzip

from backup_pipeline.domain.backup import Backup, Manifest
from backup_pipeline.storage import catalog
from backup_pipeline.storage.store import Store
from backup_pipeline_tests.domain.values import content_of


def put_objects(store: Store, manifest: Manifest) -> None:
    """Store what the manifest names, and nothing else."""
    for item in manifest.objects:
        store.put(item.key, [content_of(manifest.id, item.name)])


def put_backup(store: Store, manifest: Manifest) -> Backup:
    """Store a whole backup, published."""
    put_objects(store, manifest)
    return catalog.publish(store, manifest)


def contents(store: Store, prefix: str = "") -> dict[str, bytes]:
    """All objects below a prefix, but for the leases, which come and go."""
    return {
        info.key: b"".join(store.read(info.key))
        for info in store.list(prefix)
        if not info.key.startswith("leases/")
    }


def packed(data: bytes) -> bytes:
    """The same gzip at any time: the bytes name a test, and every worker must find the same tests."""
    return gzip.compress(data, mtime=0)
