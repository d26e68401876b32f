"""Whose WAL an archive takes: the record in the store, and the system that a data directory is of.

Called before anything is pushed, and by `wal setup`, which alone begins an archive. One archive belongs to
one PostgreSQL system; one that was made anew is refused until an operator says that it takes over.
"""

import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from time import monotonic

from backup_pipeline.domain.layout import (
    parse_wal_key,
    wal_archive_prefix,
    wal_identity_key,
)
from backup_pipeline.domain.manifest import MAX_RECORD_BYTES
from backup_pipeline.domain.wal_archive import ArchiveIdentity, identity_from_json, identity_to_json
from backup_pipeline.errors import ConfigError, ObjectExists, ObjectNotFound, Refused, StoreError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store

BELIEVED_S = 60.0
"""For how long a record that was read is not read again, where reading it is a request to a server."""

_SYSTEM = struct.Struct("<Q")


@dataclass(frozen=True)
class System:
    """A PostgreSQL system: its identifier, and how large its segments are."""

    identifier: str
    segment_bytes: int


def read_system_identifier(data_directory: Path) -> str:
    """The identifier that initdb gave a cluster. Raises ConfigError.

    Source: `ControlFileData` begins with it.
    """
    path = data_directory / "global" / "pg_control"
    try:
        with path.open("rb") as file:
            (identifier,) = _SYSTEM.unpack(file.read(_SYSTEM.size))
    except (OSError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is too short"
        raise ConfigError(
            f"{data_directory} is no data directory that can be read: {path}: {reason}",
            hint="Run this as PostgreSQL's own user, on files in pg_wal of its data directory.",
        ) from error
    return str(identifier)


def read_identity(store: Store, cluster: str) -> ArchiveIdentity | None:
    """The record of a cluster's archive; None where there is no archive yet. Raises Corrupt."""
    key = wal_identity_key(cluster)
    try:
        data = store.read_range(key, offset=0, length=MAX_RECORD_BYTES)
    except ObjectNotFound:
        return None
    identity = identity_from_json(data, key)
    if identity.cluster != cluster:
        raise Refused(f"{key} is the record of cluster {identity.cluster}")
    return identity


def claim(store: Store, cluster: str, system: System, *, at: datetime) -> ArchiveIdentity:
    """Have the archive belong to `system` if it belongs to none yet; the record as it is then, durable.

    Raises Refused when it belongs to another one.
    """
    found = read_identity(store, cluster)
    if found is None:
        _refuse_abandoned(store, cluster, system)
        with suppress(ObjectExists):
            made = ArchiveIdentity(cluster, system.identifier, system.segment_bytes, at)
            store.put_if_absent(wal_identity_key(cluster), identity_to_json(made))
        found = read_identity(store, cluster)  # of several that were first, one is
    if found is None:
        raise _foreign(store, cluster, "lost its record")
    if found.system_identifier != system.identifier:
        raise _foreign(store, cluster, _belongs(found, system.identifier))
    if found.segment_bytes != system.segment_bytes:
        raise _foreign(
            store, cluster, f"takes segments of {found.segment_bytes} bytes, not of {system.segment_bytes}"
        )
    store.settle(wal_identity_key(cluster))
    return found


def adopt(store: Store, cluster: str, system: System, *, at: datetime) -> ArchiveIdentity:
    """Have the archive belong to `system` from now on; what the ones before archived stays."""
    found = read_identity(store, cluster)
    if found and (found.system_identifier, found.segment_bytes) == (system.identifier, system.segment_bytes):
        store.settle(wal_identity_key(cluster))
        return found
    earlier = (*found.earlier, found.system_identifier) if found else ()
    made = ArchiveIdentity(
        cluster, system.identifier, system.segment_bytes, at, tuple(dict.fromkeys(earlier))
    )
    store.put(wal_identity_key(cluster), [identity_to_json(made)])
    return replace(made)


def _refuse_abandoned(store: Store, cluster: str, system: System) -> None:
    """Where the record was lost, the WAL that is there says whose archive it is, if it is of one system."""
    parsed = (parse_wal_key(info.key) for info in store.list(wal_archive_prefix(cluster)))
    systems = sorted({archived.system_identifier for archived in parsed if archived})
    if systems not in ([], [system.identifier]):
        whose = f"system{'s' if len(systems) > 1 else ''} {' and '.join(systems)}"
        raise _foreign(store, cluster, f"has no record, and holds WAL of {whose}")


def _belongs(identity: ArchiveIdentity, system_identifier: str) -> str:
    return f"belongs to PostgreSQL system {identity.system_identifier}, not to {system_identifier}"


def _foreign(store: Store, cluster: str, found: str) -> Refused:
    return Refused(
        f"the WAL archive of {cluster} in {store.url} {found}",
        hint="A copy of a cluster must not archive into its source's place: give it a name of its own. Only "
        "when this cluster takes over (pg_upgrade, initdb), or the other is a copy that came first "
        f"(pg_controldata tells a cluster's system): backup-pipeline wal setup {cluster} --adopt",
    )


class Door:
    """Lets one system's WAL into an archive that was begun. Safe for several threads.

    A server is asked for the record once a minute; a directory each time, for another one lies under its
    name as soon as its disk is unmounted.
    """

    def __init__(self, store: Store, cluster: str) -> None:
        self._store, self._cluster = store, cluster
        self._believed_s = 0.0 if isinstance(store, DirectoryStore) else BELIEVED_S
        self._known: dict[str, tuple[float, ArchiveIdentity]] = {}

    def enter(self, system_identifier: str) -> ArchiveIdentity:
        """The archive's record. Raises StoreError when there is none, Refused when it is another system's."""
        until_s, identity = self._known.get(system_identifier, (0.0, None))
        if identity is not None and monotonic() < until_s:
            return identity
        identity = read_identity(self._store, self._cluster)
        if identity is None:
            raise StoreError(
                f"there is no WAL archive of {self._cluster} in {self._store.url}",
                hint="Where there was one, mount its disk, or correct the store's URL; "
                f"`backup-pipeline wal setup {self._cluster} --apply` begins one.",
            )
        if identity.system_identifier != system_identifier:
            raise _foreign(self._store, self._cluster, _belongs(identity, system_identifier))
        self._known[system_identifier] = (monotonic() + self._believed_s, identity)
        return identity
