"""Retention: which backups the policy gives up, and why each stays or goes. Pure.

plan_prune judges backups, plan_orphans judges objects that no manifest names; actions/prune.py
gathers the facts and carries the plans out. When in doubt a backup stays:

- The newest proven backup of a database, and its two newest good ones, are never given up.
- Nor is what is pinned, in use, dated in the future, unreadable, or of a tier without a policy.
- Of each tier the newest N good backups stay. What failed its proof, lacks objects, lies in the
  future or cannot be judged does not count towards N, so it pushes nothing out.
- Manual backups go by their expiry alone, and no number of them pushes out a scheduled one.

Order is by the time in the id; never by when an object was written, never by age alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from backup_pipeline.domain.backup import MANUAL_TIER, Backup, BackupId, Lease, Verdict, newest_first
from backup_pipeline.units import show_bytes

SKEW = timedelta(minutes=15)
"""By how much a backup's clock may be ahead of ours before it counts as dated in the future."""

LAST_GOOD = 2
"""So many newest good backups of a database stay, whatever the policy."""

ORPHAN_AGE = timedelta(hours=24)
"""Objects without a manifest are left alone for so long: an upload may be under way."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one backup, with the reasons in plain words."""

    backup: Backup
    keep: bool
    reasons: tuple[str, ...]
    floor: bool = False  # it stays whatever the policy, because others may go on its account

    def __str__(self) -> str:
        verb = "keep" if self.keep else "delete"
        return f"{verb} {self.backup.id} ({self.backup.tier}): {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class PrunePlan:
    """The decisions, newest first, and what is left alone because it cannot be read."""

    decisions: tuple[Decision, ...]
    unreadable: tuple[tuple[str, str], ...] = ()  # (key, reason)

    @property
    def keep(self) -> tuple[Backup, ...]:
        """What stays, newest first."""
        return tuple(decision.backup for decision in self.decisions if decision.keep)

    @property
    def delete(self) -> tuple[Backup, ...]:
        """What goes, newest first."""
        return tuple(decision.backup for decision in self.decisions if not decision.keep)


@dataclass(frozen=True)
class UnlistedObjects:
    """The objects below one backup's prefix for which the catalog has no manifest."""

    id: BackupId
    tier: str
    keys: tuple[str, ...]
    size_bytes: int
    newest_at: datetime  # when the last of them was written
    copy: str = ""  # what the manifest's copy beside them is worth, in words; "" when there is none
    pinned: bool = False


@dataclass(frozen=True)
class OrphanDecision:
    """What becomes of unlisted objects, with the reason."""

    objects: UnlistedObjects
    keep: bool
    reason: str

    def __str__(self) -> str:
        found = self.objects
        verb = "leave" if self.keep else "collect"
        size = show_bytes(found.size_bytes)
        return f"{verb} {len(found.keys)} unlisted objects of {found.id}, {size}: {self.reason}"


def plan_prune(
    backups: Iterable[Backup],
    *,
    tiers: Mapping[str, int],
    leases: Iterable[Lease],
    now: datetime,
    unreadable: Iterable[tuple[str, str]] = (),
    damaged: Mapping[BackupId, str] | None = None,
) -> PrunePlan:
    """Decide for each backup whether it stays. `tiers` says how many of each tier stay.

    `damaged` says of which backups objects are missing, and which. Backups of several databases
    may be given; each database is judged by itself. Any order of `backups` gives the same plan.
    """
    claims: dict[BackupId, list[Lease]] = {}
    for lease in leases:
        if lease.purpose != "prune":
            claims.setdefault(lease.id, []).append(lease)
    ordered = newest_first(backups)
    decisions = {}
    for database in {backup.id.database for backup in ordered}:
        own = tuple(backup for backup in ordered if backup.id.database == database)
        decisions.update(_judge(own, tiers, claims, now, damaged or {}))
    return PrunePlan(tuple(decisions[backup.id] for backup in ordered), tuple(unreadable))


def plan_orphans(
    found: Iterable[UnlistedObjects], *, leases: Iterable[Lease], now: datetime
) -> tuple[OrphanDecision, ...]:
    """Decide which objects without a manifest are collected."""
    held = {lease.id for lease in leases if lease.purpose != "prune"}
    return tuple(_judge_orphan(objects, held, now) for objects in sorted(found, key=lambda item: item.keys))


