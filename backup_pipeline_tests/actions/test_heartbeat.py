"""The heartbeat of a real cluster: made, written by a role that may do no more, pruned, and kept up."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from backup_pipeline.actions import heartbeat
from backup_pipeline.config import ClusterConfig, Secret
from backup_pipeline.domain.heartbeat import GRACE, Heartbeat, SourceBeats
from backup_pipeline.engines.postgres import heartbeat as table
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import ServerError
from backup_pipeline_tests.actions.box import ask, execute, now
from backup_pipeline_tests.servers import postgres as servers

ROLE = 'the "writer"'
WINDOW = timedelta(days=3)


@pytest.fixture(params=["17", "15"])
def database(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    cluster: LocalCluster = request.getfixturevalue("postgres" if request.param == "17" else "postgres15")
    with servers.fresh_database(cluster) as endpoint:
        yield endpoint


@pytest.fixture
def writer(database: Endpoint) -> Iterator[Endpoint]:
    """A role that has nothing but what the set-up grants."""
    quoted = '"' + ROLE.replace('"', '""') + '"'
    execute(database, f"CREATE ROLE {quoted} LOGIN")
    heartbeat.set_up(config(database), ROLE)
    yield Endpoint(make_conninfo(database.dsn, user=ROLE))
    execute(database, f"DROP OWNED BY {quoted}")
    execute(database, f"DROP ROLE {quoted}")


def config(endpoint: Endpoint) -> ClusterConfig:
    return ClusterConfig("main", dsn=Secret(endpoint.dsn), heartbeat=True, recovery_window=WINDOW)


def age(database: Endpoint, number: int, by: timedelta) -> None:
    execute(database, f"UPDATE backup_pipeline.heartbeat SET at = at - interval '{by}' WHERE id = {number}")


def test_a_role_that_may_do_no_more_writes_it_and_the_window_bounds_it(
    database: Endpoint, writer: Endpoint
) -> None:
    heartbeat.set_up(config(database), ROLE)  # twice
    begun = now()
    beats = [heartbeat.beat(config(writer)) for _ in range(3)]
    assert begun - timedelta(seconds=1) <= beats[0] < beats[1] < beats[2]
    age(database, 1, WINDOW + timedelta(days=1, seconds=1))
    age(database, 2, WINDOW + timedelta(hours=23))
    heartbeat.beat(config(writer))
    assert ask(database, "SELECT array_agg(id ORDER BY id) FROM backup_pipeline.heartbeat") == [2, 3, 4]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM backup_pipeline.heartbeat",
        "INSERT INTO backup_pipeline.heartbeat DEFAULT VALUES",
        "UPDATE backup_pipeline.heartbeat SET at = now()",
        "CREATE TABLE backup_pipeline.mine ()",
    ],
)
def test_that_role_can_neither_forge_nor_empty_it(writer: Endpoint, statement: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        execute(writer, statement)


def test_the_young_rows_stay_whatever_that_role_asks(database: Endpoint, writer: Endpoint) -> None:
    heartbeat.beat(config(writer))
    execute(writer, "SELECT backup_pipeline.beat('-1 year')")
    assert ask(database, "SELECT count(*) FROM backup_pipeline.heartbeat") == 2


def test_a_schema_that_another_role_made_is_not_trusted(database: Endpoint) -> None:
    execute(database, "CREATE SCHEMA backup_pipeline AUTHORIZATION pg_database_owner")
    with pytest.raises(ServerError, match="belongs to another role"):
        heartbeat.set_up(config(database))


def test_without_the_table_it_says_what_to_do(database: Endpoint) -> None:
    with pytest.raises(ServerError, match="no heartbeat was written") as caught:
        heartbeat.beat(config(database))
    assert "--setup --apply" in caught.value.hint
    with connect(database) as session:
        assert table.read_source(session, now()) is None
        assert table.read_copy(session, None) is None


def test_a_locked_table_is_not_waited_for(database: Endpoint) -> None:
    heartbeat.set_up(config(database))
    with connect(database, autocommit=False) as session:
        session.execute("LOCK backup_pipeline.heartbeat")
        with pytest.raises(ServerError, match="lock timeout"):
            heartbeat.beat(config(database))


def test_the_rows_on_both_sides_of_a_moment_are_read(database: Endpoint) -> None:
    heartbeat.set_up(config(database))
    at = datetime(2026, 3, 1, 2, tzinfo=UTC)
    for seconds in (-70, -11, -9, 1, 61):
        moment = at + timedelta(seconds=seconds)
        execute(database, f"INSERT INTO backup_pipeline.heartbeat (at) VALUES ('{moment}')")
    beats = {
        number: Heartbeat(number, at + timedelta(seconds=second))
        for number, second in ((2, -11), (4, 1), (5, 61))
    }
    with connect(database) as session:
        assert timedelta(seconds=10) == GRACE
        source = table.read_source(session, at)
        assert source == SourceBeats(beats[2], beats[4])
        copy = table.read_copy(session, source)
        assert copy is not None
        assert (copy.newest, copy.has_before, copy.has_after) == (beats[5], True, True)
        back = at - timedelta(minutes=5)
        execute(database, f"INSERT INTO backup_pipeline.heartbeat (at) VALUES ('{back}')")
        source = table.read_source(session, at)
        assert source is not None
        assert source.stepped_back == Heartbeat(6, back)
        assert table.read_source(session, at + timedelta(days=9)) == SourceBeats(beats[5], None)


def test_it_is_kept_up_until_it_is_stopped_and_says_each_trouble_once(database: Endpoint) -> None:
    said: list[str] = []

    class Ticks(threading.Event):
        """Each wait is over at once: the first three minutes fail, then somebody sets it up."""

        minutes = 0

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout == 60.0
            self.minutes += 1
            if self.minutes == 3:
                heartbeat.set_up(config(database))
            return self.minutes == 5

    heartbeat.keep_beating(config(database), Ticks(), log=said.append)
    assert ask(database, "SELECT count(*) FROM backup_pipeline.heartbeat") == 2
    assert ["no heartbeat was written" in line for line in said] == [True, False]
    assert said[1] == "the heartbeat of main is written again"
