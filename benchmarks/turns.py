"""What one contender's turns have cost, and how a table shows it. Pure but for `machine`.

Used by wal.py and base.py.
"""

import os
import platform
import statistics
from dataclasses import dataclass, field

from benchmarks.measure import Work
from benchmarks.table import MIB
from benchmarks.wal_ground import Ground


@dataclass
class Measured:
    """The turns of one contender: `scale` 1 for seconds, 1000 for milliseconds."""

    title: str
    scale: float = 1.0
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    servers: list[float] = field(default_factory=list)
    stored_bytes: int = 0

    def add(self, work: Work, *, per: int = 1, stored_bytes: int = 0) -> None:
        """One more turn, in which the same was done `per` times."""
        self.walls.append(self.scale * work.wall_s / per)
        self.cpus.append(self.scale * work.cpu_s / per)
        self.servers.append(self.scale * work.server_cpu_s / per)
        self.stored_bytes = stored_bytes

    @property
    def wall(self) -> float:
        """The median."""
        return statistics.median(self.walls)

    def to(self, base: "Measured | None") -> float | None:
        """How many times as long as another; None where one was not measured."""
        return self.wall / base.wall if base and base.walls and self.walls else None


def cells(each: Measured) -> tuple[str, str, str, str, str]:
    """Title, median, spread, processor time of it and of the S3 server."""
    return (
        each.title,
        f"{each.wall:.1f}",
        f"{min(each.walls):.1f}-{max(each.walls):.1f}",
        f"{statistics.median(each.cpus):.1f}",
        f"{statistics.median(each.servers):.1f}",
    )


def ratio(value: float | None) -> str:
    """As a table shows it."""
    return "" if value is None else f"{value:.2f}"


def megabytes(each: Measured) -> str:
    """What it has stored."""
    return f"{each.stored_bytes / MIB:.0f}" if each.stored_bytes else ""


def machine(ground: Ground) -> str:
    """What it was measured on."""
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {ground.version}, TLS on loopback"
