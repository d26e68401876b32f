"""What a proof makes of a restore that fails: the backup's fault, this place's, or nobody's."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from backup_pipeline.actions import prove
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import Secret
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.scratch import DATABASE_PREFIX
from backup_pipeline.errors import ToolError
from backup_pipeline_tests.actions.box import Box, a_box, execute, now, our_children, stored

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


def test_a_killed_pg_restore_records_nothing(failing: MakesBox) -> None:
    box = failing("PERFORM pg_sleep(60)")
    backup = box.take()
    before = stored(box.store)

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for pid in our_children("pg_restore"):
                if b"--dbname" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ToolError, match="SIGKILL"):
        prove.prove(box.protected, backup.id, clock=now, report=box.said)
    killer.join()
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
