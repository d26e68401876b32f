"""The last transaction of a segment, as real servers of each version write it."""

import contextlib
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.engines.postgres.waldump import TransactionEnd, last_transaction
from backup_pipeline.errors import ToolError
from backup_pipeline_tests.servers import postgres as servers


@pytest.fixture(scope="module", params=servers.EACH_VERSION)
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    settings = {"wal_level": "replica", "max_prepared_transactions": "2"}
    with servers.running_cluster(request.param(), **settings) as running:
        yield running


def one(session: Connection, query: str) -> str:
    row = session.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


def finished_segment(cluster: LocalCluster, session: Connection, into: Path) -> Path:
    """A copy of the segment that was written until now, after the switch to the next."""
    name = one(session, "SELECT pg_walfile_name(pg_switch_wal())")
    return Path(shutil.copy(cluster.data / "pg_wal" / name, into / name))


def last(cluster: LocalCluster, segment: Path) -> TransactionEnd | None:
    return last_transaction(f"{cluster.bin_dir}/pg_waldump", segment)


@pytest.mark.parametrize(
    ("statements", "committed"),
    [
        (["CREATE TABLE public.t (a int)", "INSERT INTO public.t VALUES (1)"], True),
        (["BEGIN; CREATE TABLE public.u (a int); SELECT txid_current(); ROLLBACK"], False),
        (["BEGIN; CREATE TABLE public.v (a int); PREPARE TRANSACTION 'x'", "COMMIT PREPARED 'x'"], True),
        (["BEGIN; CREATE TABLE public.w (a int); PREPARE TRANSACTION 'y'", "ROLLBACK PREPARED 'y'"], False),
    ],
)
def test_the_last_transaction_that_ended_is_found(
    cluster: LocalCluster, tmp_path: Path, statements: list[str], committed: bool
) -> None:
    with contextlib.closing(connect(cluster.endpoint())) as session:
        before = datetime.fromisoformat(one(session, "SELECT clock_timestamp()"))
        for statement in statements:
            session.execute(statement.encode())
        after = datetime.fromisoformat(one(session, "SELECT clock_timestamp()"))
        found = last(cluster, finished_segment(cluster, session, tmp_path))
    assert found is not None
    assert found.committed is committed
    assert before <= found.at <= after


def test_a_segment_in_which_nothing_ended_has_none(cluster: LocalCluster, tmp_path: Path) -> None:
    with contextlib.closing(connect(cluster.endpoint())) as session:
        session.execute("SELECT pg_switch_wal()")
        session.execute("SELECT pg_create_restore_point('COMMIT 2026-03-01 02:00:00.0 UTC')")
        assert last(cluster, finished_segment(cluster, session, tmp_path)) is None


def test_a_segment_that_is_not_whole_is_an_error(cluster: LocalCluster, tmp_path: Path) -> None:
    with contextlib.closing(connect(cluster.endpoint())) as session:
        session.execute("CREATE TABLE public.z AS SELECT generate_series(1, 1000)")
        segment = finished_segment(cluster, session, tmp_path)
    data = bytearray(segment.read_bytes())
    data[8192:16384] = bytes(8192)
    segment.write_bytes(data)
    with pytest.raises(ToolError, match="pg_waldump ended with exit code 1"):
        last(cluster, segment)
