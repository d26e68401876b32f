"""The catalog: publish, read, list and annotate backups. The manifests are the truth.

A backup exists when its manifest lies in the catalog. Publishing writes that object last, deleting
(catalog_delete.py) removes it before anything that it names, so at no moment is a backup listed
whose objects are not whole. Beside the objects lie copies of manifest, verdict and pin, from which
catalog_rebuild.py makes a lost catalog anew. What is deleted is decided in domain/retention.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from backup_pipeline.domain.backup import (
    Backup,
    BackupId,
    CatalogListing,
    Manifest,
    Proof,
    ProofRecord,
    Verdict,
    newest_first,
)
from backup_pipeline.domain.base_backup import BaseBackup, BaseManifest, base_from_json, is_base_record
from backup_pipeline.domain.layout import (
    COPY_NAMES,
    DATA,
    INDEX,
    Beside,
    catalog_key,
    catalog_prefix,
    copy_key,
    data_prefix,
    parse_catalog_key,
    parse_data_key,
)
from backup_pipeline.domain.manifest import (
    MAX_RECORD_BYTES,
    manifest_from_json,
    manifest_to_json,
    verdict_from_json,
    verdict_to_json,
)
from backup_pipeline.errors import (
    BackupNotFound,
    Busy,
    Corrupt,
    ObjectNotFound,
    Refused,
)
from backup_pipeline.storage import catalog_index, leases
from backup_pipeline.storage.catalog_publish import publish_record, read_or_none
from backup_pipeline.storage.store import ObjectInfo, Store, read_all

__all__ = [
    "CatalogRecord",
    "Marks",
    "catalog_keys",
    "exists",
    "imported_marks",
    "list_backups",
    "load",
    "load_marks",
    "marks_from",
    "pin",
    "publish",
    "put_proof",
    "read_records",
    "record_proof",
    "refresh_index",
    "unindexed",
    "unpin",
]

READERS = 16
"""Reads of small objects at the same time."""


CatalogRecord = Manifest | BaseManifest | ProofRecord | Corrupt
"""What a record in the catalog is read as; Corrupt says why it cannot be."""


Marked = TypeVar("Marked", Backup, BaseBackup)


@dataclass(frozen=True)
class Marks:
    """What lies beside a manifest: the record of proofs, or why it cannot be read, and the pin."""

    record: ProofRecord | None = None
    pinned: bool = False
    unreadable_verdict: str = ""

    def on(self, backup: Marked) -> Marked:
        """The backup with these marks."""
        return replace(
            backup,
            proof=self.record.standing if self.record else None,
            last_attempt=self.record.latest if self.record else None,
            pinned=self.pinned,
            unreadable_verdict=self.unreadable_verdict,
        )


def publish(store: Store, manifest: Manifest) -> Backup:
    """List a finished backup; see publish_record. Raises Corrupt when the manifest could not be read back."""
    data, key = manifest_to_json(manifest), catalog_key(manifest.id)
    manifest_from_json(data, key)
    publish_record(
        store,
        manifest.id,
        data,
        manifest.objects,
        prefix=data_prefix(manifest.id, manifest.tier),
        at=manifest.finished_at,
    )
    return _backup(manifest)


def load(store: Store, backup: BackupId) -> Backup:
    """One backup as it is now, never from the index. Raises BackupNotFound, or Corrupt."""
    key = catalog_key(backup)
    try:
        manifest = manifest_from_json(read_all(store, key), key)
    except ObjectNotFound:
        raise BackupNotFound(
            f"there is no backup {backup}", hint="`backup-pipeline list` shows what there is."
        ) from None
    return load_marks(store, backup).on(_backup(manifest))


def load_marks(store: Store, backup: BackupId) -> Marks:
    """The record of proofs and the pin of one backup, imported or not, as they are now."""
    pinned = exists(store, catalog_key(backup, Beside.PIN))
    key = catalog_key(backup, Beside.VERDICT)
    data = read_or_none(store, key)
    record = _parse(key, data) if data is not None else None
    if isinstance(record, Corrupt):
        return Marks(None, pinned, reason_of(record))
    return Marks(record if isinstance(record, ProofRecord) else None, pinned)


def list_backups(store: Store, database: str = "", *, fresh: bool = False) -> CatalogListing:
    """The backups of one database, or of all. What exists is what the store lists.

    Few requests for any number of backups, as long as prunes refresh the index now and then. For
    decisions on what to delete, `fresh` reads the manifests themselves.
    """
    found, unreadable = catalog_keys(store, database)
    records = read_records(
        store, _infos(found), catalog_index.Index() if fresh else catalog_index.read(store)
    )
    backups = []
    for backup, beside in found.items():
        marks = marks_from(beside, records)
        if marks.unreadable_verdict:
            unreadable.append((beside[Beside.VERDICT].key, marks.unreadable_verdict))
        if Beside.MANIFEST not in beside:
            if Beside.PIN in beside and not backup.imported:
                unreadable.append((beside[Beside.PIN].key, "it pins a backup whose manifest is missing"))
            continue
        manifest = records.get(beside[Beside.MANIFEST].key)
        if isinstance(manifest, Corrupt):
            unreadable.append((beside[Beside.MANIFEST].key, reason_of(manifest)))
        elif isinstance(manifest, Manifest):  # else a base backup, or deleted since it was listed
            backups.append(marks.on(_backup(manifest)))
    return CatalogListing(newest_first(backups), tuple(sorted(unreadable)))


def imported_marks(store: Store, database: str, *, fresh: bool = False) -> Mapping[BackupId, Marks]:
    """The verdicts and pins that our own store keeps for imported dumps, which have no manifest."""
    found, _ = catalog_keys(store, database)
    found = {backup: beside for backup, beside in found.items() if backup.imported}
    if not found:
        return {}
    records = read_records(
        store, _infos(found), catalog_index.Index() if fresh else catalog_index.read(store)
    )
    return {backup: marks_from(beside, records) for backup, beside in found.items()}


def unindexed(store: Store) -> int:
    """About how many objects a listing of all databases would read one by one, by the index's age."""
    try:
        since = store.head(INDEX).modified_at
    except ObjectNotFound:
        since = datetime.min.replace(tzinfo=UTC)
    return sum(info.modified_at >= since for info in _infos(catalog_keys(store, "")[0]))


