"""Deleting a backup: its manifest first, and nothing that somebody uses."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta

import pytest

from backup_pipeline.domain.layout import (
    data_prefix,
)
from backup_pipeline.errors import StoreError
from backup_pipeline.storage import catalog, catalog_delete, leases
from backup_pipeline.storage.catalog_publish import missing_objects
from backup_pipeline.storage.catalog_rebuild import rebuild
from backup_pipeline.storage.store import ObjectInfo
from backup_pipeline_tests.domain.values import NOW, manifest, proof
from backup_pipeline_tests.storage.backups import contents, put_backup
from backup_pipeline_tests.storage.cataloged import COPY, KEY, PIN, VERDICT, M, day, listed
from backup_pipeline_tests.storage.effects import CountingStore, DatedStore, Died, DyingStore
from backup_pipeline_tests.storage.memory import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


class TestDelete:
    def test_nothing_of_it_is_left(self, store: MemoryStore) -> None:
        put_backup(store, M)
        other = put_backup(store, manifest(at=day(2)))
        catalog.record_proof(store, M.id, proof())
        store.put(data_prefix(M.id, M.tier) + "left-by-a-retry", [b"x"])
        backup = catalog.load(store, M.id)
        done = catalog_delete.delete(store, backup, clock=lambda: NOW)
        assert not done.kept
        assert not done.denied
        assert done.freed_bytes >= backup.size_bytes
        assert not [key for key in store.objects if M.id.stamp in key]
        assert listed(store) == [other.id]

    def test_killed_before_each_effect_a_listed_backup_is_whole(self) -> None:
        def prepared() -> MemoryStore:
            store = MemoryStore()
            put_backup(store, M)
            catalog.record_proof(store, M.id, proof())
            return store

        counting = CountingStore(prepared())
        backup = catalog.load(counting, M.id)
        catalog_delete.delete(counting, backup, clock=lambda: NOW)
        deletes = [effect.split()[1] for effect in counting.effects if effect.startswith("delete")]
        assert deletes[:3] == [COPY, KEY, VERDICT]
        later = NOW + timedelta(hours=1)
        for before in range(1, len(counting.effects) + 1):
            store = prepared()
            with pytest.raises(Died):
                catalog_delete.delete(DyingStore(store, before=before), backup, clock=lambda: NOW)
            for found in catalog.list_backups(store).backups:
                assert found.manifest is not None
                sizes = {info.key: info.size_bytes for info in store.list("databases/")}
                assert not missing_objects(found.manifest.objects, sizes)
            still = listed(store) == [M.id]
            again = catalog_delete.delete(DatedStore(store, at=later), backup, clock=lambda: later)
            assert (not again.kept) == still, "what is no longer listed is left to the collector"
            assert listed(store) == []
            assert rebuild(store).backups == ()

    @pytest.mark.parametrize("against", ["lease", "pin", "verdict"])
    def test_what_comes_up_in_the_last_moment_puts_the_manifest_back(
        self, store: MemoryStore, against: str
    ) -> None:
        put_backup(store, M)
        backup = catalog.load(store, M.id)
        before = contents(store, "databases/") | contents(store, "catalog/")

        class Racing(CountingStore):
            def delete(self, keys: Sequence[str]) -> dict[str, str]:
                if KEY in keys:
                    if against == "lease":
                        restores.enter_context(leases.hold(store, M.id, "restore", clock=lambda: NOW))
                    elif against == "pin":
                        store.put(PIN, [b""])
                    else:
                        catalog.record_proof(store, M.id, proof())
                return super().delete(keys)

        with ExitStack() as restores:
            done = catalog_delete.delete(Racing(store), backup, clock=lambda: NOW)
        assert {"lease": "in use: restore", "pin": "pinned", "verdict": "verdict"}[against] in done.kept
        assert listed(store) == [M.id]
        assert before.items() <= contents(store).items()

    def test_what_speaks_against_it_beforehand_keeps_it(self, store: MemoryStore) -> None:
        put_backup(store, M)
        backup = catalog.load(store, M.id)
        before = contents(store)
        with leases.hold(store, M.id, "proof", clock=lambda: NOW):
            assert "in use: proof" in catalog_delete.delete(store, backup, clock=lambda: NOW).kept
        with leases.claim(store, M.id, clock=lambda: NOW):
            assert "in use: prune" in catalog_delete.delete(store, backup, clock=lambda: NOW).kept
        assert (
            "not the one"
            in catalog_delete.delete(store, replace(backup, manifest=None), clock=lambda: NOW).kept
        )
        assert contents(store) == before
        assert not catalog_delete.delete(store, backup, clock=lambda: NOW).kept
        assert "gone already" in catalog_delete.delete(store, backup, clock=lambda: NOW).kept

    def test_a_store_that_fails_at_the_last_look_keeps_it_listed(self, store: MemoryStore) -> None:
        put_backup(store, M)
        backup = catalog.load(store, M.id)

        class Failing(CountingStore):
            gone = False

            def delete(self, keys: Sequence[str]) -> dict[str, str]:
                self.gone = self.gone or KEY in keys
                return super().delete(keys)

            def list(self, prefix: str) -> Iterator[ObjectInfo]:
                if self.gone:
                    raise StoreError("no answer")
                return super().list(prefix)

        with pytest.raises(StoreError):
            catalog_delete.delete(Failing(store), backup, clock=lambda: NOW)
        assert listed(store) == [M.id]
        assert COPY in store.objects

    @pytest.mark.parametrize("key", [COPY, KEY])
    def test_a_manifest_that_is_locked_keeps_the_whole_backup(self, store: MemoryStore, key: str) -> None:
        put_backup(store, M)
        before = contents(store)
        store.locked[key] = "object protected by object lock"
        done = catalog_delete.delete(store, catalog.load(store, M.id), clock=lambda: NOW)
        assert done.kept
        assert done.denied == {key: "object protected by object lock"}
        assert contents(store) == before

    def test_objects_that_are_locked_are_told(self, store: MemoryStore) -> None:
        put_backup(store, M)
        store.locked[M.objects[0].key] = "object protected by object lock"
        done = catalog_delete.delete(store, catalog.load(store, M.id), clock=lambda: NOW)
        assert not done.kept
        assert done.denied == {M.objects[0].key: "object protected by object lock"}
        assert listed(store) == []
