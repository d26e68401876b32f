"""Sources, stores and a second server for the tests of actions."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql

from backup_pipeline.actions import prove, restore
from backup_pipeline.actions.compare import Restored, compare_restored
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.fingerprint import Fingerprint
from backup_pipeline.domain.proof import Comparison
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline_tests.actions.box import (
    DUE,
    Box,
    a_box,
    ask,
    copy_of,
    databases,
    execute,
    now,
)
from backup_pipeline_tests.actions.restoring import drop
from backup_pipeline_tests.servers import postgres as servers


@pytest.fixture(scope="session")
def other() -> Iterator[LocalCluster]:
    """A second PostgreSQL 17: where proofs restore to, and where a lost server's backups go."""
    with servers.running_cluster(servers.bin_dir_17()) as cluster:
        yield cluster


@pytest.fixture
def box(postgres: LocalCluster, other: LocalCluster, tmp_path: Path) -> Iterator[Box]:
    """A source of its own, with an empty store."""
    with a_box(postgres, tmp_path / "store", scratch=other) as made:
        yield made


@pytest.fixture(scope="session")
def taken(
    postgres: LocalCluster, other: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    """A source with a proven daily backup and an unproven weekly one; read only: see `proven`."""
    with a_box(postgres, tmp_path_factory.mktemp("taken") / "store", scratch=other) as made:
        first = made.take("daily", scheduled_for=DUE)
        assert prove.prove(made.protected, first.id, clock=now, report=made.said).verdict is Verdict.PROVEN
        made.execute("INSERT INTO public.customer (name, added) VALUES ('the last one', '2026-03-01Z')")
        made.take("weekly")
        yield made


@pytest.fixture
def proven(taken: Box, tmp_path: Path) -> Box:
    """The backups of `taken` in a store of the test's own."""
    return copy_of(taken, tmp_path / "copy")


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes each proof and restore find its copy changed by some SQL, in which {database} is its name."""

    def tamper(statement: str) -> None:
        def compare(source: Fingerprint, restored: Restored, **options: Any) -> Comparison:
            name = sql.Identifier(restored.database.database).as_string()
            execute(restored.database, statement.replace("{database}", name))
            return compare_restored(source, restored, **options)

        monkeypatch.setattr(prove, "compare_restored", compare)
        monkeypatch.setattr(restore, "compare_restored", compare)

    return tamper


@pytest.fixture(scope="session")
def shop(
    postgres: LocalCluster, other: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    """A source of which there is one backup, and which has gone on since."""
    with a_box(postgres, tmp_path_factory.mktemp("shop") / "store", scratch=other) as made:
        made.take("daily")
        made.execute("DELETE FROM public.orders WHERE id <= 400")
        yield made


@pytest.fixture
def live(shop: Box, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The same with a store of the test's own; the source has its name and contents back afterwards."""
    oid = ask(shop.endpoint, "SELECT oid FROM pg_database WHERE datname = current_database()")
    yield copy_of(shop, tmp_path_factory.mktemp("live") / "store")
    admin, name = shop.cluster.endpoint(), shop.endpoint.database
    with contextlib.closing(connect(admin)) as session:
        for extra in databases(shop.cluster, name) - {name}:
            if ask(admin, f"SELECT oid FROM pg_database WHERE datname = {sql.quote(extra)}") == oid:
                drop(session, name)
                back = sql.SQL("ALTER DATABASE {} RENAME TO {}")
                session.execute(back.format(sql.Identifier(extra), sql.Identifier(name)))
            else:
                drop(session, extra)
    assert ask(shop.endpoint, "SELECT oid FROM pg_database WHERE datname = current_database()") == oid
    assert ask(shop.endpoint, "SELECT count(*) FROM public.orders") == 600
