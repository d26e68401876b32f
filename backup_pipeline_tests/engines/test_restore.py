"""Restores on a real server: whole round trips, refusals, and interruptions that leave nothing behind."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from backup_pipeline import process
from backup_pipeline.domain.backup import DatabaseProperties, Source
from backup_pipeline.domain.unfinished import is_marked, is_temporary
from backup_pipeline.engines.postgres import restore
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.globals import parse_globals
from backup_pipeline.engines.postgres.load import (
    LoadLimits,
    LoadOptions,
    LoadProgress,
    count_items,
    load,
    restore_argv,
)
from backup_pipeline.engines.postgres.properties import read_properties, read_source, statements
from backup_pipeline.engines.postgres.requirements import missing_requirements
from backup_pipeline.engines.postgres.roles import (
    create_plain_roles,
    create_roles,
    drop_plain_roles,
    existing_roles,
    plan_roles,
)
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.engines.postgres.swap import CopyKind, copy_name, publish, swap
from backup_pipeline.engines.postgres.tools import Tools, find_tools
from backup_pipeline.errors import Refused, ServerError, ToolError
from backup_pipeline.process import Command
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.waiting import wait_until

HOSTILE = '= "it\'s" -d\n\\x;é'


@pytest.fixture(scope="module")
def tools() -> Tools:
    return find_tools(servers.bin_dir_17())


@pytest.fixture
def admin(postgres: LocalCluster) -> Iterator[Endpoint]:
    """The server; databases and roles that the test makes are gone afterwards."""
    endpoint = postgres.endpoint()
    with contextlib.closing(connect(endpoint)) as session:
        before = names(session)
        yield endpoint
        for name in sorted(names(session) - before):
            drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
            session.execute(drop.format(sql.Identifier(name)))
        for (role,) in session.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'r %'").fetchall():
            session.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(str(role))))


def names(session: Connection) -> set[str]:
    return {str(name) for (name,) in session.execute("SELECT datname FROM pg_database")}


def database_names(endpoint: Endpoint) -> set[str]:
    with contextlib.closing(connect(endpoint)) as session:
        return names(session)


def execute(endpoint: Endpoint, *queries: str) -> None:
    with contextlib.closing(connect(endpoint)) as session:
        for query in queries:
            session.execute(query.encode())


def fetch(endpoint: Endpoint, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(connect(endpoint)) as session:
        return session.execute(query.encode()).fetchall()


def dump(endpoint: Endpoint, target: Path, tools: Tools, *, directory: bool = False) -> Path:
    how = ("--format=directory", "--jobs=2") if directory else ("--format=custom",)
    argv = (tools.path("pg_dump"), f"--dbname={endpoint.tool_dbname}", f"--file={target}", *how)
    process.run(Command(argv, endpoint.environment()), timeout_s=60)
    return target


def source_of(endpoint: Endpoint, tools: Tools) -> Source:
    with contextlib.closing(connect(endpoint)) as session:
        return read_source(session, tools)


def plain(endpoint: Endpoint) -> DatabaseProperties:
    with contextlib.closing(connect(endpoint)) as session:
        return read_properties(session, endpoint.database)


@pytest.fixture
def furnished(admin: Endpoint) -> Endpoint:
    """A database with a hostile name, and with everything that a dump alone would lose."""
    name = f"src{secrets.token_hex(3)} {HOSTILE}"
    with contextlib.closing(connect(admin)) as session:
        for role in ("r owner", "r 'app'"):
            session.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
        session.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C.UTF-8'").format(
                sql.Identifier(name)
            )
        )
        properties = replace(
            read_properties(session, name),
            owner="r owner",
            comment="it's \\ a\ncomment",
            connection_limit=17,
            settings=(
                ("", 'search_path="a b", public'),
                ("", "work_mem=5MB"),
                ("r 'app'", "my.setting=a'b\\c\nd"),
            ),
            grants=(
                ("r owner", "r 'app'", "CONNECT", True),
                ("r owner", "r owner", "CONNECT", False),
                ("r owner", "r owner", "CREATE", False),
            ),
        )
        for statement in statements(properties, name):
            session.execute(statement)
    endpoint = admin.with_database(name)
    execute(
        endpoint,
        "CREATE EXTENSION pgcrypto SCHEMA public",
        "CREATE TABLE public.t (id serial PRIMARY KEY, v text)",
        "INSERT INTO public.t (v) SELECT pg_catalog.md5(i::text) FROM pg_catalog.generate_series(1, 5000) i",
        "CREATE INDEX ON public.t (v)",
        'CREATE TABLE public."a\nb" (x int); INSERT INTO public."a\nb" VALUES (7)',
        'ALTER TABLE public.t OWNER TO "r owner"',
        "GRANT SELECT ON public.t TO \"r 'app'\"",
        "SELECT pg_catalog.lo_from_bytea(0, 'large')",
    )
    return endpoint


# --- round trips ---------------------------------------------------------------------------


@pytest.mark.parametrize("directory", [False, True], ids=["custom", "directory"])
def test_a_restored_database_is_like_its_source(
    admin: Endpoint, furnished: Endpoint, tools: Tools, tmp_path: Path, directory: bool
) -> None:
    archive = dump(furnished, tmp_path / "-d 'x' = y", tools, directory=directory)
    source = source_of(furnished, tools)
    target = f"new {furnished.database}"[:50]
    seen: list[LoadProgress] = []
    with restore.temporary_database(admin, target, source.database) as name:
        assert is_temporary(name)
        load(admin, name, archive, LoadOptions(2 if directory else 1), tools=tools, progress=seen.append)
        assert target not in database_names(admin)
        restore.analyze(admin, name)
        restore.apply_properties(admin, name, source.database)
        publish(admin, name, target)
    new = admin.with_database(target)
    assert replace(plain(new), name=source.database.name) == source.database
    assert source_of(new, tools).roles == source.roles == ("postgres", "r 'app'", "r owner")
    query = "SELECT count(*), sum(hashtextextended(t::text, 0)) FROM public.t"
    assert fetch(new, query) == fetch(furnished, query)
    assert fetch(new, 'SELECT * FROM public."a\nb"') == [(7,)]
    assert fetch(new, "SELECT pg_get_userbyid(relowner), reltuples FROM pg_class WHERE relname = 't'") == [
        ("r owner", 5000.0)
    ]
    assert fetch(new, "SELECT has_table_privilege('r ''app''', 'public.t', 'SELECT')") == [(True,)]
    assert seen[-1].items_done == seen[-1].items_total == count_items(archive, tools) > 10
    if not directory:  # one worker alone: each of its lines is counted
        assert seen[-2].items_done == seen[-2].items_total
    assert not any(is_temporary(each) for each in database_names(admin))


def test_a_restored_database_takes_the_place_of_the_live_one(
    admin: Endpoint, furnished: Endpoint, tools: Tools, tmp_path: Path
) -> None:
    from datetime import UTC, datetime

    archive, live = dump(furnished, tmp_path / "dump", tools), furnished.database
    properties, kept = plain(furnished), copy_name(live, CopyKind.BEFORE, datetime(2026, 3, 1, tzinfo=UTC))
    execute(furnished, "DELETE FROM public.t")
    with restore.temporary_database(admin, live, properties) as name:
        load(admin, name, archive, tools=tools)
        restore.apply_properties(admin, name, properties)
        report = swap(admin, live, name, kept)
    assert report.kept == kept
    assert fetch(furnished, "SELECT count(*) FROM public.t") == [(5000,)]
    assert fetch(admin.with_database(kept), "SELECT count(*) FROM public.t") == [(0,)]
    assert plain(furnished) == properties
    assert database_names(admin) >= {live, kept}


def test_an_operator_who_is_no_superuser_restores_and_swaps(
    admin: Endpoint, furnished: Endpoint, tools: Tools, tmp_path: Path
) -> None:
    """As on a managed server: CREATEDB and CREATEROLE, and membership in what is created."""
    from datetime import UTC, datetime

    archive, source = dump(furnished, tmp_path / "dump", tools), source_of(furnished, tools)
    globals_sql = b'CREATE ROLE "r owner";\nCREATE ROLE "r \'app\'";\n'
    restore.drop_database(admin, furnished.database, force=True)
    execute(admin, 'DROP ROLE "r owner"', "DROP ROLE \"r 'app'\"")
    execute(admin, 'CREATE ROLE "r operator" LOGIN CREATEDB CREATEROLE')
    conninfo = {name: value for name, value in admin.conninfo.items() if name in {"host", "port", "dbname"}}
    operator = Endpoint(psycopg.conninfo.make_conninfo("", **conninfo, user="r operator"))
    with contextlib.closing(connect(operator)) as session:
        lacking = missing_requirements(session, source)
        assert lacking.roles == ("r 'app'", "r owner")
        plan = plan_roles(parse_globals(globals_sql), needed=lacking.roles, existing=existing_roles(session))
        assert create_roles(session, plan) == ()
        restore.create_database(operator, "target", source.database)
        with pytest.raises(ServerError, match=r"cannot be made like its source: .*my\.setting") as caught:
            restore.apply_properties(operator, "target", source.database)
        assert "GRANT SET ON PARAMETER" in caught.value.hint
        shown = str(caught.value.detail["statement"])
        assert shown == 'ALTER ROLE "r \'app\'" IN DATABASE "target" SET "my.setting" TO \'…\''
    execute(admin, 'GRANT SET ON PARAMETER my.setting TO "r operator"')
    # Large objects and tables of the source's superuser stay the operator's: only a superuser gives to one.
    with restore.temporary_database(operator, "target", source.database) as name:
        load(operator, name, archive, LoadOptions(owners=False), tools=tools)
        restore.analyze(operator, name)
        restore.apply_properties(operator, name, source.database)
        swap(operator, "target", name, copy_name("target", CopyKind.BEFORE, datetime(2026, 3, 1, tzinfo=UTC)))
    new = admin.with_database("target")
    assert replace(plain(new), name=source.database.name) == source.database
    assert fetch(new, "SELECT count(*) FROM public.t") == [(5000,)]
    execute(admin, 'REVOKE SET ON PARAMETER my.setting FROM "r operator"')


def test_nobody_else_may_enter_while_a_private_database_is_loaded(
    admin: Endpoint, furnished: Endpoint
) -> None:
    execute(admin, 'CREATE ROLE "r stranger" LOGIN')
    conninfo = {name: value for name, value in admin.conninfo.items() if name in {"host", "port"}}
    with restore.temporary_database(admin, "private", plain(furnished)) as name:
        stranger = psycopg.conninfo.make_conninfo("", **conninfo, user="r stranger", dbname=name)
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(stranger)


def test_the_command_line_of_pg_restore() -> None:
    assert restore_argv("/bin/pg_restore", Path("/tmp/-x"), "keepalives=1") == (
        "/bin/pg_restore",
        "--dbname=keepalives=1",
        "--format=custom",
        "--verbose",
        "--no-password",
        "--exit-on-error",
        "--",
        "/tmp/-x",
    )
    argv = restore_argv(
        "p", Path("/"), "d", LoadOptions(4, tablespaces=False, owners=False), stop_at_error=False
    )
    assert argv == (
        "p",
        "--dbname=d",
        "--format=directory",
        "--verbose",
        "--no-password",
        "--jobs=4",
        "--no-tablespaces",
        "--no-owner",
        "--no-privileges",
        "--",
        "/",
    )


def test_an_older_server_is_loaded_by_a_newer_pg_restore(
    postgres15: LocalCluster, tools: Tools, tmp_path: Path
) -> None:
    """pg_restore 17 sets what 15 does not know; that error alone is passed over."""
    admin = postgres15.endpoint()
    with servers.fresh_database(postgres15) as source, servers.fresh_database(postgres15) as target:
        execute(source, "CREATE TABLE public.t AS SELECT 1 AS a", "CREATE TABLE public.u AS SELECT 2 AS a")
        archive = dump(source, tmp_path / "dump", tools, directory=True)
        load(admin, target.database, archive, LoadOptions(2), tools=tools)
        assert fetch(target, "SELECT t.a, u.a FROM public.t, public.u") == [(1, 2)]
        execute(admin, 'CREATE ROLE "r fifteen"')
        execute(source, 'ALTER TABLE public.t OWNER TO "r fifteen"')
        archive = dump(source, tmp_path / "second", tools)
        execute(source, "ALTER TABLE public.t OWNER TO postgres")
        execute(admin, 'DROP ROLE "r fifteen"')
        with (
            servers.fresh_database(postgres15) as other,
            pytest.raises(ToolError, match='role "r fifteen" does not exist'),
        ):
            load(admin, other.database, archive, tools=tools)


def test_money_is_read_as_it_was_written(
    admin: Endpoint, postgres: LocalCluster, database: Endpoint, tools: Tools, tmp_path: Path
) -> None:
    """A dump's money is that of lc_monetary C: the server's own would not read it, or read it otherwise."""
    written = "CHECK (pg_catalog.current_setting('lc_monetary') = 'C')"
    execute(database, f"CREATE TABLE public.price (amount money {written})")
    execute(database, "SET lc_monetary = 'C'; INSERT INTO public.price VALUES ('$1,234.56')")
    archive = dump(database, tmp_path / "dump", tools)
    with servers.fresh_database(postgres) as target:
        execute(admin, f"ALTER DATABASE {target.database} SET lc_monetary = 'C.UTF-8'")
        load(admin, target.database, archive, tools=tools)
        assert fetch(target, "SELECT count(*) FROM public.price") == [(1,)]


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        (
            "CREATE SUBSCRIPTION feed CONNECTION 'password=SECRET' PUBLICATION p WITH (connect = false)",
            "SUBSCRIPTION feed",
        ),
        (
            "CREATE TABLE public.t (a text"
            " CHECK (pg_catalog.current_setting('application_name') !~ 'restore'));"
            " INSERT INTO public.t VALUES (E'SECRET\nSECRET')",
            "COPY t, line 1",
        ),
    ],
    ids=["statement", "row"],
)
def test_an_error_repeats_neither_statements_nor_rows(
    admin: Endpoint, database: Endpoint, tools: Tools, tmp_path: Path, statement: str, named: str
) -> None:
    execute(database, statement)
    archive = dump(database, tmp_path / "dump", tools)
    if "feed" in named:
        execute(database, "ALTER SUBSCRIPTION feed SET (slot_name = NONE)", "DROP SUBSCRIPTION feed")
    execute(admin, 'CREATE ROLE "r plain" LOGIN', 'CREATE DATABASE target OWNER "r plain"')
    conninfo = {name: value for name, value in admin.conninfo.items() if name in {"host", "port", "dbname"}}
    plain_role = Endpoint(psycopg.conninfo.make_conninfo("", **conninfo, user="r plain"))
    with pytest.raises(ToolError) as caught:
        load(plain_role, "target", archive, LoadOptions(owners=False), tools=tools)
    assert named in str(caught.value)
    assert "SECRET" not in repr((caught.value.message, caught.value.detail))


# --- what is refused -----------------------------------------------------------------------


def test_a_database_that_holds_anything_is_not_loaded_into(
    admin: Endpoint, database: Endpoint, tools: Tools, tmp_path: Path
) -> None:
    archive = dump(database, tmp_path / "dump", tools)
    execute(database, "CREATE TABLE public.mine ()")
    with pytest.raises(Refused, match="not empty: it holds 1 relations"):
        load(admin, database.database, archive, tools=tools)


def test_settings_are_tried_and_taken_back(admin: Endpoint, database: Endpoint) -> None:
    execute(admin, 'CREATE ROLE "r tried"')
    settings = (("", "work_mem=9MB"), ("r tried", "work_mem=7MB"))
    there = "SELECT count(*) FROM pg_db_role_setting WHERE setdatabase <> 0"
    before = fetch(admin, there)
    restore.try_properties(admin, database.database, replace(plain(database), settings=settings))
    assert fetch(admin, there) == before
    missing = (*settings, ("", 'session_preload_libraries="no_such_library"'))
    with pytest.raises(Refused, match='could not access file "no_such_library"'):
        restore.try_properties(admin, database.database, replace(plain(database), settings=missing))
    assert fetch(admin, there) == before
    with pytest.raises(Refused, match='unrecognized configuration parameter "no_such"'):
        restore.try_properties(
            admin, database.database, replace(plain(database), settings=(("", "no_such=1"),))
        )


@pytest.mark.parametrize("role", ["", "r 'it' SET a TO b"])
def test_a_setting_that_cannot_be_set_is_named_without_its_value(
    admin: Endpoint, database: Endpoint, role: str
) -> None:
    execute(admin, "CREATE ROLE \"r 'it' SET a TO b\"")
    settings = (("", "search_path=a, b"), (role, "no_such=geheim SET a TO geheim\ngeheim"))
    with pytest.raises(Refused) as caught:
        restore.try_properties(admin, database.database, replace(plain(database), settings=settings))
    whose = f'ALTER ROLE "{role}" IN DATABASE' if role else "ALTER DATABASE"
    assert caught.value.detail["statement"] == f'{whose} "{database.database}" SET "no_such" TO \'…\''
    assert "geheim" not in str(caught.value)


def test_a_session_that_fails_anyway_is_no_fault_of_the_settings(admin: Endpoint, database: Endpoint) -> None:
    settled = replace(plain(database), settings=(("", "work_mem=9MB"),))
    execute(admin, f'ALTER DATABASE "{database.database}" ALLOW_CONNECTIONS false')
    with pytest.raises(ServerError, match="not currently accepting connections"):
        restore.try_properties(admin, database.database, settled)


def test_a_taken_name_is_refused(admin: Endpoint, database: Endpoint) -> None:
    with pytest.raises(Refused, match="exists already"):
        restore.create_database(admin, database.database, plain(database))


@pytest.mark.parametrize("name", ["", "x" * 64, "é" * 32])
def test_what_is_no_name_is_refused(admin: Endpoint, database: Endpoint, name: str) -> None:
    with pytest.raises(Refused, match="not a name"):
        restore.create_database(admin, name, plain(database))


@pytest.mark.parametrize(
    "change",
    [
        {"collate": "xx_XX.UTF-8"},
        {"ctype": "xx_XX.UTF-8"},
        {"locale_provider": "icu", "locale": "de-AT"},
        {"locale_provider": "builtin", "locale": "xx"},
    ],
)
def test_an_absent_locale_is_foreseen_and_named(
    admin: Endpoint, database: Endpoint, tools: Tools, change: dict[str, Any]
) -> None:
    properties = replace(plain(database), **change)
    with contextlib.closing(connect(admin)) as session:
        lacking = missing_requirements(session, replace(source_of(database, tools), database=properties))
    wanted = next(value for value in reversed(change.values()))
    assert wanted in lacking.locale
    with pytest.raises(Refused, match=f"locale .*{wanted}"):
        restore.create_database(admin, "never", properties)
    assert "never" not in database_names(admin)


def test_an_absent_tablespace_is_foreseen_and_named(
    admin: Endpoint, database: Endpoint, tools: Tools
) -> None:
    properties = replace(plain(database), tablespace="fast disk")
    source = replace(source_of(database, tools), database=properties, tablespaces=("fast disk", "other"))
    with contextlib.closing(connect(admin)) as session:
        assert missing_requirements(session, source).tablespaces == ("fast disk", "other")
    with pytest.raises(Refused, match='tablespace "fast disk" does not exist'):
        restore.create_database(admin, "never", properties)


def test_all_that_is_missing_is_listed_at_once(admin: Endpoint, database: Endpoint, tools: Tools) -> None:
    source = replace(
        source_of(database, tools),
        server_version=990001,
        server_version_text="99.1",
        client_version=990001,
        roles=("postgres", "r gone", "r 'gone'"),
        extensions=(("pgcrypto", "0.1"), ("timescaledb", "2.0")),
        size_bytes=1 << 60,
    )
    with contextlib.closing(connect(admin)) as session:
        lacking = missing_requirements(session, source)
        assert names(session) == database_names(admin)
    assert lacking.roles == ("r 'gone'", "r gone")
    assert lacking.extensions == ("timescaledb",)
    assert [name for name, _, _ in lacking.extension_versions] == ["pgcrypto"]
    assert lacking.locale == lacking.standby == ""
    assert lacking.free_bytes is not None
    assert lacking.problems[0] == "the backup is of PostgreSQL 99.1, and the server is 17.10"
    assert lacking.problems[1:-2] == ("extensions are not installed there: timescaledb",)
    assert lacking.problems[-1] == "roles do not exist there: r 'gone', r gone"
    assert lacking.notes == (
        f"extension pgcrypto will have version {lacking.extension_versions[0][2]} instead of 0.1",
    )


def test_a_plain_role_sees_what_it_may(admin: Endpoint, database: Endpoint, tools: Tools) -> None:
    execute(admin, 'CREATE ROLE "r plain" LOGIN')
    conninfo = {name: value for name, value in admin.conninfo.items() if name in {"host", "port", "dbname"}}
    endpoint = Endpoint(psycopg.conninfo.make_conninfo("", **conninfo, user="r plain"))
    source = replace(source_of(database, tools), extensions=(("pgcrypto", "1.3"), ("amcheck", "1.4")))
    with contextlib.closing(connect(endpoint)) as session:
        lacking = missing_requirements(session, source)
    assert lacking.problems == ("only a superuser may create extensions amcheck",)
    assert lacking.untrusted_extensions == ("amcheck",)
    assert lacking.free_bytes is None


def test_the_databases_of_the_server_itself_are_not_dropped(admin: Endpoint, database: Endpoint) -> None:
    for name in ("postgres", "template1", "template0"):
        with pytest.raises(Refused):
            restore.drop_database(database, name, force=True)
    with contextlib.closing(connect(database)):
        with pytest.raises(ServerError, match="being accessed by other users"):
            restore.drop_database(admin, database.database)
        assert restore.drop_database(admin, database.database, force=True)
    assert not restore.drop_database(admin, database.database)


# --- failures and interruptions ------------------------------------------------------------


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


@pytest.fixture
def slow(admin: Endpoint, tools: Tools, tmp_path: Path) -> tuple[DatabaseProperties, Path]:
    """A dump that takes a minute to restore: an index whose every entry sleeps."""
    name = f"slow{secrets.token_hex(3)}"
    execute(admin, f"CREATE DATABASE {name}")
    endpoint = admin.with_database(name)
    execute(
        endpoint,
        "CREATE FUNCTION public.wait(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN"
        " IF (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE application_name LIKE '%restore'"
        " AND datname = current_database()) > 0 THEN PERFORM pg_catalog.pg_sleep(1); END IF;"
        " RETURN i; END $$",
        "CREATE TABLE public.t AS SELECT i FROM pg_catalog.generate_series(1, 60) i",
        "CREATE INDEX slow_index ON public.t (public.wait(i))",
    )
    return plain(endpoint), dump(endpoint, tmp_path / "slow", tools)


def restoring_sessions(admin: Endpoint) -> list[tuple[object, ...]]:
    return fetch(
        admin,
        "SELECT pid FROM pg_stat_activity WHERE datname LIKE 'target.restoring-%' AND state = 'active'"
        " AND query LIKE 'CREATE INDEX slow_index%'",
    )


def tool_pids() -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"pg_restore\0--dbname" in (entry / "cmdline").read_bytes():
                status = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                pids += [int(entry.name)] if status != "Z" else []
    return pids


def own_tool(parent: int) -> int:
    for pid in tool_pids():
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == parent:
                return pid
    return 0


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


def test_a_slow_index_is_no_stall(admin: Endpoint, tools: Tools, tmp_path: Path, database: Endpoint) -> None:
    execute(
        database,
        "CREATE FUNCTION public.wait(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN"
        " IF pg_catalog.current_setting('application_name') LIKE '%restore'"
        " THEN PERFORM pg_catalog.pg_sleep(1.2); END IF; RETURN i; END $$",
        "CREATE TABLE public.t AS SELECT i FROM pg_catalog.generate_series(1, 4) i",
        "CREATE INDEX ON public.t (public.wait(i))",
    )
    archive, began = dump(database, tmp_path / "dump", tools), time.monotonic()
    with restore.temporary_database(admin, "target", plain(database)) as name:
        load(admin, name, archive, tools=tools, limits=LoadLimits(stall_s=4))
    assert time.monotonic() - began > 4


def test_a_size_that_cannot_be_measured_ends_no_load_that_is_at_work(
    admin: Endpoint, tools: Tools, tmp_path: Path, database: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(
        database,
        "CREATE FUNCTION public.wait(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN"
        " IF pg_catalog.current_setting('application_name') LIKE '%restore'"
        " THEN PERFORM pg_catalog.pg_sleep(1.2); END IF; RETURN i; END $$",
        "CREATE TABLE public.t AS SELECT i FROM pg_catalog.generate_series(1, 4) i",
        "CREATE INDEX ON public.t (public.wait(i))",
    )
    archive = dump(database, tmp_path / "dump", tools)
    run = psycopg.Connection.execute

    def slow(session: Any, query: Any, *values: Any, **options: Any) -> Any:
        if "pg_database_size" in str(query):  # as on a disk so slow that it never ends in time
            raise psycopg.errors.QueryCanceled
        return run(session, query, *values, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", slow)
    with restore.temporary_database(admin, "target", plain(database)) as name:
        load(admin, name, archive, tools=tools, limits=LoadLimits(stall_s=3))


CHILD = """
import sys
from pathlib import Path
from backup_pipeline.engines.postgres import restore
from backup_pipeline.engines.postgres.load import load
from backup_pipeline.engines.postgres.properties import read_properties
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.swap import publish
from backup_pipeline.engines.postgres.tools import find_tools
dsn, source, archive, bin_dir = sys.argv[1:]
admin = Endpoint(dsn)
with connect(admin) as session:
    properties = read_properties(session, source)
