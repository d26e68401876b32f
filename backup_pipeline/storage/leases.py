"""Leases: how uploads, restores and proofs keep prune away from what they use.

A lease is a small object under leases/<database>/. Whoever uses a backup holds one, renews it
from a thread, and removes it at the end; after a crash it ends by itself.

Why prune and a restore cannot miss each other, in any store whose reads see finished writes:

    restore:  R1 put its lease          prune:  P1 delete the manifest
              R2 look for the manifest          P2 look for leases

P1 deletes the catalog's manifest, before any object is touched. Either R1 is before P2: then prune
sees the lease, puts the manifest back and deletes nothing. Or P2 is before R1: then P1 < P2 < R1
< R2, so the restore finds no manifest and refuses to begin. No clock and no conditional write
takes part, and either side may stop for any time between its two steps. (Where both happen to
lose, the restore refuses although the backup stays; it may be started again.) Pins work alike:
put the pin, then look for the manifest.

Clocks only tell which leases have ended: one lives until its holder's clock says so, and for as long
after the store saw it written. A holder whose clock is far behind is shielded by the second; and whoever
looks goes by the store's clock where his own is ahead of it, as what he has just written there tells.

An imported dump has no manifest of ours that could be deleted first. There, and where objects
without a manifest are collected, prune puts a lease of its own and then looks for others, and the
other side puts its lease and then looks for prune's: at least one of the two sees the other and
draws back. This rests on leases being renewed in time. The same claim keeps two prunes apart.
"""

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from backup_pipeline.domain.backup import BackupId, Lease
from backup_pipeline.domain.layout import (
    LEASES,
    catalog_key,
    clock_key,
    lease_key,
    lease_prefix,
    parse_clock_key,
    parse_lease_key,
)
from backup_pipeline.domain.manifest import MAX_RECORD_BYTES, lease_from_json, lease_to_json
from backup_pipeline.errors import BackupNotFound, Busy, Corrupt, ObjectNotFound, StoreError
from backup_pipeline.storage.store import ObjectInfo, Store, read_all

TTL = timedelta(minutes=15)
"""How long a lease lives without renewal: after a crash, prune keeps away for this long."""

SKEW = timedelta(minutes=5)
"""By how much the clocks of two machines may differ."""

UNREADABLE_FOR = timedelta(hours=24)
"""An unreadable lease counts as live until it was written this long ago."""

DUMP = "dump"
BASE_BACKUP = "base backup"
PARENT = "parent"
PRUNE = "prune"
UNREADABLE = "unreadable"


@dataclass
class Held:
    """A lease that is being held; safe to ask from any thread.

    `unshielded` says why there is none, where it was not required; prune then keeps away from nothing.
    """

    id: BackupId
    purpose: str
    token: str
    _clock: Callable[[], datetime] = field(repr=False)
    _until: datetime
    _problem: str = ""
    unshielded: str = ""

    def check(self) -> None:
        """Raises StoreError when the lease has run out because it could not be renewed."""
        if not self.unshielded and self._clock() >= self._until:
            raise StoreError(
                f"the lease of {self.id} ran out at {self._until:%Y-%m-%dT%H:%M:%SZ}",
                detail={"reason": self._problem or "this process stood still"},
                hint="Prune no longer keeps away from the backup: begin again.",
            )

    def _lease(self, until: datetime) -> Lease:
        return Lease(self.id, self.token, self.purpose, until)


@contextmanager
def hold(
    store: Store,
    backup: BackupId,
    purpose: str,
    *,
    clock: Callable[[], datetime],
    ttl: timedelta = TTL,
    required: bool = True,
) -> Iterator[Held]:
    """Hold a lease on a backup while the block runs. `purpose` is "dump", "base backup",
    "parent" (an incremental one is taken against it), "restore" or "proof".

    For all but the first two the backup must exist, or BackupNotFound is raised; Busy when an imported
    dump is being pruned. A renewal that fails is tried again until the lease runs out; ask
    `check()` before a step that must not begin without it. Where a lease is not `required` (a
    restore by somebody who may only read), one that cannot be put is told in `unshielded`.
    """
    held = Held(backup, purpose, secrets.token_hex(8), clock, clock() + ttl)
    try:
        _put(store, held)
    except StoreError as error:
        if required:
            raise
        held.unshielded = error.message
    ended = threading.Event()
    thread = threading.Thread(
        target=_renew, args=(store, held, ttl, ended), name=f"lease {backup}", daemon=True
    )
    try:
        if purpose not in (DUMP, BASE_BACKUP):  # those make the backup
            _refuse_deleted(store, held)
        if not held.unshielded:
            thread.start()
        yield held
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()  # a renewal under way would put the lease back
        if not held.unshielded:
            _remove(store, held)


