"""Crons as all of us read them alike: what words.py explains is what Dagster does. Pure.

Called by config_file.py. Of what the two libraries behind them know, only what both read in one way is taken.
"""

import re
from datetime import UTC, datetime

from cronsim import CronSim, CronSimError

EXPECTED = 'five cron fields such as "0 2 * * *"'
_ANY_MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
_VALUE = "(?:[0-9]+|[A-Z]{3})"
_PLAIN = re.compile(rf"L|{_VALUE}#[1-5]|{_VALUE}|(?:\*|{_VALUE}-{_VALUE})(?:/[0-9]+)?")
_RANGE = re.compile(r"(\w+)-(\w+)")
_ALL_DAYS, _ALL_WEEKDAYS = set(range(1, 32)), set(range(7))


def canonical(text: str) -> str:
    """The one form of this cron: single spaces, no leading zeros, capitals. Raises ValueError."""
    fields = [re.sub(r"(?<!\d)0+(?=\d)", "", field).upper() for field in text.split()]
    cron = " ".join(fields)
    try:
        if len(fields) != 5:  # Dagster knows no seconds
            raise CronSimError("Wrong number of fields")
        read = CronSim(cron, _ANY_MOMENT)
    except CronSimError as error:
        raise ValueError(f'found "{text}", expected {EXPECTED} ({error})') from error
    day, weekday = fields[2], fields[4]
    if any(not _PLAIN.fullmatch(part) for field in fields for part in field.split(",")) or any(
        first == last for field in fields for first, last in _RANGE.findall(field)
    ):
        raise ValueError(f'found "{text}", expected ranges and steps such as "1-5", "5-59/15" and "*/15"')
    numbered = {"#" in part for part in weekday.split(",")}
    if ("L" in day and day != "L") or len(numbered) > 1 or (numbered == {True} and day != "*"):
        raise ValueError(f'found "{text}", expected L alone as the day, or # throughout the weekdays')
    every = day.startswith("*") or weekday.startswith("*")
    if "*" not in (day, weekday) and (every or read.days == _ALL_DAYS or read.weekdays >= _ALL_WEEKDAYS):
        raise ValueError(
            f'found "{text}", expected a day or a weekday, or a list for each such as "0 2 1,15 * 0": '
            "a day then counts when either matches"
        )
    if read.months == {2} and min(read.days) > 29:
        raise ValueError(f'found "{text}": February has no such day')
    return cron
