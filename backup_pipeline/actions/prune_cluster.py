"""Prune a cluster: gather what exists, let domain/cluster_retention.py decide, log it, then delete.

Called by cli.py and by Dagster's ops. Base backups go first, each before what it was taken against; WAL goes
last and oldest first, by a look that was taken after them: at any moment, what is listed has its WAL. Old
records of drills go as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.prune import Pruned, by_the_store, clean_up
from backup_pipeline.actions.report import Lines
from backup_pipeline.actions.waiting_base_backup import finish_waiting
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseBackup
from backup_pipeline.domain.cluster_retention import (
    ClusterPlan,
    Facts,
    SystemWal,
    WalDecision,
    plan_cluster_prune,
)
from backup_pipeline.domain.drill import KEPT_FOR, outdated
from backup_pipeline.domain.layout import catalog_key, parse_wal_key, wal_system_prefix
from backup_pipeline.domain.replayable_wal import archive_of
from backup_pipeline.domain.retention import ORPHAN_AGE
from backup_pipeline.domain.wal import WalKind, WalSegment
from backup_pipeline.domain.wal_archive import ArchiveIdentity, ArchiveListing
from backup_pipeline.errors import ConfigError, Corrupt
from backup_pipeline.storage import base_backups, drills, leases
from backup_pipeline.storage.catalog_delete import Deletion
from backup_pipeline.storage.store import ObjectInfo, Store
from backup_pipeline.storage.waiting import read_waiting
from backup_pipeline.units import show_bytes, show_count
from backup_pipeline.wal.identity import read_identity
from backup_pipeline.wal.listing import read_archive

_AT_ONCE = 1000
_LOST = "the base backup was finished, and its record is gone: `backup-pipeline rebuild` lists it again"


@dataclass(frozen=True)
class WalSweep:
    """The files of one system's archive that go, oldest first, and how much stays."""

    decision: WalDecision
    segment_bytes: int
    goes: tuple[ObjectInfo, ...]
    stays: int

    def __str__(self) -> str:
        system, cut = self.decision.system_identifier, self.decision.cut
        if cut is None:
            return f"keep all WAL of system {system}: {self.decision.reason}"
        if not self.goes:
            return (
                f"keep all WAL of system {system}, {show_count(self.stays, 'file')}: {self.decision.reason}"
            )
        size = show_bytes(sum(info.size_bytes for info in self.goes))
        below = WalSegment(1, cut).name(self.segment_bytes)[8:]
        return (
            f"delete {show_count(len(self.goes), 'file')} of WAL, {size}, of system {system}: below {below}; "
            f"{self.stays} stay: {self.decision.reason}"
        )


@dataclass(frozen=True)
class ClusterPrune:
    """What one prune of one cluster would do. Holds no secret: it may be stored between two steps."""

    cluster: str
    plan: ClusterPlan
    sweeps: tuple[WalSweep, ...]
    unlisted: tuple[tuple[BackupId, bool], ...] = ()  # objects without a record, and whether they go
    drills: tuple[BackupId, ...] = ()  # whose records go, newest first
    uncounted: tuple[tuple[str, str], ...] = ()  # WAL of earlier systems that stays, each with why

    @property
    def lines(self) -> tuple[str, ...]:
        """Every decision with its reasons, newest base backup first."""
        return (
            *(str(decision) for decision in self.plan.decisions),
            *(f"leave {key}, which cannot be read: {reason}" for key, reason in self.plan.unreadable),
            *(
                f"delete what lies of {backup}, which was never finished"
                if goes
                else f"leave what lies of {backup}, which is not listed: it may be under way"
                for backup, goes in self.unlisted
            ),
            *map(str, self.sweeps),
            *(f"leave {prefix}: {reason}" for prefix, reason in self.uncounted),
            *(
                f"delete the record of drill {drill}: older than {KEPT_FOR.days} days, and not the newest "
                "of its verdict"
                for drill in self.drills
            ),
        )


@dataclass
class ClusterPruned(Pruned):
    """What one prune did; `freed_bytes` is of base backups and WAL together."""

    wal_files: int = 0
    drills: int = 0
    survivors: set[BackupId] = field(default_factory=set)

    def __str__(self) -> str:
        drills = f", {show_count(self.drills, 'record')} of drills" if self.drills else ""
        return f"{super().__str__()}, {show_count(self.wal_files, 'file')} of WAL{drills} deleted"


