"""Prune on stores: what it logs, what it deletes, and what it leaves after every crash and race."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backup_pipeline.actions import prune
from backup_pipeline.config import DatabaseConfig, Secret, TierConfig
from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.domain.layout import INDEX, Beside, catalog_key, copy_key, data_prefix
from backup_pipeline.errors import Busy, StoreError
from backup_pipeline.storage import catalog, leases
from backup_pipeline.storage.catalog_publish import missing_objects
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import ObjectInfo, Store
from backup_pipeline_tests.domain.values import NOW, manifest, proof
from backup_pipeline_tests.storage.backups import contents, put_backup, put_objects
from backup_pipeline_tests.storage.effects import CountingStore, DatedStore, Died, DyingStore
from backup_pipeline_tests.storage.memory import MemoryStore

CONFIG = DatabaseConfig(
    name="app", dsn=Secret("postgresql:///app"), tiers=(TierConfig("daily", "0 2 * * *", 3),)
)


def day(number: int) -> datetime:
    return datetime(2026, 3, number, 2, tzinfo=UTC)


@pytest.fixture
def store() -> MemoryStore:
    """Seven daily backups, the second of them proven."""
    store = MemoryStore()
    for number in range(1, 8):
        put_backup(store, manifest(at=day(number)))
    catalog.record_proof(store, manifest(at=day(2)).id, proof())
    return store


def run(
    store: Store, *, imports: Store | None = None, now: datetime = NOW, ahead: timedelta = timedelta()
) -> tuple[prune.Pruned, list[str]]:
    """A prune at `now` by a machine whose clock is `ahead` of the store's."""
    log: list[str] = []
    planned = prune.plan(store, CONFIG, now=now + ahead, imports=imports)
    dated = DatedStore(store, at=now)
    return prune.carry_out(dated, planned, clock=lambda: now + ahead, log=log.append, imports=imports), log


def days(store: Store) -> list[int]:
    return sorted(backup.taken_at.day for backup in catalog.list_backups(store).backups)


def test_every_decision_is_logged_before_anything_is_deleted(store: MemoryStore) -> None:
    log: list[str] = []

    class Watching(CountingStore):
        def delete(self, keys: Sequence[str]) -> dict[str, str]:
            log.append("DELETE")
            return super().delete(keys)

    planned = prune.plan(store, CONFIG, now=NOW)
    done = prune.carry_out(Watching(DatedStore(store, at=NOW)), planned, clock=lambda: NOW, log=log.append)
    assert log[:7] == [str(decision) for decision in planned.plan.decisions]
    assert log.index("DELETE") == 7
    assert days(store) == [2, 5, 6, 7]
    assert [backup.taken_at.day for backup in done.deleted] == [1, 3, 4]
    assert log[-1] == "prune of app: 3 backups deleted, " + log[-1].split("deleted, ")[1]
    for backup in done.deleted:
        assert not [key for key in store.objects if backup.stamp in key]


def test_a_second_run_finds_nothing_to_do(store: MemoryStore) -> None:
    run(store)
    before = contents(store)
    done, _ = run(store)
    assert not done.deleted
    assert contents(store) == before


