"""An S3 server, and a Dagster whose backups are in it, for the tests of each module."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from backup_pipeline_tests.e2e.dagster_box import DagsterBox, running_dagster
from backup_pipeline_tests.servers.s3 import S3Server, rclone_s3

STORE = """
[store]
url = "s3://{s3.bucket}/e2e"
endpoint = "{s3.endpoint}"
region = "{s3.region}"
access_key_id = {{ env = "E2E_ACCESS_KEY_ID" }}
secret_access_key = {{ env = "E2E_SECRET_ACCESS_KEY" }}
"""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server; the store is its prefix `e2e`."""
    with rclone_s3(tmp_path_factory.mktemp("e2e_s3")) as server:
        yield server


@pytest.fixture(scope="module")
def dagster_with(
    s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], AbstractContextManager[DagsterBox]]:
    """Runs a Dagster whose configuration is the store and these tables."""

    @contextlib.contextmanager
    def running(tables: str) -> Iterator[DagsterBox]:
        folder = tmp_path_factory.mktemp("e2e")
        configuration = folder / "backups.toml"
        configuration.write_text(STORE.format(s3=s3) + tables, encoding="utf-8")
        secrets = {"E2E_ACCESS_KEY_ID": s3.access_key_id, "E2E_SECRET_ACCESS_KEY": s3.secret_access_key}
        with running_dagster(folder / "home", configuration, secrets) as dagster:
            yield dagster

    return running
