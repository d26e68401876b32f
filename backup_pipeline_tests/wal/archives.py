"""What the tests of the WAL archive share: archives, and looks into them."""

from datetime import UTC, datetime
from pathlib import Path

from backup_pipeline.domain.layout import wal_identity_key
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline_tests.wal.segments import DataDirectory

AT = datetime(2026, 3, 1, 2, tzinfo=UTC)
HISTORY = b"1\t0/5000000\tno recovery target specified\n"
LABEL = b"START WAL LOCATION: 0/300028 (file 000000010000000000000003)\n"


def archive_in(store: Store, data: DataDirectory | None = None) -> WalArchive:
    return WalArchive(store, "main", data_directory=data.path if data else None)


def keys(store: Store) -> list[str]:
    """All keys but that of the archive's record."""
    return [info.key for info in store.list("clusters/") if info.key != wal_identity_key("main")]


def object_of(store: DirectoryStore, number: int) -> Path:
    """The file of one archived segment."""
    (key,) = (key for key in keys(store) if f"{number:024X}"[8:] in key.split("/")[-1])
    return store.root / key
