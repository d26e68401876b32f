"""Clusters of our own: made, reached, stopped, removed, and never left behind."""

import contextlib

from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import Endpoint, connect, read_server_info


def test_a_running_cluster_answers_and_says_what_it_is(postgres: LocalCluster) -> None:
    with contextlib.closing(connect(postgres.endpoint())) as session:
        info = read_server_info(session)
    assert (info.major, info.in_recovery, info.is_superuser) == (17, False, True)
    assert info.system_identifier.isdigit()


def test_a_fresh_database_is_empty(database: Endpoint) -> None:
    with contextlib.closing(connect(database)) as session:
        query = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        rows = session.execute(query).fetchall()
    assert rows == [(0,)]
