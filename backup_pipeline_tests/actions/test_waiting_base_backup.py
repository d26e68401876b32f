"""Base backups that wait for their WAL: listed once it is there, by whoever comes by first."""

from datetime import timedelta

import pytest

from backup_pipeline.actions import base_backup, prune_cluster
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.waiting_base_backup import finish_waiting
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.domain.layout import Beside, base_copy_key, catalog_key
from backup_pipeline.errors import ServerError
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.store import Store
from backup_pipeline.storage.waiting import keep_waiting
from backup_pipeline_tests.actions.box import Said
from backup_pipeline_tests.storage.archives import BEGUN, FakeArchive
from backup_pipeline_tests.storage.effects import CountingStore, Died, DyingStore


def one_that_waits() -> tuple[FakeArchive, BaseManifest]:
    """Its WAL is there by now, a day and a half after it was taken."""
    made = FakeArchive()
    made.segments(*range(40))
    manifest = made.base(2)
    made.store.delete([catalog_key(manifest.id), base_copy_key(manifest.id, Beside.MANIFEST)])
    keep_waiting(made.store, manifest)
    made.at = BEGUN + timedelta(hours=40)
    return made, manifest


def listed(made: FakeArchive) -> list[BaseManifest]:
    found = base_backups.list_base_backups(made.store, "main", fresh=True)
    assert not found.unreadable
    return [each.manifest for each in found.backups]


def test_it_is_listed_when_the_next_one_fails() -> None:
    made, manifest = one_that_waits()
    nowhere = made.cluster(dsn="host=/nowhere user=backup")
    with pytest.raises(ServerError):
        base_backup.take(nowhere, clock=lambda: made.at, report=Said())
    assert [each.id for each in listed(made)] == [manifest.id]


def test_a_prune_lists_it_and_does_not_collect_it() -> None:
    made, manifest = one_that_waits()
    planned = prune_cluster.plan(made.cluster(), now=made.at)
    assert planned.unlisted == ((manifest.id, True),)
    said: list[str] = []
    done = prune_cluster.carry_out(made.cluster(), planned, clock=lambda: made.at, log=said.append)
    assert done.collected == 0
    assert [each.id for each in listed(made)] == [manifest.id]
    assert f"published {manifest.id}: its WAL is in the archive now" in said


def an_incremental_one_that_waits() -> tuple[FakeArchive, BaseManifest, BaseManifest]:
    """Its WAL is not there yet, and nothing but it needs its parent."""
    made = FakeArchive()
    made.segments(*range(120))
    parent = made.base(2)
    for first in (26, 50, 74, 98):
        made.base(first)
    child = made.base(110, 130, parent=parent.id)
    made.store.delete([catalog_key(child.id), base_copy_key(child.id, Beside.MANIFEST)])
    made.at = BEGUN + timedelta(hours=120)
    return made, parent, child


def pruned(made: FakeArchive, store: Store) -> list[str]:
    cluster, said = ProtectedCluster(made.cluster().config, store), list[str]()
    planned = prune_cluster.plan(cluster, now=made.at)
    prune_cluster.carry_out(cluster, planned, clock=lambda: made.at, log=said.append)
    return said


def test_a_prune_leaves_what_it_was_taken_against_until_it_is_collected() -> None:
    made, parent, child = an_incremental_one_that_waits()
    keep_waiting(made.store, child)
    said = pruned(made, made.store)
    (line,) = (line for line in said if line.startswith(f"keep {parent.id}"))
    assert line.endswith(f"{child.id}, which waits for its WAL, was taken against it")
    made.segments(*range(120, 131))
    assert finish(made, made.store) == (child.id,)
    assert {parent.id, child.id} <= {each.id for each in listed(made)}

    made, parent, child = an_incremental_one_that_waits()
    keep_waiting(made.store, child)
    made.at += timedelta(days=1)
    pruned(made, made.store)
    assert not [key for key in made.store.objects if child.id.stamp in key]
    assert parent.id not in [each.id for each in listed(made)]


def test_one_that_begins_to_wait_while_a_prune_is_at_its_parent_keeps_it() -> None:
    made, parent, child = an_incremental_one_that_waits()

    class Racing(CountingStore):
        def _note(self, effect: str, key: str) -> None:
            if key.startswith(f"leases/main/{parent.id.stamp}"):
                keep_waiting(made.store, child)
            super()._note(effect, key)

    said = pruned(made, Racing(made.store))
    assert f"kept after all {parent.id}: {child.id} was taken against it meanwhile" in said
    assert parent.id in [each.id for each in listed(made)]


def test_death_before_any_effect_of_finishing_is_made_good_by_the_next() -> None:
    made, manifest = one_that_waits()
    counting = CountingStore(made.store)
    assert finish(made, counting) == (manifest.id,)
    for number in range(1, len(counting.effects) + 1):
        made, manifest = one_that_waits()
        with pytest.raises(Died):
            finish(made, DyingStore(made.store, before=number))
        made.at += timedelta(hours=1)
        finish(made, made.store)
        assert [each.id for each in listed(made)] == [manifest.id], counting.effects[number - 1]


def finish(made: FakeArchive, store: Store) -> tuple[BackupId, ...]:
    cluster = ProtectedCluster(made.cluster().config, store)
    return finish_waiting(cluster, clock=lambda: made.at, report=Said())