def refresh_index(store: Store) -> int:
    """Rewrite the index from the store; returns how many objects it holds. May be run at any time."""
    infos = _infos(catalog_keys(store, "")[0])
    index = catalog_index.read(store)
    bodies = {info: index.body(info) for info in infos}
    missing = [
        info for info, body in bodies.items() if body is None or isinstance(_parse(info.key, body), Corrupt)
    ]
    for info, body in zip(missing, _read_many(store, missing), strict=True):
        bodies[info] = body if body and not isinstance(_parse(info.key, body), Corrupt) else None
    whole = {info: body for info, body in bodies.items() if body is not None}
    catalog_index.write(store, whole)
    return len(whole)


def record_proof(store: Store, backup: BackupId, proof: Proof) -> ProofRecord:
    """Record the result of a proof; returns what now stands (see ProofRecord).

    Raises BackupNotFound when the backup is gone. An unreadable record is replaced by all but
    NOT_PROVABLE, which could hide that the backup was proven: then it raises Corrupt.
    """
    tier = "" if backup.imported else load(store, backup).tier
    copy = copy_key(backup, tier, Beside.VERDICT) if tier else ""
    return put_proof(store, backup, proof, copy=copy, comparable=not backup.imported)


def put_proof(
    store: Store, backup: BackupId, proof: Proof, *, copy: str, comparable: bool = True
) -> ProofRecord:
    """Record a proof in the catalog, and at `copy` before that, unless it is ""; see `record_proof`."""
    key = catalog_key(backup, Beside.VERDICT)
    data = read_or_none(store, key)
    try:
        before = verdict_from_json(data, key) if data is not None else None
    except Corrupt:
        if proof.verdict is Verdict.NOT_PROVABLE:
            raise
        before = None
    record = before.followed_by(proof, comparable=comparable) if before else ProofRecord(proof)
    for where in filter(None, (copy, key)):
        store.put(where, [verdict_to_json(backup, record)])
    return record


def pin(store: Store, backup: BackupId, *, at: datetime, note: str = "") -> None:
    """Keep a backup until it is unpinned, whatever the policy.

    Raises BackupNotFound, also when a prune was faster; Busy when an imported dump is being pruned.
    """
    tier = "" if backup.imported else load(store, backup).tier
    _put_beside(store, backup, tier, Beside.PIN, f"pinned at {at:%Y-%m-%dT%H:%M:%SZ}\n{note}\n".encode())
    # Looking after putting is what makes prune and us see one another; see leases.py.
    if backup.imported:
        now = leases.written_at(store, catalog_key(backup, Beside.PIN), at)
        if any(lease.purpose == leases.PRUNE for lease in leases.others(store, backup, now=now)):
            store.delete([catalog_key(backup, Beside.PIN)])
            raise Busy(f"{backup} is being pruned", hint="`backup-pipeline list` shows what is left.")
    elif not exists(store, catalog_key(backup)):
        store.delete([copy_key(backup, tier, Beside.PIN), catalog_key(backup, Beside.PIN)])
        raise BackupNotFound(
            f"{backup} was pruned a moment ago", hint="`backup-pipeline list` shows what there is."
        )


