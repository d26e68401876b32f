"""Swaps on a real server: under reconnecting clients, killed at each step, and without the rights."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import sql

from backup_pipeline.domain.names import NAME_BYTES
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import advisory_lock
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.engines.postgres.swap import (
    CopyKind,
    DatabaseCopy,
    choose_copy,
    copies_of,
    copy_name,
    left_behind,
    publish,
    read_copy,
    swap,
)
from backup_pipeline.errors import BackupNotFound, Busy, Refused, ServerError
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.waiting import wait_until

AT = datetime(2026, 3, 1, 2, 0, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Pair:
    """A live database whose only row is 'old', and a new one whose only row is 'new'."""

    admin: Endpoint
    session: Connection
    live: str
    new: str

    @property
    def kept(self) -> str:
        return copy_name(self.live, CopyKind.BEFORE, AT)

    def content(self, name: str) -> str:
        return content(self.admin.with_database(name))

    def names(self) -> set[str]:
        stem = self.live[:12]
        rows = self.session.execute(
            "SELECT datname FROM pg_database WHERE datallowconn AND datconnlimit = -1"
        )
        return {str(name) for (name,) in rows if str(name).startswith(stem)}


def enter(endpoint: Endpoint) -> Connection:
    """A session as an application has it."""
    return psycopg.connect(psycopg.conninfo.make_conninfo("", **endpoint.conninfo), autocommit=True)


def content(endpoint: Endpoint) -> str:
    with contextlib.closing(connect(endpoint)) as session:
        return str(session.execute("SELECT which FROM public.marker").fetchall())


def make(session: Connection, admin: Endpoint, name: str, which: str) -> None:
    session.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    with contextlib.closing(connect(admin.with_database(name))) as inside:
        inside.execute("CREATE TABLE public.marker (which text)")
        inside.execute("INSERT INTO public.marker VALUES (%s)", [which])


ONE_NAME = pytest.mark.parametrize("pair", ["plain"], indirect=True)


@pytest.fixture(params=["plain", "hostile"])
def pair(request: pytest.FixtureRequest, postgres: LocalCluster) -> Iterator[Pair]:
    admin = postgres.endpoint()
    stem = f"swap{secrets.token_hex(4)}"
    live = stem if request.param == "plain" else f"{stem} = \"x' -d\n;é--" + "é" * 16
    with contextlib.closing(connect(admin)) as session:
        make(session, admin, live, "old")
        make(session, admin, f"{stem}_new", "new")
        yield Pair(admin, session, live, f"{stem}_new")
        names = session.execute(
            "SELECT datname FROM pg_database WHERE datname LIKE %s", [f"{stem}%"]
        ).fetchall()
        for (name,) in names:
            drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
            session.execute(drop.format(sql.Identifier(str(name))))


# --- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("live", ["app", "a" * 63, "é" * 31, "x" * 39, "x" * 40, "日本" * 10, "a\n=b'"])
@pytest.mark.parametrize("kind", CopyKind)
def test_a_copy_s_name_fits_needs_no_quotes_and_reads_back(live: str, kind: CopyKind) -> None:
    name = copy_name(live, kind, AT)
    assert len(name.encode()) <= NAME_BYTES
    assert name.endswith(f"_{kind}_20260301t020000z")
    assert read_copy(name, live) == DatabaseCopy(name, kind, AT)


def test_long_names_that_begin_alike_keep_apart() -> None:
    one, other = "a" * 50 + "1", "a" * 50 + "2"
    name = copy_name(one, CopyKind.BEFORE, AT)
    assert name != copy_name(other, CopyKind.BEFORE, AT)
    assert read_copy(name, other) is None


@pytest.mark.parametrize(
    "name",
    [
        "app",
        "app_before_20261301t020000z",
        "app_before_20260301t020000z_x",
        "app_before_20260301t020000z_1",
        "app_after_20260301t020000z",
        "xapp_before_20260301t020000z",
    ],
)
def test_other_names_are_no_copies(name: str) -> None:
    assert read_copy(name, "app") is None


def test_a_name_of_the_older_form_is_still_read() -> None:
    copy = read_copy("app_before_20260301T020000Z", "app")
    assert copy == DatabaseCopy("app_before_20260301T020000Z", CopyKind.BEFORE, AT)


def test_copies_of_one_second_are_numbered() -> None:
    names: list[str] = []
    for _ in range(11):
        names.append(copy_name("a" * 60, CopyKind.BEFORE, AT, names))
    assert names[1].endswith("_before_20260301t020000z_2")
    assert len(set(names)) == 11
    assert [copy.name for copy in copies_of("a" * 60, names)] == names[::-1]


def test_the_newest_copy_of_one_second_is_known_whatever_the_kinds() -> None:
    before = copy_name("app", CopyKind.BEFORE, AT)
    undone = copy_name("app", CopyKind.UNDONE, AT, [before])  # the undo took `before` away: it is live again
    again = copy_name("app", CopyKind.BEFORE, AT + timedelta(milliseconds=900), [undone])
    assert choose_copy("app", copies_of("app", [undone, again])).name == again


def test_the_newest_copy_is_known_whatever_clocks_their_makers_have() -> None:
    ahead = copy_name("app", CopyKind.BEFORE, AT + timedelta(hours=2))
    late = copy_name("app", CopyKind.BEFORE, AT, [ahead])
    assert late == f"{ahead}_2"
    assert choose_copy("app", copies_of("app", [ahead, late])).name == late
    undone = copy_name("app", CopyKind.UNDONE, AT, [ahead])  # the undo took `late` away
    with pytest.raises(Refused, match="undone already"):
        choose_copy("app", copies_of("app", [ahead, undone]))


def copies(*kinds: CopyKind) -> tuple[DatabaseCopy, ...]:
    """Copies of these kinds, newest first."""
    ages = [AT - timedelta(days=number) for number in range(len(kinds))]
    names = [copy_name("app", kind, at) for kind, at in zip(kinds, ages, strict=True)]
    return copies_of("app", names)


def test_an_undo_takes_the_newest_kept_copy_whatever_else_there_is() -> None:
    finished, newest, _older = found = copies(CopyKind.FINISHED, CopyKind.BEFORE, CopyKind.BEFORE)
    assert choose_copy("app", found) == newest
    assert choose_copy("app", found, finished.name) == finished


def test_an_undo_is_not_repeated_by_itself() -> None:
    undone, older = found = copies(CopyKind.UNDONE, CopyKind.BEFORE)
    with pytest.raises(Refused, match="the last swap of app was undone already, at 2026-03-01T02") as caught:
        choose_copy("app", found)
    assert undone.name in caught.value.hint
    assert older.name in caught.value.hint
    assert choose_copy("app", found, older.name) == older
    assert choose_copy("app", found, undone.name) == undone


@pytest.mark.parametrize("named", ["", "app", "app_before_20200101t000000z", "other"])
def test_what_is_no_copy_is_not_swapped_in(named: str) -> None:
    found = copies(CopyKind.UNDONE, CopyKind.FINISHED)
    with pytest.raises(BackupNotFound) as caught:
        choose_copy("app", found, named)
    assert found[0].name in str(caught.value)


# --- swaps ---------------------------------------------------------------------------------


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


# --- rights --------------------------------------------------------------------------------


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


# --- interruptions -------------------------------------------------------------------------

CHILD = """
import sys
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.swap import swap
dsn, live, new, kept = sys.argv[1:]
print("begun", flush=True)
swap(Endpoint(dsn), live, new, kept)
print("done", flush=True)
"""


@contextlib.contextmanager
def swapping(pair: Pair) -> Iterator["subprocess.Popen[bytes]"]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, pair.admin.dsn, pair.live, pair.new, pair.kept], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == b"begun\n"
        yield child


def lock_is_held(pair: Pair, name: str) -> bool:
    row = pair.session.execute(
        "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.objid WHERE l.locktype = 'object'"
        " AND l.mode = 'AccessExclusiveLock' AND l.granted AND d.datname = %s",
        [name],
    ).fetchone()
    return row == (1,)


def nobody_renames(pair: Pair) -> bool:
    row = pair.session.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name IN"
        " ('backup_pipeline rename', 'backup_pipeline swap')"
    ).fetchone()
    return row == (0,)


@pytest.mark.parametrize("step", ["first rename", "second rename"])
def test_a_swap_killed_while_it_holds_its_locks_changes_nothing(pair: Pair, step: str) -> None:
    name = pair.live if step == "first rename" else pair.new
    session = connect(pair.admin.with_database(name))
    os.kill(session.info.backend_pid, signal.SIGSTOP)  # it will not leave
    try:
        with swapping(pair) as child:
            wait_until(lambda: lock_is_held(pair, name))
            child.kill()
    finally:
        os.kill(session.info.backend_pid, signal.SIGCONT)
    with contextlib.suppress(psycopg.Error):
        session.close()
    wait_until(lambda: nobody_renames(pair), within_s=20)
    assert pair.names() == {pair.live, pair.new}
    assert pair.content(pair.live) == "[('old',)]"
    swap(pair.admin, pair.live, pair.new, pair.kept)  # nothing was left in the way
    assert pair.content(pair.live) == "[('new',)]"


@ONE_NAME
@pytest.mark.parametrize("delay_ms", range(0, 150, 30))
def test_a_swap_killed_at_any_moment_leaves_one_whole_database(pair: Pair, delay_ms: int) -> None:
    client = connect(pair.admin.with_database(pair.live))
    with swapping(pair) as child:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(delay_ms / 1000)
        child.kill()
    wait_until(lambda: nobody_renames(pair), within_s=20)
    client.close()
    if pair.names() == {pair.live, pair.new}:
        assert pair.content(pair.live) == "[('old',)]"
    else:
        assert pair.names() == {pair.live, pair.kept}
        assert (pair.content(pair.live), pair.content(pair.kept)) == ("[('new',)]", "[('old',)]")


@ONE_NAME
def test_a_session_that_never_leaves_ends_the_swap_with_nothing_changed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup_pipeline.engines.postgres.rename._ATTEMPTS", 1)
    session = connect(pair.admin.with_database(pair.live))
    os.kill(session.info.backend_pid, signal.SIGSTOP)
    try:
        with pytest.raises(ServerError, match="nothing was changed") as caught:
            swap(pair.admin, pair.live, pair.new, pair.kept)
    finally:
        os.kill(session.info.backend_pid, signal.SIGCONT)
    session.close()
    assert "1 other session" in str(caught.value)
    assert pair.content(pair.live) == "[('old',)]"


@ONE_NAME
def test_a_renaming_session_that_is_lost_is_asked_about(pair: Pair) -> None:
    session = connect(pair.admin.with_database(pair.new))
    os.kill(session.info.backend_pid, signal.SIGSTOP)

    def shoot(_: threading.Event) -> None:
        wait_until(lambda: lock_is_held(pair, pair.new))
        with contextlib.closing(connect(pair.admin)) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'object'"
                " AND mode = 'AccessExclusiveLock' AND granted"
            )

    try:
        with meanwhile(shoot), pytest.raises(ServerError, match="was lost; nothing was changed"):
            swap(pair.admin, pair.live, pair.new, pair.kept)
    finally:
        os.kill(session.info.backend_pid, signal.SIGCONT)
    session.close()
    assert pair.content(pair.live) == "[('old',)]"
