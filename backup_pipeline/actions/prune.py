"""Prune: gather what exists, let domain/retention.py decide, log every decision, then delete.

Called by cli.py and by Dagster's ops. Nothing is deleted that was not logged with its reasons, nor
that a second look, right before, would keep. Two prunes at once, or one after a crash, delete no
more than one would.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from backup_pipeline.config import DatabaseConfig
from backup_pipeline.domain.backup import Backup, BackupId, CatalogListing
from backup_pipeline.domain.layout import (
    COPY_NAMES,
    DATA,
    Beside,
    catalog_key,
    copy_key,
    data_prefix,
    parse_catalog_key,
    parse_data_key,
)
from backup_pipeline.domain.manifest import manifest_from_json
from backup_pipeline.domain.retention import (
    OrphanDecision,
    PrunePlan,
    UnlistedObjects,
    plan_orphans,
    plan_prune,
)
from backup_pipeline.errors import BackupNotFound, Corrupt, ObjectNotFound, StoreError
from backup_pipeline.storage import leases
from backup_pipeline.storage.bucket import abort_uploads
from backup_pipeline.storage.catalog import (
    exists,
    list_backups,
    load,
    refresh_index,
    unindexed,
)
from backup_pipeline.storage.catalog_delete import Deletion, collect, delete, delete_imported
from backup_pipeline.storage.catalog_publish import missing_objects
from backup_pipeline.storage.imported import list_imported, load_imported
from backup_pipeline.storage.store import ObjectInfo, Store, read_all
from backup_pipeline.units import show_bytes, show_count, show_seconds

UPLOADS_MAY_LAST = timedelta(days=2)

INDEX_FROM = 200
"""From so many manifests and verdicts that no index holds, a prune refreshes the index at its end."""

_LOCKED = re.compile(r"object.?lock|worm|retention|legal.?hold", re.IGNORECASE)
"""How stores say that a lock, and not a missing permission, keeps an object."""


@dataclass(frozen=True)
class Prune:
    """What one prune of one database would do. Holds no secret: it may be stored between two steps."""

    database: str
    tiers: Mapping[str, int]  # how many of each are kept
    plan: PrunePlan
    orphans: tuple[OrphanDecision, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """Every decision with its reasons, newest backup first."""
        return (
            *(str(decision) for decision in self.plan.decisions),
            *(f"leave {key}, which cannot be read: {reason}" for key, reason in self.plan.unreadable),
            *(str(decision) for decision in self.orphans),
        )


@dataclass
class Pruned:
    """What one prune did. `locked` are objects that an object lock still holds; a later prune retries."""

    deleted: list[BackupId] = field(default_factory=list)
    kept_after_all: list[tuple[BackupId, str]] = field(default_factory=list)
    collected: int = 0
    freed_bytes: int = 0
    locked: dict[str, str] = field(default_factory=dict)
    denied: dict[str, str] = field(default_factory=dict)

    def note(self, outcome: Deletion) -> None:
        """Add what one deletion came to."""
        self.freed_bytes += outcome.freed_bytes
        for key, reason in outcome.denied.items():
            (self.locked if _LOCKED.search(reason) else self.denied)[key] = reason

    def finish(self, name: str, log: Callable[[str], object]) -> None:
        """Tell what was done. Raises StoreError when something was refused that no object lock holds."""
        log(f"prune of {name}: {self}")
        for key, reason in self.locked.items():
            log(f"still locked: {key}: {reason}")
        if self.denied:
            raise StoreError(
                f"prune of {name}: {show_count(len(self.denied), 'object')} could not be deleted",
                detail=dict(list(self.denied.items())[:20]),
                hint="Prune with credentials that may delete; the rest is tried again next time.",
            )

    def __str__(self) -> str:
        return (
            f"{show_count(len(self.deleted), 'backup')} deleted, {show_bytes(self.freed_bytes)} freed, "
            f"{len(self.kept_after_all)} kept after all, {show_count(self.collected, 'leftover')} collected, "
            f"{show_count(len(self.locked), 'object')} still locked"
        )


def plan(store: Store, database: DatabaseConfig, *, now: datetime, imports: Store | None = None) -> Prune:
    """Decide what stays and what goes; changes nothing. `imports` holds dumps of an older layout.

    Raises StoreError.
    """
    return _look(store, database.name, {tier.name: tier.keep for tier in database.tiers}, now, imports)


def _look(
    store: Store, database: str, tiers: Mapping[str, int], now: datetime, imports: Store | None
) -> Prune:
    # Objects before manifests before leases: whoever publishes meanwhile is seen as published.
    objects = list(store.list(f"{DATA}{database}/"))
    listing = list_backups(store, database, fresh=True)
    imported = _imported(imports, store, database)
    claims = leases.live_leases(store, database, now)
    judged = plan_prune(
        (*listing.backups, *imported.backups),
        tiers=tiers,
        leases=claims,
        now=now,
        unreadable=(*listing.unreadable, *imported.unreadable),
        damaged=_damaged(store, listing.backups, objects) | _empty(imported.backups),
    )
    orphans = plan_orphans(_unlisted(store, listing, objects), leases=claims, now=now)
    return Prune(database, tiers, judged, orphans)


def carry_out(
    store: Store,
    planned: Prune,
    *,
    clock: Callable[[], datetime],
    log: Callable[[str], object],
    imports: Store | None = None,
) -> Pruned:
    """Log the plan, then delete what it gives up, oldest first. May be repeated, and interrupted.

    What a second look would keep stays. Raises StoreError at the end, after all that could be
    done, when the store refused to delete something that no object lock holds.
    """
    for line in planned.lines:
        log(line)
    clock = by_the_store(store, planned.database, clock=clock, log=log)
    done = Pruned()
    again = _look(store, planned.database, planned.tiers, clock(), imports)
    for backup in reversed(planned.plan.delete):
        outcome = _delete(store, imports, backup, again, clock)
        done.note(outcome)
        if outcome.kept:
            done.kept_after_all.append((backup.id, outcome.kept))
            log(f"kept after all {backup.id}: {outcome.kept}")
        else:
            done.deleted.append(backup.id)
            log(f"deleted {backup.id}, {show_bytes(outcome.freed_bytes)}")
    _collect(store, planned, again, done, clock, log)
    done.note(Deletion(denied=leases.remove_ended(store, planned.database, clock())))
    clean_up(store, clock(), log)
    done.finish(planned.database, log)
    return done


def by_the_store(
    store: Store, name: str, *, clock: Callable[[], datetime], log: Callable[[str], object]
) -> Callable[[], datetime]:
    """The clock, put back to the store's where it is ahead: else what is in use would seem to have ended."""
    ahead = leases.clock_ahead(store, name, clock=clock)
    if ahead > leases.SKEW:
        log(
            f"warning: the clock of this machine is {show_seconds(ahead.total_seconds())} ahead of the "
            "store's, and the prune goes by the store's: correct it"
        )
    return lambda: clock() - ahead


