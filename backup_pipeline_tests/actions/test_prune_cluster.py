"""A cluster's prune as it is carried out: logged, in an order that may stop anywhere, and never too much."""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest

from backup_pipeline.actions import prune_cluster
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.prune_cluster import ClusterPruned
from backup_pipeline.actions.windows import windows_of
from backup_pipeline.domain.backup import BackupId, Lease
from backup_pipeline.domain.layout import (
    Beside,
    base_prefix,
    catalog_key,
    drill_key,
    lease_key,
    wal_identity_key,
    wal_key,
)
from backup_pipeline.domain.manifest import lease_to_json
from backup_pipeline.domain.wal import parse_wal_name
from backup_pipeline.errors import BackupNotFound, StoreError
from backup_pipeline.storage import base_backups, drills, leases
from backup_pipeline.storage.store import Store
from backup_pipeline.wal.identity import System, adopt, claim
from backup_pipeline_tests.domain.values import drill
from backup_pipeline_tests.storage.archives import BEGUN, SEGMENT_BYTES, SYSTEM, FakeArchive
from backup_pipeline_tests.storage.effects import CountingStore, Died, DyingStore

DAY = timedelta(days=1)
DAILY = (2, 26, 50, 74, 98)


def an_archive(*, until: int = 120, bases: Sequence[int] = DAILY) -> FakeArchive:
    made = FakeArchive()
    made.segments(*range(until))
    for first in bases:
        made.base(first)
    made.at = BEGUN + timedelta(hours=until)
    return made


def prune(
    made: FakeArchive, store: Store | None = None, *, after: timedelta = timedelta(), window: timedelta = DAY
) -> ClusterPruned:
    cluster = ProtectedCluster(made.cluster(window=window).config, store or made.store)
    at = made.at + after
    said: list[str] = []
    done = prune_cluster.carry_out(
        cluster, prune_cluster.plan(cluster, now=at), clock=lambda: at, log=said.append
    )
    assert said[-1].startswith("prune of main: ")
    return done


def hours(made: FakeArchive) -> list[int]:
    found = base_backups.list_base_backups(made.store, "main", fresh=True)
    assert not found.unreadable
    return sorted(round((each.id.taken_at - BEGUN) / timedelta(hours=1)) for each in found.backups)


def segments(made: FakeArchive) -> list[int]:
    return sorted(
        int(key.split("/")[-1][16:24], 16)
        for key in made.store.objects
        if key.endswith(".zst") and "wal-archive" in key
    )


def has_all_its_wal(made: FakeArchive) -> bool:
    """Whether each listed base backup, and any moment since, can still be recovered."""
    found = windows_of(made.cluster(), now=made.at)
    return (
        not found.found.gaps
        and len(found.found.windows) == 1
        and len(found.found.windows[0].bases) == len(hours(made))
    )


def test_base_backups_go_with_their_objects_and_then_their_wal() -> None:
    made = an_archive()
    before = windows_of(made.cluster(), now=made.at)
    done = prune(made)
    assert hours(made) == [74, 98]
    assert segments(made) == list(range(74, 120))
    assert not [key for key in made.store.objects if "/base/20260301" in key or "/base/20260302" in key]
    assert (len(done.deleted), done.wal_files, done.denied) == (3, 74, {})
    after = windows_of(made.cluster(), now=made.at)
    assert before.is_met
    assert after.is_met
    again = prune(made)
    assert (again.deleted, again.wal_files) == ([], 0)


def test_a_plan_changes_nothing_and_says_all_that_would_go() -> None:
    made = an_archive()
    before = dict(made.store.objects)
    planned = prune_cluster.plan(made.cluster(), now=made.at)
    assert made.store.objects == before
    assert sum(line.startswith("delete main/") for line in planned.lines) == 3
    assert "delete 74 files of WAL, 444 B" in planned.lines[-1]
    assert "below 000000000000004A" in planned.lines[-1]
    record = json.loads(json.dumps(prune_cluster.record(planned)))
    assert record["cluster"] == "main"
    assert [each["keep"] for each in record["decisions"]] == [True, True, False, False, False]


