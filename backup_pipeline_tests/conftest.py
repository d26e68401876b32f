"""Fixtures that several test modules share; what they start lives in servers/."""

from collections.abc import Iterator

import pytest

from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline_tests.servers import postgres as servers


@pytest.fixture(scope="session")
def postgres() -> Iterator[LocalCluster]:
    """PostgreSQL 17, on its private socket, for the whole session."""
    with servers.running_cluster(servers.bin_dir_17()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def postgres15() -> Iterator[LocalCluster]:
    """PostgreSQL 15 as Debian has it; the test is skipped where it is not installed."""
    with servers.running_cluster(servers.bin_dir_15()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def postgres18() -> Iterator[LocalCluster]:
    """PostgreSQL 18."""
    with servers.running_cluster(servers.bin_dir_18()) as cluster:
        yield cluster


@pytest.fixture
def database(postgres: LocalCluster) -> Iterator[Endpoint]:
    """A fresh, empty database of the PostgreSQL 17 server, gone after the test."""
    with servers.fresh_database(postgres) as endpoint:
        yield endpoint
