"""Roles from globals.sql: read from what pg_dumpall really writes, and created with nothing smuggled in."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from backup_pipeline import process
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.globals import Globals, Role, parse_globals
from backup_pipeline.engines.postgres.roles import (
    RolePlan,
    create_plain_roles,
    create_roles,
    drop_plain_roles,
    existing_roles,
    plan_roles,
)
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.errors import Refused, ServerError
from backup_pipeline.process import Command
from backup_pipeline_tests.servers import postgres as servers

SCRAM = (
    "SCRAM-SHA-256$4096:2JPuhtjq5P/73mV/UtTaLQ==$aXVgG7kOsahdmYH5ApqNRT6oerIz1TWfEvYK7z4tHYo="
    ":MCYtIuYDQPI/A9Ht6tmoRscU+dtAWXmwxQL5uRMBLAA="
)
HOSTILE = (
    'we"ird',
    "new\nline; \\! touch /tmp/x\n\\connect x",
    "it's $$;--x",
    "-dash",
    "=eq",
    "ünïcode" + "é" * 20,
    "back\\slash",
    "UPPER",
    "user",
    "a/*b",
)


@pytest.fixture(scope="module")
def source() -> Iterator[Endpoint]:
    """A server of its own, because roles belong to all databases."""
    with servers.running_cluster(servers.bin_dir_17()) as cluster:
        yield cluster.endpoint()


@pytest.fixture(scope="module")
def target() -> Iterator[Endpoint]:
    with servers.running_cluster(servers.bin_dir_17()) as cluster:
        yield cluster.endpoint()


@pytest.fixture
def empty(target: Endpoint) -> Iterator[Connection]:
    """The target server; roles that the test makes are gone afterwards."""
    with contextlib.closing(connect(target)) as session:
        before = existing_roles(session)
        yield session
        drop_plain_roles(session, sorted(existing_roles(session) - before))


def dump_globals(endpoint: Endpoint) -> bytes:
    argv = (f"{servers.bin_dir_17()}/pg_dumpall", "--globals-only", f"--dbname={endpoint.tool_dbname}")
    return process.run(Command(argv, endpoint.environment()), timeout_s=60).stdout.encode()


def describe(session: Connection, names: tuple[str, ...]) -> list[tuple[object, ...]]:
    return session.execute(
        "SELECT rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolconnlimit,"
        " rolpassword, rolvaliduntil, shobj_description(oid, 'pg_authid'),"
        " (SELECT setconfig::text FROM pg_db_role_setting WHERE setrole = a.oid AND setdatabase = 0)"
        " FROM pg_authid a WHERE rolname = ANY(%s) ORDER BY 1",
        [list(names)],
    ).fetchall()


def memberships(session: Connection, names: tuple[str, ...]) -> list[tuple[object, ...]]:
    return session.execute(
        "SELECT roleid::regrole::text, member::regrole::text, bool_or(admin_option), bool_or(inherit_option),"
        " bool_or(set_option) FROM pg_auth_members WHERE roleid::regrole::text = ANY(%s) "
        "GROUP BY 1, 2 ORDER BY 1, 2",
        [list(names)],
    ).fetchall()


def test_hostile_roles_come_back_as_they_were(source: Endpoint, empty: Connection) -> None:
    with contextlib.closing(connect(source)) as session:
        for name in HOSTILE:
            role = sql.Identifier(name)
            session.execute(sql.SQL("CREATE ROLE {} LOGIN NOINHERIT CONNECTION LIMIT 3").format(role))
            session.execute(sql.SQL("ALTER ROLE {} PASSWORD {} VALID UNTIL '2030-01-01'").format(role, SCRAM))
            comment = sql.Literal(f"of {name}\n\\! evil 'x'")
            session.execute(sql.SQL("COMMENT ON ROLE {} IS {}").format(role, comment))
            session.execute(
                sql.SQL("ALTER ROLE {} SET search_path TO {}, 'b\\c'").format(role, sql.Identifier(name))
            )
            session.execute(
                sql.SQL("ALTER ROLE {} SET my.setting TO {}").format(role, sql.Literal(f"{name}\n'\\"))
            )
            session.execute(sql.SQL("ALTER ROLE {} SET work_mem TO '64MB'").format(role))
        expected = describe(session, HOSTILE)
        known = parse_globals(dump_globals(source))
    plan = plan_roles(known, needed=HOSTILE, existing=existing_roles(empty))
    assert (plan.withheld, plan.absent) == ((), ())
    assert create_roles(empty, plan) == ()
    assert describe(empty, HOSTILE) == expected
    assert not Path("/tmp/x").exists()
    assert SCRAM not in repr(known)


def test_whoever_acts_through_a_needed_role_comes_too(source: Endpoint, empty: Connection) -> None:
    with contextlib.closing(connect(source)) as session:
        session.execute(
            "CREATE ROLE owner_1; CREATE ROLE app_1 LOGIN; CREATE ROLE team_1; CREATE ROLE person_1 LOGIN;"
            "CREATE ROLE stranger_1; CREATE ROLE above_1;"
            "GRANT owner_1 TO app_1 WITH INHERIT FALSE; GRANT owner_1 TO team_1 WITH ADMIN TRUE;"
            "GRANT team_1 TO person_1 WITH SET FALSE; GRANT above_1 TO owner_1;"
            "GRANT pg_read_all_data TO app_1;"
            "GRANT owner_1 TO app_1 WITH SET FALSE GRANTED BY team_1;"
        )
        expected = memberships(session, ("owner_1", "team_1"))
        known = parse_globals(dump_globals(source))
    plan = plan_roles(known, needed=["owner_1", "gone_1"], existing=existing_roles(empty))
    assert {role.name for role in plan.create} == {"owner_1", "app_1", "team_1", "person_1"}
    assert plan.withheld == ('GRANT "above_1" TO "owner_1";', 'GRANT "pg_read_all_data" TO "app_1";')
    assert plan.absent == ("gone_1",)
    assert create_roles(empty, plan) == ()
    assert memberships(empty, ("owner_1", "team_1")) == expected
    assert len(expected) == 3


def test_powers_are_withheld_unless_asked_for() -> None:
    known = parse_globals(
        b"CREATE ROLE boss;\nALTER ROLE boss WITH SUPERUSER INHERIT NOCREATEROLE CREATEDB LOGIN;\n"
        b"GRANT pg_monitor TO boss;\nGRANT boss TO postgres;\nGRANT elsewhere TO boss;\n"
    )
    existing = ["postgres", "pg_monitor"]
    plan = plan_roles(known, needed=["boss"], existing=existing)
    assert plan.create == (Role("boss", ("INHERIT", "LOGIN")),)
    assert plan.memberships == ()
    assert plan.withheld == (
        'ALTER ROLE "boss" WITH SUPERUSER;',
        'ALTER ROLE "boss" WITH CREATEDB;',
        'GRANT "pg_monitor" TO "boss";',
        'GRANT "boss" TO "postgres";',
        'GRANT "elsewhere" TO "boss";',
    )


def test_existing_roles_are_never_altered() -> None:
    known = parse_globals(
        b"CREATE ROLE app;\nALTER ROLE app WITH SUPERUSER;\nCREATE ROLE m;\nGRANT app TO m;\n"
    )
    plan = plan_roles(known, needed=["app"], existing=["app"])
    assert plan == RolePlan((), (), (), ())


def test_settings_for_superusers_and_unknown_ones_are_left_out(empty: Connection) -> None:
    settings = (
        ("session_preload_libraries", ("evil",)),
        ("work_mem", ("lots",)),
        ("DateStyle", ("ISO, DMY",)),
    )
    plan = RolePlan((Role("app", settings=settings),), (), (), ())
    assert create_roles(empty, plan) == (
        'ALTER ROLE "app" SET "session_preload_libraries" TO …; (as in globals.sql)',
        'ALTER ROLE "app" SET "work_mem" TO …; (as in globals.sql)',
    )
    assert describe(empty, ("app",))[0][-1] == '{"DateStyle=ISO, DMY"}'


@pytest.mark.parametrize(
    "smuggled",
    [
        "\\! touch /tmp/x\n",
        "CREATE ROLE a\n\\! touch /tmp/x\n;",
        "\\restrict abc; DROP ROLE postgres;\n",
        "DO $$ BEGIN END $$;",
        'CREATE ROLE "a;\n',
        "COMMENT ON ROLE a IS 'x\\';",
        "COMMENT ON ROLE a IS E'x\\'; DROP ROLE b;",
        "COMMENT ON ROLE a IS E'\\x41';",
        "COMMENT ON ROLE a IS U&'x';",
        "CREATE ROLE a /* b */;",
        "CREATE ROLE a",
        "SELECT 1 \\gexec\n",
        "\xff",
        "SET client_encoding = 'LATIN1';",
    ],
)
def test_what_pg_dumpall_never_writes_is_refused_whole(smuggled: str) -> None:
    with pytest.raises(Refused, match=r"globals\.sql"):
        parse_globals(b"CREATE ROLE first;\n" + smuggled.encode("latin-1"))


def test_the_line_of_a_smuggled_command_is_named() -> None:
    with pytest.raises(Refused) as caught:
        parse_globals(b"CREATE ROLE a;\n\n\\! evil\n")
    assert caught.value.detail == {"line": 3}


def test_other_statements_are_skipped_and_said() -> None:
    known = parse_globals(
        b"SET client_encoding = 'UTF8';\nSET role TO 'x';\n"
        b"CREATE TABLESPACE fast OWNER postgres LOCATION '/mnt/fast';\n"
        b"ALTER TABLESPACE fast SET (random_page_cost=1.1);\n"
        b"CREATE ROLE a SUPERUSER;\nALTER ROLE b SET x TO 'y';\nDROP ROLE postgres;\nCREATE ROLE c;\n"
        b"ALTER ROLE c WITH PASSWORD 'plain';\nALTER ROLE c IN DATABASE d SET x TO 'y';\n"
        b"ALTER ROLE c WITH LOGIN ADMIN;\n"
        b"GRANT SET ON PARAMETER work_mem TO c;\nGRANT ALL ON TABLESPACE fast TO c;\nGRANT x, y TO c;\n"
        b'GRANT c TO a WITH HIERARCHY OPTION;\nCREATE ROLE UPPER;\nDROP TABLE "ALTER ROLE c";\n;\n'
    )
    assert known == Globals(
        roles=(Role("c"),),
        memberships=(),
        tablespaces=("fast",),
        skipped=(
            "SET",
            "ALTER TABLESPACE",
            "CREATE ROLE",
            "ALTER ROLE",
            "DROP ROLE",
            "GRANT SET ON PARAMETER",
            "GRANT ALL ON TABLESPACE",
            "GRANT",
            "CREATE ROLE UPPER",
            "DROP TABLE",
            "an unknown statement",
        ),
    )


def test_a_refused_role_leaves_none_behind(empty: Connection) -> None:
    plan = RolePlan((Role("first"), Role("pg_second")), (), (), ())
    with pytest.raises(ServerError, match="could not be created"):
        create_roles(empty, plan)
    assert "first" not in existing_roles(empty)


def test_a_role_that_is_no_superuser_may_hand_over_objects_to_what_it_created(
    target: Endpoint, empty: Connection
) -> None:
    empty.execute("CREATE ROLE operator_2 LOGIN CREATEROLE CREATEDB")
    conninfo = {name: value for name, value in target.conninfo.items() if name in {"host", "port", "dbname"}}
    operator = Endpoint(psycopg.conninfo.make_conninfo("", **conninfo, user="operator_2"))
    with contextlib.closing(connect(operator)) as session:
        create_roles(session, RolePlan((Role("owner_2"),), (), (), ()))
        session.execute("CREATE DATABASE handed OWNER owner_2")
        session.execute("ALTER DATABASE handed SET work_mem = '5MB'")
        session.execute("DROP DATABASE handed")


def test_plain_roles_come_and_go(empty: Connection) -> None:
    names = (*HOSTILE, "postgres", "pg_of_the_future")
    created = create_plain_roles(empty, names)
    assert created == HOSTILE
    assert create_plain_roles(empty, names) == ()
    assert {row[5] for row in describe(empty, HOSTILE)} == {False}
    empty.execute('CREATE SCHEMA kept AUTHORIZATION "UPPER"')
    assert drop_plain_roles(empty, created) == ("UPPER",)
    empty.execute("DROP SCHEMA kept")
    assert drop_plain_roles(empty, created) == ()


def test_the_source_of_this_session_reads_whole(postgres: LocalCluster) -> None:
    name = f"r{secrets.token_hex(4)}"
    with contextlib.closing(connect(postgres.endpoint())) as session:
        session.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
        try:
            known = parse_globals(dump_globals(postgres.endpoint()))
        finally:
            session.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))
    assert {"postgres", name} <= {role.name for role in known.roles}
    assert known.skipped == ()