def test_a_real_directory_is_pruned_alike(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for number in range(1, 6):
        put_backup(store, manifest(at=day(number)))
    run(store)
    assert days(store) == [3, 4, 5]
    assert not [
        info.key for info in store.list("") if "202603" in info.key and info.key.split("202603")[1] < "03"
    ]


def test_another_database_is_not_touched(store: MemoryStore) -> None:
    for number in range(1, 8):
        put_backup(store, manifest("other", at=day(number)))
        put_backup(store, manifest("app2", at=day(number)))
    before = {key: data for key, data in contents(store).items() if "/app/" not in key}
    run(store)
    assert before.items() <= contents(store).items()


def test_a_plan_that_is_no_longer_right_is_not_carried_out(store: MemoryStore) -> None:
    planned = prune.plan(store, CONFIG, now=NOW)
    catalog.pin(store, manifest(at=day(1)).id, at=NOW)
    catalog.record_proof(store, manifest(at=day(7)).id, proof(Verdict.FAILED))
    log: list[str] = []
    done = prune.carry_out(DatedStore(store, at=NOW), planned, clock=lambda: NOW, log=log.append)
    assert days(store) == [1, 2, 4, 5, 6, 7]
    assert [reason for _, reason in done.kept_after_all] == ["pinned", "number 3 of the 3 newest of daily"]
    assert f"kept after all {manifest(at=day(1)).id}: pinned" in log


def test_a_floor_that_breaks_while_others_are_deleted_stops_the_rest(store: MemoryStore) -> None:
    class Racing(CountingStore):
        def delete(self, keys: Sequence[str]) -> dict[str, str]:
            if catalog_key(manifest(at=day(1)).id) in keys:
                catalog.record_proof(store, manifest(at=day(2)).id, proof(Verdict.FAILED))
            return super().delete(keys)

    racing = Racing(DatedStore(store, at=NOW))
    planned = prune.plan(racing, CONFIG, now=NOW)
    done = prune.carry_out(racing, planned, clock=lambda: NOW, log=lambda _: None)
    assert [backup.taken_at.day for backup in done.deleted] == [1]
    assert {reason for _, reason in done.kept_after_all} == {
        f"the verdict of {manifest(at=day(2)).id}, which stays for it, has changed"
    }


def test_a_backup_in_use_is_kept(store: MemoryStore) -> None:
    with leases.hold(store, manifest(at=day(1)).id, "restore", clock=lambda: NOW):
        run(store)
    assert days(store) == [1, 2, 5, 6, 7]
    run(store)
    assert days(store) == [2, 5, 6, 7]


def test_a_clock_that_is_a_day_ahead_takes_nothing_that_is_in_use() -> None:
    """Held by a restore, by a proof on a machine whose clock is behind, and what is just being uploaded."""
    store = MemoryStore(lambda: NOW)
    for number in range(1, 8):
        put_backup(store, manifest(at=day(number)))
    uploaded = manifest(at=NOW - timedelta(hours=1))
    put_objects(store, uploaded)
    with (
        leases.hold(store, manifest(at=day(1)).id, "restore", clock=lambda: NOW),
        leases.hold(store, manifest(at=day(3)).id, "proof", clock=lambda: NOW - timedelta(days=2)),
    ):
        done, log = run(store, ahead=timedelta(days=1, hours=2))
    assert days(store) == [1, 3, 5, 6, 7]
    assert done.collected == 0
    assert all(item.key in store.objects for item in uploaded.objects)
    assert any("is 1 d 2 h ahead of the store's" in line for line in log)
    assert not list(store.list("leases/"))


def test_a_backup_that_lost_an_object_counts_for_nothing(store: MemoryStore) -> None:
    store.delete([manifest(at=day(7)).objects[0].key])
    _, log = run(store)
    assert days(store) == [2, 4, 5, 6, 7]
    assert "database.dump is missing" in log[0]


def test_a_backup_published_while_the_plan_is_made_is_neither_damaged_nor_left_over(
    store: MemoryStore,
) -> None:
    new = manifest(at=day(9))

    class Racing(CountingStore):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            found = list(super().list(prefix))
            if prefix == "databases/app/" and catalog_key(new.id) not in store.objects:
                put_backup(store, new)
            return iter(found)

    planned = prune.plan(Racing(store), CONFIG, now=NOW)
    assert planned.plan.decisions[0].backup.id == new.id
    assert "newest of daily" in planned.plan.decisions[0].reasons[-1]
    assert not planned.orphans


def test_what_cannot_be_read_is_left_alone_and_costs_nothing(store: MemoryStore) -> None:
    for number in (1, 7):
        store.put(catalog_key(manifest(at=day(number)).id), [b"damaged"])
    before = {key: data for key, data in contents(store).items() if "20260301" in key or "20260307" in key}
    _, log = run(store)
    assert days(store) == [2, 4, 5, 6]
    assert before.items() <= contents(store).items()
    assert any(line.startswith(f"leave {catalog_key(manifest(at=day(1)).id)}") for line in log)


def test_killed_before_each_effect_all_promises_hold_and_the_next_run_converges(store: MemoryStore) -> None:
    def copy() -> MemoryStore:
        fresh = MemoryStore()
        fresh.objects = dict(store.objects)
        return fresh

    counting = CountingStore(copy())
    run(counting)
    want = contents(counting)
    for before in range(1, len(counting.effects) + 1):
        victim = copy()
        with pytest.raises(Died):
            run(DyingStore(victim, before=before))
        listing = catalog.list_backups(victim, fresh=True)
        sizes = {info.key: info.size_bytes for info in victim.list("databases/")}
        for backup in listing.backups:
            assert backup.manifest is not None
            assert not missing_objects(backup.manifest.objects, sizes)
        assert {2, 5, 6, 7} <= set(days(victim))
        run(victim, now=NOW + timedelta(hours=1))
        assert contents(victim) == want


def test_two_prunes_at_once_delete_no_more_than_one(store: MemoryStore) -> None:
    """A second prune runs as a whole before each request of the first."""
    want: dict[str, bytes] = {}
    for before in range(1, 1000):
        fresh = MemoryStore(lambda: NOW)
        fresh.objects = dict(store.objects)

        class Stepping(CountingStore):
            requests = 0

            def _look(self, fresh: MemoryStore = fresh, before: int = before) -> None:
                self.requests += 1
                if self.requests == before:
                    run(fresh)

        first = Stepping(fresh)
        run(first)
        assert days(fresh) == [2, 5, 6, 7]
        run(fresh, now=NOW + timedelta(hours=1))
        want = want or contents(fresh)
        assert contents(fresh) == want
        if first.requests < before:
            return
    raise AssertionError("the prune did not end")


class TestLeftovers:
    M = manifest(at=day(1))

    def planned(self, store: MemoryStore, now: datetime = NOW) -> tuple[bool, str]:
        (decision,) = prune.plan(store, CONFIG, now=now).orphans
        return decision.keep, decision.reason

    def test_objects_that_nobody_published_are_collected_after_a_day(self) -> None:
        clock = [day(1)]
        store = MemoryStore(lambda: clock[0])
        put_objects(store, self.M)
        assert self.planned(store, day(1) + timedelta(hours=23))[0]
        clock[0] = day(2)
        store.put(self.M.objects[1].key, [b"later"])
        assert self.planned(store, day(2) + timedelta(hours=1))[0]
        done, log = run(store, now=day(4))
        assert done.collected == 1
        assert not contents(store)
        assert any(line.startswith(f"collect 2 unlisted objects of {self.M.id}") for line in log)

    def test_an_upload_that_holds_a_lease_is_left(self) -> None:
        store = MemoryStore()
        put_objects(store, self.M)
        with leases.hold(store, self.M.id, "dump", clock=lambda: NOW):
            run(store)
            assert "lease" in self.planned(store)[1]
        assert len(contents(store)) == 2

    def test_a_whole_backup_without_its_manifest_is_kept_and_told(self) -> None:
        store = MemoryStore()
        put_backup(store, self.M)
        store.delete([catalog_key(self.M.id)])
        _, log = run(store)
        assert log[0].endswith("unlisted but complete: run `backup-pipeline rebuild`")
        store.delete([self.M.objects[0].key])
        _, log = run(store)
        assert "unlisted and not whole" in log[0]
        store.put(copy_key(self.M.id, "daily", Beside.MANIFEST), [b"damaged"])
        _, log = run(store)
        assert "cannot be read" in log[0]
        assert len(contents(store)) == 2

    def test_a_pin_keeps_even_what_is_not_listed(self) -> None:
        store = MemoryStore()
        put_backup(store, self.M)
        catalog.pin(store, self.M.id, at=NOW)
        store.delete([catalog_key(self.M.id), copy_key(self.M.id, "daily", Beside.MANIFEST)])
        run(store)
        assert self.planned(store) == (
            True,
            "it is pinned, but its manifest is missing: unpin it to have it collected",
        )
        store.delete([catalog_key(self.M.id, Beside.PIN)])
        assert self.planned(store)[0], "the pin's copy counts as well"
        catalog.unpin(store, self.M.id)
        assert self.planned(store) == (False, "no manifest names them, and nobody holds a lease")

    def test_a_verdict_goes_with_the_objects(self) -> None:
        store = MemoryStore()
        put_backup(store, self.M)
        catalog.record_proof(store, self.M.id, proof())
        store.delete([catalog_key(self.M.id), copy_key(self.M.id, "daily", Beside.MANIFEST)])
        run(store)
        assert not contents(store)

    def test_what_is_published_in_the_last_moment_is_not_collected(self) -> None:
        store = MemoryStore()
        put_objects(store, self.M)

        class Racing(CountingStore):
            def _note(self, effect: str, key: str) -> None:
                if key.startswith(f"leases/app/{record.id.stamp}") and effect == "put":
                    catalog.publish(store, record)

        record = self.M
        done, log = run(Racing(store))
        assert done.collected == 0
        assert f"unlisted objects of {self.M.id}: {catalog_key(self.M.id)} is there now" in log
        assert days(store) == [1]

    def test_objects_that_are_none_of_ours_are_left(self) -> None:
        store = MemoryStore()
        for key in ("databases/app/notes.txt", "databases/app/dumps/daily/x/y", "databases/application/x"):
            store.put(key, [b"mine"])
        done, _ = run(store)
        assert done.collected == 0
        assert len(contents(store)) == 3


class TestDenials:
    def test_a_lock_is_told_and_tolerated(self, store: MemoryStore) -> None:
        held = manifest(at=day(1))
        store.locked[held.objects[0].key] = "Access Denied because object protected by object lock."
        done, log = run(store)
        assert len(done.deleted) == 3
        assert list(done.locked) == [held.objects[0].key]
        assert log[-1].startswith(f"still locked: {held.objects[0].key}")
        # Unlisted now, it is tried again each time, and goes once the lock ends.
        done, _ = run(store)
        assert list(done.locked) == [held.objects[0].key]
        store.locked.clear()
        done, _ = run(store)
        assert (done.collected, done.locked) == (1, {})
        assert data_prefix(held.id, "daily") not in " ".join(store.objects)

    def test_a_missing_permission_fails_after_all_else_is_done(self, store: MemoryStore) -> None:
        denied = manifest(at=day(3))
        store.locked[copy_key(denied.id, "daily", Beside.MANIFEST)] = "Access Denied"
        with pytest.raises(StoreError, match="1 object could not be deleted") as caught:
            run(store)
        assert caught.value.detail == {copy_key(denied.id, "daily", Beside.MANIFEST): "Access Denied"}
        assert days(store) == [2, 3, 5, 6, 7]


class TestImported:
    @pytest.fixture
    def imports(self) -> MemoryStore:
        imports = MemoryStore()
        for number in range(1, 6):
            imports.put(f"daily/backup_daily_202602{number:02}_020000.sql.gz", [b"PGDMP"])
        return imports

    def test_they_go_under_the_same_retention(self, imports: MemoryStore) -> None:
        store = MemoryStore()
        put_backup(store, manifest(at=day(1)))
        done, _ = run(store, imports=imports)
        assert [str(backup) for backup in done.deleted] == [
            f"app/2026020{number}T020000Z-imported-daily" for number in (1, 2, 3)
        ]
        assert [key[-13:-11] for key in imports.objects] == ["02", "02"]
        assert done.freed_bytes == 15

    def test_a_pin_and_a_lease_keep_them(self, imports: MemoryStore) -> None:
        store = MemoryStore()
        first, second = (BackupId("app", f"2026020{number}T020000Z-imported-daily") for number in (1, 2))
        catalog.pin(store, first, at=NOW)
        with leases.hold(store, second, "restore", clock=lambda: NOW):
            run(store, imports=imports)
        assert len(imports.objects) == 5

    def test_a_long_prune_still_claims_what_it_deletes(self, imports: MemoryStore) -> None:
        """A restore that begins while a dump is deleted is refused, however long ago the prune began."""
        store = MemoryStore()
        refused: list[BackupId] = []

        def clock() -> datetime:
            return NOW + timedelta(hours=len(refused))

        class Racing(CountingStore):
            def delete(self, keys: Sequence[str]) -> dict[str, str]:
                (claimed,) = {item.id for item in leases.live_leases(store, "app", clock())}
                with pytest.raises(Busy), leases.hold(store, claimed, "restore", clock=clock):
                    raise AssertionError
                refused.append(claimed)
                return super().delete(keys)

        planned = prune.plan(store, CONFIG, now=NOW, imports=imports)
        dated = DatedStore(store, at=NOW)
        done = prune.carry_out(dated, planned, clock=clock, log=lambda _: None, imports=Racing(imports))
        assert refused == done.deleted
        assert len(refused) > 1

    def test_an_empty_one_counts_for_nothing(self, imports: MemoryStore) -> None:
        imports.put("daily/backup_daily_20260209_020000.sql.gz", [b""])
        _, log = run(MemoryStore(), imports=imports)
        assert "it is empty" in log[0]
        assert len(imports.objects) == 4

    def test_without_their_store_they_are_not_touched(self, imports: MemoryStore) -> None:
        store = MemoryStore()
        planned = prune.plan(store, CONFIG, now=NOW, imports=imports)
        done = prune.carry_out(DatedStore(store, at=NOW), planned, clock=lambda: NOW, log=lambda _: None)
        assert not done.deleted
        assert len(imports.objects) == 5


def test_a_large_catalog_gets_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many databases its backups are of; and again, once enough was added."""
    times = iter(NOW + timedelta(seconds=number) for number in range(10_000))
    store = MemoryStore(clock=lambda: next(times))
    for name in ("app", "b", "c", "d"):
        put_backup(store, manifest(name, at=day(1)))
    run(store)
    assert INDEX not in store.objects
    monkeypatch.setattr(prune, "INDEX_FROM", 4)
    run(store)
    first = store.objects[INDEX]
    store.requests.clear()
    assert len(catalog.list_backups(store).backups) == 4
    assert store.requests["read"] == 1
    run(store)
    assert store.objects[INDEX] == first
    for name in ("e", "f", "g", "h"):
        put_backup(store, manifest(name, at=day(1)))
    run(store)
    assert store.objects[INDEX] != first


def test_a_tier_that_is_gone_from_the_configuration_keeps_its_backups(store: MemoryStore) -> None:
    config = replace(CONFIG, tiers=(TierConfig("weekly", "0 2 * * 0", 1),))
    assert not prune.plan(store, config, now=NOW).plan.delete


def test_leases_of_crashed_runs_are_cleared_away() -> None:
    store = MemoryStore()
    put_backup(store, manifest(at=day(1)))
    dying = DyingStore(store, before=2)
    with pytest.raises(Died), leases.hold(dying, manifest(at=day(1)).id, "restore", clock=lambda: day(2)):
        dying.delete(["x"])
    assert list(store.list("leases/"))
    run(store)
    assert not list(store.list("leases/"))
