"""What the tests of incremental base backups share: looks at those there, a cluster to take them of."""

import contextlib

from backup_pipeline.domain.backup import BackupId, Proof, Verdict
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.store import Store
from backup_pipeline_tests.actions.box import execute, now
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.actions.protected_box import NAME
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers import postgres as servers


def tablespace(box: RecoveryBox, name: str) -> None:
    folder = box.folder.parent / name
    folder.mkdir(mode=0o700)
    execute(box.cluster.endpoint(), f"CREATE TABLESPACE {name} LOCATION '{give(folder)}'")


def bases(store: Store) -> list[BaseManifest]:
    """The base backups, oldest first."""
    found = base_backups.list_base_backups(store, NAME, fresh=True)
    return sorted((each.manifest for each in found.backups), key=lambda each: each.end.lsn)


def fail(store: Store, backup: BackupId) -> None:
    """Record that a drill of it failed."""
    proof = Proof(Verdict.FAILED, now(), 1.0, 1.0, (), ("an index is spoiled",), (), "test")
    base_backups.record_proof(store, backup, proof, comparable=True)


def small(store: Store, **settings: str) -> contextlib.AbstractContextManager[RecoveryBox]:
    return a_recovery_box(servers.bin_dir_17(), store, **{"summarize_wal": "on", **settings})
