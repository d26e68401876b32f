"""A lost catalog made anew from the copies beside the backups."""

from collections.abc import Iterator

import pytest

from backup_pipeline.domain.backup import Manifest
from backup_pipeline.domain.layout import (
    Beside,
    copy_key,
)
from backup_pipeline.domain.manifest import (
    manifest_to_json,
)
from backup_pipeline.storage import catalog, catalog_delete
from backup_pipeline.storage.catalog_rebuild import rebuild
from backup_pipeline.storage.store import ObjectInfo
from backup_pipeline_tests.domain.values import NOW, manifest, proof
from backup_pipeline_tests.storage.backups import contents, put_backup
from backup_pipeline_tests.storage.cataloged import COPY, KEY, PIN, VERDICT, M, day, listed
from backup_pipeline_tests.storage.effects import CountingStore
from backup_pipeline_tests.storage.memory import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


class TestRebuild:
    def records(self) -> list[Manifest]:
        return [manifest(at=day(1)), manifest(at=day(2), tier="weekly"), manifest("other", at=day(3))]

    def test_a_lost_catalog_comes_back_equal(self, store: MemoryStore) -> None:
        for record in self.records():
            put_backup(store, record)
        catalog.record_proof(store, M.id, proof())
        catalog.pin(store, self.records()[1].id, at=NOW)
        before, known = contents(store), catalog.list_backups(store)
        store.delete(list(contents(store, "catalog/")))
        rebuilt = rebuild(store)
        assert set(rebuilt.backups) == {record.id for record in self.records()}
        assert not rebuilt.refused
        assert contents(store) == before
        assert catalog.list_backups(store) == known
        assert rebuild(store).backups == ()

    def test_protection_comes_back_before_the_backup(self, store: MemoryStore) -> None:
        put_backup(store, M)
        catalog.record_proof(store, M.id, proof())
        catalog.pin(store, M.id, at=NOW)
        store.delete(list(contents(store, "catalog/")))
        counting = CountingStore(store)
        rebuild(counting)
        assert [effect.split()[1] for effect in counting.effects] == [PIN, VERDICT, KEY]

    def test_a_damaged_manifest_is_replaced_by_its_copy(self, store: MemoryStore) -> None:
        put_backup(store, M)
        catalog.record_proof(store, M.id, proof())
        before = contents(store)
        store.put(KEY, [before[KEY][:-1]])
        store.put(VERDICT, [b"damaged"])
        assert rebuild(store).backups == (M.id,)
        assert contents(store) == before

    def test_what_is_not_whole_stays_unlisted_and_is_told(self, store: MemoryStore) -> None:
        first, second, third = self.records()
        for record in self.records():
            put_backup(store, record)
        store.delete(list(contents(store, "catalog/")))
        store.delete([first.objects[0].key])
        store.put(second.objects[1].key, [b"short"])
        store.put(copy_key(third.id, third.tier, Beside.MANIFEST), [manifest_to_json(first)])
        rebuilt = rebuild(store)
        assert rebuilt.backups == ()
        assert [reason.split()[-1] for _, reason in rebuilt.refused] == ["missing", "39", "key"]
        assert listed(store) == []

    def test_a_damaged_verdict_comes_back_as_it_is(self, store: MemoryStore) -> None:
        """Retention keeps what has an unreadable verdict; without one it might give a proven one up."""
        put_backup(store, M)
        store.put(copy_key(M.id, M.tier, Beside.VERDICT), [b"damaged"])
        store.delete(list(contents(store, "catalog/")))
        rebuilt = rebuild(store)
        assert rebuilt.backups == (M.id,)
        assert len(rebuilt.refused) == 1
        assert catalog.load(store, M.id).unreadable_verdict

    def test_what_is_whole_in_the_catalog_is_not_touched(self, store: MemoryStore) -> None:
        put_backup(store, M)
        store.put(COPY, [b"damaged"])
        counting = CountingStore(store)
        rebuild(counting)
        assert not counting.effects

    def test_a_backup_in_deletion_does_not_come_back(self, store: MemoryStore) -> None:
        put_backup(store, M)
        backup = catalog.load(store, M.id)

        class Racing(CountingStore):
            def list(self, prefix: str) -> Iterator[ObjectInfo]:
                found = list(super().list(prefix))
                if prefix == "databases/":
                    catalog_delete.delete(store, backup, clock=lambda: NOW)
                return iter(found)

        assert rebuild(Racing(store)).backups == ()
        assert listed(store) == []
