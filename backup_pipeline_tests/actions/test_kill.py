"""Death before each effect, and at any moment: nothing half done counts, and nobody has to clean up."""

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backup_pipeline import process
from backup_pipeline.actions import dump, prune, restore
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import TierConfig
from backup_pipeline.domain.layout import DATA
from backup_pipeline.domain.unfinished import is_temporary
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.swap import read_copy
from backup_pipeline.storage import catalog, catalog_rebuild
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline_tests.actions import worker
from backup_pipeline_tests.actions.box import DUE, Box, a_box, ask, now, stored, swap_back
from backup_pipeline_tests.domain.values import manifest
from backup_pipeline_tests.storage.backups import put_backup
from backup_pipeline_tests.storage.effects import CountingStore, DatedStore, Died, DyingStore

CONTENT = """
CREATE TABLE public.orders (id serial PRIMARY KEY, item text);
INSERT INTO public.orders (item) SELECT md5(n::text) FROM generate_series(1, 3000) n;
ALTER TABLE public.orders OWNER TO {owner};
GRANT SELECT ON public.orders TO {reader};
ALTER DATABASE {database} SET work_mem = '8MB';
GRANT TEMPORARY ON DATABASE {database} TO {reader}
"""
ROWS = "SELECT count(*) || ' ' || md5(string_agg(o::text, ',' ORDER BY id)) FROM public.orders o"
FORTNIGHT = timedelta(days=14)


@pytest.fixture
def small(postgres: LocalCluster, other: LocalCluster, tmp_path: Path) -> Iterator[Box]:
    """A source of one table."""
    with a_box(postgres, tmp_path / "store", scratch=other, content=CONTENT) as made:
        yield made


def all_whole(store: Store) -> int:
    """Assert that each listed backup has every byte of its objects; return how many there are."""
    found = catalog.list_backups(store, fresh=True)
    assert not found.unreadable
    for backup in found.backups:
        assert backup.manifest is not None
        for item in backup.manifest.objects:
            data = read_all(store, item.key)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (item.size_bytes, item.sha256)
    return len(found.backups)


def pruned(box: Box, store: Store, *, keep: int, at: datetime) -> None:
    config = replace(box.protected.config, tiers=(TierConfig("daily", "0 2 * * *", keep),))
    planned = prune.plan(store, config, now=at)
    prune.carry_out(DatedStore(store, at=at), planned, clock=lambda: at, log=box.said.say)


def nothing_is_left_behind(box: Box) -> None:
    """Assert that a later prune collects what the dead left, but for what a rebuild would list again."""
    before, later = all_whole(box.store), now() + FORTNIGHT
    pruned(box, box.store, keep=before, at=later)
    assert all_whole(box.store) == before
    whole = catalog_rebuild.rebuild(box.store).backups  # of those that died between copy and catalog
    assert all_whole(box.store) == before + len(whole)
    listed = {item.id.stamp for item in catalog.list_backups(box.store).backups}
    assert {key.split("/")[4] for key in stored(box.store) if key.startswith(DATA)} == listed


# --- before every effect on the store ------------------------------------------------------


def dump_into(box: Box, store: Store) -> None:
    box.take("daily", protected=box.on(store))


def test_a_dump_that_dies_before_any_effect(small: Box) -> None:
    counting = CountingStore(small.store)
    dump_into(small, counting)
    assert counting.effects[-1].startswith("put_if_absent catalog/app/")
    published = 1
    for number in range(1, len(counting.effects) + 1):
        dying = DyingStore(small.store, before=number)
        with pytest.raises(Died):
            dump_into(small, dying)
        assert all_whole(small.store) == published  # its manifest is the last effect
    dump_into(small, small.store)  # on top of what all the dead left
    assert all_whole(small.store) == published + 1
    nothing_is_left_behind(small)


def test_a_copy_that_dies_before_any_effect(proven: Box) -> None:
    def share(store: Store) -> None:
        manifest_ = dump.dump_and_upload(
            proven.on(store), tier="monthly", scheduled_for=DUE, clock=now, report=proven.said
        )
        assert manifest_.copied_from is not None
        dump.publish(proven.on(store), manifest_, report=proven.said)

    counting = CountingStore(proven.store)
    share(counting)
    before = all_whole(proven.store)
    for number in range(1, len(counting.effects) + 1):
        with pytest.raises(Died):
            share(DyingStore(proven.store, before=number))
        found = all_whole(proven.store)
        assert before <= found <= before + 1
        before = found
    share(proven.store)
    assert all_whole(proven.store) == before + 1
    nothing_is_left_behind(proven)


