"""Schemas cut into statements, whatever the statements hold; sequences as an archive sets them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql

from backup_pipeline import process
from backup_pipeline.domain.fingerprint import Statement
from backup_pipeline.engines.postgres import schema
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.schema import (
    archive_schema,
    archive_sequences,
    capture,
    schema_argv,
    split_statements,
)
from backup_pipeline.errors import ServerError, ToolError
from backup_pipeline_tests.engines.zoo import HOSTILE_NAMES, ZOO, ZOO_WITHOUT_XML, execute, tool
from backup_pipeline_tests.servers import postgres as servers

PREAMBLE = """--
-- PostgreSQL database dump
--

\\restrict Token1

-- Dumped from database version 17.10 (it's Debian's)
-- Dumped by pg_dump version 17.10

SET statement_timeout = 0;
SET standard_conforming_strings = on;
"""
END = """
--
-- PostgreSQL database dump complete
--

\\unrestrict Token1

"""
FAKE = "--\n-- Name: fake; Type: TABLE; Schema: public; Owner: x\n--"


def entry(kind: str, name: str, body: str, *, schema: str = "public", before: str = "") -> str:
    return f"{before}\n--\n-- Name: {name}; Type: {kind}; Schema: {schema}; Owner: me\n--\n\n{body}\n\n"


def split(*entries: str) -> list[tuple[str, str, str]]:
    return [(each.kind, each.name, each.body) for each in split_statements(PREAMBLE + "".join(entries) + END)]


def test_schema_argv() -> None:
    assert schema_argv("/bin/pg_dump", "keepalives=1", lock_timeout_s=1.5) == (
        "/bin/pg_dump",
        "--dbname=keepalives=1",
        "--schema-only",
        "--encoding=UTF8",
        "--no-tablespaces",
        "--no-password",
        "--lock-wait-timeout=1500",
    )
    inside = schema_argv("/bin/pg_dump", "keepalives=1", lock_timeout_s=1.5, snapshot_id="0-1")
    assert inside[-1] == "--snapshot=0-1"


def test_what_differs_between_dumps_is_no_part_of_a_statement() -> None:
    view = entry("VIEW", "v", "CREATE VIEW public.v AS\n SELECT 1;")
    table = entry(
        "TABLE", "t", "CREATE TABLE public.t ();", before="SET default_table_access_method = heap;\n"
    )
    expected = [
        ("VIEW", "v", "CREATE VIEW public.v AS\n SELECT 1;"),
        ("TABLE", "t", "CREATE TABLE public.t ();"),
    ]
    assert split(view, table) == expected
    assert sorted(split(table, view)) == sorted(expected)


def test_an_access_method_is_the_table_s_own() -> None:
    other = "SET default_tablespace = 'x';\n\nSET default_table_access_method = columnar;\n"
    found = split(
        entry("TYPE", "a", "CREATE TYPE public.a;"),
        entry("TABLE", "b", "CREATE TABLE public.b ();", before=other),
        entry("FUNCTION", "f()", "CREATE FUNCTION public.f();"),
        entry("TABLE", "c", "CREATE TABLE public.c ();"),
    )
    assert [body for _, _, body in found] == [
        "CREATE TYPE public.a;",
        "CREATE TABLE public.b ();\n\n-- access method columnar",
        "CREATE FUNCTION public.f();",
        "CREATE TABLE public.c ();\n\n-- access method columnar",
    ]


@pytest.mark.parametrize(
    "body",
    [
        f"CREATE FUNCTION public.f() AS $$\n{FAKE}\nSET default_tablespace = '';\n$$;",
        f"CREATE FUNCTION public.f() AS $_$ $$ '\n{FAKE}\n$$ $_$;",
        f"CREATE FUNCTION public.f() AS $_X2$\n{FAKE}\n$_$\n{FAKE}\n$_X2$;",
        f"CREATE FUNCTION public.f() AS '\n{FAKE}\n''\n{FAKE}\n';",
        f"CREATE FUNCTION public.f() AS E'\\'\n{FAKE}\n\\\\''\n{FAKE}\n';",
        f"COMMENT ON TABLE public.t IS 'back\\\n{FAKE}\n\nSET default_tablespace = ';",
        f'CREATE TABLE public."\n{FAKE}\n""\n{FAKE}\n" ();',
        f"COMMENT ON TABLE public.t IS '{END}';",
        "CREATE FUNCTION public.f(int) BEGIN ATOMIC\n SELECT $1;\n SELECT 'it''s';\nEND;",
        "CREATE VIEW public.v AS\n SELECT ('a'::text || $1), \"e'\";",
    ],
)
def test_text_that_looks_like_an_entry_is_text(body: str) -> None:
    after = entry("TABLE", "t", "CREATE TABLE public.t ();")
    assert split(entry("FUNCTION", "f()", body), after) == [
        ("FUNCTION", "f()", body),
        ("TABLE", "t", "CREATE TABLE public.t ();"),
    ]


def test_strings_of_another_standard() -> None:
    body = f"COMMENT ON TABLE public.t IS 'quote \\' and backslash \\\\\n{FAKE}\n';"
    text = PREAMBLE.replace("strings = on", "strings = off") + entry("COMMENT", "TABLE t", body) + END
    assert [each.body for each in split_statements(text)] == [body]


def test_headers() -> None:
    text = (
        "\n--\n-- Name: public; Type: SCHEMA; Schema: -; Owner: -\n--\n\nA;\n\n"
        "\n--\n-- Name: t; Type: TABLE; Schema: a b; Owner: o; Tablespace: fast\n--\n\nB;\n\n"
        "\n--\n-- Name: x; Type: VIEW; Schema: y; Type: TABLE; Schema: public; Owner: me\n--\n\nC;\n\n"
        "\n--\n-- Name: DATABASE d; Type: ACL; Schema: -; Owner: me\n--\n\nGRANT;\n\n"
    )
    assert split_statements(PREAMBLE + text + END) == (
        Statement("SCHEMA", "", "public", "", "A;"),
        Statement("TABLE", "a b", "t", "o", "B;"),
        Statement("TABLE", "public", "x; Type: VIEW; Schema: y", "me", "C;"),
    )


def test_only_what_is_said_of_the_database_is_left_out() -> None:
    body = 'CREATE TABLE public."DATABASE x" (a integer);'
    kinds = ("COMMENT", "ACL", "SECURITY LABEL")
    found = split(
        *(entry(kind, "DATABASE x", f"{kind};", schema="-") for kind in kinds),
        entry("TABLE", "DATABASE x", body),
        entry("DEFAULT", "DATABASE x a", "ALTER TABLE;"),
        *(entry(kind, "TABLE DATABASE x", f"{kind};") for kind in kinds),
    )
    assert found == [
        ("TABLE", "DATABASE x", body),
        ("DEFAULT", "DATABASE x a", "ALTER TABLE;"),
        *((kind, "TABLE DATABASE x", f"{kind};") for kind in kinds),
    ]


def test_passwords_are_kept_as_digests() -> None:
    def body(password: str) -> str:
        text = f"CREATE USER MAPPING FOR u SERVER s OPTIONS (password '{password}');"
        return split(entry("USER MAPPING", "USER MAPPING u SERVER s", text))[0][2]

    assert re.fullmatch("sha256 [0-9a-f]{64}", body("hush"))
    assert body("hush") == body("hush") != body("rush")


def entries_of(pg_bin: str, endpoint: Endpoint, folder: Path) -> list[str]:
    """The kinds of a schema's entries as pg_restore lists them, with what shows as a comment in SQL."""
    archive = folder / "schema.dump"
    environment = endpoint.environment()
    dump = [f"{pg_bin}/pg_dump", "--schema-only", "--format=custom", f"--file={archive}"]
    subprocess.run(dump, env=environment, check=True)
    listed = subprocess.run(
        [f"{pg_bin}/pg_restore", "--list", str(archive)], capture_output=True, text=True, check=True
    )
    lines = re.findall(r"^\d+; (?:\d+ \d+) ((?:[A-Z]+ )+)", listed.stdout, re.MULTILINE)
    hidden = ("ENCODING", "STDSTRINGS", "SEARCHPATH", "DATABASE")
    return [line for line in lines if not line.startswith(hidden)]


