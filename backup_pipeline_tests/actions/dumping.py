"""What the tests of dumps share: whether a backup is whole, and a Report that keeps the progress."""

import hashlib

from backup_pipeline.actions.protected import Protected
from backup_pipeline.actions.report import Progress
from backup_pipeline.domain.backup import Backup
from backup_pipeline.domain.layout import data_prefix
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.actions.box import Said


def whole(protected: Protected, backup: Backup) -> None:
    """Assert that every object is there as its manifest says, below the backup's own prefix."""
    record = backup.manifest
    assert record is not None
    prefix = data_prefix(backup.id, backup.tier)
    below = {info.key: info.size_bytes for info in protected.store.list(prefix)}
    assert {item.key: item.size_bytes for item in record.objects}.items() <= below.items()
    for item in record.objects:
        data = read_all(protected.store, item.key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (item.size_bytes, item.sha256)
        assert item.key == prefix + item.name
    assert set(below) - {item.key for item in record.objects} <= {
        f"{prefix}manifest.json",
        f"{prefix}verdict.json",
    }


class Watching(Said):
    """A Report that keeps the progress too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Progress] = []

    def progress(self, progress: Progress) -> None:
        """Keep it."""
        self.seen.append(progress)

    def of(self, step: str) -> list[Progress]:
        """The progress of one step."""
        return [item for item in self.seen if item.step == step]
