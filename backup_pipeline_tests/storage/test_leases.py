"""Leases: held, renewed, lost, and the race between prune and restore in every order."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from backup_pipeline.domain.backup import Backup, BackupId, Lease
from backup_pipeline.domain.layout import catalog_key, lease_key
from backup_pipeline.domain.manifest import lease_from_json, lease_to_json
from backup_pipeline.errors import BackupNotFound, Busy, StoreError
from backup_pipeline.storage import catalog, catalog_delete, leases
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.domain.values import NOW, manifest
from backup_pipeline_tests.storage.backups import put_backup, put_objects
from backup_pipeline_tests.storage.effects import CountingStore, Died, DyingStore
from backup_pipeline_tests.storage.memory import MemoryStore

M = manifest()
IMPORTED = BackupId("app", "20260301T020000Z-imported-daily")


def clock() -> datetime:
    return NOW


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore(clock)
    put_backup(store, M)
    return store


def live(store: MemoryStore, now: datetime = NOW) -> list[str]:
    return [lease.purpose for lease in leases.live_leases(store, "app", now)]


def test_a_lease_is_there_while_it_is_held(store: MemoryStore) -> None:
    with leases.hold(store, M.id, "restore", clock=clock) as held:
        held.check()
        (lease,) = leases.live_leases(store, "app", NOW)
        assert (lease.id, lease.purpose, lease.until) == (M.id, "restore", NOW + leases.TTL)
        assert not leases.live_leases(store, "ap", NOW)
        with leases.hold(store, M.id, "proof", clock=clock):
            assert sorted(live(store)) == ["proof", "restore"]
    assert live(store) == []


def test_it_goes_when_the_work_fails(store: MemoryStore) -> None:
    with pytest.raises(ZeroDivisionError), leases.hold(store, M.id, "restore", clock=clock):
        raise ZeroDivisionError
    assert live(store) == []


def test_after_a_crash_it_ends_by_itself() -> None:
    store = MemoryStore(lambda: NOW - leases.TTL)
    lease = Lease(M.id, "00ff", "restore", NOW)
    store.put(lease_key(M.id, "00ff"), [lease_to_json(lease)])
    assert live(store, NOW + leases.SKEW - timedelta(seconds=1)) == ["restore"]
    assert live(store, NOW + leases.SKEW) == []
    assert leases.remove_ended(store, "app", NOW + timedelta(hours=25)) == {}
    assert not list(store.list("leases/"))


def test_one_whose_clock_is_far_behind_shields_while_the_store_saw_it_renewed(store: MemoryStore) -> None:
    behind = NOW - timedelta(hours=3)
    with leases.hold(store, M.id, "restore", clock=lambda: behind):
        assert live(store, NOW + leases.TTL - timedelta(seconds=1)) == ["restore"]
        assert live(store, NOW + leases.TTL + leases.SKEW) == []


def test_only_what_ended_long_ago_is_removed(store: MemoryStore) -> None:
    for token, until in (("00", timedelta(0)), ("01", timedelta(hours=2)), ("02", timedelta(hours=25))):
        key = lease_key(M.id, token)
        store.put(key, [lease_to_json(Lease(M.id, token, "restore", NOW + until))])
    store.put("leases/app/notes.txt", [b"mine"])
    leases.remove_ended(store, "app", NOW + timedelta(hours=25))
    left = [info.key for info in store.list("leases/")]
    assert left == [lease_key(M.id, "01"), lease_key(M.id, "02"), "leases/app/notes.txt"]


@pytest.mark.parametrize("body", [b"", b"garbage", lease_to_json(Lease(IMPORTED, "00", "restore", NOW))])
def test_one_that_cannot_be_read_counts_as_live_for_a_day(store: MemoryStore, body: bytes) -> None:
    store.put(lease_key(M.id, "00"), [body])
    (lease,) = leases.live_leases(store, "app", NOW + timedelta(hours=23))
    assert (lease.id, lease.purpose) == (M.id, leases.UNREADABLE)
    assert live(store, NOW + timedelta(hours=25)) == []


def test_a_lease_that_goes_while_it_is_read_is_not_there(store: MemoryStore) -> None:
    with leases.hold(store, M.id, "restore", clock=clock):

        class Vanishing(CountingStore):
            def read(self, key: str) -> Iterator[bytes]:
                store.delete([key])
                return super().read(key)

        assert leases.live_leases(Vanishing(store), "app", NOW) == ()


def test_it_is_renewed_until_the_end_and_not_after(store: MemoryStore) -> None:
    renewed = threading.Event()
    times = iter(NOW + timedelta(minutes=number) for number in range(10_000))

    class Watching(CountingStore):
        def _note(self, effect: str, key: str) -> None:
            super()._note(effect, key)
            if len(self.effects) == 4:
                renewed.set()

    watching = Watching(store)
    ttl = timedelta(milliseconds=30)
    with leases.hold(watching, M.id, "restore", clock=lambda: next(times), ttl=ttl) as held:
        assert renewed.wait(30)
        lease = lease_from_json(read_all(store, lease_key(M.id, held.token)), lease_key(M.id, held.token))
        assert lease.until > NOW + ttl + timedelta(minutes=1)
    puts = [effect.startswith("put") for effect in watching.effects]
    assert puts == [True] * (len(puts) - 1) + [False]
    assert live(store) == []


def test_a_lease_that_could_not_be_renewed_is_told(store: MemoryStore) -> None:
    tried = threading.Event()
    now = [NOW]

    class Failing(CountingStore):
        def _note(self, effect: str, key: str) -> None:
            super()._note(effect, key)
            if len(self.effects) > 1 and effect == "put":
                if len(self.effects) > 3:
                    tried.set()
                raise StoreError("no answer")

    with leases.hold(
        Failing(store), M.id, "restore", clock=lambda: now[0], ttl=timedelta(seconds=0.03)
    ) as held:
        assert tried.wait(30)
        held.check()
        now[0] = NOW + timedelta(minutes=1)
        with pytest.raises(StoreError, match="ran out") as caught:
            held.check()
        assert caught.value.detail["reason"] == "no answer"


def test_a_lease_that_cannot_be_removed_does_not_spoil_the_work(store: MemoryStore) -> None:
    class Failing(CountingStore):
        def delete(self, keys: Sequence[str]) -> dict[str, str]:
            raise StoreError(f"no answer for {keys}")

    with leases.hold(Failing(store), M.id, "restore", clock=clock):
        pass
    assert live(store) == ["restore"]


def test_who_may_only_read_restores_without_a_lease_and_is_told(store: MemoryStore) -> None:
    class ReadOnly(CountingStore):
        def _note(self, effect: str, key: str) -> None:
            raise StoreError(f"{effect} of {key} is denied")

    reader = ReadOnly(store)
    with pytest.raises(StoreError, match="denied"), leases.hold(reader, M.id, "proof", clock=clock):
        raise AssertionError
    times = iter((NOW, NOW + timedelta(days=1)))
    with leases.hold(reader, M.id, "restore", clock=lambda: next(times), required=False) as held:
        assert "is denied" in held.unshielded
        held.check()
    gone = manifest(at=datetime(2026, 3, 2, tzinfo=UTC)).id
    with pytest.raises(BackupNotFound), leases.hold(reader, gone, "restore", clock=clock, required=False):
        raise AssertionError
    with leases.hold(store, M.id, "restore", clock=clock, required=False) as held:
        assert not held.unshielded
        assert live(store) == ["restore"]


def test_nothing_is_held_of_a_backup_that_is_gone(store: MemoryStore) -> None:
    gone = manifest(at=datetime(2026, 3, 2, tzinfo=UTC)).id
    for purpose in ("restore", "proof"):
        with pytest.raises(BackupNotFound), leases.hold(store, gone, purpose, clock=clock):
            raise AssertionError
    with leases.hold(store, gone, "dump", clock=clock):
        assert live(store) == ["dump"]
    assert live(store) == []


def test_an_imported_dump_is_not_restored_while_it_is_pruned(store: MemoryStore) -> None:
    with leases.claim(store, IMPORTED, clock=clock) as others:
        assert others == ()
        with pytest.raises(Busy), leases.hold(store, IMPORTED, "restore", clock=clock):
            raise AssertionError
    with (
        leases.hold(store, IMPORTED, "restore", clock=clock),
        leases.claim(store, IMPORTED, clock=clock) as others,
    ):
        assert [lease.purpose for lease in others] == ["restore"]


def test_a_clock_that_is_ahead_sees_what_the_store_says_is_held(store: MemoryStore) -> None:
    """Of a restore by a prune, of a prune by a restore, and by whoever publishes or pins."""

    def ahead() -> datetime:
        return NOW + timedelta(days=1)

    assert leases.clock_ahead(store, "app", clock=ahead) == timedelta(days=1)
    assert leases.clock_ahead(store, "app", clock=lambda: NOW - timedelta(days=1)) == timedelta()
    with (
        leases.hold(store, M.id, "restore", clock=clock),
        leases.claim(store, M.id, clock=ahead) as others,
    ):
        assert [lease.purpose for lease in others] == ["restore"]
    with leases.claim(store, IMPORTED, clock=clock):
        with pytest.raises(Busy), leases.hold(store, IMPORTED, "restore", clock=ahead):
            raise AssertionError
        with pytest.raises(Busy):
            catalog.pin(store, IMPORTED, at=ahead())
    late = replace(manifest(suffix="aaaaaa"), finished_at=ahead())
    put_objects(store, late)
    with leases.claim(store, late.id, clock=clock), pytest.raises(Busy):
        catalog.publish(store, late)


def test_what_a_prune_that_died_wrote_to_see_the_time_is_removed(store: MemoryStore) -> None:
    with pytest.raises(Died):
        leases.clock_ahead(DyingStore(store, before=2), "app", clock=clock)
    (left,) = (info.key for info in store.list("leases/"))
    assert left.startswith("leases/app/clock.")
    assert live(store) == []
    leases.remove_ended(store, "app", NOW + timedelta(hours=23))
    assert [info.key for info in store.list("leases/")] == [left]
    leases.remove_ended(store, "app", NOW + timedelta(hours=25))
    assert not list(store.list("leases/"))


def test_of_two_prunes_at_least_one_draws_back(store: MemoryStore) -> None:
    with leases.claim(store, M.id, clock=clock) as first, leases.claim(store, M.id, clock=clock) as second:
        assert not first
        assert [lease.purpose for lease in second] == ["prune"]


class Stepping(CountingStore):
    """A store that lets another party act right before the n-th request of ours."""

    def __init__(self, store: MemoryStore, before: int, act: Callable[[], object]) -> None:
        super().__init__(store)
        self.requests = 0
        self._before = before
        self._act = act

    def _look(self) -> None:
        self.requests += 1
        if self.requests == self._before:
            self._act()


def test_a_restore_that_begins_at_any_moment_of_a_prune_finds_all_or_is_refused() -> None:
    outcomes = set()
    for before in range(1, 100):
        store = MemoryStore(clock)
        backup = put_backup(store, M)
        with ExitStack() as restores:

            def begin(store: MemoryStore = store, restores: ExitStack = restores) -> None:
                with suppress(BackupNotFound):
                    restores.enter_context(leases.hold(store, M.id, "restore", clock=clock))

            stepping = Stepping(store, before, begin)
            done = catalog_delete.delete(stepping, backup, clock=lambda: NOW)
            restoring = bool(live(store))
            if restoring and done.kept:
                assert catalog.load(store, M.id) == backup
                assert all(item.key in store.objects for item in M.objects)
            elif not done.kept:
                assert not list(store.list("databases/"))
            if stepping.requests < before:
                break
            outcomes.add((restoring, bool(done.kept), f"put {catalog_key(M.id)}" in stepping.effects))
    else:
        raise AssertionError("the prune did not end")
    # It is refused; or seen beforehand; or seen after the manifest went, which is put back.
    assert outcomes >= {(False, False, False), (True, True, False), (True, True, True)}
    assert (True, False, False) not in outcomes


def test_a_prune_at_any_moment_of_a_restores_beginning_leaves_all_or_the_restore_is_refused() -> None:
    outcomes = set()
    for before in range(1, 100):
        store = MemoryStore(clock)
        backup = put_backup(store, M)

        def prune(store: MemoryStore = store, backup: Backup = backup) -> None:
            catalog_delete.delete(store, backup, clock=lambda: NOW)

        stepping = Stepping(store, before, prune)
        try:
            with leases.hold(stepping, M.id, "restore", clock=clock):
                begun = stepping.requests
                assert catalog_key(M.id) in store.objects
                assert all(item.key in store.objects for item in M.objects)
        except BackupNotFound:
            assert not list(store.list("databases/"))
            outcomes.add("refused")
            continue
        outcomes.add("begun")
        if begun < before:
            break
    assert outcomes == {"refused", "begun"}