def test_death_before_any_effect_leaves_no_base_backup_without_its_wal() -> None:
    def begin() -> FakeArchive:
        return an_archive(until=12, bases=(1, 3, 5, 7, 9))

    window, made = timedelta(hours=3), begin()
    counting = CountingStore(made.store)
    prune(made, counting, window=window)
    assert (hours(made), segments(made)) == ([7, 9], list(range(7, 12)))
    for number in range(1, len(counting.effects) + 1):
        made = begin()
        with pytest.raises(Died):
            prune(made, DyingStore(made.store, before=number), window=window)
        assert has_all_its_wal(made), counting.effects[number - 1]
        assert set(hours(made)) >= {7, 9}
        assert set(segments(made)) >= set(range(7, 12))
        made.at += timedelta(days=2)
        prune(made, window=window)  # the leases of what died have ended
        assert (hours(made), segments(made)) == ([7, 9], list(range(7, 12)))
        assert not [key for key in made.store.objects if key.startswith("leases/")]


def test_a_chain_goes_from_its_end() -> None:
    made = FakeArchive()
    made.segments(*range(200))
    whole = made.base(2)
    child = made.base(26, parent=whole.id)
    made.base(50, parent=child.id)
    for first in (100, 124, 148, 172, 190):
        made.base(first)
    made.at = BEGUN + timedelta(hours=200)
    done = prune(made)
    assert [each.taken_at.day for each in done.deleted[-3:]] == [3, 2, 1]
    assert hours(made) == [172, 190]


def held(made: FakeArchive, backup: BackupId, purpose: str) -> None:
    lease = Lease(backup, "0011223344556677", purpose, made.at + timedelta(hours=1))
    made.store.put(lease_key(backup, lease.token), [lease_to_json(lease)])


class Interrupting(CountingStore):
    """Calls `act` once, right before the first effect on a key that contains `text`."""

    def __init__(self, store: Store, text: str, act: Callable[[], object]) -> None:
        super().__init__(store)
        self._text = text
        self._act: Callable[[], object] | None = act

    def _note(self, effect: str, key: str) -> None:
        if self._text in key and self._act is not None:
            act, self._act = self._act, None
            act()
        super()._note(effect, key)


def test_a_recovery_that_begins_meanwhile_keeps_its_base_backup_and_all_wal_since() -> None:
    made = an_archive()
    oldest = base_backups.list_base_backups(made.store, "main").backups[-1].id
    store = Interrupting(made.store, "catalog/", lambda: held(made, oldest, "restore"))
    done = prune(made, store)
    assert [backup for backup, _ in done.kept_after_all] == [oldest]
    assert hours(made) == [2, 74, 98]
    assert segments(made) == list(range(2, 120))


def test_a_pin_that_comes_meanwhile_is_seen() -> None:
    made = an_archive()
    oldest = base_backups.list_base_backups(made.store, "main").backups[-1].id
    done = prune(
        made,
        Interrupting(
            made.store, "leases/main/2026", lambda: base_backups.pin(made.store, oldest, at=made.at)
        ),
    )
    assert [backup for backup, _ in done.kept_after_all] == [oldest]
    assert segments(made) == list(range(2, 120))
    base_backups.unpin(made.store, oldest)
    prune(made)
    assert hours(made) == [74, 98]
    assert not [key for key in made.store.objects if key.endswith("pin")]


@pytest.mark.parametrize("moment", ["leases/main/", "catalog/main/"])
def test_a_child_that_is_published_meanwhile_keeps_its_parent(moment: str) -> None:
    made = an_archive()
    oldest = base_backups.list_base_backups(made.store, "main").backups[-1].id
    store = Interrupting(made.store, f"{moment}{oldest.stamp}", lambda: made.base(110, parent=oldest))
    done = prune(made, store)
    ((kept, reason),) = done.kept_after_all
    assert kept == oldest
    assert reason.endswith("was taken against it meanwhile")
    assert hours(made) == [2, 74, 98, 110]


