"""The index of a large catalog: quicker, and never believed more than the manifests."""

import gzip
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from backup_pipeline.domain.backup import BackupId, ProofRecord, Verdict
from backup_pipeline.domain.layout import (
    INDEX,
    Beside,
    catalog_key,
)
from backup_pipeline.domain.manifest import (
    manifest_to_json,
    verdict_to_json,
)
from backup_pipeline.storage import catalog, catalog_delete, catalog_index
from backup_pipeline_tests.domain.values import NOW, manifest, proof
from backup_pipeline_tests.storage.backups import packed, put_backup
from backup_pipeline_tests.storage.cataloged import KEY, M, day, listed, resealed
from backup_pipeline_tests.storage.memory import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


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
