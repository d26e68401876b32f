"""A cluster that archives its WAL, the store that holds it, and base backups unpacked and started again."""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from backup_pipeline.actions import base_backup
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.config import ClusterConfig, Secret
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseBackup
from backup_pipeline.domain.layout import wal_key
from backup_pipeline.domain.wal import parse_wal_name
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.errors import ConfigError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store
from backup_pipeline.zstd import compressed
from backup_pipeline_tests.actions.box import Said, ask, execute, now
from backup_pipeline_tests.background import meanwhile

NAME = "main"
SETTINGS = {
    "wal_level": "replica",
    "max_wal_senders": "5",
    "full_page_writes": "on",
    "archive_mode": "on",
    "max_locks_per_transaction": "128",
    "fsync": "off",
    "autovacuum": "off",
}
WITHIN_S = 60.0


@dataclass
class ClusterBox:
    """A running cluster whose archive_command copies into `archived`; `ship` puts that into the store."""

    cluster: LocalCluster
    archived: Path
    store: Store
    said: Said = field(default_factory=Said)
    shipped: set[str] = field(default_factory=set)

    @property
    def system(self) -> str:
        """The cluster's system identifier."""
        return str(ask(self.cluster.endpoint(), "SELECT system_identifier::text FROM pg_control_system()"))

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

    def ship(self, system: str) -> None:
        """Put what was archived since the last time where an archive keeps it."""
        for path in sorted(self.archived.iterdir()):
            with contextlib.suppress(ConfigError):  # a copy that is not finished has another name
                name = parse_wal_name(path.name)
                if path.name not in self.shipped:
                    plain = path.read_bytes()
                    key = wal_key(NAME, system, name, hashlib.sha256(plain).hexdigest())
                    self.store.put(key, compressed([plain]) if key.endswith(".zst") else [plain])
                    self.shipped.add(path.name)

    def shipping(self) -> AbstractContextManager[object]:
        """`ship` again and again, until the block ends."""
        system = self.system

        def follow(ended: threading.Event) -> None:
            while not ended.wait(0.05):
                self.ship(system)

        return meanwhile(follow)


@contextlib.contextmanager
def a_cluster(bin_dir: str, store_folder: Path, **settings: str) -> Iterator[ClusterBox]:
    """A cluster with SETTINGS; its archive is empty."""
    with private_folder() as folder:
        archived = folder / "archived"
        archived.mkdir()
        give(archived)
        # What the server's name for it shows only when it is whole.
        command = f"cp %p {archived}/%f.new && mv {archived}/%f.new {archived}/%f"
        cluster = LocalCluster(
            bin_dir,
            folder / "cluster",
            settings={**SETTINGS, "archive_command": command, **settings},
        )
        store_folder.mkdir(exist_ok=True)
        try:
            cluster.create()
            cluster.start()
            yield ClusterBox(cluster, archived, DirectoryStore(store_folder))
        finally:
            cluster.stop()


def give(path: Path) -> Path:
    """Let the server's user own a path; returns it."""
    if (identity := server_identity()) is not None:
        os.chown(path, identity.uid, identity.gid)
    return path


def make_tablespace(box: ClusterBox, name: str, folder: Path) -> Path:
    """A tablespace in a new folder that the server's user owns."""
    folder.mkdir(mode=0o700)
    give(folder)
    execute(box.cluster.endpoint(), f"CREATE TABLESPACE {name} LOCATION '{folder}'")
    return folder


@contextlib.contextmanager
def started(box: ClusterBox, folder: Path, **settings: str) -> Iterator[LocalCluster]:
    """A server on the data directory `folder`/data, which a base backup was unpacked into, with the WAL that
    was archived put into its pg_wal.
    """
    for path in box.archived.iterdir():
        shutil.copyfile(path, folder / "data" / "pg_wal" / path.name)
        give(folder / "data" / "pg_wal" / path.name)
    cluster = LocalCluster(
        box.cluster.bin_dir, folder, settings={**SETTINGS, "archive_mode": "off", **settings}
    )
    cluster.create()  # opens the folder to the server's user
    try:
        cluster.start(timeout_s=WITHIN_S)
        yield cluster
    finally:
        cluster.stop()
