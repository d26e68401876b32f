"""What heartbeats say of a recovered copy: with the source, without it, and when its clock lied."""

from datetime import timedelta

import pytest

from backup_pipeline.domain.heartbeat import (
    CopyBeats,
    Heartbeat,
    HeartbeatFinding,
    SourceBeats,
    judge_beats,
)
from backup_pipeline_tests.domain.values import NOW


def beat(number: int, second: float) -> Heartbeat:
    return Heartbeat(number, NOW + timedelta(seconds=second))


BEFORE, AFTER = beat(7, -30), beat(8, 30)
SOURCE = SourceBeats(BEFORE, AFTER)


def judged(
    newest: Heartbeat | None, source: SourceBeats | None = None, *, before: bool = True, after: bool = False
) -> HeartbeatFinding:
    return judge_beats(NOW, CopyBeats(newest, before, after), source)


def test_the_row_before_is_there_and_the_one_after_is_not() -> None:
    found = judged(BEFORE, SOURCE)
    assert (found.bracketed, found.differences, found.notes) == (True, (), ())
    assert "30.0 s before the target, is there" in found.checked[0]
    assert "number 8), is not" in found.checked[1]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (judged(beat(6, -90), SOURCE, before=False), "its newest is of 2026-03-10T11:58:30Z"),
        (judged(None, SOURCE, before=False), "it holds none"),
        (judged(BEFORE, SOURCE, after=True), "after the target, is in the recovered cluster"),
        (judged(beat(9, 1), SOURCE), "holds the heartbeat of 2026-03-10T12:00:01Z (number 9), after"),
        (judged(beat(9, 1)), "holds the heartbeat of 2026-03-10T12:00:01Z (number 9), after"),
    ],
)
def test_what_is_missing_or_too_much_is_a_difference(found: HeartbeatFinding, said: str) -> None:
    assert not found.bracketed
    assert said in found.differences[0]


def test_a_clock_that_was_set_back_is_named() -> None:
    lied = SourceBeats(BEFORE, AFTER, stepped_back=beat(7, -30))
    assert "clock was set back before 2026-03-10T11:59:30Z" in judged(None, lied, before=False).differences[1]
    assert judged(BEFORE, lied).bracketed


def test_without_the_source_a_row_within_the_last_minute_is_enough() -> None:
    assert judged(beat(7, -69)).bracketed
    for late in (judged(beat(7, -71)), judged(None)):
        assert not late.bracketed
        assert not late.differences
        assert len(late.notes) == 1


def test_a_source_that_was_silent_then_is_told_and_proves_all_the_same() -> None:
    found = judged(beat(7, -3600), SourceBeats(beat(7, -3600), AFTER))
    assert found.bracketed
    assert found.notes == (
        "the source has no heartbeat in the last minute before the target: none was written then",
    )


def test_a_target_later_than_all_rows_is_bracketed_by_a_fresh_one_only() -> None:
    fresh = judged(beat(7, -80), SourceBeats(beat(7, -80), None))
    assert fresh.bracketed
    assert fresh.notes == ("the source has no heartbeat after the target yet",)
    for second in (-81, -20 * 3600):
        stale = judged(beat(7, second), SourceBeats(beat(7, second), None))
        assert (stale.bracketed, stale.differences) == (False, ())
        assert "before the target, is there" in stale.checked[0]
        assert stale.notes == (
            "the source has no heartbeat in the last minute before the target: none was written then",
            "the source has none after the target either: is `backup-pipeline heartbeat` still run?",
        )


def test_a_source_whose_first_row_is_later_proves_nothing_of_what_is_in() -> None:
    found = judged(None, SourceBeats(None, AFTER), before=False)
    assert not found.bracketed
    assert "number 8), is not" in found.checked[0]
    assert judged(None, SourceBeats(None, None), before=False).notes
