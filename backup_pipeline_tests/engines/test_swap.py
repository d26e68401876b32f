"""Swaps on a real server: under reconnecting clients, and without the rights."""

import contextlib
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import psycopg
import pytest
from psycopg import sql

from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import advisory_lock
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.swap import (
    CopyKind,
    copies_of,
    copy_name,
    left_behind,
    publish,
    swap,
)
from backup_pipeline.errors import Busy, Refused
from backup_pipeline_tests.engines.pairs import AT, ONE_NAME, Pair, enter, make
from backup_pipeline_tests.waiting import wait_until


def test_a_swap_exchanges_the_names_and_goes_back(pair: Pair) -> None:
    report = swap(pair.admin, pair.live, pair.new, pair.kept)
    assert (report.live, report.kept, report.sessions_ended, report.left_behind) == (
        pair.live,
        pair.kept,
        0,
        (),
    )
    assert (pair.content(pair.live), pair.content(pair.kept)) == ("[('new',)]", "[('old',)]")
    assert [copy.name for copy in copies_of(pair.live, pair.names())] == [pair.kept]

    undone = copy_name(pair.live, CopyKind.UNDONE, AT)
    swap(pair.admin, pair.live, pair.kept, undone)
    assert (pair.content(pair.live), pair.content(undone)) == ("[('old',)]", "[('new',)]")
    assert [copy.name for copy in copies_of(pair.live, pair.names())] == [undone]


def test_a_finished_database_is_published_under_a_free_name_only(pair: Pair) -> None:
    with pytest.raises(Refused, match="exists already"):
        publish(pair.admin, pair.new, pair.live)
    watcher = enter(pair.admin.with_database(pair.new))
    publish(pair.admin, pair.new, pair.kept)
    with pytest.raises(psycopg.OperationalError), watcher:
        watcher.execute("SELECT 1")
    assert pair.content(pair.kept) == "[('new',)]"


@dataclass
class Clients:
    """Threads that connect again whenever they are thrown out, and note what they see."""

    endpoint: Endpoint
    count: int
    seen: list[str] = field(default_factory=list)
    errors: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        stop, ready = threading.Event(), threading.Barrier(self.count + 1)
        threads = [threading.Thread(target=self._run, args=(stop, ready)) for _ in range(self.count)]
        for thread in threads:
            thread.start()
        ready.wait(30)
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _run(self, stop: threading.Event, ready: threading.Barrier) -> None:
        waiting = True
        while not stop.is_set():
            try:
                with contextlib.closing(enter(self.endpoint)) as session:
                    while not stop.is_set():
                        row = session.execute("SELECT which FROM public.marker").fetchone()
                        self.seen.append(str(row[0] if row else None))
                        if waiting:
                            ready.wait(30)
                            waiting = False
            except psycopg.OperationalError as error:
                self.errors.add(str(error))

    def await_sight_of(self, which: str) -> None:
        start = len(self.seen)
        wait_until(lambda: which in self.seen[start:], within_s=10)


def test_reconnecting_clients_see_the_old_database_or_the_new_one(pair: Pair) -> None:
    clients = Clients(pair.admin.with_database(pair.live), 8)
    with clients.running():
        report = swap(pair.admin, pair.live, pair.new, pair.kept)
        clients.await_sight_of("new")
        back = swap(pair.admin, pair.live, pair.kept, copy_name(pair.live, CopyKind.UNDONE, AT))
        clients.await_sight_of("old")
    assert report.sessions_ended >= 8
    assert back.sessions_ended >= 1
    assert max(report.held_s, back.held_s) < 5
    assert set(clients.seen) == {"old", "new"}
    # Someone who was already waiting when the name moved is told so, and comes again.
    assert all("terminat" in each or "dropped or renamed" in each for each in clients.errors), clients.errors


@ONE_NAME
def test_a_swap_waits_for_no_dump_unless_asked_to(pair: Pair) -> None:
    with (
        advisory_lock(pair.admin.with_database(pair.live), pair.live, purpose="dump", wait_s=0),
        pytest.raises(Busy, match="held by another"),
    ):
        swap(pair.admin, pair.live, pair.new, pair.kept)
    assert pair.content(pair.live) == "[('old',)]"


@pytest.mark.parametrize("case", ["live gone", "new gone", "kept taken", "itself", "too long", "our own"])
def test_a_swap_that_cannot_work_is_refused_untouched(pair: Pair, case: str) -> None:
    live, new, kept, admin = pair.live, pair.new, pair.kept, pair.admin
    if case == "live gone":
        live = f"{pair.live[:20]}_gone"
    elif case == "new gone":
        new = f"{pair.new}_gone"
    elif case == "kept taken":
        kept = pair.new
    elif case == "itself":
        new = live
    elif case == "too long":
        kept = "k" * 64
    else:
        admin = pair.admin.with_database(pair.live)
    before = pair.names()
    with contextlib.closing(enter(pair.admin.with_database(pair.live))) as client:
        with pytest.raises(Refused):
            swap(admin, live, new, kept)
        client.execute("SELECT 1")
    assert pair.names() == before


