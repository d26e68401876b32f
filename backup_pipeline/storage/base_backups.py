"""The base backups of a cluster: publish, list, load, delete. What exists is what the catalog's records say.

They lie in the same catalog as the dumps, under the cluster's name, with records of another kind; a cluster
and a database never share a name. Called by actions/; what is deleted is decided elsewhere.
"""

from collections.abc import Callable, Iterable
from datetime import datetime

from backup_pipeline.domain.backup import BackupId, Proof, ProofRecord
from backup_pipeline.domain.base_backup import (
    BaseBackup,
    BaseListing,
    BaseManifest,
    base_from_json,
    base_to_json,
)
from backup_pipeline.domain.base_chain import Chain, chain_of
from backup_pipeline.domain.layout import (
    Beside,
    base_copy_key,
    base_prefix,
    bases_prefix,
    catalog_key,
    parse_base_key,
)
from backup_pipeline.errors import BackupNotFound, Busy, Corrupt, ObjectNotFound, Refused, StoreError
from backup_pipeline.storage import catalog, catalog_index, catalog_publish, leases
from backup_pipeline.storage.catalog_delete import Deletion, in_use
from backup_pipeline.storage.catalog_publish import publish_record, read_or_none
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline.storage.waiting import read_waiting

Clock = Callable[[], datetime]


def publish(store: Store, manifest: BaseManifest) -> BaseBackup:
    """List a finished base backup; durable on return, and may be run again.

    That the WAL which it needs is in the archive is for the caller to see to. Raises Refused, also when
    what it builds on is gone; Busy; Corrupt when the record could not be read back.
    """
    data = base_to_json(manifest)
    base_from_json(data, catalog_key(manifest.id))
    refuse_broken(store, manifest)
    publish_record(
        store,
        manifest.id,
        data,
        manifest.objects,
        prefix=base_prefix(manifest.id),
        at=manifest.finished_at,
    )
    try:
        refuse_broken(store, manifest)  # a prune of its parent may have seen no child a moment ago
    except Refused:
        store.delete([base_copy_key(manifest.id, Beside.MANIFEST), catalog_key(manifest.id)])
        raise
    return BaseBackup(manifest)


def refuse_broken(store: Store, manifest: BaseManifest) -> None:
    """Raise Refused when the record of something that an incremental one builds on is not there."""
    if manifest.parent is None:
        return
    known: dict[BackupId, BaseManifest] = {}
    above: BackupId | None = manifest.parent
    while above is not None and above not in known:
        try:
            known[above] = load(store, above).manifest
        except BackupNotFound:
            break
        above = known[above].parent
    if broken := chain_of(manifest, known).broken:
        raise Refused(
            f"{manifest.id} is not listed: {broken}",
            hint="Take a whole base backup; what is unlisted is collected.",
        )


def missing_objects(store: Store, manifest: BaseManifest) -> str:
    """Which of a base backup's objects is not there, or of another size; "" when all are as recorded."""
    present = {info.key: info.size_bytes for info in store.list(base_prefix(manifest.id))}
    return catalog_publish.missing_objects(manifest.objects, present)


def missing_link(store: Store, chain: Chain) -> tuple[BackupId, str] | None:
    """The first link of a chain that is not whole in the store, and why; a listing for each."""
    for link in chain.links:
        if reason := missing_objects(store, link):
            return link.id, f"{link.id}: {reason}"
    return None


def load(store: Store, backup: BackupId) -> BaseBackup:
    """One base backup as it is now, never from the index. Raises BackupNotFound, or Corrupt."""
    key = catalog_key(backup)
    try:
        manifest = base_from_json(read_all(store, key), key)
    except ObjectNotFound:
        raise BackupNotFound(
            f"there is no base backup {backup}",
            hint=f"`backup-pipeline list {backup.database}` shows what there is.",
        ) from None
    return catalog.load_marks(store, backup).on(BaseBackup(manifest))


def record_proof(store: Store, backup: BackupId, proof: Proof, *, comparable: bool) -> ProofRecord:
    """Record what a drill found of a base backup; returns what now stands (see ProofRecord).

    `comparable` says that there was something to hold the recovered cluster against. Raises
    BackupNotFound when the backup is gone; Corrupt as catalog.record_proof does.
    """
    load(store, backup)
    copy = base_copy_key(backup, Beside.VERDICT)
    return catalog.put_proof(store, backup, proof, copy=copy, comparable=comparable)