def written_at(store: DirectoryStore, at: datetime) -> None:
    """Let the store say that all in it was written then: a lease lives by the store's clock too."""
    for path in store.root.rglob("*"):
        os.utime(path, (at.timestamp(), at.timestamp()))


def test_a_prune_that_dies_before_any_effect(small: Box, tmp_path: Path) -> None:
    at = datetime(2026, 3, 10, tzinfo=UTC)
    once_leases_end = at + timedelta(hours=1)
    for day in range(1, 7):
        put_backup(small.store, manifest(at=datetime(2026, 3, day, 2, tzinfo=UTC)))

    def run(store: Store, when: datetime = at) -> None:
        pruned(small, store, keep=3, at=when)

    def copy(name: str) -> DirectoryStore:
        shutil.copytree(small.store.root, tmp_path / name)
        return DirectoryStore(tmp_path / name)

    counting = CountingStore(copy("undisturbed"))
    run(counting)
    assert all_whole(counting) == 3
    for number in range(1, len(counting.effects) + 1):
        store = copy(f"dies-{number}")
        with pytest.raises(Died):
            run(DyingStore(store, before=number))
        assert 3 <= all_whole(store) <= 6
        written_at(store, at)
        run(store, once_leases_end)
        assert [item.id for item in catalog.list_backups(store).backups] == [
            item.id for item in catalog.list_backups(counting).backups
        ]
        assert all_whole(store) == 3


# --- before every effect on a server -------------------------------------------------------

_CHANGES = ("CREATE", "ALTER", "DROP", "GRANT", "REVOKE", "COMMENT", "ANALYZE")


class Mortal:
    """Ends this process, as far as servers can tell, before its n-th effect on one.

    Effects are statements that change something, commits, and the start of pg_restore. Afterwards
    no statement is sent and no connection made, so that no `finally` does what a dead one could not.
    """

    def __init__(self, before: int) -> None:
        self.effects: list[str] = []
        self.dead = False
        self._before = before
        self._thread = threading.get_ident()

    def about_to(self, effect: str) -> None:
        """Note an effect, or die."""
        self.look()
        if threading.get_ident() != self._thread:
            return  # beside the run: sessions are ended there
        if len(self.effects) + 1 == self._before:
            self.dead = True
            self.look()
        self.effects.append(effect)

    def look(self) -> None:
        """Raise when dead."""
        if self.dead:
            if threading.get_ident() == self._thread:
                raise Died(f"before effect {self._before}")
            raise psycopg.OperationalError("dead")