@contextmanager
def claim(
    store: Store, backup: BackupId, *, clock: Callable[[], datetime], ttl: timedelta = TTL
) -> Iterator[tuple[Lease, ...]]:
    """A prune's own lease on what it is about to delete; yields the other live leases.

    When there are any, nothing may be deleted. It is not renewed: deleting takes seconds.
    """
    held = Held(backup, PRUNE, secrets.token_hex(8), clock, clock() + ttl)
    _put(store, held)
    try:
        now = written_at(store, lease_key(held.id, held.token), clock())
        yield others(store, held.id, now=now, token=held.token)
    finally:
        _remove(store, held)


def written_at(store: Store, key: str, now: datetime) -> datetime:
    """When the store saw the object written that was written just now, at `now` at the latest."""
    return min(now, store.head(key).modified_at)


def clock_ahead(store: Store, database: str, *, clock: Callable[[], datetime]) -> timedelta:
    """By how much a clock is ahead of the store's, nothing when it is behind; writes a small object."""
    there = store_time(store, database)
    return max(timedelta(), clock() - there)


def store_time(store: Store, database: str) -> datetime:
    """What the store's clock says; writes a small object."""
    key = clock_key(database, secrets.token_hex(8))
    store.put(key, [b"what time is it here?"])
    try:
        return store.head(key).modified_at
    finally:
        with suppress(StoreError):  # a later prune takes it away
            store.delete([key])


def others(store: Store, backup: BackupId, *, now: datetime, token: str = "") -> tuple[Lease, ...]:
    """The live leases of one backup, but for the one with this token."""
    found = _live(store, f"{LEASES}{backup.database}/{backup.stamp}.", now)
    return tuple(lease for lease in found if lease.id == backup and lease.token != token)


def live_leases(store: Store, database: str, now: datetime) -> tuple[Lease, ...]:
    """The leases of a database that are live at `now`, by their holders' clocks or by the store's.

    An unreadable lease counts as live until UNREADABLE_FOR after it was written.
    """
    return _live(store, lease_prefix(database), now)


def remove_ended(store: Store, database: str, now: datetime) -> dict[str, str]:
    """Remove what crashed runs left: leases that ended a day ago. Returns what was denied, and why."""
    before = now - UNREADABLE_FOR
    old = [
        info.key
        for info in store.list(lease_prefix(database))
        if info.modified_at < before
        and (
            parse_clock_key(info.key) or ((lease := _read(store, info)) is not None and lease.until < before)
        )
    ]
    return store.delete(old) if old else {}


def _live(store: Store, prefix: str, now: datetime) -> tuple[Lease, ...]:
    found = ((_read(store, info), info.modified_at) for info in store.list(prefix))
    return tuple(
        lease
        for lease, written_at in found
        if lease is not None and (lease.until > now - SKEW or written_at > now - TTL)
    )


def _read(store: Store, info: ObjectInfo) -> Lease | None:
    """The lease that lies there, None when it is gone or no lease's key."""
    named = parse_lease_key(info.key)
    if named is None:
        return None
    try:
        if info.size_bytes <= MAX_RECORD_BYTES:
            return lease_from_json(read_all(store, info.key), info.key)
    except ObjectNotFound:
        return None
    except Corrupt:
        pass  # it counts as one that lives for a day
    return Lease(named[0], named[1], UNREADABLE, info.modified_at + UNREADABLE_FOR)


def _put(store: Store, held: Held) -> None:
    store.put(lease_key(held.id, held.token), [lease_to_json(held._lease(held._until))])


def _renew(store: Store, held: Held, ttl: timedelta, ended: threading.Event) -> None:
    while not ended.wait(ttl.total_seconds() / 3):
        until = held._clock() + ttl
        try:
            store.put(lease_key(held.id, held.token), [lease_to_json(held._lease(until))])
        except StoreError as error:
            held._problem = error.message  # tried again; check() tells when it is too late
        else:
            held._until, held._problem = until, ""


def _remove(store: Store, held: Held) -> None:
    with suppress(StoreError):  # it ends by itself, and the work under it is done
        store.delete([lease_key(held.id, held.token)])


def _refuse_deleted(store: Store, held: Held) -> None:
    if held.id.imported:
        now = held._clock()
        if not held.unshielded:
            now = written_at(store, lease_key(held.id, held.token), now)
        pruning = [lease for lease in others(store, held.id, now=now) if lease.purpose == PRUNE]
        if pruning:
            raise Busy(
                f"{held.id} is being pruned", hint="Choose another backup; `backup-pipeline list` shows them."
            )
        return
    try:
        store.head(catalog_key(held.id))
    except ObjectNotFound:
        raise BackupNotFound(
            f"there is no backup {held.id}, or it was pruned a moment ago",
            hint="`backup-pipeline list` shows what there is.",
        ) from None