@pytest.mark.parametrize(
    ("server", "client"),
    [("postgres", 17), ("postgres15", 15), ("postgres15", 17), ("postgres18", 18)],
)
def test_every_entry_of_a_real_schema_is_found(
    request: pytest.FixtureRequest, server: str, client: int, tmp_path: Path
) -> None:
    cluster: LocalCluster = request.getfixturevalue(server)
    pg_bin = servers.BIN_DIRS[client]()
    with servers.fresh_database(cluster) as database:
        execute(database, ZOO_WITHOUT_XML if client == 18 else ZOO)
        execute(database, "CREATE SCHEMA hostile")
        for name in HOSTILE_NAMES:
            execute(database, sql.SQL("CREATE TABLE hostile.{} ()").format(sql.Identifier(name)).as_string())
        found = capture(f"{pg_bin}/pg_dump", database)
        listed = entries_of(pg_bin, database, tmp_path)
    assert len(found.statements) == len(listed)
    assert found.client_version // 10000 == client
    last = found.statements[-1].body
    assert "restrict" not in last
    assert "complete" not in last
    names = {each.name for each in found.statements if each.schema == "hostile"}
    assert names == {name.replace("\n", " ") for name in HOSTILE_NAMES}


@pytest.mark.parametrize("form", ["custom", "directory"])
def test_sequences_of_an_archive(database: Endpoint, tmp_path: Path, form: str) -> None:
    execute(
        database,
        'CREATE SCHEMA "s.\'""p"; CREATE TABLE t (id serial, other int GENERATED ALWAYS AS IDENTITY)',
    )
    execute(database, 'INSERT INTO t DEFAULT VALUES; CREATE TABLE "SEQUENCE SET x" (t text)')
    execute(
        database,
        "INSERT INTO \"SEQUENCE SET x\" VALUES ('SELECT pg_catalog.setval(''public.no'', 1, true);')",
    )
    expected = {("public", "t_id_seq"): (1, True), ("public", "t_other_seq"): (1, True)}
    for number, name in enumerate(HOSTILE_NAMES):
        sequence = sql.Identifier("s.'\"p", name)
        execute(database, sql.SQL("CREATE SEQUENCE {} MINVALUE -9").format(sequence).as_string())
        set_it = sql.SQL("SELECT setval({}, {}, {})")
        values = (sql.Literal(sequence.as_string()), sql.Literal(number - 5), sql.Literal(number % 2 == 0))
        execute(database, set_it.format(*values).as_string())
        expected["s.'\"p", name] = (number - 5, number % 2 == 0)
    archive = tmp_path / "dump"
    argv = [tool("pg_dump"), f"--format={form}", f"--file={archive}"]
    subprocess.run(argv, env=database.environment(), check=True)
    assert archive_sequences(tool("pg_restore"), archive, database) == expected


