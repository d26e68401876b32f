"""Base backups that are whole but for WAL that came too late: kept, and listed once it is there.

Called by base_backup.py and prune_cluster.py. What was uploaded for an hour is not thrown away because the
archiver was behind. A prune collects what nobody finished, as it does what a killed one left.
"""

from dataclasses import replace

from backup_pipeline.actions.needed_wal import needed_names, not_archived
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseManifest, base_from_json
from backup_pipeline.domain.layout import Beside, base_copy_key, wal_system_prefix
from backup_pipeline.domain.wal import TimelineHistory, parse_history
from backup_pipeline.errors import BackupError, StoreError
from backup_pipeline.storage import base_backups, leases
from backup_pipeline.storage.catalog_publish import read_or_none
from backup_pipeline.storage.store import Store
from backup_pipeline.storage.waiting import forget_waiting, read_waiting


def finish_waiting(cluster: ProtectedCluster, *, clock: Clock, report: Report) -> tuple[BackupId, ...]:
    """List those whose WAL is in the archive by now. What cannot be finished is told, and waits on."""
    finished: list[BackupId] = []
    try:
        waiting = read_waiting(cluster.store, base_backups.unlisted(cluster.store, cluster.name))
    except StoreError as error:
        report.say(f"whether base backups wait for their WAL is not known: {error.message}")
        return ()
    for key, reason in waiting.unreadable:
        report.say(f"{key}: {reason}")
    for manifest in waiting.manifests:
        try:
            with leases.claim(cluster.store, manifest.id, clock=clock) as others:
                if others:
                    continue  # under way
                missing = not_archived(cluster, manifest, needed_names(manifest, _history(cluster, manifest)))
                if missing:
                    report.say(f"{manifest.id} still waits for {missing[0]}")
                    continue
            base_backups.publish(cluster.store, _finished(cluster.store, manifest, clock))
            forget_waiting(cluster.store, manifest.id)
            report.say(f"published {manifest.id}: its WAL is in the archive now")
            finished.append(manifest.id)
        except BackupError as error:
            report.say(f"{manifest.id} cannot be finished: {error.message}")
    return tuple(finished)


def _finished(store: Store, manifest: BaseManifest, clock: Clock) -> BaseManifest:
    """The record that is published: as begun where one died between the copy and the record."""
    key = base_copy_key(manifest.id, Beside.MANIFEST)
    begun = read_or_none(store, key)
    return replace(manifest, finished_at=clock()) if begun is None else base_from_json(begun, key)


def _history(cluster: ProtectedCluster, manifest: BaseManifest) -> TimelineHistory:
    timeline = manifest.end.timeline
    if timeline == 1:
        return TimelineHistory(1)
    key = f"{wal_system_prefix(cluster.name, manifest.system_identifier)}{timeline:08X}.history"
    return parse_history(timeline, b"".join(cluster.store.read(key)))
