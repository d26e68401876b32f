"""Retention of clusters: which base backups and which WAL the recovery window gives up, and why. Pure.

actions/prune_cluster.py gathers the facts and carries the plan out. When in doubt a thing stays:

- The window ends now, or with the newest WAL or base backup where that is older: neither an archive
  that stands still nor a clock that is ahead shortens it.
- A base backup that ended within the window stays, and of those before it, per timeline that reaches into
  the window, the newest one whose WAL is whole: any moment of the window can be recovered then.
- So do the two newest good ones, the two newest whole ones, the newest proven one, whatever is pinned, in
  use or dated in the future; and what an incremental one that stays, or waits for its WAL, was taken against.
- One whose proof failed, or that holds pages which its source had damaged, is not good: nothing goes for it.
- WAL goes below the first segment of the oldest base backup that stays, on every timeline, and nowhere else.
  One that stays only because another needs its files holds no WAL. Histories never go.
- Nothing at all goes while a record cannot be read, nothing of a system while the history of one of its
  timelines is missing or its segments are of another size, and no WAL while a base backup is under way.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from backup_pipeline.domain.backup import BackupId, Lease, Verdict
from backup_pipeline.domain.base_backup import BaseBackup, BaseManifest
from backup_pipeline.domain.base_chain import by_id, chain_of
from backup_pipeline.domain.replayable_wal import Archive, BasePoint, Route, routes
from backup_pipeline.domain.retention import LAST_GOOD, SKEW
from backup_pipeline.domain.wal import WalKind, WalName

ABANDONED_FOR = timedelta(days=7)
"""How long beyond the window a branch that was left, or an earlier system, still counts as alive."""


@dataclass(frozen=True)
class BaseDecision:
    """What becomes of one base backup, with the reasons in plain words.

    One that `holds_wal` may be recovered from; else its files alone are needed.
    """

    backup: BaseBackup
    keep: bool
    reasons: tuple[str, ...]
    holds_wal: bool = True

    def __str__(self) -> str:
        return f"{'keep' if self.keep else 'delete'} {self.backup.id}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class WalDecision:
    """What becomes of one system's WAL: segments below `cut` go. None keeps all of it."""

    system_identifier: str
    cut: int | None
    reason: str

    def gives_up(self, name: WalName, segment_bytes: int) -> bool:
        """Whether a file of the archive goes. A history never does."""
        if self.cut is None or name.kind is WalKind.HISTORY:
            return False
        return name.number(segment_bytes) < self.cut


@dataclass(frozen=True)
class ClusterPlan:
    """The decisions on base backups, newest first, and on the WAL of each system."""

    decisions: tuple[BaseDecision, ...]
    wal: tuple[WalDecision, ...]
    unreadable: tuple[tuple[str, str], ...] = ()  # (key, reason)

    @property
    def delete(self) -> tuple[BaseBackup, ...]:
        """The base backups that go, newest first: none before those that need it."""
        return tuple(each.backup for each in self.decisions if not each.keep)


@dataclass(frozen=True)
class SystemWal:
    """The WAL of one system as it is judged; `ended_at` is when its newest segment was archived."""

    archive: Archive
    ended_at: datetime | None = None


@dataclass(frozen=True)
class Facts:
    """What a cluster's prune is decided on. `current` is the system that archives now."""

    backups: Sequence[BaseBackup]
    systems: Mapping[str, SystemWal]
    current: str
    window: timedelta
    now: datetime
    leases: Sequence[Lease] = ()
    under_way: Collection[BackupId] = ()  # base backups that are being taken
    unlisted: Collection[BackupId] = ()  # objects of base backups without a record
    waiting: Sequence[BaseManifest] = ()  # those of them that are listed once their WAL is archived
    unreadable: tuple[tuple[str, str], ...] = ()

    @cached_property
    def begins_at(self) -> datetime:
        """The window's first moment, earlier by as much as two clocks may differ.

        A window ends with the newest moment that anything shows: a clock that is ahead does not move it.
        """
        shown = [
            *(each.ended_at for each in self.systems.values() if each.ended_at is not None),
            *(each.manifest.stopped_at for each in self.backups),
        ]
        return min(self.now, max(shown, default=self.now)) - self.window - SKEW


