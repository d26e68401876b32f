"""Crons: the ticks that are explained and counted with are those that Dagster makes."""

from datetime import UTC, datetime
from itertools import islice

import pytest
from cronsim import CronSim
from dagster._utils.schedules import schedule_execution_time_iterator
from hypothesis import given, reject
from hypothesis import strategies as st

from backup_pipeline.domain.cron import canonical

FROM = datetime(2026, 3, 1, tzinfo=UTC)


def field(low: int, high: int, *odd: str) -> st.SearchStrategy[str]:
    """A field as people write it, and, one time in many, in one of the `odd` forms."""
    number = st.integers(low, high).map(str)
    ends = st.lists(st.integers(low, high), min_size=2, max_size=2, unique=True).map(sorted)
    span = ends.map(lambda pair: f"{pair[0]}-{pair[1]}")
    step = st.integers(1, max(1, high // 2)).map(str)
    stepped = st.builds("{}/{}".format, st.sampled_from(["*", f"{low}-{high}"]), step)
    listed = st.lists(st.one_of(number, span), min_size=2, max_size=3).map(",".join)
    return st.one_of(st.just("*"), number, span, stepped, listed, st.sampled_from(["*", *odd]))


CRONS = st.tuples(
    field(0, 59),
    field(0, 23),
    field(1, 31, "L", "LW", "1,L"),
    field(1, 12, "JAN", "feb-apr"),
    field(0, 7, "mon", "1#2", "1#1,3#2", "1#1,2", "5L", "MON#1"),
).map(" ".join)


@given(CRONS)
def test_what_is_accepted_means_the_same_to_dagster(text: str) -> None:
    try:
        cron = canonical(text)
    except ValueError:
        reject()
    theirs = schedule_execution_time_iterator(FROM.timestamp(), cron, "UTC", ascending=True)
    later = (tick for tick in theirs if tick > FROM)
    assert list(islice(CronSim(cron, FROM), 3)) == list(islice(later, 3))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("00  02 * * *", "0 2 * * *"),
        ("0 2 * feb mon-fri", "0 2 * FEB MON-FRI"),
        ("0 2 01,015 * 0", "0 2 1,15 * 0"),
        ("10 20 30 1 0", "10 20 30 1 0"),
    ],
)
def test_a_cron_has_one_form(text: str, expected: str) -> None:
    assert canonical(text) == canonical(expected) == expected