def test_sequences_where_backslashes_escape(database: Endpoint, tmp_path: Path) -> None:
    execute(database, f"ALTER DATABASE {database.database} SET standard_conforming_strings = off")
    execute(database, 'CREATE SEQUENCE "back\\slash\'quote"')
    archive = tmp_path / "dump"
    argv = [tool("pg_dump"), "--format=custom", f"--file={archive}"]
    subprocess.run(argv, env=database.environment(), check=True)
    found = archive_sequences(tool("pg_restore"), archive, database)
    assert found == {("public", "back\\slash'quote"): (1, False)}


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "EUC_JP", "EUC_TW", "UTF8", "SQL_ASCII"])
def test_an_archive_is_read_in_its_database_s_encoding(
    postgres: LocalCluster, tmp_path: Path, encoding: str
) -> None:
    name = f"in_{encoding.lower()}"
    letter = {"EUC_JP": "あ", "EUC_TW": "中"}.get(encoding, "ö")
    create = f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
    execute(postgres.endpoint(), create)
    try:
        database = postgres.endpoint(name)
        execute(database, f"CREATE SEQUENCE public.\"gr{letter}\"; COMMENT ON SCHEMA public IS '{letter}'")
        archive = tmp_path / "dump"
        argv = [tool("pg_dump"), "--format=custom", f"--file={archive}"]
        subprocess.run(argv, env=database.environment(), check=True)
        expected = capture(tool("pg_dump"), database).statements
        assert archive_schema(tool("pg_restore"), archive, database) == expected
        assert archive_sequences(tool("pg_restore"), archive, database) == {
            ("public", f"gr{letter}"): (1, False)
        }
    finally:
        execute(postgres.endpoint(), f"DROP DATABASE {name}")


