"""Drills as values: the second is fair, the record is read back equal, gaps that matter are named."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.domain.drill import (
    Span,
    breaks,
    draw,
    drill_from_json,
    drill_to_json,
    drillable,
    outdated,
    summary,
)
from backup_pipeline.domain.layout import drill_key, parse_drill_key
from backup_pipeline.domain.recovery_window import Window, Windows
from backup_pipeline.domain.replayable_wal import Archive, BasePoint
from backup_pipeline.domain.wal import Lsn, TimelineHistory, TimelineSwitch, WalSegment
from backup_pipeline.errors import Corrupt
from backup_pipeline_tests.domain.values import NOW, drill

MIB = 1 << 20


def at(second: float) -> datetime:
    return NOW + timedelta(seconds=second)


def test_the_records_of_a_year_stay_and_before_it_the_newest_of_each_verdict() -> None:
    failed, proven = Verdict.FAILED, Verdict.PROVEN
    verdicts = {0: proven, 399: proven, 401: proven, 402: failed, 403: proven, 404: failed, 900: failed}
    made = [drill(at=NOW - timedelta(days=days), verdict=verdict) for days, verdict in verdicts.items()]
    assert outdated(made, now=NOW) == tuple(each.id for each in made[4:])
    assert outdated(made[:4], now=NOW) == ()


moments = st.floats(0, 100_000).map(at)
spans = st.lists(
    st.tuples(moments, moments).map(sorted).map(lambda pair: Span(*pair)), min_size=1, max_size=4
)


@given(spans, st.integers(0, 2**64))
def test_the_second_lies_within_and_is_the_same_for_the_same_seed(found: list[Span], seed: int) -> None:
    drawn = draw(found, seed)
    assert any(span.from_at <= drawn <= span.to_at for span in found)
    assert drawn == draw(found, seed)


def test_over_many_draws_every_second_of_every_span_comes_about_as_often() -> None:
    found = [Span(at(0.5), at(10)), Span(at(100), at(109.9))]
    chance = random.Random(1)
    drawn = [draw(found, chance.getrandbits(64)) for _ in range(10_000)]
    counts = {second: drawn.count(second) for second in set(drawn)}
    assert set(counts) == {at(second) for second in (*range(1, 11), *range(100, 110))}
    assert min(counts.values()) > 380
    assert max(counts.values()) < 620


def test_a_window_without_a_whole_second_gives_its_end() -> None:
    assert draw([Span(at(0.2), at(0.7))], 7) == at(0.7)


def window(timeline: int, begin: float, end: float) -> Window:
    return Window(timeline, at(begin), Lsn(1), at(end), Lsn(2), ())


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        (-1, [(0, 50), (100, 180)]),
        (20, [(20, 50), (100, 180)]),
        (60, [(100, 180)]),
        (170, [(170, 180)]),
        (500, [(0, 50), (100, 180)]),  # nothing since: then all that there is
    ],
)
def test_a_second_is_drawn_from_the_window_that_is_promised(
    since: float, expected: list[tuple[float, float]]
) -> None:
    windows = Windows((window(2, 100, 200), window(2, 0, 50), window(1, 0, 40)), ())
    found = drillable(windows, 2, since=at(since), newest=at(180))
    assert found == tuple(Span(at(begin), at(end)) for begin, end in expected)


def base(number: int, stopped: float, timeline: int = 1) -> BasePoint:
    start = Lsn(number * MIB + 40)
    return BasePoint(
        BackupId.make("main", at(stopped), f"b{number:03}"),
        timeline,
        start,
        Lsn(start.value + 100),
        at(stopped),
    )


def archive(*numbers: int, doubled: int | None = None) -> Archive:
    twice = frozenset({WalSegment(1, doubled)} if doubled is not None else ())
    return Archive(MIB, {1: {number: at(10 * number) for number in numbers}}, doubled=twice)


def test_a_gap_is_told_unless_a_base_backup_before_the_window_lies_beyond_it() -> None:
    bases = [base(1, 10), base(6, 60)]
    whole, gap = archive(*range(1, 10)), archive(1, 2, 5, 6, 7, 8, 9)
    assert breaks(bases, whole, 1, since=at(0)) == ()
    (said,) = breaks(bases, gap, 1, since=at(0))
    assert "000000010000000000000003 to 000000010000000000000004 missing" in said
    assert breaks(bases, gap, 1, since=at(59)) == (said,)
    assert breaks(bases, gap, 1, since=at(60)) == ()
    both = breaks(bases, archive(1, 2, 5, 7, 8, 9), 1, since=at(60))  # nothing can begin with the second
    assert ["03 to" in both[1], "06 missing" in both[0]] == [True, True]
    (said,) = breaks(bases, archive(*range(1, 10), doubled=8), 1, since=at(60))
    assert "000000010000000000000008 cannot be used: two versions are archived" in said


def test_what_a_timeline_left_behind_is_no_gap() -> None:
    history = TimelineHistory(2, (TimelineSwitch(1, Lsn(3 * MIB + 500)),))
    found = Archive(
        MIB,
        {1: {n: at(n) for n in (1, 2, 3, 9)}, 2: {n: at(n) for n in (3, 4)}},
        {2: history},
    )
    assert breaks([base(1, 1)], found, 2, since=at(0)) == ()


def test_a_record_is_read_back_equal() -> None:
    empty = replace(drill(), base=None, target_at=None, seed=None, recovery=None, loss=None, spans=())
    for each in (drill(), empty, drill(verdict=Verdict.FAILED)):
        data = drill_to_json(each)
        assert drill_from_json(data, drill_key(each.id)) == each
        assert drill_to_json(drill_from_json(data, drill_key(each.id))) == data
    assert parse_drill_key(drill_key(drill().id)) == drill().id


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"segments": 40', b'"segments": 41', "sha256"),
        (b"backup-pipeline drill", b"backup-pipeline other", "it is a"),
        (b"", b"", "under another drill's key"),
    ],
)
def test_a_damaged_or_moved_record_is_not_believed(old: bytes, new: bytes, said: str) -> None:
    data = drill_to_json(drill()).replace(old, new, 1)
    key = drill_key(drill().id if old else drill(at=NOW + timedelta(1)).id)
    with pytest.raises(Corrupt, match=said):
        drill_from_json(data, key)


def test_a_drill_in_a_line_says_what_it_found() -> None:
    assert summary(drill()) == (
        "drill main/20260310T120000Z-3f9a1c: proven, to 2026-03-10T09:00:00Z, recovered in 31.5 s, "
        "1 min 2 s would have been lost"
    )
    assert drill().recovery_s == 31.5
    assert datetime.fromtimestamp(0, UTC) < drill().proof(Verdict.PROVEN, ()).at
