"""Restores that fail, are interrupted or lose a server: all is left as it was, and what is unsure is told."""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from backup_pipeline.actions import restore, undo
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.domain.backup import ObjectRole
from backup_pipeline.engines.postgres import rename
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.errors import (
    Corrupt,
    ProofFailed,
    Refused,
    ServerError,
    StoreError,
)
from backup_pipeline_tests.actions.box import (
    Box,
    ask,
    now,
    swap_back,
)
from backup_pipeline_tests.actions.restoring import at, finished, flip, orders, run, untouched
from backup_pipeline_tests.storage.effects import CountingStore


@pytest.mark.parametrize("role", [ObjectRole.DUMP, ObjectRole.FINGERPRINT])
def test_stored_bytes_that_changed_touch_nothing(live: Box, role: ObjectRole) -> None:
    flip(live, role)
    name = live.endpoint.database
    with untouched(live), pytest.raises(Corrupt, match="not those that were written"):
        run(live, replace=True, confirm=name)


def test_a_copy_that_is_not_equal_is_dropped(live: Box, tampered: Callable[[str], None]) -> None:
    tampered("UPDATE public.orders SET item = 'x' WHERE id = 7")
    name = live.endpoint.database
    with untouched(live), pytest.raises(ProofFailed, match="it was dropped") as failure:
        run(live, replace=True, confirm=name)
    assert "table public.orders: 1,000 rows as expected, but their content differs" in str(failure.value)


class Outage(CountingStore):
    """A Store that cannot be reached from some moment on."""

    down = False

    def _look(self) -> None:
        if self.down:
            raise StoreError("the store cannot be reached")


def test_a_store_that_is_lost_after_the_download_does_not_cost_the_restore(live: Box) -> None:
    store = Outage(live.store)
    late = [timedelta(0)]

    def lose() -> None:
        store.down, late[0] = True, timedelta(hours=1)

    name, protected = live.endpoint.database, live.on(store)
    request = RestoreRequest("latest", replace=True, confirm=name)
    plan = restore.plan(protected, request, clock=now)
    done = restore.carry_out(protected, plan, clock=lambda: now() + late[0], report=at("gathering", lose))
    assert "2 tables, 1,100 rows equal row for row" in "\n".join(done.lines)
    assert orders(live.endpoint) == 1000


class Halt(BaseException):
    """As KeyboardInterrupt or SystemExit, which end a run at any point."""


def halt() -> None:
    raise Halt


@pytest.mark.parametrize("line", ["gathering the planner's statistics", "swapping"])
def test_an_interrupted_restore_leaves_nothing(live: Box, line: str) -> None:
    name = live.endpoint.database
    with untouched(live), pytest.raises(Halt):
        run(live, replace=True, confirm=name, report=at(line, halt))
    assert run(live, replace=True, confirm=name, check="none").kept_as


def test_a_server_that_ends_our_sessions_is_told_of(live: Box) -> None:
    def end_all() -> None:
        with contextlib.closing(connect(live.cluster.endpoint(), purpose="the end")) as session:
            session.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name LIKE 'backup_pipeline restore%' AND pid <> pg_backend_pid()"
            )

    name = live.endpoint.database
    with untouched(live), contextlib.suppress(ServerError):  # what needs none of them may go on
        report = at("gathering the planner's statistics", end_all)
        done = run(live, into=f"{name}_new", check="none", report=report)
        live.execute(f'DROP DATABASE "{done.database}"', "postgres")
    assert live.databases() == {name}


def test_a_live_database_that_vanishes_meanwhile_is_not_recreated_in_silence(live: Box) -> None:
    name, aside = live.endpoint.database, f"{live.endpoint.database}_aside"
    move = 'ALTER DATABASE "{}" RENAME TO "{}"'
    report = at("swapping", lambda: live.execute(move.format(name, aside), "postgres"))
    with pytest.raises(Refused, match=f"database {name} does not exist") as failure:
        run(live, replace=True, confirm=name, check="none", report=report)
    copy = finished(live)
    assert live.databases() == {aside, copy}
    assert f"`backup-pipeline undo app --into {name} --copy {copy}` swaps the copy in" in failure.value.hint
    assert swap_back(live.protected, copy=copy).kept_as == ""
    assert (live.databases(), orders(live.endpoint)) == ({aside, name}, 1000)


def test_a_name_that_is_taken_meanwhile_is_not_taken_over(live: Box) -> None:
    name = f"{live.endpoint.database}_new"
    report = at("gathering", lambda: live.execute(f'CREATE DATABASE "{name}"', "postgres"))
    with pytest.raises(Refused, match="exists already") as failure:
        run(live, into=name, check="none", report=report)
    copy = finished(live)
    assert live.databases() == {live.endpoint.database, name, copy}
    assert ask(live.cluster.endpoint(name), "SELECT to_regclass('public.orders')") is None
    assert f'`DROP DATABASE "{copy}";` drops it' in failure.value.hint


class AnswerLost:
    """Makes a rename's commit lose its answer, and the server refuse `away` connections after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, away: int) -> None:
        self.lost, self.away = False, away
        end, self._connect = psycopg.Transaction.__exit__, connect

        def ending(transaction: Any, *failure: Any) -> Any:
            ended = end(transaction, *failure)
            name = transaction.connection.info.parameter_status("application_name")
            if name == "backup_pipeline rename" and not self.lost and failure[0] is None:
                self.lost = True
                raise psycopg.OperationalError("server closed the connection unexpectedly")
            return ended

        monkeypatch.setattr(psycopg.Transaction, "__exit__", ending)
        monkeypatch.setattr(rename, "connect", self.connect)

    def connect(self, *args: Any, **options: Any) -> Connection:
        """As server.connect."""
        if self.lost and self.away:
            self.away -= 1
            raise ServerError("cannot connect: the database system is starting up")
        return self._connect(*args, **options)


def test_a_swap_whose_answer_is_lost_is_asked_about_until_the_server_answers(
    live: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = live.endpoint.database
    lost = AnswerLost(monkeypatch, away=3)
    done = run(live, replace=True, confirm=name, check="none")
    assert (lost.lost, lost.away) == (True, 0)
    assert (orders(live.endpoint), orders(live.cluster.endpoint(done.kept_as))) == (1000, 600)


@pytest.mark.parametrize("back", [False, True], ids=["server still away", "server back at once"])
def test_a_swap_that_may_have_been_made_is_told_as_such(
    live: Box, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    name = live.endpoint.database
    monkeypatch.setattr(rename, "_ANSWER_TIMEOUT_S", 0.5)
    lost = AnswerLost(monkeypatch, away=10**6)
    if not back:
        monkeypatch.setattr(undo, "connect", lost.connect)
    with pytest.raises(ServerError, match=f"whether {name} and .* were renamed is not known") as failure:
        run(live, replace=True, confirm=name, check="none")
    assert lost.lost
    monkeypatch.undo()
    (kept,) = live.databases() - {name}
    assert orders(live.endpoint) == 1000
    told = str(failure.value)
    assert f": {name} or {kept}" in told
    assert "could not be kept" not in told
    assert (f"the restored copy: is complete, and called {name}; " in told) is back
    assert f"`backup-pipeline undo app --into {name} --copy {kept}` swaps it back" in failure.value.hint
    swap_back(live.protected)
    assert orders(live.endpoint) == 600