def list_base_backups(store: Store, cluster: str = "", *, fresh: bool = False) -> BaseListing:
    """The base backups of one cluster, newest first, or of all clusters. What cannot be read is told.

    Of one cluster, whatever is no base backup's record is told as well; of all, dumps are passed over.
    For decisions on what to delete, `fresh` reads the records themselves.
    """
    found, unreadable = catalog.catalog_keys(store, cluster)
    whole = [beside for beside in found.values() if Beside.MANIFEST in beside]
    infos = [info for beside in whole for kind, info in beside.items() if kind is not Beside.PIN]
    records = catalog.read_records(
        store, infos, catalog_index.Index() if fresh else catalog_index.read(store)
    )
    backups = []
    for beside in whole:
        key = beside[Beside.MANIFEST].key
        record = records.get(key)
        if isinstance(record, Corrupt):
            unreadable.append((key, catalog.reason_of(record)))
        elif isinstance(record, BaseManifest):
            marks = catalog.marks_from(beside, records)
            backups.append(marks.on(BaseBackup(record)))
            if marks.unreadable_verdict:
                unreadable.append((beside[Beside.VERDICT].key, marks.unreadable_verdict))
    backups.sort(key=lambda item: (item.id.taken_at, item.id.stamp, item.id.database), reverse=True)
    return BaseListing(tuple(backups), tuple(sorted(unreadable)))


def pin(store: Store, backup: BackupId, *, at: datetime) -> None:
    """Keep a base backup, and all WAL since, until it is unpinned.

    Raises BackupNotFound, also when a prune was faster: looking after putting is what makes the two see one
    another, see leases.py.
    """
    load(store, backup)
    data = f"pinned at {at:%Y-%m-%dT%H:%M:%SZ}\n".encode()
    keys = [base_copy_key(backup, Beside.PIN), catalog_key(backup, Beside.PIN)]
    for key in keys:
        store.put(key, [data])
    if not catalog.exists(store, catalog_key(backup)):
        store.delete(keys)
        raise BackupNotFound(
            f"{backup} was pruned a moment ago",
            hint=f"`backup-pipeline list {backup.database}` shows what there is.",
        )


def unpin(store: Store, backup: BackupId) -> None:
    """Leave a base backup to the retention again. Raises Refused when the store keeps its pin."""
    for key in (base_copy_key(backup, Beside.PIN), catalog_key(backup, Beside.PIN)):
        if denied := store.delete([key]):
            raise Refused(
                f"{backup} stays pinned: the store does not let go of its pin",
                detail=denied,
                hint="Unpin with credentials that may delete, once no object lock holds it.",
            )


def unlisted(store: Store, cluster: str) -> dict[BackupId, int]:
    """Base backups that were begun and never published, or half deleted: their ids and bytes.

    One may be under way: its lease tells, see `collect`.
    """
    sizes: dict[BackupId, int] = {}
    for info in store.list(bases_prefix(cluster)):
        if named := parse_base_key(info.key):
            sizes[named[0]] = sizes.get(named[0], 0) + info.size_bytes
    found, _ = catalog.catalog_keys(store, cluster)
    return {each: size for each, size in sizes.items() if Beside.MANIFEST not in found.get(each, {})}


def lost_records(store: Store, backups: Iterable[BackupId]) -> tuple[BackupId, ...]:
    """Those of `unlisted` ones that were finished: the copy of the record is there, and the record is gone.

    A prune takes the copy first, so what it left half deleted is none of them.
    """
    return tuple(each for each in backups if catalog.exists(store, base_copy_key(each, Beside.MANIFEST)))


