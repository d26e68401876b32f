"""What restore_command is answered: only what the plan knows, only where PostgreSQL wants it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline.errors import BackupError, Corrupt, NotArchived, StoreError
from backup_pipeline.wal.fetch import ABSENT, FATAL
from backup_pipeline.wal.prefetch import AHEAD, Prefetch

ORDER = [f"00000001000000000000{number:04X}" for number in range(1, 20)]


class Archive:
    """Files by name; whatever else is asked for is noted, and not there."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.errors: dict[str, list[BackupError]] = {}

    def fetch(self, name: str, path: Path) -> None:
        self.asked.append(name)
        if self.errors.get(name):
            raise self.errors[name].pop(0)
        if name not in ORDER:
            raise NotArchived(f"{name} is not there")
        path.write_text(name)


@pytest.fixture
def archive() -> Archive:
    return Archive()


@pytest.fixture
def served(archive: Archive, tmp_path: Path) -> Iterator[Prefetch]:
    (tmp_path / "pg_wal").mkdir()
    prefetch = Prefetch(archive.fetch, ORDER, tmp_path / "pg_wal" / "spool", patience_s=20.0)
    yield prefetch
    prefetch.close()


def test_a_segment_is_put_where_postgresql_wants_it_and_the_next_are_fetched_ahead(
    served: Prefetch, archive: Archive, tmp_path: Path
) -> None:
    target = tmp_path / "pg_wal" / "RECOVERYXLOG"
    assert served.bring(ORDER[0], target) == (0, "")
    assert target.read_text() == ORDER[0]
    served.close()
    assert set(archive.asked) <= set(ORDER[: 1 + AHEAD])
    assert served.brought == [ORDER[0]]


def test_what_came_after_the_plan_or_is_of_another_branch_does_not_exist(
    served: Prefetch, archive: Archive, tmp_path: Path
) -> None:
    target = tmp_path / "pg_wal" / "RECOVERYXLOG"
    for name in ("000000010000000000000020", "000000020000000000000001"):
        assert served.bring(name, target) == (ABSENT, "")
    assert archive.asked == []
    assert served.bring("00000002.history", tmp_path / "pg_wal" / "RECOVERYHISTORY") == (ABSENT, "")
    assert archive.asked == ["00000002.history"]


def test_what_the_plan_needs_and_is_gone_ends_the_recovery(
    served: Prefetch, archive: Archive, tmp_path: Path
) -> None:
    archive.errors[ORDER[0]] = [NotArchived("gone")]
    code, said = served.bring(ORDER[0], tmp_path / "pg_wal" / "RECOVERYXLOG")
    assert code == FATAL
    assert "is no longer in the archive" in said
    assert served.failure is not None


def test_nothing_is_put_anywhere_else(served: Prefetch, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for target in (precious, tmp_path / "pg_wal" / ORDER[0]):
        assert served.bring(ORDER[0], target)[0] == FATAL
    assert precious.read_text() == "mine"
    elsewhere = tmp_path / "elsewhere" / "RECOVERYXLOG"
    assert served.bring(ORDER[0], elsewhere) == (0, "")  # by its name alone, in pg_wal
    assert not elsewhere.exists()
    assert (tmp_path / "pg_wal" / "RECOVERYXLOG").read_text() == ORDER[0]


def test_an_archive_that_is_away_is_waited_for_and_what_is_damaged_is_not(
    served: Prefetch, archive: Archive, tmp_path: Path
) -> None:
    archive.errors[ORDER[-1]] = [StoreError("away")]
    assert served.bring(ORDER[-1], tmp_path / "pg_wal" / "RECOVERYXLOG") == (0, "")
    assert archive.asked == [ORDER[-1]] * 2
    archive.errors[ORDER[-2]] = [Corrupt("damaged")]
    code, said = served.bring(ORDER[-2], tmp_path / "pg_wal" / "RECOVERYXLOG")
    assert (code, "damaged" in said) == (FATAL, True)
    assert archive.asked[2] == ORDER[-2]


def test_what_is_no_name_of_wal_ends_the_recovery(served: Prefetch, tmp_path: Path) -> None:
    assert served.bring("../../etc/passwd", tmp_path / "pg_wal" / "RECOVERYXLOG")[0] == FATAL
