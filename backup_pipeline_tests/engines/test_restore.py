"""Round trips through dump, restore and swap: what a restored database has of its source."""

import contextlib
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from backup_pipeline.domain.unfinished import is_temporary
from backup_pipeline.engines.postgres import restore
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.globals import parse_globals
from backup_pipeline.engines.postgres.load import (
    LoadOptions,
    LoadProgress,
    count_items,
    load,
    restore_argv,
)
from backup_pipeline.engines.postgres.requirements import missing_requirements
from backup_pipeline.engines.postgres.roles import (
    create_roles,
    existing_roles,
    plan_roles,
)
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.swap import CopyKind, copy_name, publish, swap
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.errors import ServerError, ToolError
from backup_pipeline_tests.engines.restoring import database_names, dump, execute, fetch, plain, source_of
from backup_pipeline_tests.servers import postgres as servers


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
