"""What an operator may type to name a backup."""

from datetime import UTC, datetime

import pytest

from backup_pipeline.domain.backup import CatalogListing, Verdict, newest_first
from backup_pipeline.domain.choice import find
from backup_pipeline.errors import BackupNotFound
from backup_pipeline_tests.domain import values


def at(day: int, hour: int = 2) -> datetime:
    return datetime(2026, 3, day, hour, tzinfo=UTC)


BACKUPS = newest_first(
    [
        values.backup(at=at(1), verdict=Verdict.PROVEN, suffix="aaaa"),
        values.backup(at=at(2), verdict=Verdict.PROVEN, suffix="bbbb"),
        values.backup(at=at(3), verdict=Verdict.RESTORED, suffix="cccc"),
        values.backup(at=at(3, 14), verdict=Verdict.FAILED, suffix="dddd"),
    ]
)
LISTING = CatalogListing(BACKUPS)
OTHER = values.backup(at=at(2), database="other", suffix="eeee")
BOTH = CatalogListing(newest_first([*BACKUPS, OTHER]))


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("app/20260301T020000Z-aaaa", "aaaa"),
        ("20260301T020000Z-aaaa", "aaaa"),
        ("20260302", "bbbb"),
        ("app/20260302", "bbbb"),
        ("2026-03-02", "bbbb"),
        ("2026-03-02T02:00:00Z", "bbbb"),
        ("2026-03-03 14:00", "dddd"),
        ("latest", "dddd"),
        ("proven", "bbbb"),
        (" app/proven ", "bbbb"),
    ],
)
def test_what_names_a_backup(text: str, suffix: str) -> None:
    assert find(LISTING, text).id.stamp.endswith(suffix)


def error(listing: CatalogListing, text: str) -> BackupNotFound:
    with pytest.raises(BackupNotFound) as caught:
        find(listing, text)
    return caught.value


def test_what_names_more_than_one_is_no_name() -> None:
    found = error(LISTING, "20260303")
    assert found.message == "20260303 names 2 backups"
    assert list(found.detail) == ["app/20260303T140000Z-dddd", "app/20260303T020000Z-cccc"]
    assert len(error(LISTING, "2026-03").detail) == 4


def test_what_names_none_shows_the_nearest() -> None:
    assert next(iter(error(LISTING, "20260302T030000Z-ffff").detail)) == "app/20260302T020000Z-bbbb"
    assert next(iter(error(LISTING, "2026-02-20").detail)) == "app/20260301T020000Z-aaaa"
    for text in ("", "/", "app/", "nonsense", "app/x/y", "../..", "2026-99-99"):
        assert error(LISTING, text).hint


def test_the_database_is_asked_for_when_there_are_several() -> None:
    assert error(BOTH, "latest").message == "latest of which database: app, other?"
    assert find(BOTH, "other/latest") == OTHER
    assert "there is no backup of nobody" in error(BOTH, "nobody/latest").message


def test_none_proven_shows_what_there_is() -> None:
    found = error(CatalogListing((OTHER,), (("catalog/other/x.json", "damaged"),)), "proven")
    assert found.message == "no backup of other is proven"
    assert list(found.detail) == [str(OTHER.id)]
    assert "name an unproven one" in found.hint
    assert "1 objects in the catalog cannot be read" in found.hint


@pytest.mark.parametrize("text", ["latest", "proven", "", "2026-03-01", "20260301T020000Z-aaaa"])
def test_an_empty_catalog_is_no_crash(text: str) -> None:
    for database, of in (("", ""), ("app/", " of app")):
        found = error(CatalogListing(()), database + text)
        assert found.message == f"there is no backup{of}"
        assert "`backup-pipeline list`" in found.hint
