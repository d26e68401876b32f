"""The catalog's contract: what exists is what its manifests say, in every order and after every crash."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from backup_pipeline.domain.backup import CatalogListing, Lease, Verdict
from backup_pipeline.domain.layout import (
    Beside,
    catalog_key,
    copy_key,
    lease_key,
)
from backup_pipeline.domain.manifest import (
    lease_to_json,
    manifest_from_json,
    manifest_to_json,
)
from backup_pipeline.errors import BackupNotFound, Busy, Corrupt, Refused, StoreError
from backup_pipeline.storage import catalog, leases
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.domain.values import NOW, manifest, proof
from backup_pipeline_tests.storage.backups import contents, put_backup, put_objects
from backup_pipeline_tests.storage.cataloged import COPY, KEY, PIN, VERDICT, M, day, listed
from backup_pipeline_tests.storage.effects import CountingStore, Died, DyingStore
from backup_pipeline_tests.storage.memory import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


class TestPublish:
    def test_a_published_backup_is_loaded_and_listed(self, store: MemoryStore) -> None:
        published = put_backup(store, M)
        assert published == catalog.load(store, M.id)
        assert catalog.list_backups(store).backups == (published,)
        assert (published.manifest, published.verdict, published.pinned) == (M, Verdict.NONE, False)
        assert store.objects[KEY][0] == store.objects[COPY][0]

    def test_it_may_be_run_again(self, store: MemoryStore) -> None:
        put_backup(store, M)
        before = contents(store)
        catalog.publish(store, M)
        assert contents(store) == before

    def test_another_manifest_is_never_overwritten(self, store: MemoryStore) -> None:
        put_backup(store, M)
        with pytest.raises(Refused, match="holds another manifest"):
            catalog.publish(store, replace(M, software="0.2.0"))
        assert catalog.load(store, M.id).manifest == M

    def test_a_backup_whose_objects_are_not_whole_is_not_published(self, store: MemoryStore) -> None:
        put_objects(store, M)
        store.put(M.objects[0].key, [b"short"])
        with pytest.raises(Refused, match="has 5 bytes instead of 41"):
            catalog.publish(store, M)
        store.delete([M.objects[0].key])
        with pytest.raises(Refused, match=r"database\.dump is missing"):
            catalog.publish(store, M)
        assert listed(store) == []

    def test_what_could_not_be_read_back_is_not_published(self, store: MemoryStore) -> None:
        put_objects(store, M)
        with pytest.raises(Corrupt, match="snapshot"):
            catalog.publish(store, replace(M, snapshot_at=M.snapshot_at + timedelta(hours=1)))
        assert not contents(store, "catalog/")

    def test_it_waits_for_a_prune_that_collects_its_objects(self, store: MemoryStore) -> None:
        put_objects(store, M)
        with leases.claim(store, M.id, clock=lambda: M.finished_at + timedelta(days=2)), pytest.raises(Busy):
            catalog.publish(store, M)
        assert listed(store) == []
        catalog.publish(store, M)
        assert listed(store) == [M.id]

    def test_a_prune_that_died_long_ago_keeps_nothing_from_being_listed_again(self) -> None:
        times = [M.finished_at]
        store = MemoryStore(clock=lambda: times[-1])
        put_objects(store, M)
        catalog.publish(store, M)
        died = Lease(M.id, "d1ed", leases.PRUNE, M.finished_at + leases.TTL)
        store.put(lease_key(M.id, died.token), [lease_to_json(died)])
        store.delete([catalog_key(M.id)])
        with pytest.raises(Busy):
            catalog.publish(store, M)
        times.append(M.finished_at + timedelta(days=3))
        catalog.publish(store, M)
        assert listed(store) == [M.id]

    def test_killed_before_each_effect_nothing_half_is_listed(self) -> None:
        counting = CountingStore(MemoryStore())
        put_objects(counting, M)
        start = len(counting.effects)
        catalog.publish(counting, M)
        assert [effect.split()[1] for effect in counting.effects[start:]] == [COPY, KEY]
        for before in range(1, len(counting.effects) - start + 1):
            fresh = MemoryStore()
            put_objects(fresh, M)
            with pytest.raises(Died):
                catalog.publish(DyingStore(fresh, before=before), M)
            assert listed(fresh) == []
            catalog.publish(fresh, M)
            assert listed(fresh) == [M.id]


class TestListing:
    def test_order_is_by_the_key_and_not_by_when_it_was_written(self, store: MemoryStore) -> None:
        for number in (3, 1, 2):
            put_backup(store, manifest(at=day(number)))
        put_backup(store, manifest("other", at=day(4)))
        assert [backup.taken_at.day for backup in catalog.list_backups(store, "app").backups] == [3, 2, 1]
        assert [backup.taken_at.day for backup in catalog.list_backups(store).backups] == [4, 3, 2, 1]

    def test_a_name_that_begins_another_is_another(self, store: MemoryStore) -> None:
        put_backup(store, manifest("app2", at=day(4)))
        assert catalog.list_backups(store, "app").backups == ()

    def test_what_cannot_be_read_is_told_and_hides_nothing(self, store: MemoryStore) -> None:
        put_backup(store, M)
        other = manifest(at=day(2))
        store.put(catalog_key(other.id), [manifest_to_json(M)])
        store.put("catalog/app/notes.txt", [b"mine"])
        store.put(catalog_key(manifest(at=day(3)).id, Beside.PIN), [b""])
        for fresh in (True, False):
            found = catalog.list_backups(store, fresh=fresh)
            assert [backup.id for backup in found.backups] == [M.id]
            assert [reason for _, reason in found.unreadable] == [
                f"it is that of {M.id}, under another backup's key",
                "it pins a backup whose manifest is missing",
                "it is no name that we give",
            ]

    def test_an_unreadable_verdict_leaves_the_backup_listed(self, store: MemoryStore) -> None:
        put_backup(store, M)
        store.put(VERDICT, [b"{}"])
        (backup,) = catalog.list_backups(store).backups
        assert backup.proof is None
        assert backup.unreadable_verdict
        assert catalog.load(store, M.id) == backup
        assert catalog.list_backups(store).unreadable == ((VERDICT, backup.unreadable_verdict),)

    def test_what_is_far_too_long_is_not_read(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_backup(store, M)
        monkeypatch.setattr(catalog, "MAX_RECORD_BYTES", 100)
        store.requests.clear()
        assert catalog.list_backups(store, fresh=True).unreadable == ((KEY, "it is empty, or far too long"),)
        assert store.requests["read"] == 0

    def test_a_failing_store_is_no_empty_catalog(self, store: MemoryStore) -> None:
        put_backup(store, M)

        class Failing(CountingStore):
            def read(self, key: str) -> Iterator[bytes]:
                raise StoreError(f"no answer for {key}")

        with pytest.raises(StoreError, match="no answer"):
            catalog.list_backups(Failing(store), fresh=True)

    def test_what_is_deleted_while_it_is_listed_is_not_there(self, store: MemoryStore) -> None:
        put_backup(store, M)
        catalog.record_proof(store, M.id, proof())

        class Vanishing(CountingStore):
            def read(self, key: str) -> Iterator[bytes]:
                store.delete([key])
                return super().read(key)

        assert catalog.list_backups(Vanishing(store), fresh=True) == CatalogListing(())


class TestMarks:
    def test_a_proof_is_recorded_and_stands(self, store: MemoryStore) -> None:
        put_backup(store, M)
        catalog.record_proof(store, M.id, proof())
        record = catalog.record_proof(store, M.id, proof(Verdict.NOT_PROVABLE))
        backup = catalog.load(store, M.id)
        assert record.standing == backup.proof == proof()
        assert record.latest == backup.last_attempt == proof(Verdict.NOT_PROVABLE)
        assert store.objects[VERDICT][0] == store.objects[copy_key(M.id, M.tier, Beside.VERDICT)][0]

    def test_no_proof_of_a_backup_that_is_gone(self, store: MemoryStore) -> None:
        with pytest.raises(BackupNotFound):
            catalog.record_proof(store, M.id, proof())
        with pytest.raises(BackupNotFound):
            catalog.pin(store, M.id, at=NOW)
        assert not contents(store)

    def test_an_unreadable_verdict_is_replaced_but_never_by_not_knowing(self, store: MemoryStore) -> None:
        put_backup(store, M)
        store.put(VERDICT, [b"damaged"])
        with pytest.raises(Corrupt):
            catalog.record_proof(store, M.id, proof(Verdict.NOT_PROVABLE))
        assert catalog.record_proof(store, M.id, proof(Verdict.FAILED)).standing == proof(Verdict.FAILED)

    def test_a_pin_holds_until_it_is_lifted(self, store: MemoryStore) -> None:
        put_backup(store, M)
        for _ in range(2):
            catalog.pin(store, M.id, at=NOW, note="before the migration")
        assert catalog.load(store, M.id).pinned
        assert b"before the migration" in read_all(store, PIN)
        for _ in range(2):
            catalog.unpin(store, M.id)
        assert not catalog.load(store, M.id).pinned
        assert not [key for key in store.objects if key.endswith("pin")]

    def test_a_pin_that_comes_too_late_says_so(self, store: MemoryStore) -> None:
        put_backup(store, M)

        class Racing(CountingStore):
            def _note(self, effect: str, key: str) -> None:
                if key == PIN and effect == "put":
                    store.delete([KEY])

        with pytest.raises(BackupNotFound, match="pruned a moment ago"):
            catalog.pin(Racing(store), M.id, at=NOW)
        assert PIN not in store.objects

    def test_a_locked_pin_is_told(self, store: MemoryStore) -> None:
        put_backup(store, M)
        catalog.pin(store, M.id, at=NOW)
        store.locked[PIN] = "Access Denied"
        with pytest.raises(Refused, match="stays pinned"):
            catalog.unpin(store, M.id)


def test_swapped_objects_are_told_apart_by_their_digests(store: MemoryStore) -> None:
    """Two whole objects under each other's keys: the manifest still names what belongs where."""
    record = manifest(names=("a.dump", "b.dump"))
    put_backup(store, record)
    first, second = record.objects
    one, two = read_all(store, first.key), read_all(store, second.key)
    store.put(first.key, [two])
    store.put(second.key, [one])
    read = manifest_from_json(read_all(store, catalog_key(record.id)), catalog_key(record.id))
    assert read == record
    assert len({item.sha256 for item in read.objects}) == 2
