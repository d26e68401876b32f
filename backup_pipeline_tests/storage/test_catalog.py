"""The catalog's contract: what exists is what its manifests say, in every order and after every crash."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from backup_pipeline.domain.backup import BackupId, CatalogListing, Lease, Manifest, ProofRecord, Verdict
from backup_pipeline.domain.layout import (
    INDEX,
    Beside,
    catalog_key,
    copy_key,
    data_prefix,
    lease_key,
)
from backup_pipeline.domain.manifest import (
    lease_to_json,
    manifest_from_json,
    manifest_to_json,
    verdict_to_json,
)
from backup_pipeline.errors import BackupNotFound, Busy, Corrupt, Refused, StoreError
from backup_pipeline.storage import catalog, catalog_delete, catalog_index, leases
from backup_pipeline.storage.catalog_publish import missing_objects
from backup_pipeline.storage.catalog_rebuild import rebuild
from backup_pipeline.storage.store import ObjectInfo, read_all
from backup_pipeline_tests.domain.values import NOW, manifest, proof
from backup_pipeline_tests.storage.backups import contents, packed, put_backup, put_objects
from backup_pipeline_tests.storage.effects import CountingStore, DatedStore, Died, DyingStore
from backup_pipeline_tests.storage.memory import MemoryStore

M = manifest()
KEY, COPY = catalog_key(M.id), copy_key(M.id, M.tier, Beside.MANIFEST)
VERDICT, PIN = catalog_key(M.id, Beside.VERDICT), catalog_key(M.id, Beside.PIN)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def day(number: int) -> datetime:
    return datetime(2026, 3, number, 2, tzinfo=UTC)


def resealed(record: bytes, backup: BackupId) -> bytes:
    """A record of M as one of another backup, made quickly."""
    body = record[: record.rindex(b'  "sha256"')].replace(M.id.stamp.encode(), backup.stamp.encode())
    taken = f"{backup.taken_at:%Y-%m-%dT%H:%M:%SZ}".encode()
    body = body.replace(b'"snapshot_at": "2026-03-01T02:00:00Z"', b'"snapshot_at": "' + taken + b'"')
    return body + f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def listed(store: MemoryStore | CountingStore) -> list[BackupId]:
    return [backup.id for backup in catalog.list_backups(store).backups]


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


class TestIndex:
    def test_twenty_thousand_backups_are_listed_in_few_requests(self, store: MemoryStore) -> None:
        bodies, one, proven = {}, manifest_to_json(M), verdict_to_json(M.id, ProofRecord(proof()))
        for number in range(20_000):
            at = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(hours=number)
            backup = BackupId.make("app", at, "3f9a1c")
            bodies[catalog_key(backup)] = resealed(one, backup)
            if number % 4 == 0:
                bodies[catalog_key(backup, Beside.VERDICT)] = resealed(proven, backup)
        for key, body in bodies.items():
            store.put(key, [body])
        catalog_index.write(store, {info: bodies[info.key] for info in store.list("catalog/")})
        store.requests.clear()
        found = catalog.list_backups(store)
        assert len(found.backups) == 20_000
        assert not found.unreadable
        assert sum(backup.verdict is Verdict.PROVEN for backup in found.backups) == 5_000
        assert store.requests == {"list": 25_000 // 1000 + 1, "read": 1}

    def test_what_the_index_does_not_know_costs_one_read_each(self, store: MemoryStore) -> None:
        for number in range(1, 10):
            put_backup(store, manifest(at=day(number)))
        catalog.record_proof(store, M.id, proof())
        assert catalog.refresh_index(store) == 10
        for number in range(10, 15):
            put_backup(store, manifest(at=day(number)))
        for action, reads in (
            (catalog.list_backups, 6),
            (catalog.refresh_index, 6),
            (catalog.list_backups, 1),
        ):
            store.requests.clear()
            action(store)
            assert store.requests["read"] == reads

    def test_what_changed_is_read_again(self, store: MemoryStore) -> None:
        put_backup(store, M)
        catalog.record_proof(store, M.id, proof())
        catalog.refresh_index(store)
        catalog.record_proof(store, M.id, proof(Verdict.FAILED))
        assert catalog.list_backups(store).backups[0].verdict is Verdict.FAILED
        catalog_delete.delete(store, catalog.load(store, M.id), clock=lambda: NOW)
        assert catalog.list_backups(store).backups == ()

    @pytest.mark.parametrize(
        "index",
        [
            b"", b"garbage", b"\x1f\x8b\x08\x00garbage", packed(b"[]"), packed(b"{}"),
            packed(b'{"kind": "backup-pipeline index", "version": 2, "entries": {}}'),
            packed(b'{"kind": "backup-pipeline index", "version": 1, "entries": []}'),
            packed(b'{"kind": "backup-pipeline index", "version": 1, "entries": {"a": 1, "b": []}}'),
            packed(b"[" * 100_000), packed(b"{}" * 1000)[:20],
        ],
    )  # fmt: skip
    def test_an_index_that_cannot_be_used_is_as_none(self, store: MemoryStore, index: bytes) -> None:
        put_backup(store, M)
        store.put(INDEX, [index])
        assert listed(store) == [M.id]
        assert catalog.refresh_index(store) == 1
        assert listed(store) == [M.id]

    def test_an_index_that_unpacks_to_too_much_is_as_none(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_backup(store, M)
        catalog.refresh_index(store)
        monkeypatch.setattr("backup_pipeline.storage.catalog_index.MAX_BYTES", 100)
        store.requests.clear()
        assert listed(store) == [M.id]
        assert store.requests["read"] == 2

    def test_a_forged_index_hides_nothing_and_decides_nothing(self, store: MemoryStore) -> None:
        put_backup(store, M)
        other = manifest(at=day(2))
        put_backup(store, other)
        etag = store.head(KEY).etag
        forged = replace(M, software="forged", expires_at=NOW)
        entries = {
            KEY: [etag, manifest_to_json(forged).decode()],
            catalog_key(other.id): [store.head(catalog_key(other.id)).etag, "no manifest"],
            catalog_key(manifest(at=day(9)).id): ["x", manifest_to_json(manifest(at=day(9))).decode()],
        }
        document = {"kind": "backup-pipeline index", "version": 1, "entries": entries}
        store.put(INDEX, [gzip.compress(json.dumps(document).encode())])
        assert listed(store) == [other.id, M.id]
        fresh = catalog.list_backups(store, fresh=True)
        assert [backup.manifest for backup in fresh.backups] == [other, M]
        assert catalog.load(store, M.id).manifest == M


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
