"""What is refused before anything is loaded: names, settings, and what the server lacks."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backup_pipeline.engines.postgres import restore
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.load import (
    load,
)
from backup_pipeline.engines.postgres.requirements import missing_requirements
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.errors import Refused, ServerError
from backup_pipeline_tests.engines.restoring import (
    database_names,
    dump,
    execute,
    fetch,
    names,
    plain,
    source_of,
)


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
