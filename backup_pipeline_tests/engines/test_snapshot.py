"""Snapshots against what other sessions do at the same time: never a false row, never an endless wait."""

import os
import pkgutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backup_pipeline.domain.fingerprint import TableContent
from backup_pipeline.engines.postgres import fingerprint
from backup_pipeline.engines.postgres import snapshot as snapshots
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.engines.postgres.snapshot import Relation, exported_snapshot
from backup_pipeline.errors import ServerError
from backup_pipeline_tests.engines.zoo import ZOO, backup, execute, restore, tool
from backup_pipeline_tests.servers.postgres import fresh_database, running_cluster
from backup_pipeline_tests.waiting import wait_until

POSTGRES = "backup_pipeline.engines.postgres"
ROWS = "CREATE TABLE t (n int); INSERT INTO t SELECT g FROM generate_series(1, 3) g"

# Each leaves three rows, by a way that a snapshot taken before would see as an empty table.
REWRITES = (
    "ALTER TABLE t ALTER n TYPE bigint USING n::bigint; ALTER TABLE t ALTER n TYPE int USING n::int",
    "BEGIN; TRUNCATE t; INSERT INTO t SELECT g FROM generate_series(1, 3) g; COMMIT",
    "VACUUM FULL t",
    "CREATE TABLE other (n int); DROP TABLE other",
)


@contextmanager
def session_of(endpoint: Endpoint) -> Iterator[Connection]:
    with closing(connect(endpoint)) as session:
        session.execute("SET search_path = public")
        yield session


def open_and_close(endpoint: Endpoint, *, lock_timeout_s: float = 20) -> None:
    with exported_snapshot(endpoint, lock_timeout_s=lock_timeout_s):
        pass


@contextmanager
def queued(endpoint: Endpoint, statement: str, watcher: Connection) -> Iterator[None]:
    """Another session that waits for a lock, until the block ends."""
    with session_of(endpoint) as session, ThreadPoolExecutor(1) as pool:
        running = pool.submit(session.execute, statement.encode())
        pid = session.info.backend_pid
        blocked = "SELECT pg_catalog.cardinality(pg_catalog.pg_blocking_pids(%s)) > 0"
        wait_until(lambda: watcher.execute(blocked, [pid]).fetchone() == (True,))
        try:
            yield
        finally:
            session.cancel_safe()
            with suppress(psycopg.errors.QueryCanceled):
                running.result(timeout=20)


