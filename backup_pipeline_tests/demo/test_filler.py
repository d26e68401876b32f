"""The demo's database: what it holds, that it is the same each time, and that an application lives on it."""

import contextlib
from collections.abc import Iterator
from datetime import date

import pytest

from backup_pipeline.demo import contents, filler
from backup_pipeline.demo.contents import Named
from backup_pipeline.demo.writer import Writer, application
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline_tests.servers import postgres as servers

TODAY = date(2026, 3, 14)
ROWS = 2_000
TABLES = ("users", "workflows", "workflow_versions", "executions", "execution_steps", "api_keys", "audit_log")


@pytest.fixture(scope="module")
def postgres() -> Iterator[LocalCluster]:
    """A server of this module's own: the demo's roles are the whole server's."""
    with servers.running_cluster(servers.bin_dir_17()) as cluster:
        yield cluster


@pytest.fixture
def filled(database: Endpoint) -> Endpoint:
    _fill(database)
    return database


@pytest.fixture
def session(filled: Endpoint) -> Iterator[Connection]:
    with contextlib.closing(connect(filled)) as session:
        yield session


def _fill(database: Endpoint, *, seed: int = filler.SEED) -> filler.Filled:
    """The roles are the server's own, and made once."""
    with contextlib.closing(connect(database)) as session:
        session.execute((filler._FOLDER / "roles.sql").read_bytes())
        session.execute(f'ALTER DATABASE "{database.database}" OWNER TO {filler.OWNER}')
        session.execute(f'GRANT CONNECT ON DATABASE "{database.database}" TO {filler.APPLICATION}')
    return filler.fill(database, rows=ROWS, today=TODAY, seed=seed)


def test_a_database_comes_with_what_no_dump_of_it_contains(postgres: LocalCluster) -> None:
    filler.create_database(postgres.endpoint(), "agentweave_made")
    with contextlib.closing(connect(postgres.endpoint())) as session:
        row = session.execute(
            "SELECT pg_get_userbyid(datdba)::text, shobj_description(oid, 'pg_database'), datacl::text,"
            " (SELECT array_length(setconfig, 1) FROM pg_db_role_setting WHERE setdatabase = d.oid)"
            " FROM pg_database d WHERE datname = 'agentweave_made'"
        ).fetchone()
        session.execute("DROP DATABASE agentweave_made")
    assert row is not None
    owner, comment, grants, settings = row
    assert (owner, settings) == (filler.OWNER, 2)
    assert str(comment).startswith("AgentWeave")
    assert "agentweave_app=c/" in str(grants)


def test_it_has_one_of_each_thing_that_a_backup_must_bring_back(session: Connection) -> None:
    def count(query: str) -> int:
        row = session.execute(query.encode()).fetchone()
        return int(str(row[0])) if row else 0

    public = "'public'::regnamespace"
    assert count(f"SELECT count(*) FROM pg_class WHERE relnamespace = {public} AND relispartition") >= 9
    assert count(f"SELECT count(*) FROM pg_type WHERE typnamespace = {public} AND typtype = 'e'") == 1
    assert count(f"SELECT count(*) FROM pg_type WHERE typnamespace = {public} AND typtype = 'd'") == 1
    assert count("SELECT count(*) FROM pg_attribute WHERE attgenerated = 's'") >= 2
    assert count("SELECT count(*) FROM pg_largeobject_metadata") == 12
    assert count("SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND condeferrable") == 1
    assert count("SELECT last_value FROM public.invoice_number_seq") >= 10_000
    assert count("SELECT count(*) FROM pg_extension WHERE extname = 'pg_trgm'") == 1
    assert count("SELECT count(*) FROM public.daily_usage") > 100
    assert count("SELECT count(*) FROM public.active_workflows") > 10
    assert count("SELECT count(*) FROM public.executions_other") == 0
    assert count("SELECT count(*) FROM public.executions WHERE started_at >= '2026-03-14'") <= 1


def test_the_same_arguments_make_the_same_rows(postgres: LocalCluster, filled: Endpoint) -> None:
    with servers.fresh_database(postgres) as again, servers.fresh_database(postgres) as other:
        _fill(again)
        _fill(other, seed=7)
        for table in TABLES:
            assert contents.rows(again, table) == contents.rows(filled, table), table
        assert contents.rows(other, "executions") != contents.rows(filled, "executions")
        assert contents.named(again) == contents.named(filled)


def test_about_as_many_rows_are_made_as_were_asked_for(database: Endpoint) -> None:
    made = _fill(database)
    assert made.rows == pytest.approx(ROWS, rel=0.1)
    assert made.size_bytes > 5_000_000


def test_the_application_writes_and_survives_a_lost_connection(filled: Endpoint) -> None:
    before = contents.rows(filled, "executions")
    with Writer(application(filled), per_second=1000) as writer:
        assert writer.wait_for(100), writer.failure
        with contextlib.closing(connect(filled)) as session:
            query = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s AND datname = %s"
            )
            session.execute(query, [filler.APPLICATION, filled.database])
        assert writer.wait_for(100), writer.failure
    assert (writer.interruptions, writer.failure) == (1, None)
    assert contents.rows(filled, "executions") != before
    assert writer.longest_gap_s > 0


def test_what_a_dropped_table_takes_with_it_is_seen(filled: Endpoint, session: Connection) -> None:
    before = contents.named(filled)
    session.execute("DROP TABLE public.workflow_versions CASCADE")
    gone = before - contents.named(filled)
    assert {Named("table", "workflow_versions"), Named("view", "active_workflows")} < gone
    assert contents.counted(gone).startswith("1 table, 1 view, ")
    assert "foreign keys" in contents.counted(gone)
