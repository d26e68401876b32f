"""Proofs of dumps that were taken while the source was written to and rebuilt: none may fail."""

import contextlib
import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backup_pipeline.actions import dump, prove
from backup_pipeline.domain.backup import Backup, Proof, Verdict
from backup_pipeline.domain.fingerprint import Fingerprint
from backup_pipeline.engines.postgres import fingerprint, schema
from backup_pipeline.engines.postgres import snapshot as snapshots
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
    "SELECT lo_from_bytea(0, int4send({n})) WHERE {n} % 20 = 0",
    "SELECT lo_put(4242, 0, int4send({n}))",  # by one writer only: PostgreSQL refuses two at once
)
TABLE = (
    "ALTER number TYPE bigint",
    "ADD extra text DEFAULT md5(random()::text)",
    "ALTER number TYPE int USING number::int",
    "DROP extra",
)
INDEX = ("CREATE INDEX wide_number ON public.wide (number)", "DROP INDEX public.wide_number")
MORE = ("CREATE TABLE public.more AS SELECT * FROM public.customer", "DROP TABLE public.more")


def changes(number: int) -> tuple[str, ...]:
    """The changes of one round, each to another object."""
    return (
        f"ALTER TABLE public.wide {TABLE[number % 4]}",
        "TRUNCATE public.side",
        INDEX[number % 2],
        "CREATE OR REPLACE FUNCTION public.twice(n int) RETURNS int LANGUAGE sql IMMUTABLE"
        f" RETURN n * {number}",
        f"INSERT INTO public.side SELECT n, 'again' FROM generate_series(1, {number}) n",
        MORE[number % 2],
        f"SELECT setval('public.tickets', 1000 + {number})",
        f"COMMENT ON TABLE public.side IS 'round {number}'",
        "REFRESH MATERIALIZED VIEW public.summary",
        "VACUUM FULL public.orders",
    )


@pytest.fixture
def busy(postgres: LocalCluster, other: LocalCluster, tmp_path: Path) -> Iterator[Box]:
    """A source that is never still."""
    with a_box(postgres, tmp_path / "store", scratch=other, content=CONTENT + SIDE) as made:
        yield made


class Load:
    """Writers that never rest, and one who changes the schema, a round for each dump, anywhere within."""

    def __init__(self, box: Box) -> None:
        self.written: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._box = box
        self._stop = threading.Event()

    @contextlib.contextmanager
    def writers(self) -> Iterator[None]:
        """While the block runs, rows are written."""
        with ThreadPoolExecutor(2) as pool:
            workers = [pool.submit(self._write, statements) for statements in (WRITES, WRITES[:-1][::-1])]
            try:
                yield
            finally:
                self._stop.set()
            for worker in workers:
                worker.result()

    def _write(self, statements: Sequence[str]) -> None:
        with contextlib.closing(connect(self._box.endpoint, purpose="writer")) as session:
            for number in itertools.count(1):
                for text in statements:
                    if self._stop.wait(0.02):
                        return
                    with contextlib.suppress(psycopg.errors.DeadlockDetected):
                        session.execute(text.format(n=number).encode())
                        self.written[text] += 1

    def change(self, number: int) -> None:
        """One round. Each change waits briefly for its locks, as a migration does that must not hold up
        the rest, and is left to a later round when it does not get them.
        """
        pauses = random.Random(number)
        with contextlib.closing(
            connect(self._box.endpoint, lock_timeout_s=0.1, purpose="migration")
        ) as session:
            for text in changes(number):
                self._stop.wait(pauses.uniform(0, 0.4))
                with contextlib.suppress(*_LATER):
                    session.execute(text.encode())
                    self.changed[text.split(" public")[0]] += 1


_LATER = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UndefinedTable,  # the round that was to make it found a lock
    psycopg.errors.UndefinedObject,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.DuplicateTable,
    psycopg.errors.DuplicateColumn,
)


def prove_under_load(box: Box, dumps: int) -> None:
    load = Load(box)
    with load.writers(), ThreadPoolExecutor(1) as migrations:
        for number in range(dumps):
            before = load.written.total()
            protected = box.configured(fingerprint_connections=1 + number % 2)
            changing = migrations.submit(load.change, number)
            backup = box.take(protected=protected)
            assert load.written.total() > before  # it was not still meanwhile
            found = prove.prove(protected, backup.id, clock=now, report=box.said)
            changing.result()
            assert found.differences == ()
            assert found.verdict is Verdict.PROVEN
    assert len(load.written) == len(WRITES)
    assert len(load.changed) > 6
    assert ask(box.endpoint, "SELECT count(*) FROM public.customer") == 100


def dump_amid(box: Box, *, before: Sequence[str] = (), during: Sequence[str] = ()) -> Backup:
    """Change the source right before the snapshot, and again right before its second reading."""
    exported_snapshot, finish = snapshots.exported_snapshot, fingerprint.finish

    def snapshot_after(*given: Any, **options: Any) -> AbstractContextManager[snapshots.Snapshot]:
        if before:
            box.execute(";".join(before))
        return exported_snapshot(*given, **options)

    def finished_after(*given: Any) -> Fingerprint:
        if during:
            box.execute(";".join(during))
        return finish(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dump, "exported_snapshot", snapshot_after)
        patch.setattr(fingerprint, "finish", finished_after)
        return box.take()


