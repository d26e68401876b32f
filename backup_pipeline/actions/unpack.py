"""Bring a base backup from the store into a new data directory, every byte checked. Recovery comes after.

Called by what recovers a cluster. Object digests are compared here, each file in engines/postgres/unpack.py;
the directory has its name only when both agreed.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from backup_pipeline.actions.fetch import fetch_backup_manifest, verified
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.report import Report, timed
from backup_pipeline.domain.backup import ObjectDigest, ObjectRole
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.domain.file_list import FileList, parse_file_list
from backup_pipeline.engines.postgres.unpack import Places, unpacking
from backup_pipeline.errors import Corrupt, Refused
from backup_pipeline.process import Identity
from backup_pipeline.read_ahead import read_ahead
from backup_pipeline.storage import leases
from backup_pipeline.storage.store import Store
from backup_pipeline.units import show_bytes
from backup_pipeline.zstd import decompressed

_MARGIN = 1.02  # folders, and the ends of blocks


def unpack(
    store: Store,
    manifest: BaseManifest,
    places: Places,
    *,
    clock: Clock,
    report: Report,
    owner: Identity | None = None,
    durable: bool = True,
) -> None:
    """Fill `places` with the backup's files. When it raises, nothing is left there.

    Durable on return, unless a server is started there next, which makes it so: `durable` says.

    `owner` is the user that the server will run as, where that is not ours. The WAL that makes it
    consistent is not brought. Raises Corrupt, StoreError, BackupNotFound, Refused, ToolError.
    """
    require_space([space_wanted(manifest, places)], str(manifest.id))
    with leases.hold(store, manifest.id, "restore", clock=clock, required=False) as lease:
        if lease.unshielded:
            report.say(f"warning: no prune is kept away meanwhile: {lease.unshielded}")
        listed = fetch_file_list(store, manifest)
        total = sum(file.size_bytes for file in listed.files.values())
        tell = timed(report, "unpack")
        with unpacking(places, listed, owner=owner, durable=durable) as work:
            for oid, item in _archives(manifest):
                with read_ahead(decompressed(verified(store, item), item.key)) as chunks:
                    work.add(item.key, oid, _telling(chunks, lambda: tell(work.read_bytes, total)))
            lease.check()
    report.say(f"unpacked {manifest.id} into {places.data}: {show_bytes(total)}, every file as listed")


def fetch_file_list(store: Store, manifest: BaseManifest) -> FileList:
    """PostgreSQL's own list of the backup's files. Raises Corrupt, also when it is of another backup."""
    (item,) = manifest.of_role(ObjectRole.FILE_LIST)
    listed = parse_file_list(fetch_backup_manifest(store, manifest))
    ends = (listed.wal_ranges[0].start, listed.wal_ranges[-1].end) if listed.wal_ranges else None
    # The newest timeline's range comes first where there are several.
    several = len(listed.wal_ranges) > 1
    if not several and ends != (manifest.start, manifest.end.lsn):
        raise Corrupt(f"{item.key} is the list of another backup: its WAL is not from {manifest.start}")
    if listed.system_identifier not in ("", manifest.system_identifier):
        raise Corrupt(f"{item.key} is the list of another cluster, {listed.system_identifier}")
    return listed


def _archives(manifest: BaseManifest) -> Iterator[tuple[int, ObjectDigest]]:
    yield 0, manifest.of_role(ObjectRole.BASE)[0]
    named = {item.name: item for item in manifest.of_role(ObjectRole.TABLESPACE)}
    yield from ((item.oid, named[item.object_name]) for item in manifest.tablespaces)


def _telling(chunks: Iterator[bytes], tell: Callable[[], None]) -> Iterator[bytes]:
    for chunk in chunks:
        tell()
        yield chunk


def space_wanted(
    manifest: BaseManifest, places: Places, *, combined: bool = False
) -> Mapping[int, tuple[Path, int]]:
    """By file system: a folder of it, and how much goes there, unpacked or `combined` with what it builds on.

    How much of an incremental one goes to which of its places is not known: all of it may.
    """
    size_bytes = manifest.combined_bytes if combined else manifest.source_bytes
    sizes = {item.oid: item.size_bytes for item in manifest.tablespaces if item.oid in places.tablespaces}
    wanted = {place: sizes[oid] for oid, place in places.tablespaces.items() if oid in sizes}
    in_part = manifest.parent is not None and not combined
    wanted[places.data] = size_bytes if in_part else max(0, size_bytes - sum(sizes.values()))
    found: dict[int, tuple[Path, int]] = {}
    for place, place_bytes in wanted.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        device = os.stat(there).st_dev
        found[device] = (there, min(size_bytes, found.get(device, (there, 0))[1] + place_bytes))
    return found


def require_space(wanted: Sequence[Mapping[int, tuple[Path, int]]], what: str) -> None:
    """Refuse when a file system has too little room for all that goes there."""
    needed: dict[int, tuple[Path, int]] = {}
    for each in wanted:
        for device, (there, size_bytes) in each.items():
            needed[device] = (there, needed.get(device, (there, 0))[1] + size_bytes)
    for there, size_bytes in needed.values():
        free = shutil.disk_usage(there).free
        if free < size_bytes * _MARGIN:
            raise Refused(
                f"too little space for {what} in {there}: {show_bytes(size_bytes * _MARGIN)} needed, "
                f"{show_bytes(free)} free",
                hint="Free some space, or name a directory on a larger disk; nothing was touched.",
            )
