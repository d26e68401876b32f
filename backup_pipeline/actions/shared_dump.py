"""One dump for all tiers that are due at the same time: the second has a copy of its own.

Called by dump.py. A copy is read again and checked, outlives the original, and is proven with it. When
none can be made, the tier is dumped anew: that is dump.py's.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime

from backup_pipeline.actions.fetch import verified
from backup_pipeline.actions.protected import Clock, Protected
from backup_pipeline.actions.report import Report, timed
from backup_pipeline.domain import layout
from backup_pipeline.domain.backup import Backup, BackupId, Manifest, ObjectDigest, Verdict
from backup_pipeline.errors import BackupNotFound, CopyUnsupported, Corrupt, StoreError
from backup_pipeline.storage import catalog, leases
from backup_pipeline.storage.store import Store


def same_schedule(protected: Protected, tier: str, scheduled_for: datetime | None) -> Backup | None:
    """The newest proven backup of another tier that was due at the same time, else the newest unproven.

    None that goes back to a dump of this very tier: whoever takes that tier again wants a new one.
    """
    if scheduled_for is None:
        return None
    found = catalog.list_backups(protected.store, protected.name, fresh=True).backups
    manifests = {each.id: each.manifest for each in found if each.manifest is not None}
    fitting = [
        backup
        for backup in found
        if backup.manifest is not None
        and backup.manifest.scheduled_for == scheduled_for
        and _dumped_as(backup.manifest, manifests) not in (tier, "")
        and backup.verdict is not Verdict.FAILED
    ]
    proven = (backup for backup in fitting if backup.verdict is Verdict.PROVEN)
    return next(proven, fitting[0] if fitting else None)


def _dumped_as(manifest: Manifest, manifests: Mapping[BackupId, Manifest]) -> str:
    """The tier whose dump this backup is, or goes back to; "" when that is gone."""
    while manifest.copied_from is not None:
        if manifest.copied_from not in manifests:
            return ""
        manifest = manifests[manifest.copied_from]
    return manifest.tier


def copy_shared(protected: Protected, shared: Backup, *, tier: str, clock: Clock, report: Report) -> Manifest:
    """A second tier's own copy of a dump: made by the store, read again, and checked.

    Raises BackupNotFound, Corrupt, StoreError; what was copied is taken away again.
    """
    manifest = shared.manifest
    if manifest is None:
        raise Corrupt(f"{shared.id} has no manifest to copy")
    started_at = clock()
    backup = BackupId.make(protected.name, shared.taken_at, secrets.token_hex(3))
    prefix = layout.data_prefix(backup, tier)
    report.say(f"{tier} is due at the same time as {manifest.tier}: copying {shared.id}")
    with (
        leases.hold(protected.store, shared.id, "restore", clock=clock),
        leases.hold(protected.store, backup, "dump", clock=clock) as lease,
        taken_away_on_failure(protected.store, prefix, report),
    ):
        copying = _Copying(protected, tier, manifest.size_bytes, report)
        objects = tuple(copying.copy(item, prefix) for item in manifest.objects)
        lease.check()
    return replace(
        manifest,
        id=backup,
        tier=tier,
        started_at=started_at,
        finished_at=clock(),
        expires_at=None,
        objects=objects,
        copied_from=shared.id,
    )


class _Copying:
    """Copies of objects, each read again when it was made; tells how far they are."""

    def __init__(self, protected: Protected, tier: str, total_bytes: int, report: Report) -> None:
        self._store, self._total_bytes = protected.store, total_bytes
        self._storage_class = storage_class_of(protected, tier)
        self._copied_bytes = self._checked_bytes = 0
        self._tell_copied, self._tell_checked = timed(report, "copy"), timed(report, "check the copy")

    def copy(self, item: ObjectDigest, prefix: str) -> ObjectDigest:
        """Copy one object below `prefix`. Raises Corrupt, StoreError."""
        copied = replace(item, key=prefix + item.name)
        try:
            self._store.copy(item.key, copied.key, storage_class=self._storage_class)
        except CopyUnsupported:
            self._store.put(
                copied.key,
                self._streamed(item),
                size_hint_bytes=item.size_bytes,
                storage_class=self._storage_class,
            )
        for chunk in verified(self._store, copied):
            self._checked_bytes += len(chunk)
            self._tell_checked(self._checked_bytes, self._total_bytes)
        return copied

    def _streamed(self, item: ObjectDigest) -> Iterator[bytes]:
        for chunk in verified(self._store, item):
            self._copied_bytes += len(chunk)
            self._tell_copied(self._copied_bytes, self._total_bytes)
            yield chunk


def inherit_proof(protected: Protected, manifest: Manifest) -> None:
    """The bytes were read again and are those of a proven dump: what was restored from them holds here."""
    if manifest.copied_from is None:
        return
    with contextlib.suppress(BackupNotFound):
        proof = catalog.load(protected.store, manifest.copied_from).proof
        if proof is not None and proof.verdict is Verdict.PROVEN:
            same = f"every byte equal to {manifest.copied_from}, which was restored and compared"
            catalog.record_proof(protected.store, manifest.id, replace(proof, checked=(same, *proof.checked)))


@contextlib.contextmanager
def taken_away_on_failure(store: Store, prefix: str, report: Report) -> Iterator[None]:
    """Delete what was stored below `prefix` when the block raises; what cannot be deleted is told."""
    try:
        yield
    except BaseException:
        try:
            left = [item.key for item in store.list(prefix)]
            denied = store.delete(left) if left else {}
        except StoreError as error:
            denied = {prefix: error.message}
        for key, reason in denied.items():
            report.say(f"could not take away {key}: {reason}; a prune will, a day from now")
        raise


def storage_class_of(protected: Protected, tier: str) -> str:
    """The tier's own storage class; "" for the store's."""
    return next((item.storage_class for item in protected.config.tiers if item.name == tier), "")
