"""Swaps that are killed, held up or lost, at each step: one whole database has the name."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import psycopg
import pytest

from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.swap import (
    swap,
)
from backup_pipeline.errors import ServerError
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.engines.pairs import ONE_NAME, Pair
from backup_pipeline_tests.waiting import wait_until

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
