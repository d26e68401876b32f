"""What a proof makes of a restore that fails: the backup's fault, this place's, or nobody's."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from backup_pipeline import confinement
from backup_pipeline.actions import prove, restore
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import Secret
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.fingerprint import Fingerprint, fingerprint_from_json
from backup_pipeline.engines.postgres import schema
from backup_pipeline.engines.postgres.cluster import LocalCluster, runs_as, server_identity
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import DATABASE_PREFIX
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.errors import ServerError, ToolError
from backup_pipeline_tests.actions.box import Box, a_box, execute, now, our_children, stored
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.servers.postgres import bin_dir_17
from backup_pipeline_tests.waiting import wait_until

MakesBox = Callable[[str], Box]

# What an index computes when it is built again, in a scratch database only.
CONTENT = """
CREATE TABLE public.t (n int); INSERT INTO public.t VALUES (1);
CREATE FUNCTION public.odd(n int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
  IF starts_with(current_database(), '%s') THEN %s; END IF; RETURN n; END $$;
CREATE FUNCTION public.die() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
  EXECUTE format('COPY (SELECT 1) TO PROGRAM %%L', 'kill -KILL ' || pg_backend_pid()); END $$;
CREATE INDEX odd ON public.t (public.odd(n))
"""


@pytest.fixture
def failing(postgres: LocalCluster, other: LocalCluster, tmp_path: Path) -> Iterator[MakesBox]:
    """Makes a source whose restore into a scratch database does this."""
    with contextlib.ExitStack() as stack:

        def make(what: str) -> Box:
            content = CONTENT % (DATABASE_PREFIX, what)
            return stack.enter_context(a_box(postgres, tmp_path / "store", scratch=other, content=content))

        yield make


def alone(box: Box) -> Protected:
    """With a scratch cluster of our own."""
    return replace(box.protected, scratch=replace(box.protected.scratch, dsn=None))


@pytest.mark.parametrize("own", [True, False])
def test_a_restore_that_fails_by_itself_is_failed(failing: MakesBox, own: bool) -> None:
    box = failing("RAISE EXCEPTION 'no such luck'")
    backup = box.take()
    protected = alone(box) if own else box.protected
    proof = prove.prove(protected, backup.id, clock=now, report=box.said)
    assert proof.verdict is Verdict.FAILED
    assert "no such luck" in proof.differences[0]


MISHAPS = {
    # what happens: whether it is tried in a cluster of our own only, where the log tells the SQLSTATE
    "RAISE EXCEPTION 'no such luck' USING ERRCODE = '53100'": True,
    "RAISE EXCEPTION 'could not extend file \"base/1/2\": No space left on device'": False,
    "PERFORM pg_terminate_backend(pg_backend_pid())": False,
    "PERFORM public.die()": True,  # and would take the other tests' server along
}


@pytest.mark.parametrize("what", MISHAPS)
def test_a_mishap_is_raised_and_records_nothing(failing: MakesBox, what: str) -> None:
    box = failing(what)
    backup = box.take()
    before = stored(box.store)
    for protected in (alone(box), *(() if MISHAPS[what] else (box.protected,))):
        with pytest.raises(ToolError, match="pg_restore failed"):
            prove.prove(protected, backup.id, clock=now, report=box.said)
    assert stored(box.store) == before


FILES = """
CREATE EXTENSION file_fdw SCHEMA public; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
CREATE FOREIGN TABLE public.lines (n int) SERVER files OPTIONS (filename '{file}', format 'csv');
CREATE MATERIALIZED VIEW public.kept AS SELECT n FROM public.lines
"""
FAR = """
CREATE EXTENSION postgres_fdw SCHEMA public;
CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{host}', dbname '{database}');
CREATE USER MAPPING FOR postgres SERVER far OPTIONS (user 'postgres', password 'x');
CREATE FOREIGN TABLE public.there (id int) SERVER far OPTIONS (schema_name 'public', table_name 'customer');
CREATE MATERIALIZED VIEW public.kept AS SELECT id FROM public.there;
ALTER SERVER far OPTIONS (SET host '192.0.2.1')
"""
"""Filled at the source through its socket, and then of an address that no machine has."""


def confined() -> bool:
    without_network = runs_as(Path(bin_dir_17()) / "postgres", server_identity(), network=False)
    return confinement.available() and without_network


@pytest.mark.skipif(not confined(), reason="takes a Linux with Landlock that lets this user make a namespace")
def test_what_reaches_for_files_is_not_provable_in_a_confined_server(box: Box) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.csv"
        file.write_text("1\n2\n")
        file.chmod(0o644)
        file.parent.chmod(0o711)
        box.execute(FILES.format(file=file))
        backup = box.take()
        proof = prove.prove(alone(box), backup.id, clock=now, report=box.said)
        assert proof.verdict is Verdict.NOT_PROVABLE
        assert "reads files of its machine" in proof.differences[0]
        assert f'could not open file "{file}"' in proof.differences[0]
        assert "[scratch] dsn" in proof.differences[-1]
        named = prove.prove(box.protected, backup.id, clock=now, report=box.said)
        assert named.verdict is Verdict.PROVEN


@pytest.mark.skipif(not confined(), reason="takes a Linux with Landlock that lets this user make a namespace")
def test_what_reaches_for_another_server_is_not_provable_in_a_confined_server(box: Box) -> None:
    host = box.endpoint.conninfo["host"]
    box.execute(FAR.format(host=host, database=box.endpoint.database))
    backup = box.take()
    proof = prove.prove(alone(box), backup.id, clock=now, report=box.said)
    assert proof.verdict is Verdict.NOT_PROVABLE
    assert "connects to another server" in proof.differences[0]
    assert 'could not connect to server "far"' in proof.differences[0]
    assert "[scratch] dsn" in proof.differences[-1]


def test_a_killed_pg_restore_records_nothing(failing: MakesBox) -> None:
    box = failing("PERFORM pg_sleep(60)")
    backup = box.take()
    before = stored(box.store)

    def is_killed() -> bool:
        for pid in our_children("pg_restore"):
            if b"--dbname" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    with (
        meanwhile(lambda _: wait_until(is_killed, within_s=60)),
        pytest.raises(ToolError, match="SIGKILL"),
    ):
        prove.prove(box.protected, backup.id, clock=now, report=box.said)
    assert stored(box.store) == before


@pytest.fixture
def replay_lost(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the session that replays a schema end before its first statement."""

    def lose() -> None:
        def lost(endpoint: Endpoint, **options: Any) -> Connection:
            session = connect(endpoint, **options)
            execute(endpoint, f"SELECT pg_terminate_backend({session.info.backend_pid}, 5000)")
            return session

        monkeypatch.setattr(schema, "connect", lost)
        monkeypatch.setattr(schema, "_PREAMBLE", ())

    return lose


def test_a_lost_replay_proves_nothing(
    box: Box,
    tampered: Callable[[str], None],
    replay_lost: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backup = box.take()
    before = stored(box.store)

    def of_an_older_client(data: bytes, key: str) -> Fingerprint:
        return replace(fingerprint_from_json(data, key), client_version=160010)

    monkeypatch.setattr(prove, "fingerprint_from_json", of_an_older_client)
    tampered("ALTER TABLE public.customer DROP CONSTRAINT named, ADD CONSTRAINT named CHECK (true)")
    replay_lost()
    with pytest.raises(ServerError, match="cannot replay the schema"):
        prove.prove(box.protected, backup.id, clock=now, report=box.said)
    assert stored(box.store) == before


def test_a_lost_replay_is_no_difference(box: Box, replay_lost: Callable[[], None]) -> None:
    # PostgreSQL writes this one differently once it has read it back.
    box.execute("CREATE TABLE public.checked (status varchar(10) CHECK (status IN ('open', 'done')))")
    backup = box.take()
    before = stored(box.store)
    planned = restore.plan(box.protected, restore.RestoreRequest(backup=str(backup.id)), clock=now)
    replay_lost()
    with pytest.raises(ServerError, match="cannot replay the schema"):
        prove.prove(box.protected, backup.id, clock=now, report=box.said)
    with pytest.raises(ServerError, match="cannot replay the schema"):
        restore.carry_out(box.protected, planned, clock=now, report=box.said)
    assert stored(box.store) == before


REFUSED = {
    # what the source has: what a role that is no superuser is told
    "CREATE EXTENSION pageinspect SCHEMA public": "only a superuser may create extensions pageinspect",
    "ALTER DATABASE {database} OWNER TO {owner}; CREATE TABLE public.superusers ()": (
        'must be able to SET ROLE "postgres"'
    ),
}


@pytest.mark.parametrize("content", REFUSED)
def test_what_only_a_superuser_may_is_not_provable_by_another_role(
    postgres: LocalCluster, other: LocalCluster, tmp_path: Path, content: str
) -> None:
    with a_box(postgres, tmp_path / "store", scratch=other, content=content) as box:
        backup = box.take()
        prover = f"{box.owner}_prover"
        name = sql.Identifier(prover).as_string()
        execute(other.endpoint(), f"CREATE ROLE {name} LOGIN CREATEDB CREATEROLE")
        try:
            dsn = Secret(make_conninfo(other.endpoint().dsn, user=prover))
            place = replace(box.protected, scratch=replace(box.protected.scratch, dsn=dsn))
            proof = prove.prove(place, backup.id, clock=now, report=box.said)
        finally:
            execute(other.endpoint(), f"DROP ROLE {name}")
    assert proof.verdict is Verdict.NOT_PROVABLE
    assert REFUSED[content] in proof.differences[0]
    assert "[scratch] dsn" in proof.differences[-1]
    assert not proof.notes