def test_no_wal_goes_while_a_base_backup_is_being_taken() -> None:
    made = an_archive()
    held(made, BackupId("main", "20260305T235900Z-aaaaaa"), leases.BASE_BACKUP)
    prune(made)
    assert hours(made) == [74, 98]
    assert segments(made) == list(range(120))


def test_what_was_never_finished_goes_after_a_day_and_not_while_it_is_under_way() -> None:
    made = an_archive()
    dead = BackupId("main", "20260302T000000Z-dddddd")
    busy = BackupId("main", "20260302T000000Z-bbbbbb")
    young = BackupId("main", "20260305T230000Z-cccccc")
    for backup in (dead, busy, young):
        made.store.put(base_prefix(backup) + "base.tar.zst", [b"half"])
    held(made, busy, leases.BASE_BACKUP)
    done = prune(made)
    assert done.collected == 1
    left = {key.split("/")[3] for key in made.store.objects if key.endswith("base.tar.zst")}
    assert {busy.stamp, young.stamp} <= left
    assert dead.stamp not in left


def test_what_the_store_does_not_let_go_keeps_its_wal_and_is_told() -> None:
    made = an_archive()
    oldest = base_backups.list_base_backups(made.store, "main").backups[-1].id
    made.store.locked[catalog_key(oldest)] = "AccessDenied"
    with pytest.raises(StoreError, match="1 object could not be deleted"):
        prune(made)
    assert hours(made) == [2, 74, 98]
    assert has_all_its_wal(made)


@pytest.mark.parametrize("after", [timedelta(), timedelta(days=365)], ids=["on time", "clock ahead"])
def test_wal_of_an_older_moment_that_was_archived_lately_stays(after: timedelta) -> None:
    made = an_archive()
    made.history(2, (1, 1))
    made.segments(1, 2, timeline=2)
    late = made.at = BEGUN + timedelta(hours=119)
    for key in [key for key in made.store.objects if "/00000002/" in key]:
        made.store.put(key, [b"packed"])
    made.at = late + timedelta(hours=1)
    prune(made, after=after)
    assert segments(made)[:2] == [1, 2]
    assert segments(made)[2] == 74


def test_an_unreadable_record_keeps_everything() -> None:
    made = an_archive()
    key = catalog_key(base_backups.list_base_backups(made.store, "main").backups[0].id)
    made.store.put(key, [b"{}"])
    before = segments(made)
    done = prune(made)
    assert (done.deleted, done.wal_files, segments(made)) == ([], 0, before)


def test_a_clock_that_is_ahead_deletes_no_more() -> None:
    made, window = an_archive(), timedelta(hours=72)
    prune(made, after=timedelta(days=365), window=window)
    assert (hours(made), segments(made)) == ([26, 50, 74, 98], list(range(26, 120)))
    assert windows_of(made.cluster(window=window), now=made.at).is_met


def test_a_clock_that_is_a_day_ahead_takes_nothing_that_is_in_use() -> None:
    made = an_archive()
    oldest = base_backups.list_base_backups(made.store, "main").backups[-1].id
    young = BackupId("main", "20260305T230000Z-cccccc")
    made.store.put(base_prefix(young) + "base.tar.zst", [b"half"])
    held(made, oldest, "restore")
    done = prune(made, after=timedelta(days=1, hours=2))
    assert (hours(made), done.collected) == ([2, 74, 98], 0)
    assert segments(made) == list(range(2, 120))
    assert made.store.objects[base_prefix(young) + "base.tar.zst"]


