"""A cluster under protection, and base backups of it: what cluster_box.py and recovery_box.py share."""

import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from backup_pipeline.actions import base_backup
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.config import ClusterConfig, Secret
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseBackup
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.storage.store import Store
from backup_pipeline_tests.actions.box import Said, now
from backup_pipeline_tests.background import meanwhile

NAME = "main"
ARCHIVING = {
    "wal_level": "replica",
    "max_wal_senders": "5",
    "archive_mode": "on",
    "fsync": "off",
    "autovacuum": "off",
}
WITHIN_S = 60.0


@dataclass
class ProtectedBox(ABC):
    """A running cluster and the store that its WAL and base backups are in."""

    cluster: LocalCluster
    store: Store
    said: Said = field(default_factory=Said, kw_only=True)
    shipped: set[str] = field(default_factory=set, kw_only=True)

    @abstractmethod
    def ship(self) -> None:
        """Put into the store what PostgreSQL has handed over since the last time."""

    def shipping(self) -> AbstractContextManager[object]:
        """`ship` again and again, until the block ends."""

        def follow(ended: threading.Event) -> None:
            while not ended.wait(0.05):
                self.ship()

        return meanwhile(follow)

    def protected(self, store: Store | None = None, **changes: Any) -> ProtectedCluster:
        """The cluster as the configuration names it."""
        config = ClusterConfig(
            NAME,
            dsn=Secret(self.cluster.endpoint().dsn),
            bin_dir=self.cluster.bin_dir,
            stall_timeout=timedelta(seconds=WITHIN_S),
            checkpoint="fast",
        )
        return ProtectedCluster(replace(config, **changes), store or self.store)

    def take(
        self,
        store: Store | None = None,
        *,
        incremental: bool = False,
        parent: BackupId | None = None,
        **changes: Any,
    ) -> BaseBackup:
        """One base backup, while the archive follows."""
        protected = self.protected(store, **changes)
        with self.shipping():
            return base_backup.take(
                protected, clock=now, report=self.said, incremental=incremental, parent=parent
            )
