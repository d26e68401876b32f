"""Restores that fail, stand still or are killed, at any moment: all or nothing."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backup_pipeline.domain.backup import DatabaseProperties
from backup_pipeline.domain.unfinished import is_temporary
from backup_pipeline.engines.postgres import restore
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.load import (
    LoadLimits,
    LoadProgress,
    load,
)
from backup_pipeline.engines.postgres.roles import (
    create_plain_roles,
    drop_plain_roles,
)
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.errors import ToolError
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.engines.restoring import (
    database_names,
    dump,
    execute,
    fetch,
    own_tool,
    plain,
    restoring,
    restoring_sessions,
    tool_pids,
)
from backup_pipeline_tests.waiting import wait_until


def test_a_missing_role_stops_the_load_and_is_named(
    admin: Endpoint, furnished: Endpoint, tools: Tools, tmp_path: Path
) -> None:
    archive, properties = dump(furnished, tmp_path / "dump", tools), plain(furnished)
    restore.drop_database(admin, furnished.database, force=True)
    with contextlib.closing(connect(admin)) as session:
        assert drop_plain_roles(session, ["r owner", "r 'app'"]) == ()
    with (
        pytest.raises(ToolError, match=r'^pg_restore failed: .*role "r owner" does not exist') as caught,
        restore.temporary_database(admin, "target", properties) as name,
    ):
        load(admin, name, archive, tools=tools)
    assert "--create-roles" in caught.value.hint
    assert not {each for each in database_names(admin) if each.startswith("target")}
    with contextlib.closing(connect(admin)) as session:
        create_plain_roles(session, ["r owner", "r 'app'"])
    with restore.temporary_database(admin, "target", properties) as name:
        load(admin, name, archive, tools=tools)
        restore.apply_properties(admin, name, properties)
        assert replace(plain(admin.with_database(name)), name=properties.name) == properties


@pytest.mark.parametrize("damage", ["truncated", "empty", "not an archive"])
def test_a_damaged_archive_leaves_no_database(
    admin: Endpoint, furnished: Endpoint, tools: Tools, tmp_path: Path, damage: str
) -> None:
    archive = dump(furnished, tmp_path / "dump", tools)
    content = archive.read_bytes()
    archive.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(damage, b"SELECT 1;"))
    with pytest.raises(ToolError), restore.temporary_database(admin, "target", plain(furnished)) as name:
        load(admin, name, archive, tools=tools)
    assert not {each for each in database_names(admin) if each.startswith("target")}


def test_a_killed_pg_restore_leaves_no_database(
    admin: Endpoint, slow: tuple[DatabaseProperties, Path], tools: Tools
) -> None:
    def shoot(_: threading.Event) -> None:
        wait_until(lambda: bool(restoring_sessions(admin)))
        os.kill(own_tool(os.getpid()), signal.SIGKILL)

    with (
        meanwhile(shoot),
        pytest.raises(ToolError, match="pg_restore was killed by SIGKILL"),
        restore.temporary_database(admin, "target", slow[0]) as name,
    ):
        load(admin, name, slow[1], tools=tools)
    assert not {each for each in database_names(admin) if each.startswith("target")}


@pytest.mark.parametrize("how", ["stopped", "told to stop"])
def test_a_load_that_goes_nowhere_is_ended(
    admin: Endpoint, slow: tuple[DatabaseProperties, Path], tools: Tools, how: str
) -> None:
    limits = LoadLimits(stall_s=1.5 if how == "stopped" else 60)
    began = time.monotonic()

    def progress(seen: LoadProgress) -> None:
        if how == "told to stop" and "INDEX" in seen.item:
            raise KeyboardInterrupt
        if how == "stopped" and seen.item:
            with contextlib.suppress(ProcessLookupError):
                os.kill(own_tool(os.getpid()), signal.SIGSTOP)
            execute(
                admin,
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'target.restoring-%'",
            )

    error = KeyboardInterrupt if how == "told to stop" else ToolError
    with (
        pytest.raises(error, match=r"did not answer within|^$"),
        restore.temporary_database(admin, "target", slow[0]) as name,
    ):
        load(admin, name, slow[1], tools=tools, progress=progress, limits=limits)
    assert time.monotonic() - began < 25
    assert not {each for each in database_names(admin) if each.startswith("target")}
    assert not own_tool(os.getpid())


def index_slowly(database: Endpoint) -> None:
    """An index of four rows, which a restore builds in almost five seconds."""
    execute(
        database,
        "CREATE FUNCTION public.wait(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN"
        " IF pg_catalog.current_setting('application_name') LIKE '%restore'"
        " THEN PERFORM pg_catalog.pg_sleep(1.2); END IF; RETURN i; END $$",
        "CREATE TABLE public.t AS SELECT i FROM pg_catalog.generate_series(1, 4) i",
        "CREATE INDEX ON public.t (public.wait(i))",
    )


def test_a_slow_index_is_no_stall(admin: Endpoint, tools: Tools, tmp_path: Path, database: Endpoint) -> None:
    index_slowly(database)
    archive, began = dump(database, tmp_path / "dump", tools), time.monotonic()
    with restore.temporary_database(admin, "target", plain(database)) as name:
        load(admin, name, archive, tools=tools, limits=LoadLimits(stall_s=4))
    assert time.monotonic() - began > 4


def test_a_size_that_cannot_be_measured_ends_no_load_that_is_at_work(
    admin: Endpoint, tools: Tools, tmp_path: Path, database: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_slowly(database)
    archive = dump(database, tmp_path / "dump", tools)
    run = psycopg.Connection.execute

    def slow(session: Any, query: Any, *values: Any, **options: Any) -> Any:
        if "pg_database_size" in str(query):  # as on a disk so slow that it never ends in time
            raise psycopg.errors.QueryCanceled
        return run(session, query, *values, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", slow)
    with restore.temporary_database(admin, "target", plain(database)) as name:
        load(admin, name, archive, tools=tools, limits=LoadLimits(stall_s=3))


def test_a_restore_that_is_killed_leaves_no_name_taken_and_the_next_one_cleans_up(
    admin: Endpoint, slow: tuple[DatabaseProperties, Path], tools: Tools
) -> None:
    with restoring(admin, *slow, tools) as child:
        wait_until(lambda: bool(restoring_sessions(admin)))
        tool = own_tool(child.pid)
        (running,) = (each for each in database_names(admin) if is_temporary(each))
        assert restore.drop_stale(admin) == ()  # it is at work
        child.kill()
    wait_until(lambda: tool not in tool_pids(), within_s=20)
    wait_until(lambda: not restoring_sessions(admin), within_s=20)  # pg_restore told the server, too
    assert "target" not in database_names(admin)
    wait_until(lambda: restore.drop_stale(admin) == (running,), within_s=20)
    assert not any(is_temporary(each) for each in database_names(admin))


@pytest.mark.parametrize("delay_ms", range(0, 500, 70))
def test_a_restore_killed_at_any_moment_is_all_or_nothing(
    admin: Endpoint, furnished: Endpoint, tools: Tools, tmp_path: Path, delay_ms: int
) -> None:
    archive, properties = dump(furnished, tmp_path / "dump", tools), plain(furnished)
    with restoring(admin, properties, archive, tools) as child:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(delay_ms / 1000)
        child.kill()
    # The server ends what it was at, such as a CREATE DATABASE.
    busy = "SELECT FROM pg_stat_activity WHERE application_name ~ ' (restore|rename)$'"
    wait_until(lambda: not fetch(admin, busy), within_s=20)
    restore.drop_stale(admin)
    assert not any(is_temporary(each) for each in database_names(admin))
    if "target" in database_names(admin):
        new = admin.with_database("target")
        assert fetch(new, "SELECT count(*) FROM public.t") == [(5000,)]
        assert replace(plain(new), name=properties.name) == properties
