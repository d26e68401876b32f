"""The advisory lock of a database: held, waited for, told of, and lost with its session."""

import contextlib
import threading

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import advisory_lock, lock_key
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import Busy, ServerError
from backup_pipeline_tests.engines.test_server import one
from backup_pipeline_tests.servers.postgres import fresh_database


def test_the_lock_of_a_database_never_changes() -> None:
    assert lock_key("agentweave") == -3859609351735919742


def test_a_second_holder_is_refused_and_told_who_holds(database: Endpoint) -> None:
    name = database.database
    with advisory_lock(database, name, purpose="dump", wait_s=0) as lock:
        assert lock.still_held()
        for renames in (False, True):
            with (
                pytest.raises(Busy) as busy,
                advisory_lock(database, name, purpose="swap", wait_s=0.05, renames=renames),
            ):
                pass
            assert "backup_pipeline dump, pid" in str(busy.value.detail["held by"])
        with advisory_lock(database, "another", purpose="dump", wait_s=0, renames=True):
            pass
    with advisory_lock(database, name, purpose="dump", wait_s=0):
        pass


def test_who_comes_at_once_finds_it_given_back(database: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the server has not seen yet that the first one's client is gone."""
    unseen: list[psycopg.Connection] = []

    def leave(session: psycopg.Connection) -> None:
        unseen.append(session)

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Connection, "close", leave)
        with advisory_lock(database, database.database, purpose="dump", wait_s=0):
            pass
    with advisory_lock(database, database.database, purpose="swap", wait_s=0, renames=True):
        pass
    assert len(unseen) == 2
    for session in unseen:
        session.close()


def test_a_second_holder_waits_for_the_first(database: Endpoint) -> None:
    released = threading.Event()
    with contextlib.ExitStack() as first:
        first.enter_context(advisory_lock(database, database.database, purpose="dump", wait_s=0))

        def second() -> None:
            with advisory_lock(database, database.database, purpose="swap", wait_s=20, renames=True):
                released.set()

        waiting = threading.Thread(target=second)
        waiting.start()
        assert not released.wait(0.2)
    assert released.wait(20)
    waiting.join()


def test_a_rename_is_possible_under_its_lock_and_keeps_dumps_out(postgres: LocalCluster) -> None:
    with fresh_database(postgres) as endpoint, contextlib.closing(connect(postgres.endpoint())) as session:
        name = sql.Identifier(endpoint.database)
        with advisory_lock(endpoint, endpoint.database, purpose="swap", wait_s=0, renames=True):
            session.execute(sql.SQL("ALTER DATABASE {} RENAME TO renamed").format(name))
            session.execute(sql.SQL("ALTER DATABASE renamed RENAME TO {}").format(name))
            with pytest.raises(Busy), advisory_lock(endpoint, endpoint.database, purpose="dump", wait_s=0):
                pass


def test_a_role_that_may_not_enter_postgres_still_meets_a_swap(postgres15: LocalCluster) -> None:
    with contextlib.closing(connect(postgres15.endpoint())) as session:
        session.execute("CREATE ROLE kept_out LOGIN")
        session.execute("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC")
        try:
            with fresh_database(postgres15) as endpoint:
                name = endpoint.database
                dumping = Endpoint(make_conninfo(endpoint.dsn, user="kept_out"))
                with (
                    advisory_lock(dumping, name, purpose="dump", wait_s=0),
                    pytest.raises(Busy),
                    advisory_lock(endpoint, name, purpose="swap", wait_s=0, renames=True),
                ):
                    pass
                with (
                    pytest.raises(ServerError),
                    advisory_lock(dumping, name, purpose="s", wait_s=0, renames=True),
                ):
                    pass
        finally:
            session.execute("GRANT CONNECT ON DATABASE postgres TO PUBLIC")


def test_a_lost_session_is_a_lost_lock(postgres: LocalCluster, database: Endpoint) -> None:
    with advisory_lock(database, database.database, purpose="dump", wait_s=0) as lock:
        for session in lock.sessions:
            one(postgres.endpoint(), f"SELECT pg_terminate_backend({session.info.backend_pid}, 5000)")
        assert not lock.still_held()
        with advisory_lock(database, database.database, purpose="s", wait_s=0, renames=True) as other:
            assert other.still_held()
