"""The records of a cluster's drills: put once, never changed, read with few requests.

They lie beside the cluster's base backups, one object each. Written by actions/drill_recovery.py; read by
listings, by the plan of a recovery, and by Dagster's plots; actions/prune_cluster.py gives up old ones.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.drill import Drill, DrillListing, drill_from_json, drill_to_json
from backup_pipeline.domain.layout import drill_key, drills_prefix, parse_drill_key
from backup_pipeline.errors import Corrupt
from backup_pipeline.storage.catalog import READERS, reason_of
from backup_pipeline.storage.catalog_publish import read_or_none
from backup_pipeline.storage.store import Store

NEWEST = 30
"""How many are read unless more are asked for: a month of nights."""


def put(store: Store, drill: Drill) -> None:
    """Record a drill; durable on return. Raises StoreError."""
    data, key = drill_to_json(drill), drill_key(drill.id)
    drill_from_json(data, key)
    store.put(key, [data])


def drills(store: Store, cluster: str, *, newest: int = NEWEST) -> DrillListing:
    """The newest drills of a cluster, newest first. What cannot be read is told. Raises StoreError."""
    ids, foreign = _listed(store, cluster)
    found = _read(store, ids[:newest])
    unreadable = (*((key, "it is no name that we give") for key in foreign), *found.unreadable)
    return DrillListing(found.drills, unreadable)


def drills_before(store: Store, cluster: str, before: datetime) -> DrillListing:
    """The drills of a cluster that began before a moment, newest first. Raises StoreError."""
    ids, _ = _listed(store, cluster)
    return _read(store, [each for each in ids if each.taken_at < before])


def delete(store: Store, gone: Iterable[BackupId]) -> dict[str, str]:
    """Delete the records of drills; returns what was denied, and why. Raises StoreError."""
    keys = [drill_key(each) for each in gone]
    return store.delete(keys) if keys else {}


def _listed(store: Store, cluster: str) -> tuple[list[BackupId], list[str]]:
    """The drills that there are, newest first, and keys that are none of ours."""
    found = [(parse_drill_key(info.key), info.key) for info in store.list(drills_prefix(cluster))]
    ids = sorted((drill for drill, _ in found if drill is not None), key=lambda one: one.stamp, reverse=True)
    return ids, [key for drill, key in found if drill is None]


def _read(store: Store, ids: Sequence[BackupId]) -> DrillListing:
    keys = [drill_key(each) for each in ids]
    read: list[Drill] = []
    unreadable: list[tuple[str, str]] = []
    with ThreadPoolExecutor(READERS) as pool:
        bodies = list(pool.map(lambda key: read_or_none(store, key), keys))
    for key, body in zip(keys, bodies, strict=True):
        try:
            if body is not None:
                read.append(drill_from_json(body, key))
        except Corrupt as error:
            unreadable.append((key, reason_of(error)))
    return DrillListing(tuple(read), tuple(unreadable))
