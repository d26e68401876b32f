"""Fetch one file of the WAL archive: PostgreSQL's contract for restore_command, on any store.

When `fetch` returns, the file is in place, whole, and the one that was archived: its digest is that of its
key. It says NotArchived only where the archive itself was seen and has neither the file nor anything behind
it; whatever else is in the way is another error, because PostgreSQL takes a plain failure for the end of the
WAL and would end its recovery there, without what comes after.

Source: PostgreSQL, "Continuous Archiving", "Recovering Using a Continuous Archive Backup".
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from backup_pipeline.domain.layout import ArchivedWal, parse_wal_key, wal_key, wal_timeline_prefix
from backup_pipeline.domain.wal import WalKind, WalName, parse_history, parse_wal_name
from backup_pipeline.errors import NotArchived, ObjectNotFound, Refused, StoreError
from backup_pipeline.storage.store import ObjectInfo, Store
from backup_pipeline.wal.ahead import AHEAD
from backup_pipeline.wal.archive import MAX_TEXT_BYTES, objects_of
from backup_pipeline.wal.identity import read_identity
from backup_pipeline.wal.partials import fetch_partial
from backup_pipeline.wal.settling import Pause, may_be_filled, settled
from backup_pipeline.wal.unpacking import check, unfinished, unpack

ABSENT, FATAL = 1, 200
"""restore_command's exit codes: PostgreSQL reads 1 to 125 as the end of the WAL, and stops above."""


@dataclass(frozen=True)
class Fetched:
    """One file that was put in place. Of a segment that was not finished, `content_bytes` are written."""

    name: str
    key: str
    plain_bytes: int
    content_bytes: int = 0
    partial: bool = False


def restore_exit_code(error: BaseException | None) -> int:
    """What restore_command ends with: 0 in place, 1 known not to exist, 200 whatever else."""
    if error is None:
        return 0
    return ABSENT if isinstance(error, NotArchived) else FATAL


def fetch(
    store: Store,
    cluster: str,
    text: str,
    target: Path,
    *,
    system_identifier: str = "",
    key: str = "",
    pause: Pause = time.sleep,
) -> Fetched:
    """Put the archived file named `text` at `target`, replacing what is there, at once and whole.

    `system_identifier` is the recovering cluster's; else the one that archives now. Where a listing told the
    `key` of its object, that is read at once, and the archive asked only when it is gone. A segment that is
    missing before a few others may be under way: it is waited for, half a minute. Of one that is missing at
    the end of the archive, what is there of it is taken: PostgreSQL replays that far. Raises NotArchived when
    the archive is known not to have it; Refused for several objects of one name and for a segment that is
    missing before others; Corrupt; ConfigError, StoreError.
    """
    name = parse_wal_name(text)
    if (known := parse_wal_key(key)) is not None and known.name == name:
        with contextlib.suppress(ObjectNotFound):
            return _bring(store, key, known, target)
    identity = read_identity(store, cluster)
    if identity is None:
        raise StoreError(
            f"there is no WAL archive of {cluster} in {store.url}",
            hint="Check the store's URL and that its disk is mounted; nothing is known of its WAL.",
        )
    system = system_identifier or identity.system_identifier
    if name.kind is WalKind.HISTORY:
        return _fetch_history(store, cluster, system, name, target)
    objects = _objects(store, cluster, system, name, pause)
    if not objects and name.kind is WalKind.SEGMENT:
        if part := fetch_partial(store, cluster, system, name, target):
            return Fetched(text, part.key, part.plain_bytes, part.content_bytes, partial=True)
        objects = objects_of(store, cluster, system, name)  # finished in between, its parts removed
    if not objects:
        raise _absent(name, cluster)
    if len(objects) > 1:
        raise Refused(
            f"{text} is in the archive of {cluster} {len(objects)} times, with different bytes",
            detail={"objects": ", ".join(info.key for info, _ in objects)},
            hint="Two servers archived as one cluster. Move the one that is not of this history away.",
        )
    ((info, archived),) = objects
    return _bring(store, info.key, archived, target)


def _bring(store: Store, key: str, archived: ArchivedWal, target: Path) -> Fetched:
    with unfinished(target) as path:
        plain_bytes = unpack(store, key, path, archived.sha256)
        if archived.name.kind is not WalKind.LABEL:
            check(archived.name, path, archived.system_identifier)
        os.replace(path, target)
    return Fetched(archived.name.text, key, plain_bytes, plain_bytes)


def _fetch_history(store: Store, cluster: str, system: str, name: WalName, target: Path) -> Fetched:
    key = wal_key(cluster, system, name, "")
    try:
        data = store.read_range(key, offset=0, length=MAX_TEXT_BYTES + 1)
    except ObjectNotFound:
        raise _absent(name, cluster) from None
    parse_history(name.timeline, data)
    with unfinished(target) as path:
        path.write_bytes(data)
        os.replace(path, target)
    return Fetched(name.text, key, len(data))


def _absent(name: WalName, cluster: str) -> NotArchived:
    return NotArchived(f"{name.text} is not in the archive of {cluster}")


def _objects(
    store: Store, cluster: str, system: str, name: WalName, pause: Pause
) -> list[tuple[ObjectInfo, ArchivedWal]]:
    """The objects of a name; none at the end of the archive. Raises Refused for a gap."""

    def look() -> tuple[list[tuple[ObjectInfo, ArchivedWal]], list[str]]:
        objects = objects_of(store, cluster, system, name)
        return objects, [] if objects else list(islice(_later(store, cluster, system, name), AHEAD + 1))

    objects, later = settled(look, lambda found: may_be_filled(len(found[1])), pause=pause)
    if later:
        raise Refused(
            f"{name.text} is missing in the archive of {cluster}, which has {later[0]} and perhaps more "
            "behind it",
            hint="Recovery would end here in silence: choose a target before the gap, or a later backup.",
        )
    return objects


def _later(store: Store, cluster: str, system: str, name: WalName) -> Iterator[str]:
    """The later segments of its timeline that are there."""
    if name.kind is not WalKind.SEGMENT:
        return
    for info in store.list(wal_timeline_prefix(cluster, system, name.timeline)):
        found = parse_wal_key(info.key)
        if found and found.name.kind is WalKind.SEGMENT and found.name.text > name.text:
            yield found.name.text