print("begun", flush=True)
with restore.temporary_database(admin, "target", properties) as name:
    load(admin, name, Path(archive), tools=find_tools(bin_dir))
    restore.apply_properties(admin, name, properties)
    publish(admin, name, "target")
print("done", flush=True)
"""


@contextlib.contextmanager
def restoring(
    admin: Endpoint, properties: DatabaseProperties, archive: Path, tools: Tools
) -> Iterator["subprocess.Popen[bytes]"]:
    argv = [sys.executable, "-c", CHILD, admin.dsn, properties.name, str(archive), tools.bin_dir]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == b"begun\n"
        yield child


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


def test_what_cannot_be_analyzed_is_told_and_the_rest_is_analyzed(
    admin: Endpoint, database: Endpoint
) -> None:
    execute(
        database,
        "CREATE TABLE public.a (x int); CREATE TABLE public.b (x int); CREATE TABLE public.c (x int)",
        "CREATE FUNCTION public.inner_f(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1'",
        "CREATE FUNCTION public.f(int) RETURNS int LANGUAGE plpgsql IMMUTABLE"
        " AS 'BEGIN RETURN inner_f($1); END'",
        "CREATE STATISTICS public.s ON (public.f(x)) FROM public.b",
        *(f"INSERT INTO public.{table} SELECT generate_series(1, 500)" for table in "abc"),
    )
    (told,) = restore.analyze(admin, database.database)
    assert told.startswith("ANALYZE of public.b failed: function inner_f(integer) does not exist")
    assert restore.try_analyze(admin, database.database) == (told,)
    counted = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND reltuples = 500"
    assert fetch(database, f"{counted} ORDER BY 1") == [("a",), ("c",)]


def test_a_lost_session_does_not_end_a_restore_at_its_statistics(admin: Endpoint, database: Endpoint) -> None:
    execute(
        database,
        "CREATE TABLE public.a (x int)",
        "CREATE FUNCTION public.f(int) RETURNS int LANGUAGE plpgsql IMMUTABLE"
        " AS 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN $1; END'",
        "CREATE STATISTICS public.s ON (public.f(x)) FROM public.a",
        "INSERT INTO public.a VALUES (1), (2)",
    )
    (told,) = restore.analyze(admin, database.database)
    assert told.startswith("ANALYZE failed: terminating connection")


def test_what_only_bears_such_a_name_is_never_dropped(admin: Endpoint, database: Endpoint) -> None:
    execute(admin, 'CREATE DATABASE "x.restoring-0badcafe"')
    execute(admin.with_database("x.restoring-0badcafe"), "CREATE TABLE public.precious ()")
    said: list[str] = []
    with restore.temporary_database(admin, "x", plain(database), tell=said.append):
        pass
    assert "x.restoring-0badcafe" in database_names(admin)
    (line,) = said
    assert line.startswith("database x.restoring-0badcafe is left alone: it bears no mark of ours")


@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_dead_restore_was_making_is_dropped_and_told(
    admin: Endpoint, database: Endpoint, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Also what died right after CREATE DATABASE."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    name = restore.temporary_name("x", "0123abcd")
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        if at_once:
            patch.setattr(restore, "_mark", interrupt)
        restore.create_database(admin, name, plain(database))
    assert name in database_names(admin)
    said: list[str] = []
    with contextlib.closing(connect(admin.with_database(name))):
        assert restore.drop_stale(admin, said.append) == ()  # somebody is in it
    wait_until(lambda: restore.drop_stale(admin, said.append) == (name,), within_s=20)
    assert said[-1] == f"dropped database {name}, which a killed restore left unfinished"


@pytest.mark.parametrize("comment", [None, "it's\na \\ comment"])
def test_no_finished_database_bears_the_mark(
    admin: Endpoint, database: Endpoint, comment: str | None
) -> None:
    properties = replace(plain(database), comment=comment)
    said = "SELECT shobj_description(oid, 'pg_database'), datconnlimit FROM pg_database WHERE datname = '{}'"
    for again in (False, True):
        with restore.temporary_database(admin, "target", properties) as name:
            ((mark, limit),) = fetch(admin, said.format(name))
            assert is_marked(str(mark))
            assert limit == -1
            restore.apply_properties(admin, name, properties)
            ((mark, _),) = fetch(admin, said.format(name))
            assert is_marked(str(mark))
            assert replace(plain(admin.with_database(name)), name=database.database) == properties
            if again:
                swap(admin, "target", name, "target_before")
            else:
                publish(admin, name, "target")
        assert fetch(admin, said.format("target")) == [(comment, -1)]


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


def test_subscriptions_do_not_keep_an_unfinished_database(
    admin: Endpoint, database: Endpoint, tools: Tools, tmp_path: Path
) -> None:
    subscription = "CREATE SUBSCRIPTION feed CONNECTION 'host=nowhere' PUBLICATION p WITH (connect = false)"
    execute(database, subscription)
    archive = dump(database, tmp_path / "dump", tools)
    execute(database, "ALTER SUBSCRIPTION feed SET (slot_name = NONE)", "DROP SUBSCRIPTION feed")
    seen = []

    def fill_and_fail() -> None:
        with restore.temporary_database(admin, "target", plain(database)) as name:
            load(admin, name, archive, tools=tools)
            seen.extend(fetch(admin, "SELECT subname, subenabled FROM pg_subscription"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_and_fail()
    assert seen == [("feed", False)]
    assert not {each for each in database_names(admin) if each.startswith("target")}
    assert fetch(admin, "SELECT subname FROM pg_subscription") == []


def test_an_unfinished_template_is_dropped_too(admin: Endpoint, database: Endpoint) -> None:
    properties = replace(plain(database), is_template=True)
    with restore.temporary_database(admin, "target", properties) as name:
        restore.apply_properties(admin, name, properties)
    assert name not in database_names(admin)


def test_temporary_names_fit_and_are_told_from_others() -> None:
    for target in ("app", "a" * 63, "é" * 31, "a\nb"):
        name = restore.temporary_name(target, "0123abcd")
        assert len(name.encode()) <= 63
        assert is_temporary(name)
    for name in (
        "app",
        "app.restoring-",
        "app.restoring-0123abc",
        "app.restoring-0123ABCD",
        ".restoring-0123abcd",
    ):
        assert not is_temporary(name)
