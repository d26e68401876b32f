"""What the retention promises, told a second time and in another way than the product tells it."""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from backup_pipeline.domain.backup import Backup, BackupId, Lease, Verdict


def must_stay(
    backups: Iterable[Backup],
    *,
    tiers: Mapping[str, int],
    leases: Iterable[Lease],
    now: datetime,
    damaged: Iterable[BackupId],
) -> set[BackupId]:
    """The backups of one database that no prune at `now` may touch."""
    ordered = sorted(backups, key=lambda item: item.id.stamp, reverse=True)
    held, broken = {lease.id for lease in leases}, set(damaged)
    uncertain = [
        item for item in ordered if item.taken_at > now + timedelta(minutes=15) or item.unreadable_verdict
    ]
    good = [
        item
        for item in ordered
        if item not in uncertain and item.id not in broken and item.verdict is not Verdict.FAILED
    ]
    stay = uncertain + good[:2]
    stay += [item for item in good if item.verdict is Verdict.PROVEN][:1]
    stay += [item for item in ordered if item.pinned or item.id in held]
    stay += [item for item in ordered if item.tier not in tiers and item.tier != "manual"]
    stay += [
        item
        for item in ordered
        if item.tier == "manual" and (item.expires_at is None or item.expires_at > now)
    ]
    for tier, keep in tiers.items():
        of_tier = [item for item in good if item.tier == tier]
        oldest = of_tier[keep - 1].id.stamp if len(of_tier) >= keep else ""
        stay += [item for item in ordered if item.tier == tier and item.id.stamp >= oldest]
    return {item.id for item in stay}