def test_a_lost_catalog_keeps_everything_until_it_is_rebuilt() -> None:
    made = an_archive()
    made.store.delete([key for key in made.store.objects if key.startswith("catalog/main/")])
    made.segments(120, 121)
    made.base(121)
    planned = prune_cluster.plan(made.cluster(), now=made.at)
    assert sum("`backup-pipeline rebuild` lists it again" in line for line in planned.lines) == len(DAILY)
    assert not [line for line in planned.lines if "never finished" in line]
    done = prune(made)
    assert (done.deleted, done.collected, segments(made)) == ([], 0, list(range(122)))
    assert len(base_backups.rebuild(made.store, "main")[0]) == len(DAILY)
    assert windows_of(made.cluster(), now=made.at).is_met
    prune(made)
    assert hours(made) == [74, 98, 121]


def test_a_lost_record_of_a_parent_keeps_what_was_taken_against_it() -> None:
    made = an_archive(bases=(50, 74, 98, 110))
    parent = made.base(2)
    made.base(26, parent=parent.id)
    made.at = BEGUN + timedelta(hours=120)
    made.store.delete([catalog_key(parent.id)])
    assert prune(made).deleted == []
    assert base_backups.rebuild(made.store, "main")[0] == (parent.id,)


def test_old_records_of_drills_go_and_what_cannot_be_read_stays() -> None:
    made = an_archive()
    days = (0, 300, 401, 402, 403)
    found = [drill(at=made.at - day * DAY) for day in days]
    for each in (*found, drill("other", at=made.at - 500 * DAY), drill("other", at=made.at - 501 * DAY)):
        drills.put(made.store, each)
    made.store.put(drill_key(found[-1].id), [b"damaged"])
    planned = prune_cluster.plan(made.cluster(), now=made.at)
    assert planned.drills == (found[3].id,)
    assert planned.lines[-1].startswith(f"delete the record of drill {found[3].id}: older than 400 days")
    assert prune_cluster.record(planned)["drills"] == [str(found[3].id)]
    done = prune(made)
    assert str(done).endswith("74 files of WAL, 1 record of drills deleted")
    assert drills.drills(made.store, "main").drills == tuple(found[:3])
    assert drill_key(found[-1].id) in made.store.objects
    assert len(drills.drills(made.store, "other").drills) == 2
    assert prune(made).drills == 0


def test_an_earlier_systems_wal_that_cannot_be_counted_stays_and_hinders_nothing() -> None:
    made = FakeArchive()
    made.store.delete([wal_identity_key("main")])
    claim(made.store, "main", System("111", SEGMENT_BYTES), at=BEGUN)
    adopt(made.store, "main", System(SYSTEM, SEGMENT_BYTES), at=BEGUN)
    damaged = wal_key("main", "111", parse_wal_name("00000001000000000000000A"), "a" * 64)
    made.store.put(damaged, [b"damaged"])
    made.segments(*range(120))
    for first in DAILY:
        made.base(first)
    planned = prune_cluster.plan(made.cluster(), now=made.at)
    (line,) = (line for line in planned.lines if "111" in line)
    assert line.startswith("leave clusters/main/wal-archive/111/: how large the segments of system 111 are")
    (uncounted,) = json.loads(json.dumps(prune_cluster.record(planned)))["uncounted"]
    assert uncounted["prefix"] == "clusters/main/wal-archive/111/"
    done = prune(made)
    assert done.deleted
    assert damaged in made.store.objects


def test_without_an_archive_there_is_nothing_to_judge() -> None:
    made = FakeArchive()
    made.store.objects.clear()
    assert prune_cluster.plan(made.cluster(), now=made.at).lines == ()


def test_a_pin_of_what_is_gone_is_refused_and_a_lost_pin_is_rebuilt() -> None:
    made = an_archive()
    oldest = base_backups.list_base_backups(made.store, "main").backups[-1].id
    base_backups.pin(made.store, oldest, at=made.at)
    for beside in Beside:
        made.store.delete([catalog_key(oldest, beside)])
    assert base_backups.rebuild(made.store, "main")[0] == (oldest,)
    assert base_backups.load(made.store, oldest).pinned
    with pytest.raises(BackupNotFound):
        base_backups.pin(made.store, BackupId("main", "20260101T000000Z-aaaaaa"), at=made.at)