def test_what_replicates_is_listed(postgres_logical: Endpoint) -> None:
    with contextlib.closing(connect(postgres_logical)) as session:
        session.execute("CREATE DATABASE shop")
        with contextlib.closing(connect(postgres_logical.with_database("shop"))) as inside:
            inside.execute("CREATE PUBLICATION everything FOR ALL TABLES")
            inside.execute("SELECT pg_create_logical_replication_slot('stream', 'pgoutput')")
            inside.execute(
                "CREATE SUBSCRIPTION feed CONNECTION 'host=nowhere' PUBLICATION p WITH (connect = false)"
            )
    assert left_behind(postgres_logical, "shop") == (
        "replication slot stream (idle) belongs to the former database",
        "subscription feed (disabled) goes on in the former database",
        "publication everything: its subscribers follow the former database",
    )


def test_prepared_transactions_are_found_before_anything_is_touched(postgres_logical: Endpoint) -> None:
    with contextlib.closing(connect(postgres_logical)) as session:
        make(session, postgres_logical, "bank", "old")
        make(session, postgres_logical, "bank_new", "new")
        bank = postgres_logical.with_database("bank")
        with contextlib.closing(connect(bank)) as inside:
            inside.execute("BEGIN")
            inside.execute("INSERT INTO public.marker VALUES ('prepared')")
            inside.execute("PREPARE TRANSACTION 'tx 1'")
        with contextlib.closing(connect(bank)) as client:
            with pytest.raises(Refused, match="prepared transactions") as caught:
                swap(postgres_logical, "bank", "bank_new", "bank_old")
            client.execute("SELECT 1")
            client.execute("ROLLBACK PREPARED 'tx 1'")
    assert "'tx 1'" in str(caught.value)
    swap(postgres_logical, "bank", "bank_new", "bank_old")


@pytest.fixture(scope="module")
def postgres_logical() -> Iterator[Endpoint]:
    """A server that replicates logically and takes prepared transactions."""
    from backup_pipeline_tests.servers import postgres as servers

    settings = {"wal_level": "logical", "max_wal_senders": "4", "max_prepared_transactions": "4"}
    with servers.running_cluster(servers.bin_dir_17(), **settings) as cluster:
        yield cluster.endpoint()


@pytest.fixture
def role(pair: Pair) -> Iterator[str]:
    name = f"op {secrets.token_hex(4)}"
    pair.session.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    yield name
    for database in pair.names():
        owner = sql.SQL("ALTER DATABASE {} OWNER TO postgres")
        pair.session.execute(owner.format(sql.Identifier(database)))
    pair.session.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def own(pair: Pair, role: str) -> None:
    for database in pair.names():
        statement = sql.SQL("ALTER DATABASE {} OWNER TO {}")
        pair.session.execute(statement.format(sql.Identifier(database), sql.Identifier(role)))


def endpoint_of(pair: Pair, role: str) -> Endpoint:
    conninfo = {
        name: value for name, value in pair.admin.conninfo.items() if name in {"host", "port", "dbname"}
    }
    return Endpoint(psycopg.conninfo.make_conninfo("", **conninfo, user=role))


def test_missing_rights_are_named_with_their_fix(pair: Pair, role: str) -> None:
    endpoint = endpoint_of(pair, role)
    with pytest.raises(Refused, match="only a superuser may"):
        swap(endpoint, pair.live, pair.new, pair.kept)
    group = f"group {role}"
    pair.session.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(group)))
    pair.session.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(f"app {role}")))
    try:
        own(pair, group)
        client = enter(endpoint_of(pair, f"app {role}").with_database(pair.live))
        with contextlib.closing(client):
            with pytest.raises(Refused, match="may not rename") as caught:
                swap(endpoint, pair.live, pair.new, pair.kept)
            assert caught.value.hint == (
                f'As a superuser: ALTER ROLE "{role}" CREATEDB; GRANT "{group}" TO "{role}"; '
                f'GRANT "pg_signal_backend" TO "{role}";'
            )
            client.execute("SELECT 1")
            pair.session.execute(caught.value.hint.removeprefix("As a superuser: ").encode())
            report = swap(endpoint, pair.live, pair.new, pair.kept)
        assert report.sessions_ended == 1
        assert pair.content(pair.live) == "[('new',)]"
    finally:
        own(pair, "postgres")
        for name in (group, f"app {role}"):
            pair.session.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@ONE_NAME
def test_sessions_of_superusers_are_found_before_anything_is_touched(pair: Pair, role: str) -> None:
    own(pair, role)
    pair.session.execute(sql.SQL("ALTER ROLE {} CREATEDB").format(sql.Identifier(role)))
    with contextlib.closing(connect(pair.admin.with_database(pair.live))) as superuser:
        with pytest.raises(Refused, match="only a superuser may") as caught:
            swap(endpoint_of(pair, role), pair.live, pair.new, pair.kept)
        assert f"pid {superuser.info.backend_pid} of role postgres" in str(caught.value)
        superuser.execute("SELECT 1")
    swap(endpoint_of(pair, role), pair.live, pair.new, pair.kept)
