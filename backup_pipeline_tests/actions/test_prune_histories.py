"""Random histories of a store: whatever happened, and wherever a prune dies, its promises hold."""

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backup_pipeline.actions import prune
from backup_pipeline.config import DatabaseConfig, Secret, TierConfig
from backup_pipeline.domain.backup import Backup, BackupId, Lease, Verdict
from backup_pipeline.domain.layout import Beside, catalog_key, copy_key, lease_key, parse_catalog_key
from backup_pipeline.domain.manifest import lease_to_json
from backup_pipeline.errors import BackupError
from backup_pipeline.storage import catalog, leases
from backup_pipeline.storage.catalog import exists
from backup_pipeline.storage.catalog_publish import missing_objects
from backup_pipeline.storage.catalog_rebuild import rebuild
from backup_pipeline.storage.imported import list_imported
from backup_pipeline.storage.store import ObjectInfo
from backup_pipeline_tests.domain.promises import must_stay
from backup_pipeline_tests.domain.values import manifest, proof
from backup_pipeline_tests.storage.backups import contents, put_backup, put_objects
from backup_pipeline_tests.storage.effects import CountingStore, Died, DyingStore
from backup_pipeline_tests.storage.memory import MemoryStore

TIERS = {"daily": 2, "weekly": 1}
CONFIG = DatabaseConfig(
    name="app",
    dsn=Secret("postgresql:///app"),
    tiers=tuple(TierConfig(name, "0 2 * * *", keep) for name, keep in TIERS.items()),
)


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """A history reads the same few records hundreds of times: remember them, and start no threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "ThreadPoolExecutor", OneAfterTheOther)
        for reader in ("manifest_from_json", "verdict_from_json"):
            patch.setattr(catalog, reader, lru_cache(2000)(getattr(catalog, reader)))
        yield


class OneAfterTheOther:
    """An executor without threads."""

    def __init__(self, threads: int) -> None:
        assert threads

    def __enter__(self) -> "OneAfterTheOther":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def map(self, action: Callable[[ObjectInfo], bytes], infos: list[ObjectInfo]) -> Iterator[bytes]:
        return map(action, infos)


class Racing(CountingStore):
    """A store in which another party acts right before our n-th request."""

    def __init__(self, store: MemoryStore, at: int, act: Callable[[], object]) -> None:
        super().__init__(store)
        self.at = at
        self._act = act
        self._requests = 0

    def _look(self) -> None:
        self._requests += 1
        if self._requests == self.at:
            self._act()


class History:
    """A store, its clock, and what may happen to it; `step` lets one thing happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = datetime(2026, 3, 1, tzinfo=UTC)
        self.store = MemoryStore(lambda: self.now)
        self.imports = MemoryStore(lambda: self.now)
        self.told: list[str] = []

    def listed(self) -> list[Backup]:
        own = catalog.list_backups(self.store, "app", fresh=True)
        older = list_imported(self.imports, self.store, "app", fresh=True)
        return [*own.backups, *older.backups]

    def damaged(self) -> set[BackupId]:
        sizes = {info.key: info.size_bytes for info in self.store.list("databases/")}
        return {
            item.id
            for item in self.listed()
            if (missing_objects(item.manifest.objects, sizes) if item.manifest else not item.size_bytes)
        }

    def any_backup(self) -> Backup | None:
        found = self.listed()
        return self.random.choice(found) if found else None

    def step(self) -> None:
        """One thing happens."""
        happenings = [
            self.backup, self.backup, self.backup, self.backup, self.prove, self.prove, self.pin, self.lease,
            self.pass_time, self.pass_time, self.crashed_upload, self.damage, self.old_dump, self.prune,
            self.prune, self.prune, self.race, self.race, self.rebuild,
        ]  # fmt: skip
        happening = self.random.choice(happenings)
        self.told.append(happening.__name__)
        happening()

    def backup(self) -> None:
        at = self.now + timedelta(days=self.random.choice((0,) * 8 + (-3, 5)))
        tier = self.random.choice(("daily", "daily", "daily", "weekly", "monthly", "manual"))
        expires = at + timedelta(days=self.random.randrange(4)) if tier == "manual" else None
        suffix = f"{self.random.randrange(16**6):06x}"
        put_backup(self.store, manifest(at=at, tier=tier, suffix=suffix, expires_at=expires))
        self.now += timedelta(hours=self.random.choice((1, 24)))

    def old_dump(self) -> None:
        at = self.now - timedelta(days=self.random.randrange(10), seconds=self.random.randrange(60))
        body = b"PGDMP" * self.random.choice((0, 1, 1))
        self.imports.put(f"daily/backup_daily_{at:%Y%m%d_%H%M%S}.sql.gz", [body])

    def prove(self) -> None:
        backup = self.any_backup()
        verdicts = (Verdict.PROVEN, Verdict.PROVEN, Verdict.FAILED, Verdict.RESTORED, Verdict.NOT_PROVABLE)
        if backup and not backup.unreadable_verdict:
            catalog.record_proof(self.store, backup.id, proof(self.random.choice(verdicts), self.now))

    def pin(self) -> None:
        backup = self.any_backup()
        if backup and backup.pinned:
            catalog.unpin(self.store, backup.id)
        elif backup:
            catalog.pin(self.store, backup.id, at=self.now)

    def lease(self) -> None:
        """A restore that holds its lease, or died with it."""
        backup = self.any_backup()
        if backup:
            until = self.now + timedelta(minutes=self.random.choice((-30, 15)))
            body = self.random.choice((lease_to_json(Lease(backup.id, "00", "restore", until)), b"damaged"))
            self.store.put(lease_key(backup.id, "00"), [body])

    def pass_time(self) -> None:
        self.now += timedelta(hours=self.random.choice((1, 12, 24, 24 * 7, -1, -24, -24 * 7, 24 * 400)))

    def crashed_upload(self) -> None:
        record = manifest(at=self.now, suffix=f"{self.random.randrange(16**6):06x}")
        dying = DyingStore(self.store, before=self.random.randrange(1, 5))
        try:
            put_objects(dying, record)
            catalog.publish(dying, record)
        except Died:
            return

    def damage(self) -> None:
        backup = self.any_backup()
        if backup and backup.manifest:
            victims = [item.key for item in backup.manifest.objects] + [catalog_key(backup.id)]
            victims += [copy_key(backup.id, backup.tier, Beside.MANIFEST)]
            victims += [catalog_key(backup.id, Beside.VERDICT)] * 2
            victim = self.random.choice(victims)
            if victim in self.store.objects:
                self.store.put(victim, [b"damaged"])

    def rebuild(self) -> None:
        rebuild(self.store)

    def prune(self) -> None:
        """A prune that may die before any of its effects; then all promises are checked."""
        live = leases.live_leases(self.store, "app", self.now)
        before = {item.id: item for item in self.listed()}
        damaged, objects = self.damaged(), contents(self.store)
        protected = must_stay(before.values(), tiers=TIERS, leases=live, now=self.now, damaged=damaged) & set(
            before
        )
        unreadable = {key for key, _ in catalog.list_backups(self.store, "app", fresh=True).unreadable}
        dying = DyingStore(self.store, before=self.random.choice((*range(1, 25), 10**6, 10**6, 10**6)))
        try:
            planned = prune.plan(dying, CONFIG, now=self.now, imports=self.imports)
            prune.carry_out(dying, planned, clock=lambda: self.now, log=lambda _: None, imports=self.imports)
        except Died:
            self.told[-1] += f" died: {dying.effects[-1:]}"
        after = {item.id: item for item in self.listed()}
        assert protected <= set(after), f"lost {protected - set(after)}"
        assert all(before[kept] == after[kept] for kept in protected)
        assert self.damaged() <= damaged, "a listed backup lost its objects"
        assert set(after) <= set(before)
        gone = set(objects) - set(contents(self.store))
        stays = {kept.stamp for kept in protected} | {
            named[0].stamp
            for key in unreadable
            if (named := parse_catalog_key(key)) and named[1] is Beside.MANIFEST
        }
        lost = [key for key in gone if any(f"/{stamp}" in key for stamp in stays)]
        assert not lost, f"deleted under a backup that stays: {lost}"

    def race(self) -> None:
        """Someone pins a backup, begins to restore it, or prunes too, at any moment of a prune."""
        victim = self.any_backup()
        if victim is None:
            return
        meanwhile = self.random.choice((self.pin_one, self.restore_one, self.prune_too))
        before, damaged = {item.id: item for item in self.listed()}, self.damaged()
        live = leases.live_leases(self.store, "app", self.now)
        protected = must_stay(before.values(), tiers=TIERS, leases=live, now=self.now, damaged=damaged)
        won: list[bool] = []
        racing = Racing(self.store, self.random.randrange(1, 60), lambda: won.append(meanwhile(victim.id)))
        planned = prune.plan(racing, CONFIG, now=self.now, imports=self.imports)
        prune.carry_out(racing, planned, clock=lambda: self.now, log=lambda _: None, imports=self.imports)
        after = {item.id: item for item in self.listed()}
        self.told[-1] += f" {meanwhile.__name__} {victim.id} at request {racing.at}: {won}"
        assert protected <= set(after), f"lost {protected - set(after)}"
        assert self.damaged() <= damaged, "a listed backup lost its objects"
        if won == [True] and not victim.id.imported:
            assert victim.id in after, f"lost {victim.id}, which was claimed in time"

    def pin_one(self, backup: BackupId) -> bool:
        try:
            catalog.pin(self.store, backup, at=self.now)
        except BackupError:
            return False
        return True

    def restore_one(self, backup: BackupId) -> bool:
        """A restore that begins, and then holds its lease until it ends by itself."""
        dying = DyingStore(self.store, before=2)
        try:
            with leases.hold(dying, backup, "restore", clock=lambda: self.now):
                dying.delete([])
                raise Died
        except BackupError:
            return False
        except Died:
            return exists(self.store, catalog_key(backup))

    def prune_too(self, _: BackupId) -> bool:
        planned = prune.plan(self.store, CONFIG, now=self.now, imports=self.imports)
        prune.carry_out(self.store, planned, clock=lambda: self.now, log=lambda _: None, imports=self.imports)
        return False

    def settle(self) -> None:
        """Left alone, prune comes to rest: then it has nothing more to do, and leaves no mess.

        A clock that went back makes the leases of the dead live longer: wait until it has caught up.
        """
        newest = max((info.modified_at for _, info in self.store.objects.values()), default=self.now)
        self.now = max(self.now, newest) + timedelta(days=2)
        done = prune.Pruned()
        for _ in range(2):
            planned = prune.plan(self.store, CONFIG, now=self.now, imports=self.imports)
            done = prune.carry_out(
                self.store, planned, clock=lambda: self.now, log=lambda _: None, imports=self.imports
            )
            assert not done.kept_after_all
            assert not done.denied
        assert not done.deleted
        assert not done.collected


def live_through(seed: int, steps: int) -> None:
    history = History(seed)
    try:
        for _ in range(steps):
            history.step()
        history.settle()
    except (AssertionError, BackupError) as error:
        raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(history.told)) from error


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_whatever_happens_the_promises_hold(seed: int, steps: int) -> None:
    live_through(seed, steps)


@pytest.mark.slow
@pytest.mark.timeout(36_000)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 30))
@settings(max_examples=100_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_whatever_happens_the_promises_hold_a_hundred_thousand_times(seed: int, steps: int) -> None:
    live_through(seed, steps)
