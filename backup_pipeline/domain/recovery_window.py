"""Which moments of a cluster can be recovered, per timeline, and where WAL is missing. Pure.

Shown by listings and on the WAL's asset; a single target is judged in domain/recovery_route.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.domain.replayable_wal import Archive, BasePoint, routes
from backup_pipeline.domain.wal import Lsn, WalGap, find_gaps


@dataclass(frozen=True)
class Window:
    """Any moment from `from_at` to about `to_at` can be recovered, beginning with one of `bases`."""

    timeline: int
    from_at: datetime
    from_lsn: Lsn
    to_at: datetime
    to_lsn: Lsn
    bases: tuple[BackupId, ...]

    def __str__(self) -> str:
        begins_at = self.from_at + (-self.from_at.microsecond % 1_000_000) * timedelta(microseconds=1)
        moments = f"from {show_moment(begins_at)} to about {show_moment(self.to_at.replace(microsecond=0))}"
        return f"{moments}, on timeline {self.timeline}"


@dataclass(frozen=True)
class Windows:
    """What can be recovered, newest timeline first, and what is missing in between."""

    windows: tuple[Window, ...]
    gaps: tuple[WalGap, ...]


def recovery_windows(bases: Sequence[BasePoint], archive: Archive) -> Windows:
    """From which moment to which any can be recovered, per timeline; and the gaps in the archive."""
    windows: list[Window] = []
    for timeline in sorted(
        {*archive.segments, *archive.histories, *(b.timeline for b in bases)}, reverse=True
    ):
        merged: list[Window] = []
        for route in reversed(routes(bases, archive, timeline)):  # oldest first
            if not route.complete or route.end_at is None:
                continue
            base = route.base
            until = max(route.end_at, base.stopped_at)
            if merged and base.end <= merged[-1].to_lsn:
                before = merged.pop()
                ids = (*before.bases, base.id)
                until = max(until, before.to_at)
                merged.append(
                    Window(
                        timeline, before.from_at, before.from_lsn, until, max(before.to_lsn, route.end), ids
                    )
                )
            else:
                merged.append(Window(timeline, base.stopped_at, base.end, until, route.end, (base.id,)))
        windows += reversed(merged)
    gaps = [
        gap
        for timeline, there in sorted(archive.segments.items(), reverse=True)
        for gap in find_gaps(timeline, list(there))
    ]
    return Windows(tuple(windows), tuple(gaps))