class _Judge:
    """The reasons to keep base backups; `for_files` are those that others were taken against."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.parents = {each.id: each.manifest.parent for each in facts.backups}
        known = by_id(each.manifest for each in facts.backups)
        self.chains = {each: chain_of(manifest, known) for each, manifest in known.items()}
        self.failed = {each.id for each in facts.backups if each.verdict is Verdict.FAILED}
        self.whole = {each.id for each in facts.backups if self._is_whole(each)}
        self.good = {each.id for each in facts.backups if each.id in self.whole and self._is_good(each)}
        self.stay: dict[BackupId, list[str]] = {}
        self.for_files: dict[BackupId, list[str]] = {}

    def _is_whole(self, backup: BaseBackup) -> bool:
        """Whether it can be recovered from: its own WAL is there, and so is what it was taken against."""
        manifest = backup.manifest
        wal = self.facts.systems.get(manifest.system_identifier)
        return (
            wal is not None
            and not self.chains[backup.id].broken
            and not _is_ahead(backup, self.facts)
            and any(each.complete for each in routes([point_of(backup)], wal.archive, manifest.end.timeline))
        )

    def _is_good(self, backup: BaseBackup) -> bool:
        """Whether others may go for it."""
        links = self.chains[backup.id].links
        return not any(link.id in self.failed or link.page_checksums_wrong for link in links)

    def keep(self, backup: BackupId, reason: str) -> None:
        self.stay.setdefault(backup, []).append(reason)

    def keep_marked(self) -> None:
        """What stays whatever its WAL is."""
        facts, held = self.facts, {lease.id: lease.purpose for lease in self.facts.leases}
        for backup in facts.backups:
            if backup.pinned:
                self.keep(backup.id, "pinned")
            if backup.id in held:
                self.keep(backup.id, f"in use by a {held[backup.id]}")
            if _is_ahead(backup, facts):
                self.keep(backup.id, "dated in the future")
            if backup.manifest.stopped_at >= facts.begins_at:
                self.keep(backup.id, "within the recovery window")
            if lost := _doubt(facts, backup.manifest.system_identifier):
                self.keep(backup.id, lost)

    def keep_for_window(self, system: str, wal: SystemWal) -> None:
        """Per timeline that reaches into the window, the newest before it, and the newest good one."""
        older = [
            each
            for each in self.facts.backups
            if each.manifest.system_identifier == system and each.manifest.stopped_at < self.facts.begins_at
        ]
        points = [point_of(each) for each in older]
        if not self.good & {each.id for each in older}:
            for point in points:
                self.keep(point.id, "none that is older than the recovery window is known to be good")
            return
        timelines = {*wal.archive.segments, *wal.archive.histories, *(point.timeline for point in points)}
        for timeline in sorted(timelines, reverse=True):
            found = [each for each in routes(points, wal.archive, timeline) if each.base.id in self.whole]
            is_live = system == self.facts.current and timeline == wal.archive.newest_timeline
            if not found or not (is_live or self._reaches_window(found[0])):
                continue
            first = {
                found[0].base.id,
                next((r.base.id for r in found if r.base.id in self.good), found[0].base.id),
            }
            for backup in sorted(first, key=str):
                self.keep(backup, f"the window on timeline {timeline} begins with it")

    def _reaches_window(self, route: Route) -> bool:
        return route.end_at is not None and route.end_at >= self.facts.begins_at - ABANDONED_FOR

    def keep_last(self) -> None:
        """The newest good ones, those that are whole if not good, and the newest that a drill has proven."""
        ids = [each.id for each in self.facts.backups]
        good = [each for each in ids if each in self.good][:LAST_GOOD]
        for each in good:
            self.keep(each, f"one of the {LAST_GOOD} newest good ones")
        for each in [each for each in ids if each in self.whole][:LAST_GOOD]:
            if each not in good:
                self.keep(each, f"one of the {LAST_GOOD} newest whole ones")
        for backup in self.facts.backups:
            if backup.verdict is Verdict.PROVEN:
                self.keep(backup.id, "the newest proven one")
                break

    def keep_parents(self) -> None:
        """What those that stay were taken against, and those that are not listed yet."""
        waiting = {each.id: each.parent for each in self.facts.waiting}
        for kept in [*self.stay, *waiting]:
            seen, parent = {kept}, waiting.get(kept) or self.parents.get(kept)
            reason = f"{kept}{', which waits for its WAL,' if kept in waiting else ''} was taken against it"
            while parent is not None and parent not in seen:
                seen.add(parent)
                self.for_files.setdefault(parent, []).append(reason)
                parent = self.parents.get(parent)

    def decision(self, backup: BaseBackup) -> BaseDecision:
        """What becomes of one."""
        stay, for_files = self.stay.get(backup.id, []), self.for_files.get(backup.id, [])
        if stay or for_files:
            return BaseDecision(backup, True, (*stay, *for_files), holds_wal=bool(stay))
        whole = backup.id in self.whole
        reason = "older than the recovery window" if whole else "not whole: nothing can begin with it"
        return BaseDecision(backup, False, (reason,))


def plan_cluster_prune(facts: Facts) -> ClusterPlan:
    """Decide what stays of base backups and WAL, and what goes. `facts.backups` is newest first."""
    if facts.unreadable:
        reason = "something in the catalog cannot be read"
        kept = tuple(BaseDecision(each, True, (reason,)) for each in facts.backups)
        wal = tuple(WalDecision(system, None, reason) for system in sorted(facts.systems))
        return ClusterPlan(kept, wal, facts.unreadable)
    judge = _Judge(facts)
    judge.keep_marked()
    for system, each in facts.systems.items():
        judge.keep_for_window(system, each)
    judge.keep_last()
    judge.keep_parents()
    decisions = tuple(judge.decision(each) for each in facts.backups)
    cuts = tuple(_wal(facts, system, decisions, judge.good) for system in sorted(facts.systems))
    return ClusterPlan(decisions, cuts)


def _wal(
    facts: Facts, system: str, decisions: Sequence[BaseDecision], good: Collection[BackupId]
) -> WalDecision:
    """Below which segment one system's WAL goes."""
    wal = facts.systems[system]
    if facts.under_way:
        ids = ", ".join(sorted(map(str, facts.under_way)))
        return WalDecision(system, None, f"{ids} is under way: what it needs is not known yet")
    if lost := _doubt(facts, system):
        return WalDecision(system, None, lost)
    mine = [each for each in decisions if each.backup.manifest.system_identifier == system]
    holding = [each.backup for each in mine if each.keep and each.holds_wal]
    if holding:
        oldest = min(holding, key=lambda each: each.manifest.start.lsn)
        cut = oldest.manifest.start.lsn.value // wal.archive.segment_bytes
        return WalDecision(system, cut, f"{oldest.id} begins there")
    of_current = [
        each for each in decisions if each.backup.manifest.system_identifier == facts.current and each.keep
    ]
    is_over = (
        not mine
        and system != facts.current
        and not facts.unlisted  # else a lost catalog would look like this
        and len([each for each in of_current if each.backup.id in good]) >= LAST_GOOD
        and wal.ended_at is not None
        and wal.ended_at < facts.begins_at - ABANDONED_FOR
    )
    if not is_over:
        return WalDecision(system, None, "no base backup begins in it")
    last = max((max(there, default=0) for there in wal.archive.segments.values()), default=0)
    return WalDecision(system, last + 1, "an earlier system's, and no base backup of it is left")