@contextlib.contextmanager
def mortal(before: int) -> Iterator[Mortal]:
    """Everything that is done in here dies before its n-th effect; 0 is never."""
    life = Mortal(before)
    execute, connect = psycopg.Connection.execute, psycopg.Connection.connect
    leave, start = psycopg.Transaction.__exit__, process.start

    def executing(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        life.look()
        text = query if isinstance(query, str | bytes) else query.as_string(self)
        shown = text.decode() if isinstance(text, bytes) else text
        if shown.startswith(_CHANGES):
            life.about_to(shown)
        return execute(self, query, *args, **options)

    def connecting(*args: Any, **options: Any) -> Any:
        life.look()
        return connect(*args, **options)

    def leaving(self: Any, kind: Any, error: Any, trace: Any) -> Any:
        if kind is None:
            try:
                life.about_to("COMMIT")
            except Died as death:
                leave(self, Died, death, None)
                raise
        return leave(self, kind, error, trace)

    def starting(command: process.Command, **options: Any) -> Any:
        life.look()
        if command.argv[0].endswith("pg_restore") and any(
            part.startswith("--dbname") for part in command.argv
        ):
            life.about_to("pg_restore")
        return start(command, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.Connection, "execute", executing)
        patch.setattr(psycopg.Connection, "connect", connecting)
        patch.setattr(psycopg.Transaction, "__exit__", leaving)
        patch.setattr(process, "start", starting)
        yield life


def fit(box: Box, rows: object) -> set[str]:
    """Assert that the live database is whole, and all others are kept or unfinished; return the kept."""
    live = box.endpoint.database
    assert ask(box.endpoint, ROWS) == rows
    assert ask(box.endpoint, "SELECT current_setting('work_mem')") == "8MB"
    others = box.databases() - {live}
    kept = {name for name in others if read_copy(name, live) is not None}
    assert all(is_temporary(name) for name in others - kept)
    for name in kept:
        assert ask(box.cluster.endpoint(name), ROWS) == rows
    return kept


def forget(box: Box, kept: set[str]) -> None:
    """Drop kept copies, as an operator does who no longer needs them."""
    for name in kept:
        box.execute(f'DROP DATABASE "{name}" WITH (FORCE)', "postgres")


def replace_live(box: Box, protected: Protected | None = None) -> restore.RestoreResult:
    given = protected or box.protected
    asked = restore.RestoreRequest("latest", replace=True, confirm=box.endpoint.database, check="none")
    plan = restore.plan(given, asked, clock=now)
    return restore.carry_out(given, plan, clock=now, report=box.said)


@pytest.mark.timeout(300)
def test_a_restore_that_dies_before_any_effect(small: Box) -> None:
    small.take("daily")
    rows = ask(small.endpoint, ROWS)
    with mortal(0) as life:
        replace_live(small)
    effects = life.effects
    renames = [number for number, effect in enumerate(effects) if " RENAME TO " in effect]
    assert len(renames) == 2
    assert effects[renames[1] + 1] == "COMMIT"
    assert effects.index("pg_restore") < effects.index("ANALYZE") < renames[0]
    forget(small, fit(small, rows))
    for number in itertools.count(1):
        with mortal(number) as life, contextlib.suppress(Died):
            replace_live(small)
        kept = fit(small, rows)
        renamed = [effect for effect in life.effects if " RENAME TO " in effect]
        swapped = len(renamed) == 2 and life.effects[-1] != renamed[-1]  # the commit came after them
        assert bool(kept) is swapped, f"died after {life.effects[-1:]}"
        forget(small, kept)
        if not life.dead:
            break
    assert number > len(effects)  # each of them, and the dropping of what the one before had left
    assert replace_live(small).kept_as
    forget(small, fit(small, rows))
    assert small.databases() == {small.endpoint.database}  # also what the dead had left
    assert all_whole(small.store) == 1


def test_an_undo_that_dies_before_any_effect(small: Box) -> None:
    small.take("daily")
    rows = ask(small.endpoint, ROWS)
    replace_live(small)
    names = small.databases()
    with mortal(0) as life:
        swap_back(small.protected)
    replace_live(small)
    for number in range(1, len(life.effects) + 1):
        before = small.databases()
        with mortal(number), pytest.raises(Died):
            swap_back(small.protected)
        assert small.databases() == before
        assert ask(small.endpoint, ROWS) == rows
    assert swap_back(small.protected).kept_as
    assert len(names) == 2


def test_a_restore_whose_store_dies(small: Box) -> None:
    small.take("daily")
    rows = ask(small.endpoint, ROWS)
    counting = CountingStore(small.store)
    replace_live(small, small.on(counting))
    forget(small, fit(small, rows))
    for number in range(1, len(counting.effects) + 1):
        with pytest.raises(Died):
            replace_live(small, small.on(DyingStore(small.store, before=number)))
        forget(small, fit(small, rows))
    replace_live(small)
    forget(small, fit(small, rows))
    assert small.databases() == {small.endpoint.database}


# --- at any moment -------------------------------------------------------------------------


def kill_at_random(box: Box, *, kills: int, seed: int) -> None:
    """Kill a real process that dumps, prunes and restores over its source, again and again."""
    rows, chance = ask(box.endpoint, ROWS), random.Random(seed)
    for _ in range(kills):
        child = process.start(worker.command(box, "forever"), stdout=subprocess.PIPE)
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == worker.READY
            with contextlib.suppress(subprocess.TimeoutExpired):  # which is when it is killed
                raise AssertionError(f"the worker ended by itself: {child.wait(chance.uniform(0, 4))}")
            child.kill()
        all_whole(box.store)
        forget(box, fit(box, rows))
    process.run(worker.command(box, "once"), timeout_s=90)
    forget(box, fit(box, rows))
    assert box.databases() == {box.endpoint.database}
    nothing_is_left_behind(box)
    pruned(box, box.store, keep=1, at=now() + FORTNIGHT)
    assert all_whole(box.store) == 2  # never fewer


@pytest.mark.timeout(300)
def test_killed_at_random(small: Box) -> None:
    kill_at_random(small, kills=8, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_at_random_five_hundred_times(small: Box, seed: int) -> None:
    kill_at_random(small, kills=250, seed=seed)
