"""Stores and data directories for the tests of the WAL archive."""

from pathlib import Path

import pytest

from backup_pipeline_tests.storage.conftest import moto, place, rclone, store
from backup_pipeline_tests.wal.segments import DataDirectory

__all__ = ["moto", "place", "rclone", "store"]


@pytest.fixture
def data(tmp_path: Path) -> DataDirectory:
    """A data directory with an empty pg_wal."""
    return DataDirectory(tmp_path / "data")
