"""The catalog's whole life on every kind of store: what it asks of them, they do."""

from datetime import UTC, datetime, timedelta

import pytest

from backup_pipeline.actions import prune
from backup_pipeline.config import DatabaseConfig, Secret, TierConfig
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.layout import INDEX, catalog_key
from backup_pipeline.errors import BackupNotFound
from backup_pipeline.storage import catalog, imported, leases
from backup_pipeline.storage.catalog_rebuild import rebuild
from backup_pipeline.storage.store import Store
from backup_pipeline_tests.domain.values import NOW, manifest, proof
from backup_pipeline_tests.storage.backups import contents, put_backup, put_objects
from backup_pipeline_tests.storage.effects import DatedStore

CONFIG = DatabaseConfig(
    name="app", dsn=Secret("postgresql:///app"), tiers=(TierConfig("daily", "0 2 * * *", 2),)
)


def day(number: int) -> datetime:
    return datetime(2026, 3, number, 2, tzinfo=UTC)


def days(store: Store) -> list[int]:
    return [backup.taken_at.day for backup in catalog.list_backups(store, "app").backups]


def test_backups_live_and_die(store: Store) -> None:
    records = [manifest(at=day(number)) for number in range(1, 7)]
    for record in records:
        put_backup(store, record)
        catalog.publish(store, record)
    catalog.record_proof(store, records[0].id, proof())
    catalog.record_proof(store, records[0].id, proof(Verdict.NOT_PROVABLE))
    catalog.pin(store, records[1].id, at=NOW)
    assert days(store) == [6, 5, 4, 3, 2, 1]

    assert catalog.refresh_index(store) == 7
    assert catalog.list_backups(store) == catalog.list_backups(store, fresh=True)
    store.put(INDEX, [b"damaged"])
    first = catalog.load(store, records[0].id)
    assert (first.verdict, first.pinned) == (Verdict.PROVEN, False)

    before = contents(store, "catalog/")
    store.delete(list(before))
    assert days(store) == []
    assert len(rebuild(store).backups) == 6
    assert contents(store, "catalog/") == before

    now = datetime.now(UTC) + timedelta(days=2)
    put_objects(store, manifest(at=day(7)))
    imports = "daily/backup_daily_20260101_020000.sql.gz"
    store.put(imports, [b"PGDMP"])
    planned = prune.plan(store, CONFIG, now=now, imports=store)
    with leases.hold(store, records[2].id, "restore", clock=lambda: now):
        dated = DatedStore(store, at=now)
        done = prune.carry_out(dated, planned, clock=lambda: now, log=lambda _: None, imports=store)
    assert [str(backup) for backup in done.deleted] == [
        "app/20260101T020000Z-imported-daily",
        str(records[3].id),
    ]
    assert done.collected == 1
    assert days(store) == [6, 5, 3, 2, 1]
    assert imported.list_imported(store, store, "app").backups == ()
    assert not [info.key for info in store.list("") if records[3].id.stamp in info.key]
    with pytest.raises(BackupNotFound), leases.hold(store, records[3].id, "restore", clock=lambda: now):
        raise AssertionError
    assert list(store.list("leases/")) == []
    assert catalog_key(records[3].id) not in contents(store)
