"""What operators type as a recovery target, and what PostgreSQL is given."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_pipeline.domain.recovery_target import LATEST, TargetKind, parse_target
from backup_pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "kind", "settings"),
    [
        ("2026-03-01T02:00:00Z", TargetKind.TIME, {"recovery_target_time": "2026-03-01 02:00:00.000000+00"}),
        (
            "2026-03-01 04:00:00.5+02:00",
            TargetKind.TIME,
            {"recovery_target_time": "2026-03-01 02:00:00.500000+00"},
        ),
        ("16/B374D848", TargetKind.LSN, {"recovery_target_lsn": "16/B374D848"}),
        ("lsn:16/b374d848", TargetKind.LSN, {"recovery_target_lsn": "16/B374D848"}),
        ("774", TargetKind.XID, {"recovery_target_xid": "774"}),
        ("before_upgrade", TargetKind.NAME, {"recovery_target_name": "before_upgrade"}),
        ("name:774", TargetKind.NAME, {"recovery_target_name": "774"}),
        ("name:latest", TargetKind.NAME, {"recovery_target_name": "latest"}),
        ("it's; -x $(true)", TargetKind.NAME, {"recovery_target_name": "it's; -x $(true)"}),
    ],
)
def test_a_target_becomes_postgresql_s_settings(
    text: str, kind: TargetKind, settings: dict[str, str]
) -> None:
    target = parse_target(text)
    assert target.kind is kind
    assert target.settings() == {**settings, "recovery_target_inclusive": "on"}
    if kind is not TargetKind.NAME:
        assert parse_target(text, inclusive=False).settings()["recovery_target_inclusive"] == "off"


def test_latest_gives_no_target() -> None:
    assert parse_target("latest") == LATEST
    assert LATEST.settings() == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2026-03-01T02:00:00", "does not say its time zone"),
        ("2026-03-01", "does not say its time zone"),
        ("2026-02-30T02:00:00Z", "not a time"),
        ("2026-03-01 at two", "not a time"),
        ("time:now", "not a time"),
        ("lsn:0", "not an LSN"),
        ("16/123456789", "not an LSN"),
        ("2", "not a transaction"),
        ("xid:12a", "not a transaction"),
        ("99999999999999999999", "not a transaction"),
        ("", "not a recovery target"),
        ("name:", "not a recovery target"),
        ("x" * 64, "not a recovery target"),
        ("a\nb", "not a recovery target"),
    ],
)
def test_what_is_no_target_is_refused_and_told_how_to_write_one(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_target(text)
    assert caught.value.hint


def test_a_time_without_a_zone_is_told_with_one() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_target("2026-03-01 02:00:00")
    assert "2026-03-01T02:00:00Z" in caught.value.hint


@given(st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1)))  # noqa: DTZ001
def test_a_time_is_kept_to_the_microsecond(naive: datetime) -> None:
    at = naive.replace(tzinfo=UTC)
    target = parse_target(at.isoformat())
    assert target.at == at
    assert datetime.fromisoformat(target.settings()["recovery_target_time"]) == at
    assert parse_target(str(target)).at == at
