"""Base backups in the catalog: listed only when whole, deleted record first, and told from dumps."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.domain.layout import INDEX, Beside, base_prefix, catalog_key
from backup_pipeline.errors import BackupNotFound, Busy, Corrupt, Refused
from backup_pipeline.storage import base_backups, catalog, leases
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline_tests.domain.values import base_manifest, content_of, proof
from backup_pipeline_tests.domain.values import manifest as dump_manifest
from backup_pipeline_tests.storage.backups import put_backup
from backup_pipeline_tests.storage.effects import CountingStore, DatedStore, Died, DyingStore
from backup_pipeline_tests.storage.memory import MemoryStore

AT = datetime(2026, 3, 1, 2, tzinfo=UTC)
LATE = leases.TTL + leases.SKEW


def clock() -> datetime:
    return AT + timedelta(days=1)


def put_objects(store: Store, manifest: BaseManifest) -> None:
    for item in manifest.objects:
        store.put(item.key, [content_of(manifest.id, item.name)])


def stored(hour: int = 0) -> tuple[MemoryStore, BaseManifest]:
    store, manifest = MemoryStore(), base_manifest(at=AT + timedelta(hours=hour))
    put_objects(store, manifest)
    return store, manifest


def listed(store: Store) -> list[BackupId]:
    found = base_backups.list_base_backups(store, "main")
    assert not found.unreadable
    return [backup.id for backup in found.backups]


def test_a_published_one_is_listed_newest_first_and_loaded() -> None:
    store, first = stored()
    second = base_manifest(at=AT + timedelta(hours=1))
    put_objects(store, second)
    for manifest in (second, first, first):
        assert base_backups.publish(store, manifest).manifest == manifest
    assert listed(store) == [second.id, first.id]
    assert base_backups.load(store, first.id).manifest == first
    with pytest.raises(BackupNotFound, match="there is no base backup"):
        base_backups.load(store, BackupId("main", "20260101T000000Z-none"))


def test_dumps_and_base_backups_do_not_take_one_another_for_damage() -> None:
    store, manifest = stored()
    base_backups.publish(store, manifest)
    dump = put_backup(store, dump_manifest())
    for fresh in (True, False):
        dumps = catalog.list_backups(store, fresh=fresh)
        assert [item.id for item in dumps.backups] == [dump.id]
        assert not dumps.unreadable
        bases = base_backups.list_base_backups(store, fresh=fresh)
        assert [item.id for item in bases.backups] == [manifest.id]
        assert not bases.unreadable
        assert catalog.refresh_index(store) == 2
    with pytest.raises(Corrupt):
        catalog.load(store, manifest.id)
    with pytest.raises(Corrupt):
        base_backups.load(store, dump.id)


def test_what_cannot_be_read_is_told_and_not_trusted() -> None:
    store, manifest = stored()
    base_backups.publish(store, manifest)
    key = catalog_key(manifest.id)
    data = read_all(store, key)
    store.put(key, [data.replace(b'"page_checksums": true', b'"page_checksums": null')])
    moved = catalog_key(BackupId("main", "20260301T020000Z-aaaa"))
    store.put(moved, [data])
    found = base_backups.list_base_backups(store, "main")
    assert not found.backups
    assert {each for each, _ in found.unreadable} == {key, moved}
    assert {each for each, _ in catalog.list_backups(store).unreadable} == {key, moved}


def test_a_missing_or_shortened_object_is_not_published() -> None:
    store, manifest = stored()
    store.delete([manifest.objects[0].key])
    with pytest.raises(Refused, match="is missing"):
        base_backups.publish(store, manifest)
    store.put(manifest.objects[0].key, [b"short"])
    with pytest.raises(Refused, match="has 5 bytes"):
        base_backups.publish(store, manifest)
    assert listed(store) == []
    assert set(base_backups.unlisted(store, "main")) == {manifest.id}


def test_a_record_is_never_overwritten() -> None:
    store, manifest = stored()
    base_backups.publish(store, manifest)
    with pytest.raises(Refused, match="another manifest"):
        base_backups.publish(store, replace(manifest, software="0.2.0"))


class Forgetting(CountingStore):
    """Loses a base backup's record right before that of another is put."""

    def __init__(self, store: Store, lost: BackupId, before: BackupId) -> None:
        super().__init__(store)
        self._lost, self._before = catalog_key(lost), catalog_key(before)

    def put_if_absent(self, key: str, data: bytes) -> None:
        if key == self._before:
            super().delete([self._lost])
        super().put_if_absent(key, data)


def test_one_whose_parent_is_pruned_while_it_is_published_is_not_listed() -> None:
    store, whole = stored()
    base_backups.publish(store, whole)
    made = base_manifest(at=AT + timedelta(hours=1))
    child = replace(made, parent=whole.id, start=whole.end, end=whole.end)
    put_objects(store, child)
    with pytest.raises(Refused, match=f"is not listed: {whole.id}, which {child.id} builds on, is not there"):
        base_backups.publish(Forgetting(store, whole.id, child.id), child)
    assert listed(store) == []
    assert set(base_backups.unlisted(store, "main")) == {whole.id, child.id}


def test_dying_before_any_effect_of_publishing_lists_nothing_by_halves() -> None:
    store, manifest = stored()
    counting = CountingStore(store)
    base_backups.publish(counting, manifest)
    for number in range(1, len(counting.effects) + 1):
        store, manifest = stored()
        with pytest.raises(Died):
            base_backups.publish(DyingStore(store, before=number), manifest)
        assert listed(store) == []
        base_backups.publish(store, manifest)
        assert listed(store) == [manifest.id]


