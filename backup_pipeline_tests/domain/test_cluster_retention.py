"""What a cluster's retention gives up: never a moment of the window, and nothing in doubt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup_pipeline.domain.backup import BackupId, Lease, Proof, Verdict
from backup_pipeline.domain.base_backup import BaseBackup, WalPoint
from backup_pipeline.domain.cluster_retention import (
    ClusterPlan,
    Facts,
    SystemWal,
    plan_cluster_prune,
    point_of,
)
from backup_pipeline.domain.replayable_wal import Archive, routes
from backup_pipeline.domain.wal import Lsn, TimelineHistory, TimelineSwitch, parse_wal_name
from backup_pipeline_tests.domain.values import base_manifest, proof

SIZE = 16 * 1024 * 1024
BEGUN = datetime(2026, 3, 1, tzinfo=UTC)
SYSTEM = "7301234567890123456"
DAY = timedelta(hours=24)


def hour(number: float) -> datetime:
    return BEGUN + timedelta(hours=number)


def lsn(number: float) -> Lsn:
    return Lsn(int(number * SIZE))


def backup(
    first: float,
    last: float = 0,
    *,
    timeline: int = 1,
    pinned: bool = False,
    verdict: Verdict = Verdict.NONE,
    parent: BackupId | None = None,
    system: str = SYSTEM,
    damaged: bool = False,
) -> BaseBackup:
    """One that needs the segments `first` to `last`, of which segment N was written in hour N."""
    last = last or first + 0.2
    manifest = replace(
        base_manifest(at=hour(first)),
        stopped_at=hour(last),
        finished_at=hour(last),
        start=WalPoint(timeline, lsn(first)),
        end=WalPoint(timeline, lsn(last)),
        system_identifier=system,
        parent=parent,
        page_checksums_wrong=damaged,
    )
    found: Proof | None = None if verdict is Verdict.NONE else proof(verdict)
    return BaseBackup(manifest, pinned, found)


def segments(*numbers: int) -> dict[int, datetime]:
    return {number: hour(number + 1) for number in numbers}


def wal(**timelines: Sequence[int]) -> SystemWal:
    """`t1=range(…)`: the segments of each timeline, which leaves the one before in its first segment."""
    there = {int(name[1:]): segments(*numbers) for name, numbers in timelines.items()}
    histories = {}
    left: list[TimelineSwitch] = []
    for before, timeline in zip(sorted(there), sorted(there)[1:], strict=False):
        left = [*left, TimelineSwitch(before, lsn(min(there[timeline]) + 0.5))]
        histories[timeline] = TimelineHistory(timeline, tuple(left))
    ended = max((at for each in there.values() for at in each.values()), default=None)
    return SystemWal(Archive(SIZE, there, histories), ended)


def facts(
    backups: Sequence[BaseBackup], there: SystemWal, *, now: float, window: timedelta = DAY, **more: object
) -> Facts:
    newest_first = sorted(backups, key=lambda each: each.id.taken_at, reverse=True)
    return Facts(newest_first, {SYSTEM: there}, SYSTEM, window, hour(now), **more)  # type: ignore[arg-type]


def kept(plan: ClusterPlan) -> list[float]:
    return [
        (each.backup.id.taken_at - BEGUN) / timedelta(hours=1)
        for each in reversed(plan.decisions)
        if each.keep
    ]


def cut(plan: ClusterPlan, system: str = SYSTEM) -> int | None:
    (found,) = (each.cut for each in plan.wal if each.system_identifier == system)
    return found


def test_the_newest_before_the_window_stays_with_all_wal_from_it_on() -> None:
    daily = [backup(first) for first in (2, 26, 50, 74, 98)]
    plan = plan_cluster_prune(facts(daily, wal(t1=range(120)), now=120))
    assert kept(plan) == [74, 98]
    assert cut(plan) == 74
    assert str(plan.decisions[0]).endswith(": within the recovery window; one of the 2 newest good ones")
    assert "the window on timeline 1 begins with it" in str(plan.decisions[1])
    assert "delete main/20260303T020000Z-3f9a1c: older than the recovery window" in map(str, plan.decisions)


def test_only_segments_labels_and_partials_below_the_cut_go_and_no_history() -> None:
    plan = plan_cluster_prune(facts([backup(first) for first in (26, 50, 74)], wal(t1=range(120)), now=120))
    (decision,) = plan.wal
    assert decision.cut == 50
    for text, goes in {
        "000000010000000000000031": True,
        "000000010000000000000032": False,
        "000000020000000000000031.partial": True,
        "000000010000000000000031.00000028.backup": True,
        "000000010000000000000032.00000028.backup": False,
        "00000002.history": False,
    }.items():
        assert decision.gives_up(parse_wal_name(text), SIZE) is goes, text


MARKS = {
    "pinned": lambda made: replace(made, pinned=True),
    "proven": lambda made: replace(made, proof=proof(Verdict.PROVEN)),
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_marked_one_stays_and_holds_its_wal(mark: str) -> None:
    old = MARKS[mark](backup(2))
    plan = plan_cluster_prune(
        facts([old, *(backup(n) for n in (26, 50, 74, 98))], wal(t1=range(120)), now=120)
    )
    assert kept(plan) == [2, 74, 98]
    assert cut(plan) == 2


def test_one_in_use_stays_and_holds_its_wal() -> None:
    old = backup(2)
    lease = Lease(old.id, "token", "restore", hour(121))
    plan = plan_cluster_prune(
        facts([old, *(backup(n) for n in (26, 50, 74))], wal(t1=range(120)), now=120, leases=[lease])
    )
    assert kept(plan) == [2, 50, 74]
    assert cut(plan) == 2
    assert "in use by a restore" in str(plan.decisions[-1])


def test_a_chain_stays_whole_but_its_parents_hold_no_wal() -> None:
    whole = backup(2)
    first = backup(26, parent=whole.id)
    second = backup(50, parent=first.id)
    third = backup(74, parent=second.id)
    plan = plan_cluster_prune(facts([whole, first, second, third], wal(t1=range(120)), now=120))
    assert kept(plan) == [2, 26, 50, 74]
    assert cut(plan) == 50
    assert [each.holds_wal for each in plan.decisions] == [True, True, False, False]
    later = plan_cluster_prune(facts([whole, first, second, third], wal(t1=range(50, 120)), now=120))
    assert kept(later) == [2, 26, 50, 74]  # also when the parents' own WAL has gone


def test_an_incremental_one_without_its_parent_counts_for_nothing() -> None:
    orphan = backup(74, parent=BackupId("main", "20260228T020000Z-3f9a1c"))
    plan = plan_cluster_prune(facts([backup(2), backup(26), orphan], wal(t1=range(120)), now=120))
    assert kept(plan) == [2, 26]
    assert "not whole" in str(plan.decisions[0])


@pytest.mark.parametrize("damaged", [True, False])
def test_nothing_goes_for_one_that_is_not_good(damaged: bool) -> None:
    def bad(first: float) -> BaseBackup:
        return backup(first, damaged=damaged, verdict=Verdict.NONE if damaged else Verdict.FAILED)

    backups = [backup(2), backup(26), backup(50), bad(74), bad(98)]
    plan = plan_cluster_prune(facts(backups, wal(t1=range(120)), now=120))
    assert kept(plan) == [26, 50, 74, 98]
    everything = [bad(first) for first in (2, 26, 50, 74, 98)]
    plan = plan_cluster_prune(facts(everything, wal(t1=range(120)), now=120))
    assert kept(plan) == [2, 26, 50, 74, 98]


def test_two_that_are_whole_stay_also_where_one_of_them_failed() -> None:
    backups = [backup(2), backup(26, verdict=Verdict.FAILED), backup(50)]
    whole = wal(t1=range(120))
    plan = plan_cluster_prune(facts(backups, whole, now=120, window=timedelta(0)))
    assert kept(plan) == [2, 26, 50]
    plan = plan_cluster_prune(facts(backups[1:], whole, now=120, window=timedelta(0)))
    assert kept(plan) == [26, 50]
    assert str(plan.decisions[-1]).endswith(": one of the 2 newest whole ones")
    assert cut(plan) == 26


def test_one_whose_wal_is_not_whole_is_passed_over() -> None:
    there = [*range(74), *range(75, 120)]
    backups = [backup(2), backup(26), backup(50), backup(74), backup(98)]
    plan = plan_cluster_prune(facts(backups, wal(t1=there), now=120))
    assert kept(plan) == [50, 98]
    assert cut(plan) == 50


def test_after_a_promote_an_ancestors_base_backup_stays_while_the_window_needs_it() -> None:
    backups = [backup(2), backup(26), backup(50), backup(100, timeline=2)]
    there = wal(t1=range(92), t2=range(90, 120))
    plan = plan_cluster_prune(facts(backups, there, now=120))
    assert kept(plan) == [50, 100]
    assert cut(plan) == 50


def test_a_branch_that_was_left_long_ago_keeps_nothing() -> None:
    backups = [backup(2), *(backup(first, timeline=2) for first in (30, 300, 330, 350))]
    plan = plan_cluster_prune(facts(backups, wal(t1=range(22), t2=range(20, 360)), now=360))
    assert kept(plan) == [330, 350]
    assert cut(plan) == 330
    assert plan.wal[0].gives_up(parse_wal_name("000000010000000000000010"), SIZE)


def test_a_branch_that_was_left_a_few_days_ago_keeps_what_begins_it() -> None:
    backups = [backup(2), *(backup(first, timeline=2) for first in (30, 100, 110, 120))]
    plan = plan_cluster_prune(facts(backups, wal(t1=range(22), t2=range(20, 130)), now=130))
    assert kept(plan) == [2, 100, 110, 120]
    assert "the window on timeline 1 begins with it" in str(plan.decisions[-1])


def test_the_window_begins_earlier_by_as_much_as_clocks_may_differ() -> None:
    """Of one that ended 24 hours and 10 minutes ago nobody knows whether that was before the window."""
    backups = [backup(2), backup(95.625), backup(100), backup(110)]
    plan = plan_cluster_prune(facts(backups, wal(t1=range(120)), now=120))
    assert kept(plan) == [2, 95.625, 100, 110]


def test_one_from_the_future_stays_and_counts_for_nothing() -> None:
    backups = [backup(2), backup(26), backup(50), backup(900)]
    plan = plan_cluster_prune(facts(backups, wal(t1=range(901)), now=120))
    assert kept(plan) == [26, 50, 900]


def test_what_cannot_be_read_keeps_everything() -> None:
    backups = [backup(first) for first in (2, 26, 50, 74)]
    plan = plan_cluster_prune(
        facts(backups, wal(t1=range(120)), now=120, unreadable=(("catalog/main/x.json", "it is empty"),))
    )
    assert kept(plan) == [2, 26, 50, 74]
    assert cut(plan) is None


def test_a_missing_history_keeps_everything_of_its_system() -> None:
    backups = [backup(first) for first in (2, 26, 50, 74)]
    there = wal(t1=range(120), t2=range(100, 120))
    without = replace(there, archive=replace(there.archive, histories={}))
    plan = plan_cluster_prune(facts(backups, without, now=120))
    assert kept(plan) == [2, 26, 50, 74]
    assert cut(plan) is None
    assert "the history of timeline 2 is not archived" in str(plan.decisions[0])


def test_no_wal_goes_while_a_base_backup_is_under_way() -> None:
    backups = [backup(first) for first in (2, 26, 50, 74)]
    new = BackupId("main", "20260305T235900Z-aaaaaa")
    plan = plan_cluster_prune(facts(backups, wal(t1=range(120)), now=120, under_way=[new]))
    assert kept(plan) == [50, 74]
    assert cut(plan) is None


def test_without_a_base_backup_the_wal_of_the_current_system_stays() -> None:
    assert cut(plan_cluster_prune(facts([], wal(t1=range(900)), now=5000))) is None


@dataclass(frozen=True)
class Earlier:
    """An earlier system whose last segment was archived in hour `ended`."""

    unlisted: tuple[BackupId, ...] = ()
    current: int = 2
    ended: int = 30

    def plan(self, *more: BaseBackup) -> ClusterPlan:
        made = facts(
            [*more, *(backup(n) for n in (470, 490)[: self.current])],
            wal(t1=range(460, 500)),
            now=500,
            unlisted=self.unlisted,
        )
        return plan_cluster_prune(replace(made, systems={**made.systems, "1": wal(t1=range(self.ended))}))


def test_an_earlier_systems_wal_goes_when_it_is_certain_that_nothing_begins_in_it() -> None:
    assert cut(Earlier().plan(), "1") == 30
    assert cut(Earlier(unlisted=(BackupId("main", "20260301T020000Z-3f9a1c"),)).plan(), "1") is None
    assert cut(Earlier(current=1).plan(), "1") is None
    assert [cut(Earlier(ended=ended).plan(), "1") for ended in (300, 320)] == [300, None]  # a week, and less
    assert (
        cut(Earlier().plan(backup(2, system="1")), "1") is None
    )  # it goes in this plan, its WAL in the next
    assert cut(Earlier().plan(backup(2, system="1", pinned=True)), "1") == 2


def test_an_earlier_systems_wal_of_other_segments_is_not_counted() -> None:
    large = 4 * SIZE
    manifest = replace(
        backup(26, system="1").manifest,
        segment_bytes=large,
        start=WalPoint(1, Lsn((1 << 32) + 10 * large)),
        end=WalPoint(1, Lsn((1 << 32) + 11 * large)),
    )
    old = BaseBackup(manifest, pinned=True)
    names = [parse_wal_name(f"00000001000000010000{number:04X}") for number in range(8, 40)]
    # As a listing counts them that knows the current system's size alone: there are 256 to a log, not 64.
    there = {name.number(SIZE): hour(26) for name in names}
    made = facts([backup(470), backup(490), old], wal(t1=range(460, 500)), now=500)
    earlier = SystemWal(Archive(SIZE, {1: there}), hour(30))
    plan = plan_cluster_prune(replace(made, systems={**made.systems, "1": earlier}))
    assert cut(plan, "1") is None
    assert cut(plan) == 470
    assert "its WAL has segments of 67108864 bytes" in str(plan.decisions[-1])


# --- any history -------------------------------------------------------------------------------

HOURS = 60
_numbers = st.integers(0, HOURS - 1)


@st.composite
def histories(draw: st.DrawFn) -> Facts:
    """A cluster of up to three timelines, with gaps, chains, marks, and a window of any length."""
    names = ["t1", "t2", "t3"][: draw(st.integers(1, 3))]
    begins = [0, *sorted(draw(st.lists(_numbers, min_size=len(names) - 1, max_size=len(names) - 1)))]
    lost = draw(st.sets(_numbers, max_size=4))
    last = draw(st.integers(min_value=max(begins), max_value=HOURS))
    there = {
        name: [n for n in range(begin, draw(st.integers(begin, last)) + 1) if n not in lost or n == begin]
        for name, begin in zip(names, begins, strict=True)
    }
    backups: list[BaseBackup] = []
    for first in sorted(draw(st.sets(_numbers, max_size=8))):
        timeline = draw(st.integers(1, len(names)))
        same = [each.id for each in backups if each.manifest.end.timeline == timeline]
        backups.append(
            backup(
                first + 0.6,
                first + 0.6 + draw(st.sampled_from([0.1, 1.3, 2.5])),
                timeline=timeline,
                pinned=draw(st.booleans()) and draw(st.booleans()),
                verdict=draw(st.sampled_from([Verdict.NONE, Verdict.NONE, Verdict.PROVEN, Verdict.FAILED])),
                parent=draw(st.sampled_from([None, *same])),
            )
        )
    window = timedelta(hours=draw(st.integers(0, HOURS)))
    return facts(backups, wal(**there), now=draw(st.integers(last, HOURS + 10)), window=window)


def pruned(made: Facts, plan: ClusterPlan) -> Facts:
    """What is left once the plan was carried out."""
    gone = {each.id for each in plan.delete}
    there = made.systems[SYSTEM]
    below = cut(plan) or 0
    left = {
        timeline: {number: at for number, at in found.items() if number >= below}
        for timeline, found in there.archive.segments.items()
    }
    archive = replace(there.archive, segments={timeline: found for timeline, found in left.items() if found})
    return replace(
        made,
        backups=[each for each in made.backups if each.id not in gone],
        systems={SYSTEM: replace(there, archive=archive)},
    )


def has_chain(made: Facts, backup: BackupId | None) -> bool:
    """Whether all that a base backup was taken against is there."""
    parents = {each.id: each.manifest.parent for each in made.backups}
    while backup is not None and backup in parents:
        backup = parents[backup]
    return backup is None


def reachable(made: Facts, at: datetime, timeline: int) -> bool:
    """Whether some base backup whose chain is there leads to a moment, as a recovery would judge."""
    return any(
        route.complete and route.base.stopped_at <= at and route.end_at is not None and at <= route.end_at
        for route in routes([point_of(each) for each in made.backups], made.systems[SYSTEM].archive, timeline)
        if has_chain(made, route.base.id)
    )


@settings(max_examples=400)
@given(made=histories(), share=st.floats(0, 1))
def test_every_moment_of_the_window_that_could_be_recovered_still_can(made: Facts, share: float) -> None:
    plan = plan_cluster_prune(made)
    left = pruned(made, plan)
    for timeline in made.systems[SYSTEM].archive.segments:
        at = made.now - made.window * share
        if reachable(made, at, timeline):
            assert reachable(left, at, timeline)


@given(made=histories())
def test_a_second_prune_gives_up_nothing_more(made: Facts) -> None:
    left = pruned(made, plan_cluster_prune(made))
    again = plan_cluster_prune(left)
    assert not again.delete
    assert pruned(left, again) == left


@given(made=histories(), hours=st.integers(0, 40))
def test_no_prune_leaves_an_incremental_one_without_what_it_needs(made: Facts, hours: int) -> None:
    whole = {each.id for each in made.backups}
    later = replace(made, now=made.now + timedelta(hours=hours))
    left = pruned(later, plan_cluster_prune(later))
    ids = {each.id for each in left.backups}
    for each in left.backups:
        assert (
            each.manifest.parent is None or each.manifest.parent in ids or each.manifest.parent not in whole
        )


@given(made=histories())
def test_two_that_can_be_recovered_from_are_left_where_there_were_two(made: Facts) -> None:
    left = pruned(made, plan_cluster_prune(made))
    assert usable(left) >= min(2, usable(made))


def usable(made: Facts) -> int:
    """How many base backups can be recovered from, to their own end at least."""
    archive = made.systems[SYSTEM].archive
    return sum(
        has_chain(made, each.id)
        and any(route.complete for route in routes([point_of(each)], archive, each.manifest.end.timeline))
        for each in made.backups
    )


def test_a_record_that_names_itself_as_its_parent_is_not_whole_and_ends_no_prune() -> None:
    own = backup(2)
    own = replace(own, manifest=replace(own.manifest, parent=own.id))
    plan = plan_cluster_prune(facts([own, *map(backup, (26, 50, 74, 98))], wal(t1=range(120)), now=120))
    assert kept(plan) == [74, 98]
    assert "not whole" in str(plan.decisions[-1])


def test_two_that_name_each_other_stay_while_one_is_pinned() -> None:
    one, other = backup(2, pinned=True), backup(3)
    one = replace(one, manifest=replace(one.manifest, parent=other.id))
    other = replace(other, manifest=replace(other.manifest, parent=one.id))
    plan = plan_cluster_prune(facts([one, other, *map(backup, (50, 74, 98))], wal(t1=range(120)), now=120))
    assert kept(plan) == [2, 3, 74, 98]


def test_a_clock_that_is_ahead_gives_up_no_more() -> None:
    daily = [backup(first) for first in (2, 26, 50, 74, 98)]
    window = timedelta(hours=72)
    right = plan_cluster_prune(facts(daily, wal(t1=range(120)), now=120, window=window))
    ahead = plan_cluster_prune(facts(daily, wal(t1=range(120)), now=120 + 24 * 365, window=window))
    assert kept(ahead) == kept(right) == [26, 50, 74, 98]
    assert cut(ahead) == cut(right) == 26
