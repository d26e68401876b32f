"""Endpoints: parsed, shown without secrets, the same for sessions and tools; and what a session is."""

import contextlib
import os
import socket
from pathlib import Path

import psycopg
import pytest
from psycopg import pq, sql

from backup_pipeline import process
from backup_pipeline.config import Secret
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect, is_pooled, read_server_info, resolved
from backup_pipeline.errors import ConfigError, ServerError
from backup_pipeline.process import Command
from backup_pipeline_tests.servers.postgres import bin_dir_17, fresh_database

HOSTILE = (
    "a=b",
    "-x",
    " sp ace ",
    "quo\"te'",
    "new\nline",
    ";$(touch /nonexistent/x)",
    "../x",
    "host=other.example",
    "postgresql://other/",
    "back\\slash %41 %s",
    "ü" * 31 + "x",
)
"""Names that are legal in PostgreSQL and poison to whoever pastes them into a command or a DSN."""


def one(endpoint: Endpoint, query: str) -> object:
    with contextlib.closing(connect(endpoint)) as session:
        row = session.execute(query.encode()).fetchone()
        return row[0] if row else None


def by_psql(endpoint: Endpoint, query: str) -> str:
    argv = (
        f"{bin_dir_17()}/psql",
        "-X",
        "-A",
        "-t",
        f"--dbname={endpoint.tool_dbname}",
        f"--command={query}",
    )
    return process.run(Command(argv, endpoint.environment()), timeout_s=20).stdout


# Parsing and showing


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:hunter2@db.example:6543/shop?sslmode=require",
        "host=db.example port=6543 user=me password=hunter2 dbname=shop sslmode=require",
    ],
)
def test_both_forms_of_a_dsn_are_read_and_neither_shows_its_password(dsn: str) -> None:
    endpoint = Endpoint(dsn)
    assert endpoint.shown == "me@db.example:6543/shop"
    assert repr(endpoint) == "Endpoint(me@db.example:6543/shop)"
    environment = endpoint.environment()
    assert environment["PGPASSWORD"] == "hunter2"
    assert {
        name: environment[name] for name in ("PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGSSLMODE")
    } == {
        "PGHOST": "db.example",
        "PGPORT": "6543",
        "PGUSER": "me",
        "PGDATABASE": "shop",
        "PGSSLMODE": "require",
    }
    assert "hunter2" not in endpoint.tool_dbname


def test_a_password_kept_apart_wins() -> None:
    endpoint = Endpoint("host=db.example password=old", Secret("new"))
    assert endpoint.environment()["PGPASSWORD"] == "new"
    assert endpoint.conninfo["password"] == "new"
    assert endpoint.with_database("other").conninfo["password"] == "new"


def test_an_unreadable_dsn_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError) as refused:
        Endpoint("host=db.example passw0rd hunter2")
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    "keyword", ["sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret", "sslkeylogfile"]
)
@pytest.mark.parametrize("service", ["", "service=prod "])
def test_what_may_be_secret_is_given_to_no_tool_in_sight_of_all(service: str, keyword: str) -> None:
    with pytest.raises(ConfigError, match=f"has {keyword}, which") as refused:
        _ = Endpoint(f"{service}host=db.example {keyword}=hunter2").tool_dbname
    assert "hunter2" not in str(refused.value)


def test_a_password_beside_a_service_stays_out_of_sight() -> None:
    endpoint = Endpoint("service=prod password=hunter2", Secret("hunter3"))
    assert "hunter" not in endpoint.tool_dbname
    assert endpoint.environment()["PGPASSWORD"] == "hunter3"


def test_options_beside_a_service_keep_none_from_those_of_a_tool() -> None:
    endpoint = Endpoint("service=prod options='-c a.b=c'")
    assert "options" not in endpoint.tool_dbname
    assert endpoint.environment()["PGOPTIONS"] == "-c a.b=c"


def test_what_libpq_takes_from_no_variable_goes_beside_it() -> None:
    assert Endpoint("host=db.example keepalives_idle=7 tcp_user_timeout=9000 dbname='a b'").tool_dbname == (
        "keepalives=1 keepalives_idle=7 keepalives_interval=10 keepalives_count=6 tcp_user_timeout=9000"
    )


def test_the_dump_is_not_recoded_by_a_client_encoding_of_the_dsn() -> None:
    assert "PGCLIENTENCODING" not in Endpoint("host=db.example client_encoding=LATIN1").environment()