def clean_up(store: Store, now: datetime, log: Callable[[str], object]) -> None:
    """What a store needs after a prune: no parts of dead uploads, and an index of what is new."""
    _abort_uploads(store, now, log)
    if unindexed(store) >= INDEX_FROM:
        refresh_index(store)


def _abort_uploads(store: Store, now: datetime, log: Callable[[str], object]) -> None:
    """Drop what killed uploads left: unseen, but billed. It is no backup, so a refusal is only told."""
    try:
        for key in abort_uploads(store, before=now - UPLOADS_MAY_LAST):
            log(f"dropped the parts of an upload that nobody finished: {key}")
    except StoreError as error:
        log(f"unfinished uploads could not be looked for: {error.message}")


def _delete(
    store: Store, imports: Store | None, backup: Backup, again: Prune, clock: Callable[[], datetime]
) -> Deletion:
    """Delete one backup of the plan, unless the second look `again`, or a last one, is against it."""
    decision = next((item for item in again.plan.decisions if item.backup.id == backup.id), None)
    against = "it is gone already"
    if decision is not None:
        against = "; ".join(decision.reasons) if decision.keep else _changed_floor(store, imports, again)
    if decision is None or against:
        return Deletion(kept=against)
    try:
        if backup.manifest is not None:
            return delete(store, decision.backup, clock=clock)
        if imports is not None:
            return delete_imported(imports, store, decision.backup, clock=clock)
    except Corrupt as error:
        return Deletion(kept=error.message)
    return Deletion(kept="the store of the older layout is not given")