def proof_of(box: Box, backup: Backup) -> Proof:
    return prove.prove(box.protected, backup.id, clock=now, report=box.said)


def proof_of_a_dump_amid(box: Box, *, before: Sequence[str], during: Sequence[str]) -> Proof:
    return proof_of(box, dump_amid(box, before=before, during=during))


def test_what_changes_right_before_a_dump_and_again_during_it_is_no_difference(box: Box) -> None:
    changed = "CREATE OR REPLACE FUNCTION public.changed() RETURNS int LANGUAGE sql AS 'SELECT {}'"
    box.execute(changed.format(1))
    found = proof_of_a_dump_amid(
        box,
        before=[changed.format(2), "CREATE VIEW public.short_lived AS SELECT 1 AS one"],
        during=[changed.format(3), "DROP VIEW public.short_lived"],
    )
    assert found.differences == ()
    assert found.verdict is Verdict.PROVEN


DEAR = "CREATE VIEW public.dear AS SELECT id FROM public.orders WHERE price > 5 AND item IN ('a', 'b')"
THERE_AND_BACK = {
    "an index": ("DROP INDEX public.orders_item", "CREATE INDEX orders_item ON public.orders (item)"),
    "a view": ("DROP VIEW public.dear", DEAR),
    "a trigger": (
        "ALTER TABLE public.orders DISABLE TRIGGER t",
        "ALTER TABLE public.orders ENABLE TRIGGER t",
    ),
    "a sequence": ("SELECT setval('public.tickets', 9999)", "SELECT setval('public.tickets', 4711)"),
    "a sequence made anew": (
        "DROP SEQUENCE public.tickets",
        "CREATE SEQUENCE public.tickets; SELECT setval('public.tickets', 4711)",
    ),
}


@pytest.mark.parametrize("what", THERE_AND_BACK)
def test_what_is_changed_and_changed_back_around_a_dump_is_no_difference(box: Box, what: str) -> None:
    box.execute(
        "CREATE TRIGGER t BEFORE UPDATE ON public.orders"
        " FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    )
    there, back = THERE_AND_BACK[what]
    found = proof_of_a_dump_amid(box, before=[there], during=[back])
    assert found.differences == ()
    assert found.verdict is Verdict.PROVEN


def test_a_sequence_set_there_and_back_during_a_dump_is_restored(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = fingerprint.prepare

    def prepared_before(*given: Any, **options: Any) -> fingerprint.Prepared:
        found = prepare(*given, **options)
        box.execute("SELECT setval('public.tickets', 9999)")
        return found

    monkeypatch.setattr(fingerprint, "prepare", prepared_before)
    found = proof_of_a_dump_amid(box, before=[], during=["SELECT setval('public.tickets', 4711)"])
    assert found.differences == ()
    assert found.verdict is Verdict.RESTORED
    assert "sequence public.tickets stood at 4,711 before and after the dump" in "\n".join(found.notes)


def test_a_schema_that_cannot_be_read_again_is_no_difference(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a migration that goes on for longer than the dump."""
    monkeypatch.setattr(fingerprint, "capture", partial(schema.capture, lock_timeout_s=0.5))
    with contextlib.closing(connect(box.endpoint, autocommit=False)) as migration:
        release = snapshots.Snapshot.release

        def released(snapshot: snapshots.Snapshot) -> None:
            release(snapshot)
            migration.execute("LOCK TABLE public.orders IN ACCESS EXCLUSIVE MODE")

        monkeypatch.setattr(snapshots.Snapshot, "release", released)
        backup = dump_amid(box, before=["ALTER TABLE public.customer ADD extra int"])
    monkeypatch.undo()
    found = proof_of(box, backup)
    assert found.differences == ()
    assert found.verdict is Verdict.PROVEN
    assert "the schema was read before the dump, and not once more after it" in "\n".join(found.notes)


CHECKED = "CREATE TABLE public.checked_{} (status varchar(10) CHECK (status IN ('open', {})))"


def test_what_comes_right_before_a_dump_may_be_written_differently_by_the_copy(box: Box) -> None:
    found = proof_of_a_dump_amid(
        box,
        before=[CHECKED.format(name, "'done'") for name in ("stays", "goes", "changes")],
        during=[
            "DROP TABLE public.checked_goes, public.checked_changes",
            CHECKED.format("changes", "'closed'"),
        ],
    )
    assert found.differences == ()
    assert found.verdict is Verdict.PROVEN


@pytest.mark.timeout(300)
def test_no_false_alarm(busy: Box) -> None:
    prove_under_load(busy, dumps=10)


@pytest.mark.slow
def test_no_false_alarm_in_fifty_dumps(busy: Box) -> None:
    prove_under_load(busy, dumps=50)