def test_rewrites_at_the_same_time_are_never_a_false_alarm(
    postgres: LocalCluster, database: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup_pipeline.engines.postgres.dump._LOCK_TIMEOUT_S", 0.2)
    execute(database, ROWS)
    stop = threading.Event()

    def rewrite(statements: str) -> None:
        with session_of(database) as session:
            while not stop.wait(0.1):
                for statement in statements.split("; "):
                    session.execute(statement.encode())

    found: list[tuple[TableContent, Path]] = []
    with ThreadPoolExecutor(len(REWRITES)) as pool:
        writers = [pool.submit(rewrite, statements) for statements in REWRITES]
        try:
            for number in range(6):
                # A writer that waits for our lock may keep pg_dump out: that is said, and tried again.
                with suppress(ServerError):
                    tables = backup(database, tmp_path / f"{number}.dump").tables
                    found.append((the_table(tables), tmp_path / f"{number}.dump"))
        finally:
            stop.set()
        for writer in writers:
            writer.result(timeout=60)
    found.append((the_table(backup(database, tmp_path / "last.dump").tables), tmp_path / "last.dump"))
    assert {table.rows for table, _ in found} == {3}
    assert len({table.digest for table, _ in found}) == 1
    for table, archive in found:
        with fresh_database(postgres) as copy:
            restore(archive, copy)
            assert the_table(fingerprint.of_database(copy, pg_dump=tool("pg_dump")).tables) == table


def the_table(tables: Sequence[TableContent]) -> TableContent:
    return next(table for table in tables if table.name == "t")


@pytest.mark.parametrize("statements", REWRITES[:2])
def test_a_rewrite_that_ends_while_its_table_is_waited_for(
    postgres: LocalCluster,
    database: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    statements: str,
) -> None:
    """A snapshot from before the wait would show an empty table to the fingerprint, or to pg_dump."""
    execute(database, ROWS)
    original = snapshots._lock

    def lock(endpoint: Endpoint, session: Connection, *others: Any) -> None:
        if not writer.info.transaction_status:
            writer.execute("BEGIN")
            for statement in statements.removeprefix("BEGIN; ").removesuffix("; COMMIT").split("; "):
                writer.execute(statement.encode())
        blocked = "SELECT pg_catalog.cardinality(pg_catalog.pg_blocking_pids(%s)) > 0"
        pid = session.info.backend_pid

        def end() -> None:
            wait_until(lambda: watcher.execute(blocked, [pid]).fetchone() == (True,))
            writer.execute("COMMIT")

        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(end)
            original(endpoint, session, *others)
            ending.result()

    monkeypatch.setattr(snapshots, "_lock", lock)
    with session_of(database) as writer, session_of(database) as watcher:
        taken = the_table(backup(database, tmp_path / "database.dump").tables)
    assert taken.rows == 3
    monkeypatch.undo()
    with fresh_database(postgres) as copy:
        restore(tmp_path / "database.dump", copy)
        assert the_table(fingerprint.of_database(copy, pg_dump=tool("pg_dump")).tables) == taken


def test_a_lock_that_is_waited_for_keeps_the_fingerprint_from_nothing(database: Endpoint) -> None:
    execute(database, ROWS)
    prepared = fingerprint.prepare(database, pg_dump=tool("pg_dump"))
    with (
        exported_snapshot(database) as snapshot,
        session_of(database) as watcher,
        queued(database, "TRUNCATE t", watcher),
    ):
        assert fingerprint.take(prepared, snapshot).rows == 3


def test_a_schema_is_read_as_the_snapshot_sees_it(database: Endpoint) -> None:
    execute(database, "CREATE SEQUENCE s; CREATE TABLE t (n int); CREATE TABLE u (n int)")
    with exported_snapshot(database) as snapshot:
        execute(database, "CREATE INDEX i ON t (n); DROP SEQUENCE s; CREATE SEQUENCE late")
        prepared = fingerprint.prepare(
            database, pg_dump=tool("pg_dump"), critical_tables=["t"], snapshot=snapshot
        )
    assert {each.name for each in prepared.schema.statements} == {"s", "t", "u"}
    assert prepared.sequences == ()


def test_a_locked_table_is_named_with_who_locks_it(database: Endpoint) -> None:
    execute(database, "CREATE TABLE a (n int); CREATE TABLE b (n int)")
    with session_of(database) as other:
        other.execute("BEGIN")
        other.execute("LOCK TABLE b")
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"table public\.b is locked by another session") as caught:
            open_and_close(database, lock_timeout_s=0.3)
        assert time.monotonic() - began < 5
        assert f"pid {other.info.backend_pid}, role postgres" in caught.value.message
        assert "holds an exclusive lock" in str(caught.value.detail["session"])


def test_a_prepared_transaction_that_locks_a_table_is_named_with_how_to_end_it() -> None:
    with running_cluster(str(Path(tool("postgres")).parent), max_prepared_transactions="2") as cluster:
        execute(cluster.endpoint(), "CREATE TABLE t (n int)")
        with session_of(cluster.endpoint()) as other:
            other.execute(b"BEGIN; CREATE TABLE new (); PREPARE TRANSACTION 'another'")
            other.execute(b"BEGIN; LOCK TABLE t; PREPARE TRANSACTION 'it''s stuck'")
        for _ in range(2):  # a restart changes nothing
            with pytest.raises(ServerError, match=r"table public\.t is locked by a prepared") as caught:
                open_and_close(cluster.endpoint(), lock_timeout_s=0.3)
            assert "('it''s stuck', role postgres since 20" in caught.value.message
            assert "ROLLBACK PREPARED 'it''s stuck'" in caught.value.hint
            cluster.stop()
            cluster.start()


