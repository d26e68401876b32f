"""What belongs to a database but to no dump of it: read, written to another name, and read again."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest
from psycopg import sql

from backup_pipeline.domain.backup import DatabaseProperties
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.notes import read_notes
from backup_pipeline.engines.postgres.properties import (
    create_statement,
    read_properties,
    read_source,
    split_quoted_list,
    statements,
)
from backup_pipeline.engines.postgres.server import Connection, connect, read_server_info
from backup_pipeline.engines.postgres.tools import find_tools
from backup_pipeline.errors import ConfigError, ServerError
from backup_pipeline_tests.domain import values
from backup_pipeline_tests.engines.test_server import HOSTILE
from backup_pipeline_tests.servers.postgres import EACH_SERVER, bin_dir_17, fresh_database

TOOLS = find_tools(bin_dir_17())

PLAIN = replace(
    values.PROPERTIES, name="shop", owner="shopkeeper", collate="C", comment=None, settings=(), grants=None
)


def texts(properties: DatabaseProperties, name: str = "new") -> list[str]:
    return [statement.as_string() for statement in statements(properties, name)]


def run(connection: Connection, template: str, *names: str) -> None:
    connection.execute(sql.SQL(template).format(*map(sql.Identifier, names)))


@contextlib.contextmanager
def roles_and_databases(server: Endpoint, roles: list[str], databases: list[str]) -> Iterator[Connection]:
    """These roles, and at the end neither they nor these databases."""
    with contextlib.closing(connect(server)) as session:
        try:
            for role in roles:
                run(session, "CREATE ROLE {}", role)
            yield session
        finally:
            session.execute("RESET ROLE")
            for name in databases:
                with contextlib.suppress(psycopg.errors.UndefinedObject, psycopg.errors.InvalidCatalogName):
                    run(session, "ALTER DATABASE {} IS_TEMPLATE false", name)
                run(session, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)
            for role in roles:
                run(session, "DROP ROLE IF EXISTS {}", role)


# Statements


def test_a_plain_database_needs_its_owner_alone() -> None:
    assert texts(PLAIN) == ['ALTER DATABASE "new" OWNER TO "shopkeeper"']
    assert create_statement(PLAIN, "new", server_version=150000).as_string() == (
        "CREATE DATABASE \"new\" TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C.UTF-8'"
        ' LOCALE_PROVIDER "libc"'
    )


def test_everything_is_set_in_an_order_that_works() -> None:
    full = replace(
        PLAIN,
        connection_limit=7,
        allow_connections=False,
        is_template=True,
        comment="it's ours",
        settings=(("", 'search_path="$user", public'), ("app", "work_mem=64MB")),
        grants=(
            ("app", "auditor", "CONNECT", False),
            ("shopkeeper", "", "CONNECT", False),
            ("shopkeeper", "app", "CONNECT", True),
        ),
    )
    assert texts(full) == [
        'ALTER DATABASE "new" OWNER TO "shopkeeper"',
        'REVOKE ALL ON DATABASE "new" FROM PUBLIC CASCADE',
        'REVOKE ALL ON DATABASE "new" FROM "shopkeeper" CASCADE',
        'GRANT CONNECT ON DATABASE "new" TO PUBLIC',
        'GRANT CONNECT ON DATABASE "new" TO "app" WITH GRANT OPTION',
        'SET ROLE "app"; GRANT CONNECT ON DATABASE "new" TO "auditor"; RESET ROLE',
        "COMMENT ON DATABASE \"new\" IS 'it''s ours'",
        "ALTER DATABASE \"new\" SET \"search_path\" TO '$user', 'public'",
        'ALTER ROLE "app" IN DATABASE "new" SET "work_mem" TO \'64MB\'',
        'ALTER DATABASE "new" CONNECTION LIMIT 7',
        'ALTER DATABASE "new" IS_TEMPLATE true',
        'ALTER DATABASE "new" ALLOW_CONNECTIONS false',
    ]


def test_a_manifest_cannot_smuggle_sql_as_a_privilege() -> None:
    with pytest.raises(ConfigError, match="not a privilege"):
        statements(replace(PLAIN, grants=(("o", "", "ALL ON DATABASE x TO y; --", False),)), "new")


def test_a_locale_that_the_server_does_not_know_is_refused() -> None:
    builtin = replace(PLAIN, locale_provider="builtin", locale="C.UTF-8")
    assert "BUILTIN_LOCALE 'C.UTF-8'" in create_statement(builtin, "new", server_version=170000).as_string()
    with pytest.raises(ConfigError, match="PostgreSQL 16 does not know"):
        create_statement(builtin, "new", server_version=160004)
    icu = replace(PLAIN, locale_provider="icu", locale="und", icu_rules="&a < b")
    assert (
        "ICU_LOCALE 'und' ICU_RULES '&a < b'" in create_statement(icu, "n", server_version=160000).as_string()
    )
    with pytest.raises(ConfigError, match="PostgreSQL 15 does not know"):
        create_statement(icu, "new", server_version=150004)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ('"$user", public', ["$user", "public"]),
        ('"a""b","c, d",e', ['a"b', "c, d", "e"]),
        ('""', [""]),
        ("", []),
        ("public", ["public"]),
    ],
)
def test_lists_of_quoted_names_are_split(value: str, names: list[str]) -> None:
    assert split_quoted_list(value) == names


# Against servers


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_any_kind_come_back_equal(postgres: LocalCluster, name: str) -> None:
    owner, app = f"{name[:20]}_o", f"{name[:20]}_a"
    copy = "copy of " + name[:20]
    with roles_and_databases(postgres.endpoint(), [owner, app], [name, copy]) as session:
        run(session, "CREATE DATABASE {} OWNER {} TEMPLATE template0 LC_CTYPE 'C.UTF-8'", name, owner)
        run(session, "REVOKE ALL ON DATABASE {} FROM PUBLIC", name)
        run(session, "GRANT CONNECT ON DATABASE {} TO {} WITH GRANT OPTION", name, app)
        run(session, "SET ROLE {}; GRANT CONNECT ON DATABASE {} TO PUBLIC; RESET ROLE", app, name)
        run(
            session,
            "ALTER ROLE {} IN DATABASE {} SET search_path TO {}, public, '$user', ''",
            app,
            name,
            name,
        )
        run(session, "ALTER DATABASE {} SET \"my.setting\" TO E'it''s\\n\"=\" ; \\\\'", name)
        run(session, "COMMENT ON DATABASE {} IS 'it''s; \\ \"so\"'", name)
        run(session, "ALTER DATABASE {} CONNECTION LIMIT 3", name)
        properties = read_properties(session, name)
        assert (properties.owner, properties.connection_limit) == (owner, 3)
        session.execute(create_statement(properties, copy, server_version=session.info.server_version))
        for _ in range(2):
            for statement in statements(properties, copy):
                session.execute(statement)
        assert replace(read_properties(session, copy), name=name) == properties


@pytest.mark.parametrize("server", EACH_SERVER)
def test_grants_are_exact_and_settings_keep_their_values(server: str, request: pytest.FixtureRequest) -> None:
    endpoint = request.getfixturevalue(server).endpoint()
    with roles_and_databases(endpoint, ["p_owner", "p_app", "p_deep"], ["p_source", "p_copy"]) as session:
        run(session, "CREATE DATABASE p_source OWNER p_owner TEMPLATE template0 IS_TEMPLATE true")
        default = read_properties(session, "p_source")
        assert default.grants is None
        for statement in (
            "REVOKE CREATE, TEMPORARY ON DATABASE p_source FROM p_owner",
            "REVOKE TEMPORARY ON DATABASE p_source FROM PUBLIC",
            "GRANT TEMPORARY ON DATABASE p_source TO p_app WITH GRANT OPTION",
            "SET ROLE p_app; GRANT TEMPORARY ON DATABASE p_source TO p_deep WITH GRANT OPTION; RESET ROLE",
            "SET ROLE p_deep; GRANT TEMPORARY ON DATABASE p_source TO PUBLIC; RESET ROLE",
            "GRANT CONNECT ON DATABASE p_source TO pg_monitor",
            "ALTER DATABASE p_source SET work_mem TO '64MB'",
            "ALTER DATABASE p_source SET DateStyle TO 'SQL, DMY'",
            "ALTER DATABASE p_source SET temp_tablespaces TO ''",
            "ALTER DATABASE p_source SET session_preload_libraries TO 'one', 'two, three'",
            "ALTER ROLE p_app IN DATABASE p_source SET default_transaction_read_only TO on",
            "ALTER DATABASE p_source ALLOW_CONNECTIONS false",
        ):
            run(session, statement)
        properties = read_properties(session, "p_source")
        assert ("p_deep", "", "TEMPORARY", False) in (properties.grants or ())
        assert not properties.allow_connections
        session.execute(create_statement(properties, "p_copy", server_version=session.info.server_version))
        for made in statements(properties, "p_copy"):
            session.execute(made)
        assert replace(read_properties(session, "p_copy"), name="p_source") == properties
        run(session, "REVOKE ALL ON DATABASE p_source FROM PUBLIC, p_app, p_owner, pg_monitor CASCADE")
        nothing = read_properties(session, "p_source")
        assert nothing.grants == ()
        run(session, "ALTER DATABASE p_copy IS_TEMPLATE false")
        run(session, "DROP DATABASE p_copy")
        session.execute(create_statement(nothing, "p_copy", server_version=session.info.server_version))
        for made in statements(nothing, "p_copy"):
            session.execute(made)
        assert read_properties(session, "p_copy").grants == ()


def test_a_builtin_locale_comes_back(postgres: LocalCluster) -> None:
    with roles_and_databases(postgres.endpoint(), [], ["builtin", "copy"]) as session:
        run(
            session,
            "CREATE DATABASE builtin TEMPLATE template0 LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'",
        )
        properties = read_properties(session, "builtin")
        assert (properties.locale_provider, properties.locale) == ("builtin", "C.UTF-8")
        session.execute(create_statement(properties, "copy", server_version=170000))
        assert replace(read_properties(session, "copy"), name="builtin") == properties


def test_an_icu_locale_comes_back(postgres15: LocalCluster) -> None:
    with roles_and_databases(postgres15.endpoint(), [], ["icu", "copy"]) as session:
        run(session, "CREATE DATABASE icu TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de-AT'")
        properties = read_properties(session, "icu")
        assert (properties.locale_provider, properties.locale) == ("icu", "de-AT")
        session.execute(create_statement(properties, "copy", server_version=150000))
        assert replace(read_properties(session, "copy"), name="icu") == properties


def test_a_database_that_is_not_there_is_named(database: Endpoint) -> None:
    with (
        contextlib.closing(connect(database)) as session,
        pytest.raises(ServerError, match="no database 'nowhere'"),
    ):
        read_properties(session, "nowhere")


@pytest.mark.parametrize("server", EACH_SERVER)
def test_a_source_names_all_that_it_leans_on(server: str, request: pytest.FixtureRequest) -> None:
    endpoint = request.getfixturevalue(server).endpoint()
    roles = ["s_owner", "s_table", "s_reader", "s_policy", "s_setting", "s_default", "s_idle"]
    with roles_and_databases(endpoint, roles, ["s_source"]) as admin:
        run(admin, "CREATE DATABASE s_source OWNER s_owner TEMPLATE template0")
        run(admin, "ALTER ROLE s_setting IN DATABASE s_source SET work_mem TO '8MB'")
        with contextlib.closing(connect(endpoint.with_database("s_source"))) as session:
            info = read_server_info(session)
            bare = read_source(session, TOOLS)
            for statement in (
                "CREATE TABLE public.t (a int, b text); ALTER TABLE public.t OWNER TO s_table",
                "GRANT SELECT (a) ON public.t TO s_reader",
                "CREATE POLICY p ON public.t TO s_policy",
                "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO s_default",
                "CREATE EXTENSION hstore WITH SCHEMA public",
                "CREATE UNLOGGED TABLE public.u ()",
                "CREATE MATERIALIZED VIEW public.m AS SELECT 1 AS a",
                "CREATE EXTENSION postgres_fdw WITH SCHEMA public",
                "CREATE SERVER f FOREIGN DATA WRAPPER postgres_fdw",
                "CREATE FOREIGN TABLE public.far () SERVER f",
                "CREATE PUBLICATION pub",
                "CREATE SUBSCRIPTION sub CONNECTION '' PUBLICATION pub"
                " WITH (connect = false, slot_name = NONE)",
                "SELECT pg_catalog.lo_create(4711)",
                "CREATE FUNCTION public.f() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'",
                "CREATE EVENT TRIGGER watch ON ddl_command_end EXECUTE FUNCTION public.f()",
            ):
                session.execute(statement)
            for number in range(7):
                session.execute(f"CREATE INDEX i{number} ON public.t (a)".encode())
            session.execute(
                "UPDATE pg_catalog.pg_index SET indisvalid = false WHERE indrelid = 'public.t'::regclass"
            )
            source = read_source(session, TOOLS)
            run(session, "ALTER SUBSCRIPTION sub DISABLE")
            run(session, "DROP SUBSCRIPTION sub")
    assert (source.server_version, source.server_version_text) == (info.version, info.version_text)
    assert (source.client_version, source.client_path) == (TOOLS.version, TOOLS.path("pg_dump"))
    assert source.system_identifier == info.system_identifier
    assert source.size_bytes > 1_000_000
    assert (bare.roles, bare.extensions, bare.notes) == (("s_owner", "s_setting"), (), ())
    assert source.roles == (
        "postgres",
        "s_default",
        "s_owner",
        "s_policy",
        "s_reader",
        "s_setting",
        "s_table",
    )
    assert [name for name, _ in source.extensions] == ["hstore", "postgres_fdw"]
    assert source.tablespaces == ()
    said = "\n".join(source.notes)
    for note in (
        "1 unlogged table (public.u): ",
        "1 materialized view (public.m): ",
        "7 invalid indexes (public.i0, public.i1, public.i2, public.i3, public.i4 and 2 more): ",
        "1 foreign table (public.far): ",
        "1 publication (pub): ",
        "1 subscription (sub): ",
        "1 event trigger (watch): ",
        "1 large object: ",
    ):
        assert note in said


LEFT_OUT = """
CREATE TABLE public.parts (n int) PARTITION BY LIST (n);
CREATE TABLE public.half PARTITION OF public.parts FOR VALUES IN (1);
UPDATE pg_inherits SET inhdetachpending = true WHERE inhrelid = 'public.half'::regclass;
CREATE TABLE public.a (id int PRIMARY KEY);
CREATE TABLE public.b (a int REFERENCES public.a);
CREATE TABLE public.c (a int REFERENCES public.a);
ALTER TABLE public.b DISABLE TRIGGER ALL;
CREATE FUNCTION pg_catalog.ours(n int) RETURNS int LANGUAGE sql AS 'SELECT n';
CREATE FUNCTION pg_catalog.ours(n text) RETURNS text LANGUAGE sql AS 'SELECT n';
CREATE DOMAIN information_schema.own AS int;
CREATE EXTENSION pg_stat_statements SCHEMA public
"""


@pytest.mark.parametrize("server", EACH_SERVER)
def test_what_pg_dump_leaves_out_is_noted(server: str, request: pytest.FixtureRequest) -> None:
    with (
        fresh_database(request.getfixturevalue(server)) as database,
        contextlib.closing(connect(database)) as session,
    ):
        assert read_notes(session) == ()
        session.execute(LEFT_OUT.encode())
        found = read_notes(session)
    assert [note.partition(": ")[0] for note in found] == [
        "1 partition half detached (public.half)",
        "1 table with foreign key triggers disabled or set ALWAYS (public.b)",
        "2 objects in schemas of the system's (information_schema.own, pg_catalog.ours)",
    ]


def test_a_plain_role_may_read_the_source(database: Endpoint, postgres: LocalCluster) -> None:
    with roles_and_databases(database, ["plain_reader"], []) as session:
        run(session, "ALTER ROLE plain_reader LOGIN")
        endpoint = postgres.endpoint(database.database, user="plain_reader")
        with contextlib.closing(connect(endpoint)) as plain:
            source = read_source(plain, TOOLS)
    assert source.database.name == database.database
    assert source.roles == ("postgres",)