def rebuild(store: Store, cluster: str) -> tuple[tuple[BackupId, ...], tuple[tuple[str, str], ...]]:
    """List again what a lost catalog, or a death while publishing, left whole but unlisted.

    Returns the ids, and the copies that could not be used, each with why. May be run again.
    """
    restored, refused = [], []
    for backup in unlisted(store, cluster):
        copy = base_copy_key(backup, Beside.MANIFEST)
        data = read_or_none(store, copy)
        if data is None:
            continue
        try:
            manifest = base_from_json(data, copy)
            for beside in (Beside.VERDICT, Beside.PIN):
                kept = read_or_none(store, base_copy_key(backup, beside))
                if kept is not None and not catalog.exists(store, catalog_key(backup, beside)):
                    store.put(catalog_key(backup, beside), [kept])
            publish(store, manifest)
        except (Corrupt, Refused, Busy) as error:
            refused.append((copy, error.message))
        else:
            restored.append(backup)
    return tuple(restored), tuple(refused)


def delete(store: Store, backup: BaseBackup, *, clock: Clock) -> Deletion:
    """Delete a base backup that a logged plan gave up, in an order that may stop anywhere.

    The copy of the record, the record, then the objects. Right after the record it looks again for a
    lease or a pin, and puts the record back when there is one; see leases.py. Raises Corrupt when the
    record has become unreadable.
    """
    key, copy = catalog_key(backup.id), base_copy_key(backup.id, Beside.MANIFEST)
    with leases.claim(store, backup.id, clock=clock) as others:
        if others:
            return Deletion(kept=in_use(others))
        data = read_or_none(store, key)
        if data is None:
            return Deletion(kept="its record is gone already: another prune is or was at it")
        if base_from_json(data, key) != backup.manifest:
            return Deletion(kept="its record is not the one that was planned with")
        if reason := _speaks_against(store, backup, clock()):
            return Deletion(kept=reason)
        denied = store.delete([copy]) or store.delete([key])
        try:
            reason = "the store does not let go of its record" if denied else ""
            reason = reason or _speaks_against(store, backup, clock())
        except StoreError:
            _put_back(store, {copy: data, key: data})
            raise
        if reason:
            _put_back(store, {copy: data, key: data})
            return Deletion(kept=reason, denied=denied)
        return _delete_objects(store, backup.id)


def collect(store: Store, backup: BackupId, *, clock: Clock) -> Deletion:
    """Delete what lies of a base backup that is not listed, unless it is under way or was published."""
    with leases.claim(store, backup, clock=clock) as others:
        if others:
            return Deletion(kept=in_use(others))
        for key in (
            catalog_key(backup),
            base_copy_key(backup, Beside.MANIFEST),
            catalog_key(backup, Beside.PIN),
            base_copy_key(backup, Beside.PIN),
        ):
            if catalog.exists(store, key):
                return Deletion(kept=f"{key} is there now")
        return _delete_objects(store, backup)


def _delete_objects(store: Store, backup: BackupId) -> Deletion:
    denied = dict(store.delete([catalog_key(backup, Beside.VERDICT)]))
    objects = {info.key: info.size_bytes for info in store.list(base_prefix(backup))}
    denied |= store.delete(list(objects)) if objects else {}
    freed = sum(size for key, size in objects.items() if key not in denied)
    return Deletion(denied=denied, freed_bytes=freed)


def _put_back(store: Store, records: dict[str, bytes]) -> None:
    for key, data in records.items():
        if read_or_none(store, key) != data:
            store.put(key, [data])


def _speaks_against(store: Store, backup: BaseBackup, now: datetime) -> str:
    others = [lease for lease in leases.others(store, backup.id, now=now) if lease.purpose != leases.PRUNE]
    if others:
        return in_use(others)
    marks = catalog.load_marks(store, backup.id)
    if marks.pinned:
        return "it was pinned meanwhile"
    if marks.unreadable_verdict or (marks.record and marks.record.standing) != backup.proof:
        return "its verdict changed meanwhile"
    # After the leases: a child lets go of its parent's once it is listed, or waits for its WAL. What waits
    # before what is listed: the one becomes the other.
    waiting = read_waiting(store, unlisted(store, backup.id.database)).manifests
    listing = list_base_backups(store, backup.id.database, fresh=True)
    known = (*waiting, *(each.manifest for each in listing.backups))
    children = [each.id for each in known if each.parent == backup.id != each.id]
    if children:
        return f"{children[0]} was taken against it meanwhile"
    return f"{listing.unreadable[0][0]} cannot be read" if listing.unreadable else ""