@pytest.mark.parametrize("after", ["snapshot._take", "fingerprint.prepare"])  # then pg_dump reads, or dumps
def test_pg_dump_behind_a_waiting_session_says_so(
    database: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    for module in ("dump", "fingerprint"):
        monkeypatch.setattr(f"{POSTGRES}.{module}._LOCK_TIMEOUT_S", 0.3)
    execute(database, ROWS)
    original = pkgutil.resolve_name(f"{POSTGRES}.{after}")

    def late(*given: object, **options: object) -> object:
        found = original(*given, **options)
        stack.enter_context(queued(database, "TRUNCATE t", watcher))
        return found

    with session_of(database) as watcher, ExitStack() as stack:
        monkeypatch.setattr(f"{POSTGRES}.{after}", late)
        with pytest.raises(ServerError, match=r"table public\.t is locked by another session") as caught:
            backup(database, tmp_path / "database.dump")
        assert "waits for an exclusive lock" in str(caught.value.detail["session"])
        assert "query failed: ERROR:  canceling statement" in str(caught.value.detail["pg_dump"])
        assert "Query was" not in str(caught.value.detail["pg_dump"])


def test_tables_that_come_while_others_are_locked_are_locked_too(
    database: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(database, "CREATE TABLE gone (n int)")
    original, calls = snapshots._lock, iter(range(100))

    def lock(*arguments: object) -> None:
        number = next(calls)
        if number == 0:
            execute(database, "DROP TABLE gone; CREATE TABLE first (n int)")
        original(*arguments)  # type: ignore[arg-type]
        if number < 2:
            execute(database, f"CREATE TABLE later_{number} (n int)")

    monkeypatch.setattr(snapshots, "_lock", lock)
    with exported_snapshot(database) as snapshot, session_of(database) as other:
        assert {relation.name for relation in snapshot.relations} == {"first", "later_0", "later_1"}
        for relation in snapshot.relations:
            with pytest.raises(psycopg.errors.LockNotAvailable), other.transaction():
                other.execute(f"LOCK TABLE {relation.name} NOWAIT".encode())
    assert next(calls) == 3


def test_endless_new_tables_are_an_error(database: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    original, numbers = snapshots._lock, iter(range(100))

    def lock(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        execute(database, f"CREATE TABLE t{next(numbers)} (n int)")

    monkeypatch.setattr(snapshots, "_lock", lock)
    with pytest.raises(ServerError, match="created faster than they can be locked"):
        open_and_close(database)
    assert next(numbers) == 20


def test_relations_are_those_of_a_dump(database: Endpoint) -> None:
    execute(
        database,
        "CREATE TABLE plain (id serial); CREATE TABLE parts (n int) PARTITION BY LIST (n);"
        "CREATE UNLOGGED TABLE fleeting (n int); CREATE VIEW seen AS SELECT 1 AS n;"
        "CREATE MATERIALIZED VIEW kept AS SELECT 1 AS n; CREATE EXTENSION pg_stat_statements",
    )
    with exported_snapshot(database) as snapshot:
        found = {(relation.name, relation.kind, relation.unlogged) for relation in snapshot.relations}
    assert found == {
        ("plain", "r", False),
        ("plain_id_seq", "S", False),
        ("parts", "p", False),
        ("fleeting", "r", True),
        ("seen", "v", False),
        ("kept", "m", False),
    }


END_SESSION = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%snapshot'"


def test_a_lost_session_fails_the_dump(database: Endpoint) -> None:
    snapshot = (context := exported_snapshot(database)).__enter__()
    snapshot.check()
    execute(database, END_SESSION)
    with pytest.raises(ServerError, match="the session that holds the dump's locks was lost"):
        snapshot.check()
    with pytest.raises(ServerError, match="the session that holds the dump's locks was lost"):
        context.__exit__(None, None, None)


def test_a_lost_session_fails_the_fingerprint(database: Endpoint) -> None:
    execute(database, ROWS)
    prepared = fingerprint.prepare(database, pg_dump=tool("pg_dump"))

    def take() -> None:
        with exported_snapshot(database) as snapshot:
            execute(database, END_SESSION)
            fingerprint.take(prepared, snapshot)

    with pytest.raises(ServerError, match="terminating connection"):
        take()


def test_released_it_holds_nothing_and_reads_nothing(database: Endpoint) -> None:
    execute(database, ROWS)
    prepared = fingerprint.prepare(database, pg_dump=tool("pg_dump"))
    with exported_snapshot(database) as snapshot, session_of(database) as other:
        snapshot.release()
        with other.transaction():
            other.execute("LOCK TABLE t NOWAIT")
        snapshot.check()
        with pytest.raises(ServerError, match="given up"):
            fingerprint.take(prepared, snapshot)


def test_leaving_ends_what_still_reads(database: Endpoint) -> None:
    execute(database, "CREATE TABLE slow AS SELECT g FROM generate_series(1, 3000000) g")
    prepared = fingerprint.prepare(database, pg_dump=tool("pg_dump"))
    running = (
        "SELECT count(*) > 0 FROM pg_stat_activity"
        " WHERE application_name LIKE '%snapshot' AND query LIKE '%slow%' AND state = 'active'"
    )
    with ThreadPoolExecutor(1) as pool, session_of(database) as watcher:
        with exported_snapshot(database) as snapshot:
            taking = pool.submit(fingerprint.take, prepared, snapshot)
            wait_until(lambda: watcher.execute(running.encode()).fetchone() == (True,))
        with pytest.raises(ServerError, match=r"cannot read table public\.slow") as caught:
            taking.result(timeout=60)
    assert isinstance(caught.value.__cause__, psycopg.errors.QueryCanceled)  # the server ended it at once


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """One of the server's processes stands still, as with a disk that does not answer."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


SLOW = "CREATE TABLE slow AS SELECT g FROM generate_series(1, 3000000) g"
READING = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%%slow%%' AND state = 'active' AND pid <> %s"


def reader_of(watcher: Connection) -> int:
    found: list[int] = []

    def look() -> bool:
        rows = watcher.execute(READING, [watcher.info.backend_pid]).fetchall()
        found.extend(int(str(pid)) for (pid,) in rows)
        return bool(found)

    wait_until(look)
    return found[0]


def test_a_reading_that_stands_still_ends(database: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backup_pipeline.engines.postgres.stall._SLOWEST_BYTES_PER_S", 2**40)
    execute(database, SLOW)
    prepared = replace(fingerprint.prepare(database, pg_dump=tool("pg_dump")), stall_s=0.2)

    def take() -> None:
        with exported_snapshot(database) as snapshot, ThreadPoolExecutor(1) as pool:
            taking = pool.submit(fingerprint.take, prepared, snapshot)
            with stopped(reader_of(watcher)):
                with pytest.raises(ServerError, match=r"stands still: table public\.slow was waited for"):
                    taking.result(timeout=20)
                snapshot.release()

    with session_of(database) as watcher:
        with pytest.raises(ServerError, match=r"stands still: table public\.slow was waited for"):
            take()
        # And its locks with it.
        gone = b"SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name LIKE '%snapshot'"
        wait_until(lambda: watcher.execute(gone).fetchone() == (True,), within_s=20)


def test_a_reading_that_only_takes_long_goes_on(database: Endpoint) -> None:
    execute(database, SLOW)
    prepared = replace(fingerprint.prepare(database, pg_dump=tool("pg_dump")), stall_s=0.05)
    with exported_snapshot(database) as snapshot:
        began = time.monotonic()
        assert fingerprint.take(prepared, snapshot).rows == 3000000
        assert time.monotonic() - began > 8 * 0.05


def test_leaving_waits_for_no_server_that_stands_still(
    database: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_CANCEL_S", 0.5)
    execute(database, SLOW)
    prepared = fingerprint.prepare(database, pg_dump=tool("pg_dump"))
    with ThreadPoolExecutor(1) as pool, session_of(database) as watcher, ExitStack() as stack:
        with exported_snapshot(database) as snapshot:
            taking = pool.submit(fingerprint.take, prepared, snapshot)
            stack.enter_context(stopped(reader_of(watcher)))
        with pytest.raises(ServerError, match=r"cannot read table public\.slow"):
            taking.result(timeout=5)


def test_a_check_waits_for_no_server_that_stands_still(
    database: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_ANSWER_S", 0.3)
    pid = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE '%snapshot'"

    def check() -> None:
        with session_of(database) as watcher, exported_snapshot(database) as snapshot:
            (row,) = watcher.execute(pid.encode()).fetchall()
            with stopped(int(str(row[0]))):
                snapshot.check()

    with pytest.raises(ServerError, match="the session that holds the dump's locks was lost"):
        check()


def test_on_a_standby(postgres: LocalCluster, tmp_path: Path) -> None:
    """What a primary left behind, started as a standby: unlogged tables are empty there, and not dumped."""
    archive = tmp_path / "database.dump"
    with running_cluster(str(Path(tool("postgres")).parent), wal_level="replica") as cluster:
        execute(cluster.endpoint(), ZOO)
        cluster.stop()
        (cluster.data / "standby.signal").touch()
        cluster.start()
        source = backup(cluster.endpoint(), archive)
    assert "fleeting" not in {table.name for table in source.tables}
    assert any("public.fleeting: empty on a standby" in note for note in source.notes)


def test_a_conflict_with_replay_says_what_helps(database: Endpoint) -> None:
    with pytest.raises(ServerError) as caught, snapshots.snapshot_errors(database, "cannot read"):
        raise psycopg.errors.SerializationFailure("canceling statement due to conflict with recovery")
    assert "hot_standby_feedback" in caught.value.hint


def test_a_name_is_quoted() -> None:
    relation = Relation(1, 'a"b', "c.d", "r", unlogged=False)
    assert relation.identifier.as_string() == '"a""b"."c.d"'
