"""What the tests of the catalog share: one backup, its keys, and looks into what is listed."""

import hashlib
from datetime import UTC, datetime

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.layout import (
    Beside,
    catalog_key,
    copy_key,
)
from backup_pipeline.storage import catalog
from backup_pipeline_tests.domain.values import manifest
from backup_pipeline_tests.storage.effects import CountingStore
from backup_pipeline_tests.storage.memory import MemoryStore

M = manifest()
KEY, COPY = catalog_key(M.id), copy_key(M.id, M.tier, Beside.MANIFEST)
VERDICT, PIN = catalog_key(M.id, Beside.VERDICT), catalog_key(M.id, Beside.PIN)


def day(number: int) -> datetime:
    return datetime(2026, 3, number, 2, tzinfo=UTC)


def resealed(record: bytes, backup: BackupId) -> bytes:
    """A record of M as one of another backup, made quickly."""
    body = record[: record.rindex(b'  "sha256"')].replace(M.id.stamp.encode(), backup.stamp.encode())
    taken = f"{backup.taken_at:%Y-%m-%dT%H:%M:%SZ}".encode()
    body = body.replace(b'"snapshot_at": "2026-03-01T02:00:00Z"', b'"snapshot_at": "' + taken + b'"')
    return body + f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def listed(store: MemoryStore | CountingStore) -> list[BackupId]:
    return [backup.id for backup in catalog.list_backups(store).backups]
