"""Proofs of dumps that were taken while the source was written to and rebuilt: none may fail."""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from backup_pipeline.actions import prove
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline_tests.actions.box import CONTENT, Box, a_box, ask, now

SIDE = """;
CREATE TABLE public.side AS SELECT n, md5(n::text) AS text FROM generate_series(1, 500) n;
CREATE TABLE public.wide (id serial PRIMARY KEY, number int);
INSERT INTO public.wide (number) SELECT n FROM generate_series(1, 5000) n;
CREATE MATERIALIZED VIEW public.summary AS SELECT count(*) FROM public.orders
"""
WRITES = (
    "INSERT INTO public.orders (customer, item, price) SELECT 1 + n % 100, 'new', n"
    " FROM generate_series(1, 20) n",
    "UPDATE public.customer SET name = name || '.', added = added + interval '1 minute'"
    " WHERE id = 1 + {n} % 100",
    "DELETE FROM public.orders WHERE id IN (SELECT id FROM public.orders ORDER BY random() LIMIT 10)",
    "SELECT nextval('public.tickets')",
    "INSERT INTO public.wide (number) VALUES ({n})",
    "SELECT lo_from_bytea(0, int4send({n}))",
    "SELECT lo_put(4242, 0, int4send({n}))",
)
CHANGES = (
    "ALTER TABLE public.wide ALTER number TYPE bigint",
    "TRUNCATE public.side",
    "CREATE INDEX wide_number_{n} ON public.wide (number)",
    "CREATE OR REPLACE FUNCTION public.twice(n int) RETURNS int LANGUAGE sql IMMUTABLE RETURN n * {n}",
    "ALTER TABLE public.wide ADD c{n} text DEFAULT md5(random()::text)",
    "INSERT INTO public.side SELECT n, 'again' FROM generate_series(1, {n}) n",
    "ALTER TABLE public.wide ALTER number TYPE int USING number::int",
    "CREATE TABLE public.new_{n} AS SELECT * FROM public.customer",
    "DROP INDEX public.wide_number_{index}",
    "SELECT setval('public.tickets', 1000 + {n})",
    "REFRESH MATERIALIZED VIEW public.summary",
    "VACUUM FULL public.orders",
    "ALTER TABLE public.wide DROP c{column}",
    "DROP TABLE public.new_{table}",
)


@pytest.fixture
def busy(postgres: LocalCluster, other: LocalCluster, tmp_path: Path) -> Iterator[Box]:
    """A source that is never still."""
    with a_box(postgres, tmp_path / "store", scratch=other, content=CONTENT + SIDE) as made:
        yield made


def work(box: Box, statements: Sequence[str], stop: threading.Event, pause_s: float, done: list[str]) -> None:
    """Run the statements, round after round, until told to stop. A change waits briefly for locks, as a
    migration does that must not hold up the rest, and is tried anew in the next round.
    """
    with contextlib.closing(connect(box.endpoint, lock_timeout_s=0.1, purpose="writer")) as session:
        for number in itertools.count(1):
            for place, text in enumerate(statements):
                if stop.wait(pause_s):
                    return
                values = {"n": number, "index": number, "column": number, "table": number}
                with contextlib.suppress(
                    psycopg.errors.LockNotAvailable,
                    psycopg.errors.UndefinedObject,  # what was to be made before found a lock
                    psycopg.errors.UndefinedColumn,
                    psycopg.errors.UndefinedTable,
                    psycopg.errors.DeadlockDetected,
                ):
                    session.execute(text.format(**values).encode())
                    done.append(f"{place}")


@contextlib.contextmanager
def under_load(box: Box) -> Iterator[tuple[list[str], list[str]]]:
    """The source is written to and changed while the block runs; what was done is counted."""
    stop = threading.Event()
    written: list[str] = []
    changed: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        try:
            workers: list[Future[None]] = [
                pool.submit(work, box, WRITES, stop, 0.005, written),
                pool.submit(work, box, WRITES[::-1], stop, 0.005, written),
                pool.submit(work, box, CHANGES, stop, 0.15, changed),
            ]
            yield written, changed
        finally:
            stop.set()
        for worker in workers:
            worker.result()


def prove_under_load(box: Box, dumps: int) -> None:
    with under_load(box) as (written, changed):
        for number in range(dumps):
            before = len(written)
            protected = box.configured(fingerprint_connections=1 + number % 2)
            backup = box.take(protected=protected)
            assert len(written) > before  # it was not still meanwhile
            found = prove.prove(protected, backup.id, clock=now, report=box.said)
            assert found.differences == ()
            assert found.verdict is Verdict.PROVEN
    assert len(set(changed)) > len(CHANGES) / 2
    assert ask(box.endpoint, "SELECT count(*) FROM public.customer") == 100


def test_no_false_alarm(busy: Box) -> None:
    prove_under_load(busy, dumps=10)


@pytest.mark.slow
def test_no_false_alarm_in_fifty_dumps(busy: Box) -> None:
    prove_under_load(busy, dumps=50)