def plan(cluster: ProtectedCluster, *, now: datetime) -> ClusterPrune:
    """Decide what stays and what goes; changes nothing. Raises StoreError, Corrupt."""
    store, name = cluster.store, cluster.name
    # WAL before objects before records before leases: whoever publishes meanwhile is seen as published.
    identity = read_identity(store, name)
    archives, uncounted = _archives(store, identity) if identity else ({}, ())
    unlisted = base_backups.unlisted(store, name)
    listing = base_backups.list_base_backups(store, name, fresh=True)
    claims = leases.live_leases(store, name, now)
    listed = {each.id for each in listing.backups}
    loose = sorted(unlisted.keys() - listed, key=str)
    busy = {each.id for each in claims if each.purpose in (leases.BASE_BACKUP, leases.PRUNE)}
    lost = base_backups.lost_records(store, [each for each in loose if each not in busy])
    unreadable = (*listing.unreadable, *((catalog_key(each), _LOST) for each in lost))
    under_way = {each.id for each in claims}
    dead = {
        each
        for each in loose
        if each not in under_way and each.taken_at < now - ORPHAN_AGE and not unreadable
    }
    facts = Facts(
        backups=listing.backups,
        systems={system: _system_wal(each) for system, each in archives.items()},
        current=identity.system_identifier if identity else "",
        window=cluster.config.recovery_window,
        now=now,
        leases=[each for each in claims if each.id in listed],
        under_way={each.id for each in claims if each.id not in listed or each.purpose == leases.BASE_BACKUP},
        unlisted=loose,
        waiting=read_waiting(store, [each for each in loose if each not in dead]).manifests,
        unreadable=unreadable,
    )
    judged = plan_cluster_prune(facts)
    return ClusterPrune(
        name,
        judged,
        tuple(
            _sweep(store, name, each, archives[each.system_identifier].segment_bytes, before=facts.begins_at)
            for each in judged.wal
        ),
        tuple((each, each in dead) for each in loose if each not in lost),
        outdated(drills.drills_before(store, name, now - KEPT_FOR).drills, now=now),
        uncounted,
    )


def _archives(
    store: Store, identity: ArchiveIdentity
) -> tuple[dict[str, ArchiveListing], tuple[tuple[str, str], ...]]:
    """By system, and what lies of earlier ones that cannot be counted: of those nothing goes."""
    name, current = identity.cluster, identity.system_identifier
    archives = {current: read_archive(store, name, system_identifier=current)}
    uncounted = []
    for system in identity.earlier:
        try:
            archives[system] = read_archive(store, name, system_identifier=system)
        except Corrupt as error:
            uncounted.append((wal_system_prefix(name, system), error.message))
    return archives, tuple(uncounted)


def _system_wal(archive: ArchiveListing) -> SystemWal:
    archived = (one.archived_at for found in archive.segments.values() for one in found)
    return SystemWal(archive_of(archive), max(archived, default=None))


def _sweep(
    store: Store, cluster: str, decision: WalDecision, segment_bytes: int, *, before: datetime
) -> WalSweep:
    """What goes of what was archived `before`: a branch off an older moment begins below the cut."""
    goes: list[tuple[int, ObjectInfo]] = []
    stays = 0
    for info in store.list(wal_system_prefix(cluster, decision.system_identifier)):
        found = parse_wal_key(info.key)
        if found is None or found.name.kind is WalKind.HISTORY:
            continue
        try:
            gone = decision.gives_up(found.name, segment_bytes)
        except ConfigError:
            gone = False  # no name of a segment of this size
        if gone and info.modified_at < before:
            goes.append((found.name.number(segment_bytes), info))
        else:
            stays += 1
    goes.sort(key=lambda item: (item[0], item[1].key))
    return WalSweep(decision, segment_bytes, tuple(info for _, info in goes), stays)


def carry_out(
    cluster: ProtectedCluster,
    planned: ClusterPrune,
    *,
    clock: Callable[[], datetime],
    log: Callable[[str], object],
) -> ClusterPruned:
    """Log the plan, then delete what it gives up. May be repeated, and interrupted.

    Base backups that waited for their WAL are listed first, where it came: else they would be collected.
    What a second look would keep stays, with its WAL. Raises StoreError at the end, after all that could be
    done, when the store refused to delete something that no object lock holds.
    """
    for line in planned.lines:
        log(line)
    clock = by_the_store(cluster.store, cluster.name, clock=clock, log=log)
    finish_waiting(cluster, clock=clock, report=Lines(log))
    done, again = ClusterPruned(), plan(cluster, now=clock())
    done.survivors = {each.backup.id for each in again.plan.decisions}
    _collect(cluster.store, planned, again, done, clock, log)  # else it would speak for its parents
    for backup in planned.plan.delete:
        outcome = _delete(cluster.store, backup, again, done, clock)
        done.note(outcome)
        if outcome.kept:
            done.kept_after_all.append((backup.id, outcome.kept))
            log(f"kept after all {backup.id}: {outcome.kept}")
        else:
            done.deleted.append(backup.id)
            done.survivors.discard(backup.id)
            log(f"deleted {backup.id}, {show_bytes(outcome.freed_bytes)}")
    _delete_wal(cluster, planned, done, clock, log)
    gone = [each for each in planned.drills if each in again.drills]
    denied = drills.delete(cluster.store, gone)
    done.note(Deletion(denied=denied))
    done.drills = len(gone) - len(denied)
    done.note(Deletion(denied=leases.remove_ended(cluster.store, cluster.name, clock())))
    clean_up(cluster.store, clock(), log)
    done.finish(cluster.name, log)
    return done


