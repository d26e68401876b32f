"""A lost or damaged catalog made anew from the copies that lie beside the objects.

Every manifest, verdict and pin has a copy below its backup's prefix. What the catalog lacks, or
holds unreadable, is written again, byte for byte, when all objects of the backup are there with
the right sizes. What can be read in the catalog is not touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.layout import CATALOG, DATA, Beside, catalog_key, copy_key, parse_data_key
from backup_pipeline.domain.manifest import manifest_from_json, verdict_from_json
from backup_pipeline.errors import Corrupt, ObjectNotFound
from backup_pipeline.storage.catalog import list_backups
from backup_pipeline.storage.catalog_publish import missing_objects
from backup_pipeline.storage.store import Store, read_all


@dataclass(frozen=True)
class Rebuilt:
    """The backups that are listed again, and the copies that could not be used, with the reason."""

    backups: tuple[BackupId, ...]
    refused: tuple[tuple[str, str], ...]  # (key, reason)


def rebuild(store: Store) -> Rebuilt:
    """Write what the catalog lacks from the copies beside the objects. May be run again.

    The objects' sizes are compared, not their contents: prove what came back.
    """
    # The objects before the catalog: a prune deletes the copy before the manifest, so a copy that
    # can still be read once the manifest was seen missing is not one that is being deleted.
    sizes = {info.key: info.size_bytes for info in store.list(DATA)}
    damaged = {key for key, _ in list_backups(store, fresh=True).unreadable}
    whole = {info.key for info in store.list(CATALOG)} - damaged
    restored, refused = [], []
    for backup, tier in _with_copies(sizes):
        lacking = [
            beside
            for beside in (Beside.PIN, Beside.VERDICT, Beside.MANIFEST)  # what protects comes first
            if catalog_key(backup, beside) not in whole and copy_key(backup, tier, beside) in sizes
        ]
        if not lacking:
            continue
        done, problems = _restore(store, backup, tier, lacking, sizes)
        refused += problems
        if done and Beside.MANIFEST in lacking:
            restored.append(backup)
            whole.add(catalog_key(backup))
    return Rebuilt(tuple(restored), tuple(refused))


def _with_copies(sizes: Mapping[str, int]) -> list[tuple[BackupId, str]]:
    """Each backup and tier of which a copy of the manifest is there."""
    named = (parse_data_key(key) for key in sorted(sizes))
    return [(backup, tier) for backup, tier, name in filter(None, named) if name == "manifest.json"]


def _restore(
    store: Store, backup: BackupId, tier: str, lacking: Sequence[Beside], sizes: Mapping[str, int]
) -> tuple[bool, list[tuple[str, str]]]:
    """Write what one backup lacks in the catalog; returns whether, and the copies that are bad, with why."""
    manifest_key, verdict_key = (
        copy_key(backup, tier, beside) for beside in (Beside.MANIFEST, Beside.VERDICT)
    )
    try:
        bodies = {beside: read_all(store, copy_key(backup, tier, beside)) for beside in lacking}
        manifest = manifest_from_json(
            bodies.get(Beside.MANIFEST) or read_all(store, manifest_key), manifest_key
        )
    except ObjectNotFound:
        return False, []  # deleted since it was listed
    except Corrupt as error:
        return False, [(manifest_key, str(error.detail["reason"]))]
    problem = missing_objects(manifest.objects, sizes)
    if problem:
        return False, [(manifest_key, problem)]
    refused = []
    if Beside.VERDICT in bodies:
        try:
            verdict_from_json(bodies[Beside.VERDICT], verdict_key)
        except Corrupt as error:  # written all the same: retention keeps what has an unreadable verdict
            refused.append((verdict_key, str(error.detail["reason"])))
    for beside, body in bodies.items():
        store.put(catalog_key(backup, beside), [body])
    return True, refused
