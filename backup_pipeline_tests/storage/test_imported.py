"""Dumps of an older layout as backups: named, marked, deleted."""

from datetime import UTC, datetime

import pytest

from backup_pipeline.domain.backup import BackupId, CatalogListing, Verdict
from backup_pipeline.errors import BackupNotFound, Busy
from backup_pipeline.storage import catalog, catalog_delete, imported, leases
from backup_pipeline_tests.domain.values import NOW, proof
from backup_pipeline_tests.storage.memory import MemoryStore

KEY = "daily/backup_daily_20260301_020000.sql.gz"
ID = BackupId("app", "20260301T020000Z-imported-daily")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def imports() -> MemoryStore:
    return MemoryStore()


def test_dumps_are_listed_newest_first(store: MemoryStore, imports: MemoryStore) -> None:
    for key in (
        KEY,
        "weekly/backup_weekly_20260308_030000.sql.gz",
        "daily/backup_daily_20260302_020000.sql.gz",
    ):
        imports.put(key, [b"PGDMP"])
    imports.put("README.txt", [b"mine"])
    found = imported.list_imported(imports, store, "app")
    assert [backup.tier for backup in found.backups] == ["weekly", "daily", "daily"]
    last = found.backups[-1]
    assert (last.id, last.imported_key, last.size_bytes, last.manifest) == (ID, KEY, 5, None)
    assert last.taken_at == datetime(2026, 3, 1, 2, tzinfo=UTC)
    assert found.unreadable == ()
    assert imported.imported_key(ID) == KEY
    assert imported.load_imported(imports, store, ID) == last


@pytest.mark.parametrize(
    "key",
    [
        "daily/backup_weekly_20260301_020000.sql.gz",
        "daily/backup_daily_20260231_020000.sql.gz",
        "daily/backup_daily_20260301.sql.gz",
        "Daily/backup_Daily_20260301_020000.sql.gz",
        "old/daily/backup_daily_20260301_020000.sql.gz",
        "backup_daily_20260301_020000.sql.gz",
    ],
)
def test_what_only_looks_like_one_is_told(store: MemoryStore, imports: MemoryStore, key: str) -> None:
    imports.put(key, [b"PGDMP"])
    found = imported.list_imported(imports, store, "app")
    assert found.backups == ()
    assert found.unreadable == ((key, "it looks like a dump, but its name has another form"),)


def test_verdicts_and_pins_lie_in_our_store(store: MemoryStore, imports: MemoryStore) -> None:
    imports.put(KEY, [b"PGDMP"])
    catalog.record_proof(store, ID, proof(Verdict.FAILED))
    catalog.record_proof(store, ID, proof(Verdict.RESTORED))
    catalog.pin(store, ID, at=NOW)
    (backup,) = imported.list_imported(imports, store, "app").backups
    assert (backup.verdict, backup.pinned) == (Verdict.RESTORED, True)
    assert imported.load_imported(imports, store, ID) == backup
    assert list(imports.objects) == [KEY]
    assert catalog.list_backups(store) == CatalogListing(())
    catalog.unpin(store, ID)
    assert not imported.load_imported(imports, store, ID).pinned


def test_what_is_being_pruned_is_not_pinned(store: MemoryStore, imports: MemoryStore) -> None:
    imports.put(KEY, [b"PGDMP"])
    with leases.claim(store, ID, clock=lambda: NOW), pytest.raises(Busy):
        catalog.pin(store, ID, at=NOW)
    assert not imported.load_imported(imports, store, ID).pinned


def test_an_unreadable_verdict_is_told(store: MemoryStore, imports: MemoryStore) -> None:
    imports.put(KEY, [b"PGDMP"])
    store.put("catalog/app/20260301T020000Z-imported-daily.verdict.json", [b"{}"])
    found = imported.list_imported(imports, store, "app")
    assert found.backups[0].unreadable_verdict
    assert len(found.unreadable) == 1


def test_one_that_is_gone_is_not_found(store: MemoryStore, imports: MemoryStore) -> None:
    for backup in (ID, BackupId("app", "20260301T020000Z-3f9a1c")):
        with pytest.raises(BackupNotFound):
            imported.load_imported(imports, store, backup)


def test_it_is_deleted_in_its_own_store(store: MemoryStore, imports: MemoryStore) -> None:
    imports.put(KEY, [b"PGDMP"])
    imports.put("daily/backup_daily_20260302_020000.sql.gz", [b"PGDMP"])
    catalog.record_proof(store, ID, proof(Verdict.RESTORED))
    backup = imported.load_imported(imports, store, ID)
    with leases.hold(store, ID, "restore", clock=lambda: NOW):
        assert "in use" in catalog_delete.delete_imported(imports, store, backup, clock=lambda: NOW).kept
    imports.locked[KEY] = "Access Denied"
    assert catalog_delete.delete_imported(imports, store, backup, clock=lambda: NOW).denied == {
        KEY: "Access Denied"
    }
    assert imported.load_imported(imports, store, ID) == backup
    imports.locked.clear()
    done = catalog_delete.delete_imported(imports, store, backup, clock=lambda: NOW)
    assert (done.kept, done.freed_bytes) == ("", 5)
    assert list(imports.objects) == ["daily/backup_daily_20260302_020000.sql.gz"]
    assert not store.objects