def _delete(
    store: Store, backup: BaseBackup, again: ClusterPrune, done: ClusterPruned, clock: Callable[[], datetime]
) -> Deletion:
    """Delete one base backup of the plan, unless the second look `again`, or a last one, is against it."""
    decision = next((each for each in again.plan.decisions if each.backup.id == backup.id), None)
    if decision is None:
        return Deletion(kept="it is gone already")
    if decision.keep:
        return Deletion(kept="; ".join(decision.reasons))
    needed_by = [
        each.backup.id
        for each in again.plan.decisions
        if each.backup.manifest.parent == backup.id and each.backup.id in done.survivors
    ]
    if needed_by:
        return Deletion(kept=f"{needed_by[0]} was taken against it, and stays")
    try:
        return base_backups.delete(store, decision.backup, clock=clock)
    except Corrupt as error:
        return Deletion(kept=error.message)


def _collect(
    store: Store,
    planned: ClusterPrune,
    again: ClusterPrune,
    done: ClusterPruned,
    clock: Callable[[], datetime],
    log: Callable[[str], object],
) -> None:
    """Delete what lies of base backups that were never finished, as far as both looks agree."""
    given_up = {backup for backup, goes in again.unlisted if goes}
    for backup, goes in planned.unlisted:
        if goes and backup in given_up:
            outcome = base_backups.collect(store, backup, clock=clock)
            done.note(outcome)
            done.collected += not outcome.kept
            log(f"what lay of {backup}: {outcome.kept or 'deleted'}")


def _delete_wal(
    cluster: ProtectedCluster,
    planned: ClusterPrune,
    done: ClusterPruned,
    clock: Callable[[], datetime],
    log: Callable[[str], object],
) -> None:
    """Delete the WAL that the plan, and a look at what is listed now, give up."""
    meant = {info.key for sweep in planned.sweeps for info in sweep.goes}
    now_there = plan(cluster, now=clock())
    for sweep in now_there.sweeps:
        cut = _below_all_listed(now_there.plan, sweep)
        goes = [
            info
            for info in sweep.goes
            if info.key in meant and cut is not None and _number(info.key, sweep.segment_bytes) < cut
        ]
        for first in range(0, len(goes), _AT_ONCE):
            some = goes[first : first + _AT_ONCE]
            denied = cluster.store.delete([info.key for info in some])
            freed = sum(info.size_bytes for info in some if info.key not in denied)
            done.note(Deletion(denied=denied, freed_bytes=freed))
            done.wal_files += len(some) - len(denied)
        if goes:
            log(
                f"deleted {show_count(len(goes), 'file')} of WAL of system {sweep.decision.system_identifier}"
            )


def _below_all_listed(found: ClusterPlan, sweep: WalSweep) -> int | None:
    """The cut, not above the beginning of what is given up and yet listed: it could not be deleted."""
    system = sweep.decision.system_identifier
    waiting = (
        each.backup.manifest.start.lsn.value // sweep.segment_bytes
        for each in found.decisions
        if not each.keep and each.backup.manifest.system_identifier == system
    )
    return sweep.decision.cut and min((sweep.decision.cut, *waiting))


def _number(key: str, segment_bytes: int) -> int:
    found = parse_wal_key(key)
    if found is None:
        raise ConfigError(f"not a key of an archive: {key}")
    return found.name.number(segment_bytes)


def record(planned: ClusterPrune) -> dict[str, object]:
    """What a prune of one cluster would do, as JSON for scripts; sizes in bytes."""
    return {
        "cluster": planned.cluster,
        "decisions": [
            {"id": str(each.backup.id), "keep": each.keep, "reasons": each.reasons}
            for each in planned.plan.decisions
        ],
        "unreadable": [{"key": key, "reason": reason} for key, reason in planned.plan.unreadable],
        "drills": [str(each) for each in planned.drills],
        "uncounted": [{"prefix": prefix, "reason": reason} for prefix, reason in planned.uncounted],
        "unlisted": [{"id": str(backup), "keep": not goes} for backup, goes in planned.unlisted],
        "wal": [
            {
                "system_identifier": each.decision.system_identifier,
                "below": each.decision.cut,
                "files": len(each.goes),
                "size_bytes": sum(info.size_bytes for info in each.goes),
                "stay": each.stays,
                "reason": each.decision.reason,
            }
            for each in planned.sweeps
        ],
    }
