"""Which base backup and which WAL lead to a target, and what is said of a target that none leads to."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovery_route import Ending, find_route, judge
from backup_pipeline.domain.recovery_target import LATEST, RecoveryTarget, TargetKind, parse_target
from backup_pipeline.domain.recovery_window import recovery_windows
from backup_pipeline.domain.replayable_wal import Archive, BasePoint, routes, without
from backup_pipeline.domain.wal import Lsn, TimelineHistory, TimelineSwitch, WalSegment
from backup_pipeline.errors import Refused

SIZE = 16 * 1024 * 1024
BEGIN = datetime(2026, 3, 1, tzinfo=UTC)


def minute(number: float) -> datetime:
    """The log moves on by one segment a minute; segment n is archived at minute n + 1."""
    return BEGIN + timedelta(minutes=number)


def base(start: int, end: int | None = None, timeline: int = 1) -> BasePoint:
    """A base backup from a little after the beginning of segment `start` to the middle of `end`."""
    last = start if end is None else end
    return BasePoint(
        BackupId.make("main", minute(start), f"base{start:04}"),
        timeline,
        Lsn(start * SIZE + 40),
        Lsn(last * SIZE + SIZE // 2),
        minute(last + 0.5),
    )


def archive(*timelines: Iterable[int], switches: Iterable[tuple[int, float]] = ()) -> Archive:
    """Timeline n holds the segments of the n-th argument; `switches`: timeline left, at which segment."""
    left = tuple(TimelineSwitch(timeline, Lsn(int(at * SIZE))) for timeline, at in switches)
    return Archive(
        SIZE,
        {
            number: {each: minute(each + 1) for each in segments}
            for number, segments in enumerate(timelines, 1)
        },
        {number + 2: TimelineHistory(number + 2, left[: number + 1]) for number in range(len(left))},
    )


def at(number: float, *, inclusive: bool = True) -> RecoveryTarget:
    return RecoveryTarget(TargetKind.TIME, at=minute(number), inclusive=inclusive)


def lsn(number: float) -> RecoveryTarget:
    return RecoveryTarget(TargetKind.LSN, lsn=Lsn(int(number * SIZE)))


def test_a_target_is_reached_from_the_newest_base_backup_before_it() -> None:
    bases, there = [base(2), base(5)], archive(range(1, 9))
    for target, start in ((at(4), 2), (lsn(5.4), 2), (at(6), 5), (lsn(6), 5), (LATEST, 5)):
        assert find_route(bases, there, target).base == base(start)
    assert find_route(bases, there, LATEST, base=base(2).id).base == base(2)


def test_a_base_backup_whose_wal_is_not_there_yet_does_not_count() -> None:
    there = archive(range(1, 9))
    assert find_route([base(2), base(7, 9)], there, LATEST).base == base(2)
    with pytest.raises(Refused, match="no base backup leads to timeline 1"):
        find_route([base(7, 9)], there, LATEST)


def test_a_base_backup_whose_chain_is_broken_is_passed_over() -> None:
    there, broken = archive(range(1, 9)), replace(base(5), broken="its parent is not there")
    assert find_route([base(2), broken], there, LATEST).base == base(2)
    assert [window.bases for window in recovery_windows([base(2), broken], there).windows] == [(base(2).id,)]
    with pytest.raises(Refused, match=r"cannot be begun with: its parent is not there") as caught:
        find_route([base(2), broken], there, LATEST, base=broken.id)
    assert f"--base {base(2).id}" in caught.value.hint
    with pytest.raises(Refused, match="no base backup leads") as alone:
        find_route([broken], there, LATEST)
    assert "its parent is not there" in str(alone.value.detail["base backups"])
    with pytest.raises(Refused, match="cannot be begun with") as nothing:
        find_route([broken], there, LATEST, base=broken.id)
    assert "Look for a copy" in nothing.value.hint


def test_a_base_backup_whose_drill_failed_is_begun_with_only_where_no_other_leads_as_far() -> None:
    there, failed = archive(range(1, 9)), replace(base(5), failed="a drill of it failed")
    assert find_route([base(2), failed], there, at(7)).base == base(2)
    assert find_route([base(2), failed], there, at(7), base=failed.id).base == failed
    assert find_route([failed], there, at(7)).base == failed
    gap = archive([1, 2, 3, 5, 6, 7])
    assert find_route([base(2), failed], gap, at(7)).base == failed
    broken = replace(base(6), broken="its parent is not there")
    with pytest.raises(Refused, match="cannot be begun with") as caught:
        find_route([base(2), failed, broken], there, LATEST, base=broken.id)
    assert f"--base {base(2).id}" in caught.value.hint


def test_without_anything_it_is_said_what_is_missing() -> None:
    with pytest.raises(Refused, match="there is no base backup"):
        find_route([], archive(range(3)), LATEST)
    with pytest.raises(Refused, match="no WAL is archived"):
        find_route([base(2)], archive(), LATEST)
    with pytest.raises(Refused, match="the history of timeline 3 is not in the archive"):
        find_route([base(2)], archive(range(9), range(5, 9), switches=[(1, 5.5)]), LATEST, timeline=3)


@pytest.mark.parametrize("target", [at(2.4), lsn(2.4)])
def test_a_target_before_the_first_consistent_point_is_refused_with_that_point(
    target: RecoveryTarget,
) -> None:
    with pytest.raises(Refused, match="lies before the first moment") as caught:
        find_route([base(2), base(5)], archive(range(1, 9)), target)
    first = str(caught.value.detail["first"])
    assert "2026-03-01T00:02:30Z" in first
    assert str(base(2).id) in first


ENDING = Ending(last_commit_at=minute(8.2), covered_until=minute(20))


def test_a_time_between_commits_is_given_to_postgresql() -> None:
    there = archive(range(1, 9))
    judged = judge(find_route([base(2)], there, at(4)), at(4), ENDING, there)
    assert not judged.to_the_end
    assert [segment.number for segment in judged.needed] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("target", "to_the_end"),
    [(at(8.2), True), (at(8.2, inclusive=False), False), (at(8.3), True), (at(20), True)],
)
def test_a_time_after_the_last_commit_of_an_idle_server_is_all_that_is_archived(
    target: RecoveryTarget, to_the_end: bool
) -> None:
    there = archive(range(1, 9))
    judged = judge(find_route([base(2)], there, target), target, ENDING, there)
    assert judged.to_the_end is to_the_end
    assert bool(judged.notes) is (to_the_end and target.at != ENDING.last_commit_at)


@pytest.mark.parametrize("target", [at(20.1), lsn(9), lsn(9.5)])
def test_a_target_past_the_archive_is_refused_with_the_newest(target: RecoveryTarget) -> None:
    there = archive(range(1, 9))
    with pytest.raises(Refused, match="past the end of what is archived") as caught:
        judge(find_route([base(2)], there, target), target, ENDING, there)
    assert "2026-03-01T00:20:00Z, LSN 0/9000000" in str(caught.value.detail["newest"])


@pytest.mark.parametrize("target", [at(6.5), lsn(6.5), LATEST])
def test_a_gap_is_named_with_the_newest_moment_before_it(target: RecoveryTarget) -> None:
    there = archive([1, 2, 3, 6, 7, 8])
    ending = Ending(last_commit_at=minute(3.9))
    with pytest.raises(Refused, match="beyond a gap in the WAL") as caught:
        judge(find_route([base(2)], there, target), target, ending, there)
    assert "000000010000000000000004 to 000000010000000000000005 missing" in caught.value.message
    assert "2026-03-01T00:03:54Z" in str(caught.value.detail["newest"])
    assert judge(find_route([base(2)], there, at(3.5)), at(3.5), ending, there).needed


@pytest.mark.parametrize("parts", [[4, 5], [5]])
def test_a_part_beyond_a_hole_makes_it_a_gap(parts: list[int]) -> None:
    there = replace(archive([1, 2, 3]), partials={WalSegment(1, n): minute(n + 1) for n in parts})
    with pytest.raises(Refused, match="000000010000000000000004 missing"):
        judge(find_route([base(2)], there, LATEST), LATEST, Ending(), there)


def test_a_segment_that_is_there_twice_beyond_a_hole_makes_it_a_gap() -> None:
    there = replace(archive([1, 2, 3]), doubled=frozenset({WalSegment(1, 5)}))
    with pytest.raises(Refused, match="000000010000000000000004 missing"):
        judge(find_route([base(2)], there, LATEST), LATEST, Ending(), there)


def test_a_hole_before_the_point_where_a_timeline_was_left_is_a_gap_on_both() -> None:
    there = archive([1, 2, 3], range(5, 9), switches=[(1, 5.5)])
    for timeline in (1, 2):
        with pytest.raises(Refused, match="000000010000000000000004 missing"):
            judge(find_route([base(2)], there, LATEST, timeline=timeline), LATEST, Ending(), there)


def test_a_timeline_that_was_left_ends_in_its_part_without_a_gap() -> None:
    there = archive(range(1, 5), range(5, 9), switches=[(1, 5.5)])
    there = replace(there, partials={WalSegment(1, 5): minute(6)})
    route = find_route([base(2)], there, LATEST, timeline=1)
    assert (route.partial, route.missing) == (WalSegment(1, 5), None)
    assert judge(route, LATEST, Ending(), there).needed[-1] == WalSegment(1, 5)


def test_a_name_may_lie_before_a_gap_which_is_said() -> None:
    there, target = archive([1, 2, 3, 6]), parse_target("before_upgrade")
    (note,) = judge(find_route([base(2)], there, target), target, Ending(), there).notes
    assert "000000010000000000000004" in note


def test_a_segment_of_two_versions_is_never_replayed() -> None:
    there = replace(archive(range(1, 9)), doubled=frozenset({WalSegment(1, 5)}))
    with pytest.raises(Refused, match="000000010000000000000005, which cannot be used: two versions"):
        judge(find_route([base(2)], there, lsn(6)), lsn(6), Ending(), there)
    assert judge(find_route([base(2)], there, lsn(4)), lsn(4), Ending(), there).needed


THREE = archive(range(1, 6), range(5, 9), range(8, 12), switches=[(1, 5.5), (2, 8.25)])


def test_a_recovery_follows_the_newest_timeline_through_its_ancestors() -> None:
    route = find_route([base(2)], THREE, LATEST)
    assert [(each.timeline, each.number) for each in route.segments] == [
        *((1, number) for number in (2, 3, 4)),
        *((2, number) for number in (5, 6, 7)),
        *((3, number) for number in (8, 9, 10, 11)),
    ]
    assert route.missing is None
    assert find_route([base(2)], THREE, LATEST, timeline=1).segments[-1] == WalSegment(1, 5)


def test_a_base_backup_after_the_switch_leads_to_its_own_timeline_only() -> None:
    late = base(6, timeline=1)  # of timeline 1, which was left at 5.5
    longer = replace(THREE, segments={**THREE.segments, 1: {n: minute(n + 1) for n in range(1, 9)}})
    assert not routes([late], longer, 3)
    assert find_route([late], longer, LATEST, timeline=1).base == late


def test_the_old_timeline_s_own_segment_of_a_switch_is_never_replayed_on_the_way_to_the_new_one() -> None:
    """It goes on into the branch that was left, and PostgreSQL would follow it there."""
    there = archive(range(1, 9), [], switches=[(1, 5.5)])
    route = find_route([base(2)], there, LATEST)
    assert route.timeline == 2
    assert route.segments[-1] == WalSegment(1, 4)
    assert route.end == Lsn(5 * SIZE)


def test_windows_join_where_base_backups_overlap_and_part_at_gaps() -> None:
    found = recovery_windows([base(2), base(4), base(8)], archive([1, 2, 3, 4, 5, 7, 8, 9]))
    assert [(window.from_at, window.to_at, len(window.bases)) for window in found.windows] == [
        (minute(8.5), minute(10), 1),
        (minute(2.5), minute(6), 2),
    ]
    assert [(gap.first, gap.last) for gap in found.gaps] == [(6, 6)]
    shown = "from 2026-03-01T00:08:30Z to about 2026-03-01T00:10:00Z, on timeline 1"
    assert str(found.windows[0]) == shown


def test_windows_are_told_per_timeline() -> None:
    found = recovery_windows([base(2)], THREE)
    assert [(window.timeline, window.to_at) for window in found.windows] == [
        (3, minute(12)),
        (2, minute(9)),
        (1, minute(6)),
    ]
    assert not found.gaps


def test_two_versions_of_the_last_segment_are_told_before_anything_is_unpacked() -> None:
    there = replace(archive(range(1, 6)), doubled=frozenset({WalSegment(1, 5)}))
    there = replace(there, segments={1: {n: minute(n + 1) for n in range(1, 5)}})
    with pytest.raises(Refused, match="which cannot be used"):
        judge(find_route([base(2)], there, LATEST), LATEST, Ending(), there)


def test_a_damaged_segment_ends_the_route_before_it() -> None:
    there = archive(range(1, 9))
    route = without(find_route([base(2)], there, LATEST), WalSegment(1, 6), "it is damaged", there)
    assert (route.segments[-1], route.end, route.end_at) == (WalSegment(1, 5), Lsn(6 * SIZE), minute(6))
    with pytest.raises(Refused, match="000000010000000000000006, which cannot be used: it is damaged"):
        judge(route, lsn(6.5), Ending(), there)
    assert judge(route, lsn(4.5), Ending(), there).needed


@given(
    starts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), max_size=4),
    numbers=st.sets(st.integers(0, 14)),
    target=st.floats(0, 16),
)
def test_a_target_is_reached_just_where_a_base_backup_and_every_segment_are_there(
    starts: list[tuple[int, int]], numbers: set[int], target: float
) -> None:
    bases = [base(start, start + length) for start, length in dict(starts).items()]
    there, wanted = archive(numbers), lsn(target)
    assert wanted.lsn
    possible = any(
        each.end <= wanted.lsn
        and set(range(each.start.value // SIZE, wanted.lsn.value // SIZE + 1)) <= numbers
        for each in bases
    )
    try:
        judged = judge(find_route(bases, there, wanted), wanted, Ending(), there)
    except Refused:
        assert not possible
        return
    assert possible
    assert {segment.number for segment in judged.needed} <= numbers
    windows = recovery_windows(bases, there).windows
    assert any(window.from_lsn <= wanted.lsn < window.to_lsn for window in windows)
