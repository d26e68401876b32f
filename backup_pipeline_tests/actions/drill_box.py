"""A protected cluster with heartbeats on both sides of what it committed, and drills of it."""

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from backup_pipeline.actions import drill_recovery, heartbeat
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.domain.drill import Drill
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store
from backup_pipeline_tests.actions.box import ask, execute, now
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers.postgres import enable_checksums

# What a session of the source's choice would fail by: no library, no time, no right.
HOSTILE = (
    "CREATE DATABASE hostile",
    "CREATE ROLE nobody_at_all",
    "ALTER DATABASE hostile SET role = 'nobody_at_all'",
    "ALTER DATABASE hostile SET statement_timeout = '1ms'",
    "ALTER DATABASE hostile SET session_preload_libraries = 'no_such_library'",
    "CREATE DATABASE half_dropped",
    "UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'half_dropped'",
    "ALTER DATABASE template1 ALLOW_CONNECTIONS false",
    "CREATE TABLE public.cache TABLESPACE space AS SELECT 1 AS a",
    "ALTER TABLE public.cache SET UNLOGGED",
)


def protected(box: RecoveryBox, store: Store | None = None, **changes: Any) -> ProtectedCluster:
    """The cluster with a heartbeat configured."""
    return box.protected(store, **{"heartbeat": True, **changes})


def forge(box: RecoveryBox, at: datetime) -> None:
    """A heartbeat with a time of the test's choice."""
    execute(box.cluster.endpoint(), f"INSERT INTO backup_pipeline.heartbeat (at) VALUES ('{at.isoformat()}')")


def drill(
    box: RecoveryBox, store: Store | None = None, *, to: datetime | None = None, **changes: Any
) -> Drill:
    """One drill, of a random second unless told."""
    cluster = protected(box, store, **changes)
    return drill_recovery.drill(cluster, clock=now, report=box.said, target_at=to, pause=lambda _: None)


def last_second(box: RecoveryBox) -> datetime:
    """The time of the last commit before the heartbeat at the end."""
    return box.ledger[-1].at


@contextlib.contextmanager
def a_drill_box(bin_dir: str, store: Store, *, checksums: bool = False) -> Iterator[RecoveryBox]:
    """A heartbeat, a base backup, four segments with commits, another heartbeat; all archived."""
    with a_recovery_box(bin_dir, store) as box:
        if checksums:
            box.cluster.stop()
            enable_checksums(box.cluster)
            box.cluster.start()
        space = box.folder.parent / "space"
        space.mkdir(mode=0o700)
        execute(box.cluster.endpoint(), f"CREATE TABLESPACE space LOCATION '{give(space)}'")
        for statement in HOSTILE:
            execute(box.cluster.endpoint(), statement)
        heartbeat.set_up(protected(box).config)
        forge(box, now() - timedelta(minutes=1))
        box.commit(2)
        box.take()
        for _ in range(4):
            box.commit(2, switch=True)
        heartbeat.beat(protected(box).config)
        box.switch()
        assert ask(box.cluster.endpoint(), "SELECT count(*) FROM backup_pipeline.heartbeat") == 2
        yield box


def root(store: Store) -> str:
    assert isinstance(store, DirectoryStore)
    return f"file://{store.root}"
