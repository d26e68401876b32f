"""Databases to dump and restore, on a server that has nothing of them left afterwards."""

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from psycopg import sql

from backup_pipeline.domain.backup import DatabaseProperties
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.properties import read_properties, statements
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.tools import Tools, find_tools
from backup_pipeline_tests.engines.pairs import Pair, make
from backup_pipeline_tests.engines.restoring import HOSTILE, dump, execute, names, plain
from backup_pipeline_tests.servers import postgres as servers


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
