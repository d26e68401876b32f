"""A cluster that archives its WAL, the store that holds it, and base backups unpacked and started again."""

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline.domain.layout import wal_key
from backup_pipeline.domain.wal import parse_wal_name
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.errors import ConfigError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.zstd import compressed
from backup_pipeline_tests.actions.box import ask, execute
from backup_pipeline_tests.actions.protected_box import ARCHIVING, NAME, WITHIN_S, ProtectedBox

SETTINGS = {**ARCHIVING, "full_page_writes": "on", "max_locks_per_transaction": "128"}


@dataclass
class ClusterBox(ProtectedBox):
    """One whose archive_command copies into `archived`."""

    archived: Path

    @functools.cached_property
    def system(self) -> str:
        """The cluster's system identifier."""
        return str(ask(self.cluster.endpoint(), "SELECT system_identifier::text FROM pg_control_system()"))

    def ship(self) -> None:
        """Put what was archived since the last time where an archive keeps it."""
        for path in sorted(self.archived.iterdir()):
            with contextlib.suppress(ConfigError):  # a copy that is not finished has another name
                name = parse_wal_name(path.name)
                if path.name not in self.shipped:
                    plain = path.read_bytes()
                    key = wal_key(NAME, self.system, name, hashlib.sha256(plain).hexdigest())
                    self.store.put(key, compressed([plain]) if key.endswith(".zst") else [plain])
                    self.shipped.add(path.name)


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
            yield ClusterBox(cluster, DirectoryStore(store_folder), archived)
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
