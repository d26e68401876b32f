"""How progress is told: shares only where they are known, one line every few seconds."""

import pytest

from backup_pipeline.actions.report import Lines, Progress, loading
from backup_pipeline.engines.postgres.load import LoadProgress

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("progress", "shown", "share"),
    [
        (Progress("dump", 10 * MIB, None, 2.0), "dump: 10.0 MiB in 2.0 s (5.0 MiB/s)", None),
        (Progress("dump", 10 * MIB, 40 * MIB, 2.0), "dump: 10.0 MiB in 2.0 s (5.0 MiB/s, about 25%)", 0.25),
        (Progress("dump", 50 * MIB, 40 * MIB, 2.0), "dump: 50.0 MiB in 2.0 s (25.0 MiB/s)", None),
        (
            Progress("load", 8 * MIB, None, 2.0, 3, 12),
            "load: 8.0 MiB in 2.0 s (4.0 MiB/s, item 3 of 12)",
            0.25,
        ),
        (Progress("load", 0, None, 2.0, 3, 12), "load: 0 B in 2.0 s (item 3 of 12)", 0.25),
        (Progress("dump", 0, None, 0.0), "dump: 0 B in 0.0 s", None),
    ],
)
def test_a_share_is_told_only_where_it_is_known(progress: Progress, shown: str, share: float | None) -> None:
    assert str(progress) == shown
    assert progress.share == share


def test_a_line_every_few_seconds_of_each_step() -> None:
    lines: list[str] = []
    report = Lines(lines.append, every_s=5.0)
    for second in range(13):
        report.progress(Progress("dump", second, None, float(second)))
        report.progress(Progress("fingerprint", second, None, float(second)))
    assert [line.split()[0] for line in lines] == ["dump:", "fingerprint:"] * 2


def test_a_load_is_told_by_its_items() -> None:
    lines: list[str] = []
    tell = loading(Lines(lines.append, every_s=0.0))
    tell(LoadProgress(3, 12, "TABLE public.users", None))
    tell(LoadProgress(4, 12, "TABLE public.orders", 5 * MIB))
    assert "item 3 of 12" in lines[0]
    assert lines[1].startswith("restore: 5.0 MiB in ")