def unpin(store: Store, backup: BackupId) -> None:
    """Leave a backup to the policy again; nothing happens when it is not pinned.

    A pin whose manifest is missing is lifted as well.
    """
    copies = _copies_of_pin(store, backup)
    denied = store.delete(copies) if copies else {}
    denied = denied or store.delete([catalog_key(backup, Beside.PIN)])
    if denied:
        raise Refused(
            f"{backup} stays pinned: the store does not let go of its pin",
            detail=denied,
            hint="Unpin with credentials that may delete, once no object lock holds it.",
        )


def has_pin(store: Store, backup: BackupId) -> bool:
    """Whether a pin of this backup lies in the store, be its manifest there or not."""
    keys = (catalog_key(backup, Beside.PIN), *_copies_of_pin(store, backup))
    return any(exists(store, key) for key in keys)


def _copies_of_pin(store: Store, backup: BackupId) -> list[str]:
    if backup.imported:
        return []
    try:
        return [copy_key(backup, load(store, backup).tier, Beside.PIN)]
    except (BackupNotFound, Corrupt):  # then the tier is not known: look for it
        keys = [info.key for info in store.list(f"{DATA}{backup.database}/")]
    named = ((key, parse_data_key(key)) for key in keys)
    return [key for key, found in named if found and found[::2] == (backup, COPY_NAMES[Beside.PIN])]


def _put_beside(store: Store, backup: BackupId, tier: str, beside: Beside, data: bytes) -> None:
    if tier:
        store.put(copy_key(backup, tier, beside), [data])
    store.put(catalog_key(backup, beside), [data])


def catalog_keys(
    store: Store, database: str
) -> tuple[dict[BackupId, dict[Beside, ObjectInfo]], list[tuple[str, str]]]:
    """What lies in the catalog of one subject, or of all: by backup, and the keys that are none of ours."""
    found: dict[BackupId, dict[Beside, ObjectInfo]] = {}
    foreign = []
    for info in store.list(catalog_prefix(database)):
        named = parse_catalog_key(info.key)
        if named is None:
            foreign.append((info.key, "it is no name that we give"))
        else:
            found.setdefault(named[0], {})[named[1]] = info
    return found, foreign


def _infos(found: Mapping[BackupId, Mapping[Beside, ObjectInfo]]) -> list[ObjectInfo]:
    return [info for beside in found.values() for kind, info in beside.items() if kind is not Beside.PIN]


def read_records(
    store: Store, infos: Iterable[ObjectInfo], index: catalog_index.Index
) -> dict[str, CatalogRecord]:
    """Manifests and verdicts by key: from the index where it agrees and can be read, else from the store."""
    records: dict[str, CatalogRecord] = {}
    missing = []
    for info in infos:
        body = index.body(info)
        record = _parse(info.key, body) if body is not None else None
        if record is None or isinstance(record, Corrupt):
            missing.append(info)
        else:
            records[info.key] = record
    for info, body in zip(missing, _read_many(store, missing), strict=True):
        if body is not None:
            records[info.key] = _parse(info.key, body)
    return records


def _parse(key: str, body: bytes) -> CatalogRecord:
    try:
        if key.endswith(Beside.VERDICT):
            return verdict_from_json(body, key)
        return base_from_json(body, key) if is_base_record(body) else manifest_from_json(body, key)
    except Corrupt as error:
        return error


def _read_many(store: Store, infos: Sequence[ObjectInfo]) -> list[bytes | None]:
    """The bodies in the same order; None for an object that is gone, nothing for one that is too long."""

    def read(info: ObjectInfo) -> bytes | None:
        return b"" if info.size_bytes > MAX_RECORD_BYTES else read_or_none(store, info.key)

    if not infos:
        return []
    with ThreadPoolExecutor(min(READERS, len(infos))) as pool:
        return list(pool.map(read, infos))


def marks_from(beside: Mapping[Beside, ObjectInfo], records: Mapping[str, CatalogRecord]) -> Marks:
    """What lies beside one record, by the records that were read."""
    record = records.get(beside[Beside.VERDICT].key) if Beside.VERDICT in beside else None
    if isinstance(record, Corrupt):
        return Marks(None, Beside.PIN in beside, reason_of(record))
    return Marks(record if isinstance(record, ProofRecord) else None, Beside.PIN in beside)


def _backup(manifest: Manifest) -> Backup:
    return Backup(
        id=manifest.id,
        tier=manifest.tier,
        taken_at=manifest.id.taken_at,
        size_bytes=manifest.size_bytes,
        manifest=manifest,
        expires_at=manifest.expires_at,
    )


def reason_of(error: Corrupt) -> str:
    """Why a record cannot be read."""
    return str(error.detail["reason"])


def exists(store: Store, key: str) -> bool:
    """Whether an object has this key."""
    try:
        store.head(key)
    except ObjectNotFound:
        return False
    return True