def test_dying_before_any_effect_of_deleting_leaves_it_whole_or_unlisted() -> None:
    store, manifest = stored()
    backup = base_backups.publish(store, manifest)
    counting = CountingStore(store)
    done = base_backups.delete(counting, backup, clock=clock)
    assert not done.kept
    assert done.freed_bytes == manifest.size_bytes
    assert not [info.key for info in store.list("")]
    for number in range(1, len(counting.effects) + 1):
        store, manifest = stored()
        backup = base_backups.publish(store, manifest)
        with pytest.raises(Died):
            base_backups.delete(DyingStore(store, before=number), backup, clock=clock)
        for each in listed(store):
            keys = {info.key for info in store.list(base_prefix(each))}
            assert {item.key for item in manifest.objects} <= keys
        for each in list(base_backups.unlisted(store, "main")):
            late = DatedStore(store, at=clock() + LATE)
            assert not base_backups.collect(late, each, clock=lambda: clock() + LATE).kept
        left = [info.key for info in store.list(base_prefix(manifest.id))]
        assert bool(left) is bool(listed(store))


def test_one_that_is_used_or_pinned_is_kept() -> None:
    store, manifest = stored()
    backup = base_backups.publish(store, manifest)
    with leases.hold(store, backup.id, "restore", clock=clock):
        assert "in use: restore" in base_backups.delete(store, backup, clock=clock).kept
    catalog_pin = catalog_key(backup.id, Beside.PIN)
    store.put(catalog_pin, [b"pinned"])
    assert base_backups.load(store, backup.id).pinned
    assert "pinned" in base_backups.delete(store, backup, clock=clock).kept
    assert listed(store) == [backup.id]


def test_one_under_way_is_not_collected_and_one_being_collected_not_published() -> None:
    store, manifest = stored()
    with leases.hold(store, manifest.id, leases.BASE_BACKUP, clock=clock):
        assert "in use: base backup" in base_backups.collect(store, manifest.id, clock=clock).kept
    at = manifest.finished_at
    with leases.claim(store, manifest.id, clock=lambda: at), pytest.raises(Busy):
        base_backups.publish(store, manifest)
    assert listed(store) == []


def test_a_lost_catalog_is_made_anew_from_the_copies() -> None:
    store, manifest = stored()
    base_backups.publish(store, manifest)
    copy = base_prefix(manifest.id) + "manifest.json"
    store.delete([catalog_key(manifest.id)])
    assert "is there now" in base_backups.collect(store, manifest.id, clock=clock).kept
    assert base_backups.rebuild(store, "main") == ((manifest.id,), ())
    assert listed(store) == [manifest.id]
    assert base_backups.rebuild(store, "main") == ((), ())
    store.delete([catalog_key(manifest.id), manifest.objects[0].key])
    assert base_backups.rebuild(store, "main")[1][0][0] == copy
    store.put(copy, [b"{}"])
    assert base_backups.rebuild(store, "main")[1][0][0] == copy
    assert listed(store) == []


def test_what_a_drill_found_is_listed_with_it_and_goes_with_it() -> None:
    store, manifest = stored()
    backup = base_backups.publish(store, manifest)
    assert backup.verdict is Verdict.NONE
    good, bad, less = (proof(each) for each in (Verdict.PROVEN, Verdict.FAILED, Verdict.RESTORED))
    base_backups.record_proof(store, manifest.id, good, comparable=True)
    base_backups.record_proof(store, manifest.id, less, comparable=True)
    catalog.refresh_index(store)
    found = base_backups.load(store, manifest.id)
    assert (found.proof, found.last_attempt) == (good, less)
    for fresh in (True, False):
        assert base_backups.list_base_backups(store, "main", fresh=fresh).backups == (found,)
    base_backups.record_proof(store, manifest.id, bad, comparable=True)
    assert "its verdict changed" in base_backups.delete(store, found, clock=clock).kept
    failed = base_backups.load(store, manifest.id)
    assert failed.verdict is Verdict.FAILED
    assert not base_backups.delete(store, failed, clock=clock).kept
    assert not [info.key for info in store.list("") if info.key != INDEX]
    with pytest.raises(BackupNotFound):
        base_backups.record_proof(store, manifest.id, good, comparable=True)


def test_without_a_heartbeat_a_recovery_that_works_again_is_the_best_there_is() -> None:
    store, manifest = stored()
    base_backups.publish(store, manifest)
    for verdict in (Verdict.FAILED, Verdict.RESTORED):
        base_backups.record_proof(store, manifest.id, proof(verdict), comparable=False)
    assert base_backups.load(store, manifest.id).verdict is Verdict.RESTORED


def test_a_verdict_is_made_anew_with_a_lost_catalog_and_told_when_it_is_damaged() -> None:
    store, manifest = stored()
    base_backups.publish(store, manifest)
    base_backups.record_proof(store, manifest.id, proof(), comparable=True)
    keys = [catalog_key(manifest.id), catalog_key(manifest.id, Beside.VERDICT)]
    store.delete(keys)
    assert base_backups.rebuild(store, "main") == ((manifest.id,), ())
    assert base_backups.load(store, manifest.id).verdict is Verdict.PROVEN
    store.put(keys[1], [b"{}"])
    (found,) = base_backups.list_base_backups(store, "main").backups
    assert (found.proof, bool(found.unreadable_verdict)) == (None, True)
    assert [key for key, _ in base_backups.list_base_backups(store, "main").unreadable] == [keys[1]]
    base_backups.record_proof(store, manifest.id, proof(), comparable=True)
    assert base_backups.load(store, manifest.id).verdict is Verdict.PROVEN
