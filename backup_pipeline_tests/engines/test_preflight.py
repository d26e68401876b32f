"""Preflight checks: what they say of a source is what pg_dump then does."""

import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from backup_pipeline import process
from backup_pipeline.engines.postgres import preflight
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.preflight import (
    Check,
    CheckStatus,
    Unfit,
    check_source,
    raise_first_failure,
)
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.errors import ServerError, ToolError
from backup_pipeline.process import Command
from backup_pipeline_tests.servers.postgres import (
    BIN_DIRS,
    EACH_SERVER,
    bin_dir_15,
    bin_dir_17,
    fresh_database,
)

READER = '"reader; --"'

CONTENTS = (
    "CREATE SCHEMA s",
    "CREATE TABLE s.t (a int)",
    "CREATE TABLE public.t (a int, b int GENERATED ALWAYS AS IDENTITY)",
    "CREATE TABLE public.parted (a int) PARTITION BY LIST (a)",
    "CREATE TABLE public.part PARTITION OF public.parted DEFAULT",
    "CREATE VIEW public.v AS SELECT 1 AS a",
    "CREATE MATERIALIZED VIEW public.m AS SELECT 1 AS a",
    "CREATE SEQUENCE s.q",
    "INSERT INTO public.t SELECT 1",
    "SELECT pg_catalog.lo_create(4711)",
)


