"""Which moments of a cluster can be recovered now, and what speaks against the window that is configured.

Called by `list` and by Dagster's asset and form; one listing of the store. The windows themselves are
domain/recovery_window.py's; whether the server archives well is wal/status.py's.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.recovery_facts import RecoveryFacts, read_facts
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.domain.recovery_window import Window, Windows, recovery_windows
from backup_pipeline.errors import BackupNotFound, Refused
from backup_pipeline.units import show_bytes, show_count, show_seconds


@dataclass(frozen=True)
class ClusterWindows:
    """What can be recovered of one cluster at the moment `at`; `problems` are for somebody to look at.

    Sizes are of what the archive takes in the store; `newest_at` is when its last segment was archived.
    """

    cluster: str
    at: datetime
    wanted: timedelta
    found: Windows
    segment_bytes: int
    segments: int
    stored_bytes: int
    newest_at: datetime | None
    problems: tuple[str, ...]

    @property
    def current(self) -> Window | None:
        """The window that reaches the furthest forward; None when nothing can be recovered."""
        return max(self.found.windows, key=lambda each: each.to_at, default=None)

    @property
    def is_met(self) -> bool:
        """Whether any moment of the configured window can be recovered, but for what is being archived."""
        current = self.current
        if current is None or current.from_at > self.at - self.wanted:
            return False
        ends = current.to_lsn.value
        return not any(
            gap.timeline == current.timeline and gap.first * self.segment_bytes >= ends
            for gap in self.found.gaps
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """The windows in words, newest first, then the archive's size, then what is wrong."""
        return (
            *(f"any moment {window}" for window in self.found.windows),
            *([] if self.found.windows else ["no moment yet"]),
            *(f"missing: {gap.names(self.segment_bytes)}" for gap in self.found.gaps),
            *([f"WAL: {self._archive}"] if self.segments else []),
            *(f"PROBLEM {problem}" for problem in self.problems),
        )

    @property
    def _archive(self) -> str:
        newest = f", the newest of {show_moment(self.newest_at)}" if self.newest_at else ""
        return f"{show_count(self.segments, 'segment')}, {show_bytes(self.stored_bytes)}{newest}"


def windows_of(cluster: ProtectedCluster, *, now: datetime) -> ClusterWindows:
    """Read the archive and the base backups of a cluster, and say what can be recovered.

    A cluster without an archive, or without base backups that fit it, has no windows, and a problem that says
    so. Raises StoreError, Corrupt.
    """
    try:
        facts = read_facts(cluster)
    except (BackupNotFound, Refused) as error:
        nothing = Windows((), ())
        return ClusterWindows(
            cluster.name, now, cluster.config.recovery_window, nothing, 0, 0, 0, None, (error.message,)
        )
    return judged(cluster, facts, now=now)


def judged(cluster: ProtectedCluster, facts: RecoveryFacts, *, now: datetime) -> ClusterWindows:
    """The windows of what was read already."""
    listing, wanted = facts.listing, cluster.config.recovery_window
    found = recovery_windows(facts.points, facts.archive)
    archived = [each.archived_at for timeline in listing.segments.values() for each in timeline]
    read = ClusterWindows(
        cluster=cluster.name,
        at=now,
        wanted=wanted,
        found=found,
        segment_bytes=listing.segment_bytes,
        segments=sum(map(len, listing.segments.values())),
        stored_bytes=listing.stored_bytes,
        newest_at=max(archived, default=None),
        problems=(
            *(f"WAL is missing: {gap.names(listing.segment_bytes)}" for gap in found.gaps),
            *(f"two versions are archived of {name}" for name in listing.conflicts),
            *facts.notes,
        ),
    )
    too_short = read.current is not None and read.current.from_at > now - wanted
    if not found.windows or (cluster.config.dsn.named and too_short):  # else no window is configured
        read = replace(read, problems=(_shortfall(read), *read.problems))
    return read


def _shortfall(read: ClusterWindows) -> str:
    if read.current is None:
        return "no moment can be recovered: there is no base backup whose WAL is archived"
    asked = show_seconds(read.wanted.total_seconds())
    reached = show_seconds(max(0.0, (read.at - read.current.from_at).total_seconds()))
    since = show_moment(read.current.from_at.replace(microsecond=0))
    return f"the recovery window is to be {asked}, and goes back {reached}, to {since}"
