"""The places that the storage tests run on, each behind the same fixtures."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline.config import StoreConfig
from backup_pipeline.storage.store import Store, open_store
from backup_pipeline_tests.servers.s3 import S3Server, moto_s3, rclone_s3

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """`rclone serve s3`, for the whole session."""
    with rclone_s3(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """`moto_server`, for the whole session, which refuses wrong credentials."""
    with moto_s3(authorized=True) as server:
        yield server


@pytest.fixture(params=["rclone", "moto"])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Each S3 server in turn."""
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=["directory", "rclone", "moto"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    """An empty place of each kind in turn."""
    if request.param == "directory":
        root = tmp_path / "store"
        root.mkdir()
        return StoreConfig(root.as_uri())
    server: S3Server = request.getfixturevalue(request.param)
    return server.store(f"test-{next(_numbers)}/inner prefix")


@pytest.fixture
def store(place: StoreConfig) -> Store:
    """An empty store of each kind in turn."""
    return open_store(place)