def _is_ahead(backup: BaseBackup, facts: Facts) -> bool:
    return max(backup.id.taken_at, backup.manifest.stopped_at) > facts.now + SKEW


def _doubt(facts: Facts, system: str) -> str:
    """Why nothing of a system may be judged, "" when it may."""
    wal = facts.systems.get(system)
    if wal is None:
        return "the WAL of its system is not archived"
    timelines = {
        each.manifest.end.timeline for each in facts.backups if each.manifest.system_identifier == system
    }
    sizes = {
        each.manifest.segment_bytes for each in facts.backups if each.manifest.system_identifier == system
    }
    if sizes - {wal.archive.segment_bytes}:  # it was changed, and the system is the same
        return f"its WAL has segments of {max(sizes)} bytes, and is counted in {wal.archive.segment_bytes}"
    lost = [each for each in sorted({*wal.archive.segments, *timelines}) if wal.archive.history(each) is None]
    return f"the history of timeline {lost[0]} is not archived" if lost else ""


def point_of(backup: BaseBackup) -> BasePoint:
    """A base backup as a beginning."""
    manifest = backup.manifest
    return BasePoint(
        backup.id,
        manifest.end.timeline,
        manifest.start.lsn,
        manifest.end.lsn,
        manifest.stopped_at,
        manifest.size_bytes,
    )