def _changed_floor(store: Store, imports: Store | None, again: Prune) -> str:
    """Whether one of the backups that must stay, and that others may go for, is not what it was."""
    for decision in again.plan.decisions:
        floor = decision.backup
        if decision.floor:
            try:
                if floor.manifest is not None:
                    found = load(store, floor.id)
                elif imports is not None:
                    found = load_imported(imports, store, floor.id)
                else:
                    continue
            except (BackupNotFound, Corrupt) as error:
                return error.message
            if (found.proof, found.unreadable_verdict) != (floor.proof, floor.unreadable_verdict):
                return f"the verdict of {floor.id}, which stays for it, has changed"
    return ""


def _collect(
    store: Store,
    planned: Prune,
    again: Prune,
    done: Pruned,
    clock: Callable[[], datetime],
    log: Callable[[str], object],
) -> None:
    """Delete the objects that no manifest names, as far as both looks agree on them."""
    given_up = {decision.objects for decision in again.orphans if not decision.keep}
    for decision in planned.orphans:
        found = decision.objects
        if decision.keep or found not in given_up:
            continue
        outcome = collect(store, found, clock=clock)
        done.note(outcome)
        done.collected += not outcome.kept
        log(f"unlisted objects of {found.id}: {outcome.kept or 'collected'}")


def _imported(imports: Store | None, store: Store, database: str) -> CatalogListing:
    if imports is None:
        return CatalogListing(())
    return list_imported(imports, store, database, fresh=True)


def _empty(imported: tuple[Backup, ...]) -> dict[BackupId, str]:
    return {backup.id: "it is empty" for backup in imported if not backup.size_bytes}


def _damaged(store: Store, backups: tuple[Backup, ...], objects: list[ObjectInfo]) -> dict[BackupId, str]:
    """The backups whose objects are not all there with the right sizes, and which is not."""
    sizes = {info.key: info.size_bytes for info in objects}
    found = {}
    for backup in backups:
        if backup.manifest is not None and missing_objects(backup.manifest.objects, sizes):
            # It may have been published since the objects were listed: look again.
            present = {info.key: info.size_bytes for info in store.list(data_prefix(backup.id, backup.tier))}
            problem = missing_objects(backup.manifest.objects, present)
            if problem:
                found[backup.id] = problem
    return found


def _unlisted(store: Store, listing: CatalogListing, objects: list[ObjectInfo]) -> list[UnlistedObjects]:
    """The objects of each backup that has no manifest in the catalog, readable or not."""
    listed = {backup.id for backup in listing.backups}
    for key, _ in listing.unreadable:
        catalogued = parse_catalog_key(key)
        if catalogued is not None and catalogued[1] is Beside.MANIFEST:
            listed.add(catalogued[0])
    groups: dict[tuple[BackupId, str], list[ObjectInfo]] = {}
    for info in objects:
        named = parse_data_key(info.key)
        if named is not None and named[0] not in listed:
            groups.setdefault(named[:2], []).append(info)
    return [_group(store, backup, tier, infos) for (backup, tier), infos in groups.items()]


def _group(store: Store, backup: BackupId, tier: str, infos: list[ObjectInfo]) -> UnlistedObjects:
    sizes = {info.key: info.size_bytes for info in infos}
    pin = copy_key(backup, tier, Beside.PIN)
    return UnlistedObjects(
        id=backup,
        tier=tier,
        keys=tuple(sorted(sizes)),
        size_bytes=sum(sizes.values()),
        newest_at=max(info.modified_at for info in infos),
        copy=_worth_of_copy(store, copy_key(backup, tier, Beside.MANIFEST), sizes),
        pinned=pin in sizes or exists(store, catalog_key(backup, Beside.PIN)),
    )


def _worth_of_copy(store: Store, key: str, sizes: Mapping[str, int]) -> str:
    if key not in sizes:
        return ""
    try:
        problem = missing_objects(manifest_from_json(read_all(store, key), key).objects, sizes)
    except ObjectNotFound:
        return ""
    except Corrupt as error:
        problem = f"the {COPY_NAMES[Beside.MANIFEST]} beside them cannot be read: {error.detail['reason']}"
    if problem:
        return f"unlisted and not whole, {problem}: look at them, then delete them by hand"
    return "unlisted but complete: run `backup-pipeline rebuild`"