@pytest.fixture(params=EACH_SERVER)
def source(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """A database with a bit of everything, on each server, and a role that may read none of it."""
    cluster: LocalCluster = request.getfixturevalue(request.param)
    with fresh_database(cluster) as endpoint, contextlib.closing(connect(endpoint)) as session:
        run(session, *CONTENTS, f"CREATE ROLE {READER} LOGIN")
        try:
            yield endpoint
        finally:
            run(session, f"DROP OWNED BY {READER}", f"DROP ROLE {READER}")


def run(session: Connection, *statements: str) -> None:
    for statement in statements:
        session.execute(statement.encode())


def by_reader(endpoint: Endpoint) -> Endpoint:
    return Endpoint(make_conninfo(endpoint.dsn, user=READER.strip('"')))


def failed(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks if check.status is CheckStatus.FAILED}


def tools_of(endpoint: Endpoint) -> str:
    with contextlib.closing(connect(endpoint)) as session:
        return BIN_DIRS[session.info.server_version // 10000]()


def dumps(endpoint: Endpoint, into: Path) -> bool:
    """Whether pg_dump ends well."""
    argv = (
        f"{tools_of(endpoint)}/pg_dump",
        "--format=custom",
        f"--dbname={endpoint.tool_dbname}",
        f"--file={into}/dump",
    )
    return process.run(Command(argv, endpoint.environment()), timeout_s=60, check=False).returncode == 0


def test_a_superuser_reads_everything(source: Endpoint, tmp_path: Path) -> None:
    checks = check_source(source, bin_dir=tools_of(source), critical_tables=["s.t", "parted"])
    assert failed(checks) == {}
    found = {check.name: check.found for check in checks}
    assert "is a superuser and reads everything" in found["rights"]
    assert found["critical tables"] == "s.t, parted"
    assert "pg_dump 1" in found["tools"]
    raise_first_failure(checks)
    assert dumps(source, tmp_path)


def test_following_every_hint_makes_the_dump_whole(source: Endpoint, tmp_path: Path) -> None:
    reader = by_reader(source)
    with contextlib.closing(connect(source)) as session:
        run(
            session,
            "ALTER TABLE public.t ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY p ON public.t USING (a > 1)",
        )
        checks = failed(check_source(reader, bin_dir=tools_of(source), role_passwords=True))
        assert {name: check.found.split(READER)[1].strip() for name, check in checks.items()} == {
            "schemas": "may not use 1 schema: s",
            "tables": "may not read 4 tables: public.part, public.parted, public.t, s.t",
            "sequences": "may not read 2 sequences: public.t_b_seq, s.q",
            "row security": "is kept from rows of 1 table by row security: public.t",
            "large objects": "may not read 1 large object: 4711",
            "role passwords": "may not read the passwords of roles, which role_passwords asks for",
        }
        # One of them less each time: it is never whole before the last one is gone.
        for name, check in list(checks.items())[:-1]:
            assert not dumps(reader, tmp_path), name
            run(session, check.hint)
        assert dumps(reader, tmp_path)
        run(session, checks["role passwords"].hint.partition("; or set")[0])
        last = check_source(reader, bin_dir=tools_of(source), role_passwords=True)
        assert failed(last) == {}
        assert any(check.found.startswith(f"role {READER} reads everything in ") for check in last)
        run(session, f"ALTER ROLE {READER} NOBYPASSRLS")
        assert list(failed(check_source(reader, bin_dir=tools_of(source)))) == ["row security"]
        assert not dumps(reader, tmp_path)


def test_many_names_are_counted_and_fixed_at_once(source: Endpoint, tmp_path: Path) -> None:
    reader = by_reader(source)
    with contextlib.closing(connect(source)) as session:
        run(session, "SELECT pg_catalog.lo_create(o) FROM pg_catalog.generate_series(5000, 5009) o")
        run(session, *(f"CREATE TABLE public.more_{number} (a serial)" for number in range(6)))
        checks = failed(check_source(reader, bin_dir=tools_of(source)))
        assert checks["tables"].found.endswith("public.more_4 and 5 more")
        assert "11 large objects: 4711, 5000, 5001, 5002, 5003 and 6 more" in checks["large objects"].found
        assert checks["tables"].hint == f"GRANT pg_read_all_data TO {READER};"
        run(session, checks["tables"].hint)
        left = failed(check_source(reader, bin_dir=tools_of(source)))
        assert list(left) == ["large objects"]
        assert not dumps(reader, tmp_path)
        run(session, left["large objects"].hint)
        assert failed(check_source(reader, bin_dir=tools_of(source))) == {}
        assert dumps(reader, tmp_path)


def test_forced_row_security_meets_owners_too(source: Endpoint, tmp_path: Path) -> None:
    with contextlib.closing(connect(source)) as session:
        for relation in ("s.t", "public.t", "public.parted", "public.part", "s.q", "public.m", "SCHEMA s"):
            kind = "TABLE" if " " not in relation else ""
            run(session, f"ALTER {kind} {relation} OWNER TO {READER}")
        run(
            session, f"ALTER LARGE OBJECT 4711 OWNER TO {READER}", "ALTER TABLE s.t ENABLE ROW LEVEL SECURITY"
        )
        assert failed(check_source(by_reader(source), bin_dir=tools_of(source))) == {}
        assert dumps(by_reader(source), tmp_path)
        run(session, "ALTER TABLE s.t FORCE ROW LEVEL SECURITY")
        assert list(failed(check_source(by_reader(source), bin_dir=tools_of(source)))) == ["row security"]
        assert not dumps(by_reader(source), tmp_path)
        run(session, "ALTER TABLE s.t OWNER TO postgres", f"GRANT SELECT ON s.t TO {READER}")
        run(session, f"REASSIGN OWNED BY {READER} TO postgres")


def test_tables_of_extensions_count_where_they_are_configuration(source: Endpoint) -> None:
    reader = by_reader(source)
    with contextlib.closing(connect(source)) as session:
        run(session, f"GRANT pg_read_all_data TO {READER}", f"GRANT SELECT ON LARGE OBJECT 4711 TO {READER}")
        run(session, f"REVOKE pg_read_all_data FROM {READER}", f"GRANT USAGE ON SCHEMA s TO {READER}")
        run(
            session,
            *(
                f"GRANT SELECT ON ALL {kind} IN SCHEMA s, public TO {READER}"
                for kind in ("TABLES", "SEQUENCES")
            ),
        )
        assert failed(check_source(reader, bin_dir=tools_of(source))) == {}
        run(session, "CREATE TABLE public.member ()", "CREATE EXTENSION hstore WITH SCHEMA public")
        assert list(failed(check_source(reader, bin_dir=tools_of(source)))) == ["tables"]
        run(session, "ALTER EXTENSION hstore ADD TABLE public.member")
        assert failed(check_source(reader, bin_dir=tools_of(source))) == {}
        run(
            session,
            "UPDATE pg_catalog.pg_extension SET extcondition = '{\"\"}',"
            " extconfig = ARRAY['public.member'::regclass::oid] WHERE extname = 'hstore'",
        )
        assert list(failed(check_source(reader, bin_dir=tools_of(source)))) == ["tables"]


def test_what_a_plain_role_leaves_out_is_a_warning(source: Endpoint) -> None:
    with contextlib.closing(connect(source)) as session:
        run(
            session,
            "CREATE EXTENSION postgres_fdw WITH SCHEMA public",
            "CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw",
            "CREATE USER MAPPING FOR PUBLIC SERVER far OPTIONS (password 'hunter2')",
            "CREATE SUBSCRIPTION sub CONNECTION '' PUBLICATION p WITH (connect = false, slot_name = NONE)",
            "REVOKE CONNECT ON DATABASE postgres FROM PUBLIC",
        )
        try:
            checks = check_source(by_reader(source), bin_dir=tools_of(source))
            warnings = {check.name: check for check in checks if check.status is CheckStatus.WARNING}
            assert {"lock", "subscriptions", "user mappings"} <= set(warnings)
            assert "hunter2" not in str(checks)
            run(session, warnings["lock"].hint)
            again = check_source(by_reader(source), bin_dir=tools_of(source))
            assert "lock" not in {check.name for check in again}
        finally:
            run(
                session,
                f"REVOKE CONNECT ON DATABASE postgres FROM {READER}",
                "GRANT CONNECT ON DATABASE postgres TO PUBLIC",
                "ALTER SUBSCRIPTION sub DISABLE",
                "DROP SUBSCRIPTION sub",
            )


def test_a_missing_critical_table_is_named(source: Endpoint) -> None:
    checks = check_source(source, bin_dir=tools_of(source), critical_tables=["public.t", "nowhere"])
    assert "nowhere" in failed(checks)["critical tables"].found
    with pytest.raises(Unfit, match="nowhere"):
        raise_first_failure(checks)


def test_tools_older_than_the_server_fail_with_both_versions(
    postgres: LocalCluster, database: Endpoint
) -> None:
    checks = check_source(database, bin_dir=bin_dir_15())
    assert "the server is 17." in failed(checks)["tools"].found
    assert "the newest found is 15." in failed(checks)["tools"].found
    with pytest.raises(ToolError):
        raise_first_failure(checks)


def test_tools_of_another_major_are_a_warning(postgres15: LocalCluster) -> None:
    with fresh_database(postgres15) as endpoint:
        found = {check.name: check for check in check_source(endpoint, bin_dir=bin_dir_17())}
    assert found["tools"].status is CheckStatus.WARNING
    assert "cannot be read by the pg_restore of PostgreSQL 15" in found["tools"].found


@pytest.mark.parametrize(
    ("oldest", "newest", "status"), [(18, 19, CheckStatus.FAILED), (15, 16, CheckStatus.WARNING)]
)
def test_versions_that_are_not_known_are_said(
    database: Endpoint, monkeypatch: pytest.MonkeyPatch, oldest: int, newest: int, status: CheckStatus
) -> None:
    monkeypatch.setattr(preflight, "OLDEST", oldest)
    monkeypatch.setattr(preflight, "NEWEST", newest)
    assert check_source(database, bin_dir=bin_dir_17())[0].status is status


def test_a_server_that_cannot_be_reached_is_the_only_finding(database: Endpoint) -> None:
    checks = check_source(database.with_database("nowhere"))
    assert [(check.name, check.status) for check in checks] == [("server", CheckStatus.FAILED)]
    with pytest.raises(ServerError, match='"nowhere" does not exist'):
        raise_first_failure(checks)


def relay(listener: socket.socket, server: str) -> None:
    """Pass one client on to a server, announcing another process than the one that answers."""
    client, _ = listener.accept()
    with client, socket.socket(socket.AF_UNIX) as upstream:
        upstream.connect(server)
        ends = {client: upstream, upstream: client}
        while True:
            for end in select.select(list(ends), [], [])[0]:
                data = end.recv(65536)
                if not data:
                    return
                # BackendKeyData: K, a length of 12, the process, the secret.
                ends[end].sendall(data.replace(b"K\0\0\0\x0c\0\0", b"K\0\0\0\x0c\x7f\x7f"))


def test_a_pooler_is_noticed(postgres: LocalCluster, database: Endpoint) -> None:
    server = f"{postgres.endpoint().conninfo['host']}/.s.PGSQL.5432"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        passing = threading.Thread(target=relay, args=(listener, server), daemon=True)
        passing.start()
        name, port = database.database, listener.getsockname()[1]
        pooled = Endpoint(
            make_conninfo("", host="127.0.0.1", port=port, user="postgres", dbname=name, sslmode="disable")
        )
        assert "pooler" in {check.name for check in check_source(pooled, bin_dir=bin_dir_17())}
        passing.join(10)
    assert "pooler" not in {check.name for check in check_source(database, bin_dir=bin_dir_17())}


def test_identifiers_in_hints_are_quoted(database: Endpoint) -> None:
    name = sql.Identifier('Odd "name"; --').as_string()
    with contextlib.closing(connect(database)) as session:
        run(session, f"CREATE TABLE public.{name} ()", "CREATE ROLE odd_reader LOGIN")
        try:
            reader = Endpoint(make_conninfo(database.dsn, user="odd_reader"))
            hint = failed(check_source(reader, bin_dir=bin_dir_17()))["tables"].hint
            assert hint == f'GRANT SELECT ON TABLE public.{name} TO "odd_reader";'
            run(session, hint)
        finally:
            run(session, "DROP OWNED BY odd_reader", "DROP ROLE odd_reader")
