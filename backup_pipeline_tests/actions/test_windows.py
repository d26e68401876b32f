"""What a cluster's listing says can be recovered, and what it says against it."""

from datetime import timedelta

import pytest

from backup_pipeline.actions.recovery_facts import read_facts
from backup_pipeline.actions.windows import windows_of
from backup_pipeline.errors import Refused
from backup_pipeline_tests.storage.archives import BEGUN, SEGMENT_BYTES, FakeArchive

DAY = timedelta(hours=24)


def test_a_cluster_that_is_archived_for_long_enough_has_its_window() -> None:
    made = FakeArchive()
    made.segments(*range(1, 31))
    first, second = made.base(2), made.base(20, 21)
    found = windows_of(made.cluster(), now=made.at)
    (window,) = found.found.windows
    assert (window.from_at, window.to_at) == (first.stopped_at, BEGUN + timedelta(hours=30))
    assert window.bases == (first.id, second.id)
    assert found.is_met
    assert (found.segments, found.newest_at, found.problems) == (30, made.at, ())
    assert found.lines == (
        "any moment from 2026-03-01T02:01:00Z to about 2026-03-02T06:00:00Z, on timeline 1",
        "WAL: 30 segments, 180 B, the newest of 2026-03-02T06:00:00Z",
    )


def test_a_window_that_is_too_short_is_a_problem_and_says_by_how_much() -> None:
    made = FakeArchive()
    made.segments(*range(1, 11))
    made.base(2)
    found = windows_of(made.cluster(), now=made.at)
    assert not found.is_met
    assert found.problems == (
        "the recovery window is to be 1 d 0 h, and goes back 7 h 59 min, to 2026-03-01T02:01:00Z",
    )
    assert windows_of(made.cluster(dsn=""), now=made.at).problems == ()  # nobody asked for a window


def test_a_gap_and_two_versions_are_told_by_their_names() -> None:
    made = FakeArchive()
    made.segments(1, 2, 3, 5, 6)
    made.segments(6, content="other")
    made.base(2)
    found = windows_of(made.cluster(window=timedelta(hours=1)), now=made.at)
    assert found.found.windows[0].to_at == BEGUN + timedelta(hours=3)
    assert not found.is_met
    assert found.problems == (
        "WAL is missing: 000000010000000000000004",
        "two versions are archived of 000000010000000000000006",
    )


@pytest.mark.parametrize("begun", [True, False])
def test_without_an_archive_or_a_base_backup_nothing_can_be_recovered(begun: bool) -> None:
    made = FakeArchive()
    if begun:
        made.segments(1, 2)
    else:
        made.store.objects.clear()
    found = windows_of(made.cluster(), now=made.at)
    assert (found.current, found.is_met) == (None, False)
    assert found.lines[0] == "no moment yet"
    said = "there is no base backup" if begun else "there is no WAL archive of main"
    assert said in found.problems[0]


def test_a_base_backup_of_another_segment_size_is_not_planned_with() -> None:
    """As after `pg_resetwal --wal-segsize`, which leaves the system what it was."""
    made = FakeArchive()
    made.segments(*range(10))
    made.base(2)
    old = made.base(4, segment_bytes=4 * SEGMENT_BYTES)
    facts = read_facts(made.cluster())
    assert [each.segment_bytes for each in facts.manifests] == [SEGMENT_BYTES]
    assert f"{old.id} is not looked at: its WAL has segments of another size" in facts.notes
    with pytest.raises(Refused, match="was taken with WAL segments of 67108864 bytes"):
        read_facts(made.cluster(), base=old.id)


def test_after_a_promote_each_timeline_has_its_window_and_the_newest_is_first() -> None:
    made = FakeArchive()
    made.segments(*range(1, 8))
    made.base(2)
    made.history(2, (1, 5))
    made.segments(*range(5, 40), timeline=2)
    found = windows_of(made.cluster(), now=made.at)
    assert [window.timeline for window in found.found.windows] == [2, 1]
    assert found.current == found.found.windows[0]
    assert found.is_met
