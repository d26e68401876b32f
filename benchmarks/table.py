"""The results as tables, and what they are held against. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Cost

COLUMNS = (
    "what",
    "wall s",
    "spread s",
    "CPU s",
    "machine CPU s",
    "peak MB",
    "above idle MB",
    "size MB",
    "to cron",
    "to floor",
)
MIB = 1024 * 1024


@dataclass(frozen=True)
class Result:
    """One contender's runs on one database."""

    key: str
    title: str
    costs: tuple[Cost, ...]
    size_bytes: int

    @property
    def wall_s(self) -> float:
        """The median of all runs."""
        return statistics.median(cost.wall_s for cost in self.costs)

    @property
    def cpu_s(self) -> float:
        """The median of all runs."""
        return statistics.median(cost.cpu_s for cost in self.costs)

    @property
    def machine_cpu_s(self) -> float:
        """The median of all runs."""
        return statistics.median(cost.machine_cpu_s for cost in self.costs)

    @property
    def peak_bytes(self) -> int:
        """The largest of all runs."""
        return max(cost.peak_bytes for cost in self.costs)


@dataclass(frozen=True)
class Target:
    """What was promised, and what was found."""

    promise: str
    found: str
    met: bool


def rows(results: Sequence[Result], idle_bytes: int) -> list[tuple[str, ...]]:
    """A row for each result, in COLUMNS' order; ratios are of wall times."""
    by_key = {result.key: result for result in results}
    table: list[tuple[str, ...]] = []
    for result in results:
        walls = [cost.wall_s for cost in result.costs]
        dumps = result.key not in ("prove", "restore")
        ours = result.key in ("counts", "ours", "prove", "restore")
        table.append(
            (
                result.title,
                f"{result.wall_s:.1f}",
                f"{min(walls):.1f}-{max(walls):.1f}",
                f"{result.cpu_s:.1f}",
                f"{result.machine_cpu_s:.1f}",
                f"{result.peak_bytes / MIB:.0f}",
                f"{(result.peak_bytes - idle_bytes) / MIB:.0f}" if ours else "",
                f"{result.size_bytes / MIB:.0f}" if result.size_bytes else "",
                _ratio(result, by_key.get("cron")) if dumps else "",
                _ratio(result, by_key.get("floor")) if dumps else "",
            )
        )
    return table


def targets(
    large: Mapping[str, Result], small: Mapping[str, Result], idle_bytes: int, *, sizes: tuple[str, str]
) -> list[Target]:
    """The promises: speed on the large database, memory on both."""
    faster = large["cron"].wall_s / large["ours"].wall_s
    without = large["counts"].wall_s / large["floor"].wall_s
    with_it = large["ours"].wall_s / large["floor"].wall_s
    above = [(found["ours"].peak_bytes - idle_bytes) / MIB for found in (small, large)]
    return [
        Target(
            "4 times as fast as the cron script, fingerprint included", f"{faster:.1f} times", faster >= 4
        ),
        Target(
            "within 1.25 times pg_dump's own floor, without fingerprint", f"{without:.2f}", without <= 1.25
        ),
        Target("within 2 times pg_dump's own floor, with fingerprint", f"{with_it:.2f}", with_it <= 2),
        Target("less than 100 MB above idle", f"{max(above):.0f} MB", max(above) < 100),
        Target(
            "the same memory at both sizes (within 15 MB)",
            f"{above[0]:.0f} MB at {sizes[0]}, {above[1]:.0f} MB at {sizes[1]}",
            abs(above[1] - above[0]) <= 15,
        ),
    ]


def markdown(header: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    """A table that reads well as text and as Markdown: first column to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in [header, *table]) for i in range(len(header))]
    lines = [_line(header, widths), "|" + "|".join(_rule(i, width) for i, width in enumerate(widths)) + "|"]
    return "\n".join([*lines, *(_line(row, widths) for row in table)])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "| " + " | ".join(cells) + " |"


def _rule(column: int, width: int) -> str:
    return "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"


def _ratio(result: Result, base: Result | None) -> str:
    return f"{result.wall_s / base.wall_s:.2f}" if base else ""
