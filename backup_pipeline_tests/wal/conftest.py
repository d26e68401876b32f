"""Stores and data directories for the tests of the WAL archive."""

from pathlib import Path

import pytest

from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline_tests.storage.conftest import moto, place, rclone, store
from backup_pipeline_tests.wal.archives import archive_in
from backup_pipeline_tests.wal.box import begin
from backup_pipeline_tests.wal.segments import DataDirectory

__all__ = ["moto", "place", "rclone", "store"]


@pytest.fixture
def data(tmp_path: Path) -> DataDirectory:
    """A data directory with an empty pg_wal."""
    return DataDirectory(tmp_path / "data")


@pytest.fixture
def archive(store: Store) -> WalArchive:
    """The archive of cluster `main`, on each kind of store."""
    begin(store)
    return archive_in(store)


@pytest.fixture
def here(tmp_path: Path) -> DirectoryStore:
    """An archive in a directory, whose objects are at hand."""
    (tmp_path / "here").mkdir()
    store = DirectoryStore(tmp_path / "here")
    begin(store)
    return store


@pytest.fixture
def filled(here: DirectoryStore, data: DataDirectory) -> DirectoryStore:
    """An archive with segments 3, 4 and 5."""
    for number in (3, 4, 5):
        archive_in(here).push(data.segment(number))
    return here