def _judge(
    backups: tuple[Backup, ...],
    tiers: Mapping[str, int],
    claims: Mapping[BackupId, list[Lease]],
    now: datetime,
    damaged: Mapping[BackupId, str],
) -> dict[BackupId, Decision]:
    """The decisions for one database's backups, given newest first."""
    doubts = {backup.id: _doubt(backup, now) for backup in backups}
    flaws = {backup.id: _flaw(backup, damaged) for backup in backups}
    good = [backup for backup in backups if not doubts[backup.id] and not flaws[backup.id]]
    # A damaged one only where there is no other: what is left of it may still be of use.
    proven = next((b.id for b in (*good, *backups) if b.verdict is Verdict.PROVEN and not doubts[b.id]), None)
    last_good = {backup.id for backup in good[:LAST_GOOD]}
    newer = dict.fromkeys(tiers, 0)  # good backups of the tier seen so far
    decisions = {}
    for backup in backups:
        keep = [doubts[backup.id]] if doubts[backup.id] else []
        if backup.id == proven:
            keep.append("the newest proven backup")
        if backup.id in last_good:
            keep.append(f"one of the {LAST_GOOD} newest good backups")
        if backup.pinned:
            keep.append("pinned")
        keep += [f"in use: {lease.purpose} until {_text(lease.until)}" for lease in claims.get(backup.id, [])]
        by_policy, reason = _policy(backup, flaws[backup.id], tiers, newer, now)
        if by_policy:
            keep.append(reason)
        floor = backup.id == proven or backup.id in last_good
        decisions[backup.id] = Decision(backup, bool(keep), tuple(keep) or (reason,), floor)
        if backup.tier in newer and not doubts[backup.id] and not flaws[backup.id]:
            newer[backup.tier] += 1
    return decisions


def _policy(
    backup: Backup, flaw: str, tiers: Mapping[str, int], newer: Mapping[str, int], now: datetime
) -> tuple[bool, str]:
    """Whether the policy of its tier keeps a backup, and why, or why not."""
    tier = backup.tier
    if tier == MANUAL_TIER:
        return _manual_policy(backup, now)
    if tier not in tiers:
        return True, f"no tier {tier} is configured any more: nothing of it is deleted"
    wanted, place = tiers[tier], newer[tier]
    keep = place < wanted
    if flaw:
        return keep, f"{flaw}; {place} good ones of {tier} are newer, and {wanted} are wanted"
    return (
        keep,
        f"number {place + 1} of the {wanted} newest of {tier}"
        if keep
        else f"older than the {wanted} newest of {tier}",
    )


def _manual_policy(backup: Backup, now: datetime) -> tuple[bool, str]:
    if backup.expires_at is None:
        return True, "taken by hand, without an expiry"
    if now < backup.expires_at:
        return True, f"taken by hand, kept until {_text(backup.expires_at)}"
    return False, f"taken by hand, and expired at {_text(backup.expires_at)}"


def _doubt(backup: Backup, now: datetime) -> str:
    """Why a backup cannot be judged, so that it stays and counts for nothing; "" when it can."""
    if backup.taken_at > now + SKEW:
        return f"dated in the future, {_text(backup.taken_at)}: kept, and not counted"
    if backup.unreadable_verdict:
        return "its verdict cannot be read, it may be proven: kept, and not counted"
    return ""


def _flaw(backup: Backup, damaged: Mapping[BackupId, str]) -> str:
    """Why a backup is not good; "" when it is."""
    if backup.id in damaged:
        return damaged[backup.id]
    if backup.verdict is Verdict.FAILED:
        return "its proof failed"
    return ""


def _judge_orphan(objects: UnlistedObjects, held: set[BackupId], now: datetime) -> OrphanDecision:
    reason = ""
    if objects.copy:
        reason = objects.copy
    elif objects.pinned:
        reason = "it is pinned, but its manifest is missing: unpin it to have it collected"
    elif objects.id in held:
        reason = "in use: an upload or restore holds a lease"
    elif objects.id.taken_at > now - ORPHAN_AGE or objects.newest_at > now - ORPHAN_AGE:
        reason = "younger than 24 hours: an upload may be under way"
    if reason:
        return OrphanDecision(objects, True, reason)
    return OrphanDecision(objects, False, "no manifest names them, and nobody holds a lease")


def _text(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