def test_an_archive_without_sequences(database: Endpoint, tmp_path: Path) -> None:
    archive = tmp_path / "dump"
    argv = [tool("pg_dump"), "--format=custom", f"--file={archive}"]
    subprocess.run(argv, env=database.environment(), check=True)
    assert archive_sequences(tool("pg_restore"), archive, database) == {}


def test_what_is_no_archive(tmp_path: Path, database: Endpoint) -> None:
    path = tmp_path / "-x"
    path.write_bytes(b"PGDMPnot")
    with pytest.raises(ToolError, match="pg_restore ended with exit code 1"):
        archive_sequences(tool("pg_restore"), path, database)


def test_a_schema_is_read_again_when_something_was_dropped(database: Endpoint, tmp_path: Path) -> None:
    script = tmp_path / "pg_dump"
    lines = (
        "#!/bin/sh",
        f"echo >> '{tmp_path}/calls'",
        f'[ $(wc -l < "{tmp_path}/calls") -gt 2 ] && exec "{tool("pg_dump")}" "$@"',
        """echo 'pg_dump: error: query failed: ERROR:  relation "t" does not exist' >&2""",
        "exit 1",
    )
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    assert capture(str(script), database).client_version // 10000 == 17
    assert (tmp_path / "calls").read_text() == "\n" * 3


def test_another_failure_of_pg_dump_is_raised_at_once(
    database: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = process.stream

    def stream(*arguments: Any, **options: Any) -> object:
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(process, "stream", stream)
    with pytest.raises(ToolError, match="pg_dump ended with exit code 1"):
        schema.capture(tool("pg_dump"), database.with_database("no such database here"), lock_timeout_s=1)
    assert len(calls) == 1


def test_a_server_without_room_for_locks_is_told_of() -> None:
    few = {"max_locks_per_transaction": "10", "max_connections": "10", "max_worker_processes": "0"}
    with servers.running_cluster(servers.bin_dir_17(), **few) as cluster:
        for start in range(0, 3000, 50):
            execute(
                cluster.endpoint(),
                f"DO $$ BEGIN FOR n IN {start}..{start + 49} LOOP"
                " EXECUTE format('CREATE TABLE public.t%s ()', n); END LOOP; END $$",
            )
        with pytest.raises(ToolError, match=r"pg_dump ended with exit code 1: .*max_locks") as caught:
            capture(tool("pg_dump"), cluster.endpoint())
        assert "Raise max_locks_per_transaction" in caught.value.hint
        assert "public.t2999" not in str(caught.value)


@pytest.mark.parametrize("state", ["08006", "40P01", "53100", "57014", "58030"])
def test_a_mishap_of_a_replay_is_raised(database: Endpoint, state: str) -> None:
    body = f"DO $$ BEGIN RAISE EXCEPTION 'no such luck' USING ERRCODE = '{state}'; END $$"
    with pytest.raises(ServerError, match=r"cannot replay the schema .*: no such luck"):
        schema.replay(database, [Statement("TABLE", "public", "t", "me", body)])


def test_a_replay_goes_on_past_what_cannot_be_created(database: Endpoint) -> None:
    bodies = ("CREATE TABLE public.t (n public.no_such_type);", "CREATE TABLE public.u ();")
    schema.replay(database, [Statement("TABLE", "public", "t", "me", body) for body in bodies])
    assert [each.name for each in capture(tool("pg_dump"), database).statements] == ["u"]


def test_a_large_schema_is_cut_in_time() -> None:
    body = "CREATE FUNCTION public.f() AS $$" + "x'y\"z -- \n" * 2000 + "$$;"
    text = PREAMBLE + "".join(entry("FUNCTION", f"f{n}()", body) for n in range(500)) + END
    assert len(text) > 10_000_000
    assert len(split_statements(text)) == 500
