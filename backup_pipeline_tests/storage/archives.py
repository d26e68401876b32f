"""A cluster's base backups and WAL in a store in memory, laid there at any moment; the content is made up."""

import hashlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.config import ClusterConfig, Secret
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseManifest, WalPoint
from backup_pipeline.domain.layout import wal_key
from backup_pipeline.domain.wal import Lsn, WalSegment, parse_wal_name
from backup_pipeline.storage import base_backups
from backup_pipeline.wal.identity import System, claim
from backup_pipeline_tests.domain.values import SOURCE, base_manifest, content_of
from backup_pipeline_tests.storage.memory import MemoryStore

SEGMENT_BYTES = 16 * 1024 * 1024
BEGUN = datetime(2026, 3, 1, tzinfo=UTC)
SYSTEM = SOURCE.system_identifier


@dataclass
class FakeArchive:
    """Cluster `main`: segment N is archived at BEGUN + N hours."""

    at: datetime = BEGUN
    store: MemoryStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = MemoryStore(clock=lambda: self.at)
        claim(self.store, "main", System(SYSTEM, SEGMENT_BYTES), at=self.at)

    def cluster(self, *, window: timedelta = timedelta(hours=24), dsn: str = "host=db") -> ProtectedCluster:
        """The cluster as configured; without a dsn, as the store alone knows it."""
        secret = Secret(dsn) if dsn else Secret(key="clusters.main.dsn")
        return ProtectedCluster(ClusterConfig("main", secret, recovery_window=window), self.store)

    def segments(self, *numbers: int, timeline: int = 1, content: str = "") -> None:
        """Archive segments."""
        for number in numbers:
            name = parse_wal_name(WalSegment(timeline, number).name(SEGMENT_BYTES))
            sha256 = hashlib.sha256(f"{name}{content}".encode()).hexdigest()
            self.at = BEGUN + timedelta(hours=number)
            self.store.put(wal_key("main", SYSTEM, name, sha256), [b"packed"])

    def history(self, timeline: int, *switches: tuple[int, int]) -> None:
        """Archive a history: (ancestor, the segment in whose middle it was left) each."""
        lines = [f"{ancestor}\t{_lsn(number, 0.5)}\twhy\n" for ancestor, number in switches]
        key = wal_key("main", SYSTEM, parse_wal_name(f"{timeline:08X}.history"), "")
        self.store.put(key, ["".join(lines).encode()])

    def base(
        self,
        first: int,
        last: int = 0,
        *,
        timeline: int = 1,
        parent: BackupId | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> BaseManifest:
        """Publish a base backup that needs the segments `first` to `last`, taken while they were written."""
        last = last or first
        began = BEGUN + timedelta(hours=first)
        manifest = base_manifest(at=began)
        manifest = replace(
            manifest,
            stopped_at=BEGUN + timedelta(hours=last, minutes=1),
            finished_at=BEGUN + timedelta(hours=last, minutes=2),
            start=WalPoint(timeline, _lsn(first, 0.1)),
            end=WalPoint(timeline, _lsn(last, 0.2)),
            segment_bytes=segment_bytes,
            parent=parent,
        )
        for item in manifest.objects:
            self.store.put(item.key, [content_of(manifest.id, item.name)])
        base_backups.publish(self.store, manifest)
        return manifest


def _lsn(number: int, share: float) -> Lsn:
    return Lsn(number * SEGMENT_BYTES + int(share * SEGMENT_BYTES))