def test_a_service_and_its_passfile_work(
    postgres: LocalCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = postgres.endpoint().conninfo["host"]
    (tmp_path / "services").write_text(f"[prod]\nhost={host}\nport=5432\nuser=postgres\ndbname=template1\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    endpoint = Endpoint("service=prod")
    assert endpoint.shown == "service prod"
    assert one(endpoint, "SELECT current_database()") == "template1"
    assert by_psql(endpoint, "SELECT current_database()") == "template1\n"
    found = resolved(endpoint)
    assert (found.database, found.user, found.shown) == (
        "template1",
        "postgres",
        "service prod, database template1",
    )
    assert resolved(found) is found


def test_what_a_dsn_says_wins_over_its_service(
    postgres: LocalCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = postgres.endpoint().conninfo["host"]
    (tmp_path / "services").write_text(f"[prod]\nhost={host}\nuser=postgres\ndbname=template1\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGSERVICE", "prod")
    with contextlib.closing(connect(postgres.endpoint())) as session:
        session.execute("CREATE ROLE of_the_dsn LOGIN")
        for endpoint in (Endpoint("service=prod user=of_the_dsn"), Endpoint("user=of_the_dsn")):
            other = endpoint.with_database("postgres")
            query = "SELECT current_database() || ' ' || current_user"
            assert one(other, query) == "postgres of_the_dsn"
            assert by_psql(other, query) == "postgres of_the_dsn\n"
        session.execute("DROP ROLE of_the_dsn")


# Sessions and tools


@pytest.mark.parametrize("name", HOSTILE)
def test_a_database_of_any_name_is_reached_by_sessions_and_by_tools(
    postgres: LocalCluster, name: str
) -> None:
    with fresh_database(postgres, name) as endpoint:
        assert endpoint.database == name
        assert one(endpoint, "SELECT current_database()") == name
        with contextlib.closing(connect(endpoint)) as session:
            session.execute("CREATE TABLE public.found_here ()")
        said = [
            process.run(
                Command(
                    (f"{bin_dir_17()}/{tool}", option, f"--dbname={endpoint.tool_dbname}"),
                    endpoint.environment(),
                ),
                timeout_s=20,
            ).stdout
            for tool, option in (("pg_dump", "--schema-only"), ("pg_dumpall", "--globals-only"))
        ]
        assert "CREATE TABLE public.found_here" in said[0]
        assert "CREATE ROLE" in said[1]


def test_variables_around_us_change_neither_sessions_nor_tools(
    database: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in pq.Conninfo.get_defaults():
        if option.envvar and option.envvar not in (b"PGSERVICE", b"PGPASSFILE"):
            monkeypatch.setenv(option.envvar.decode(), "planted")
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    monkeypatch.setenv("PGDATESTYLE", "German")
    assert (
        one(database, "SELECT current_setting('TimeZone') || current_setting('DateStyle')") == "UTCISO, YMD"
    )
    assert not any("planted" in value for value in database.environment().values())


def test_a_session_ignores_what_role_and_database_set(postgres: LocalCluster, database: Endpoint) -> None:
    with contextlib.closing(connect(database)) as session:
        name = sql.Identifier(database.database)
        for setting in (
            "search_path = public",
            "idle_in_transaction_session_timeout = 5",
            "DateStyle = German",
        ):
            session.execute(sql.SQL("ALTER DATABASE {} SET ").format(name) + sql.SQL(setting))
    query = "SELECT current_setting('search_path') || current_setting('idle_in_transaction_session_timeout')"
    assert one(database, query) == "0"


def test_deadlines_are_set(database: Endpoint) -> None:
    with contextlib.closing(connect(database, statement_timeout_s=0.05, purpose="test")) as session:
        assert session.execute("SHOW application_name").fetchone() == ("backup_pipeline test",)
        with pytest.raises(psycopg.errors.QueryCanceled):
            session.execute("SELECT pg_sleep(5)")


def test_a_query_that_never_arrives_ends_its_session(database: Endpoint) -> None:
    for dsn, expected in ((database.dsn, "90000"), (f"{database.dsn} tcp_user_timeout=5000", "5000")):
        with contextlib.closing(connect(Endpoint(dsn))) as session:
            assert session.info.get_parameters()["tcp_user_timeout"] == expected


def test_a_session_may_hold_a_transaction(database: Endpoint) -> None:
    with contextlib.closing(connect(database, autocommit=False)) as session:
        states = [session.info.transaction_status.name]
        session.execute("SELECT 1")
        states.append(session.info.transaction_status.name)
    assert states == ["IDLE", "INTRANS"]


def test_a_server_that_is_not_there_is_named_with_a_hint() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(ServerError) as failed:
            connect(Endpoint(f"postgresql://me:hunter2@127.0.0.1:{port}/shop"))
    assert failed.value.message.startswith(f"cannot connect (me@127.0.0.1:{port}/shop): ")
    assert "Check the address and port" in failed.value.hint
    assert "hunter2" not in str(failed.value)


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with pytest.raises(ServerError, match="timeout"):
            connect(Endpoint(f"host=127.0.0.1 port={port} connect_timeout=2"))


def test_a_database_that_does_not_exist_is_named_with_a_hint(postgres: LocalCluster) -> None:
    with pytest.raises(ServerError, match='database "nowhere" does not exist') as failed:
        connect(postgres.endpoint("nowhere"))
    assert "psql -l" in failed.value.hint


def test_a_server_says_what_it_is(postgres15: LocalCluster) -> None:
    with contextlib.closing(connect(postgres15.endpoint())) as session:
        session.execute("CREATE ROLE plain LOGIN")
    with contextlib.closing(connect(postgres15.endpoint(user="plain"))) as session:
        info = read_server_info(session)
        assert not is_pooled(session)
    assert (info.major, info.is_superuser, info.in_recovery) == (15, False, False)
    assert len(info.system_identifier) == 19


def test_no_secret_of_ours_is_in_the_process_list(database: Endpoint) -> None:
    endpoint = Endpoint(database.dsn, Secret("hunter2"))
    assert "hunter2" not in endpoint.tool_dbname
    assert "hunter2" not in str(
        Command(("pg_dump", f"--dbname={endpoint.tool_dbname}"), endpoint.environment())
    )
    assert "hunter2" not in os.environ.values()
