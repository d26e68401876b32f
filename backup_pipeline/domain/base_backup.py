"""What a base backup is: the record of a whole cluster's copy, and that record as JSON. Pure values.

The keys of its objects are in domain/layout.py; storage/base_backups.py writes and reads the records. What
the server's own manifest lists is in domain/file_list.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from backup_pipeline.domain.backup import BackupId, ObjectDigest, ObjectRole, Proof, Verdict
from backup_pipeline.domain.layout import COPY_NAMES, Beside, base_prefix, parse_base_key, parse_catalog_key
from backup_pipeline.domain.manifest import check_digests, digest_from, digest_values, id_from
from backup_pipeline.domain.sealed import (
    INCREMENTAL,
    Fields,
    Unreadable,
    corrupt,
    moment_text,
    open_sealed,
    seal,
)
from backup_pipeline.domain.wal import Lsn, TimelineHistory, WalSegment, is_segment_size
from backup_pipeline.errors import ConfigError

BASE_KIND = "backup-pipeline base backup"
BASE_OBJECT = "base.tar.zst"
FILE_LIST_OBJECT = "backup_manifest"
CONFIGURATION_FOLDER = "configuration"

RECOVERY_SETTINGS = (
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
)
"""Settings that a server which replays this cluster's WAL needs at least as large."""

_ABOUT = (
    "One finished base backup. Without backup-pipeline: get the objects, compare each with sha256sum, unpack "
    "base.tar.zst with `tar --zstd -xf` into a new directory of mode 0700, each OID.tar.zst into one of its "
    "own; write the new places into tablespace_map; check with pg_verifybackup; then set restore_command, "
    "touch recovery.signal, and start PostgreSQL of the same major version."
)
_ABOUT_INCREMENTAL = (
    "One finished incremental base backup: what changed since its parent, and useless without it. Without "
    "backup-pipeline: get the objects of this one, of its parent, and so on up to one that names no parent; "
    "compare each with sha256sum; unpack each base backup as the last one's record says, into a directory of "
    "its own, with its backup_manifest in it; check each with pg_verifybackup; then `pg_combinebackup -o NEW "
    "OLDEST ... NEWEST`, of PostgreSQL 17 or newer, and go on with NEW as with a whole one."
)
_SYSTEM = re.compile(r"[0-9]{1,20}")


@dataclass(frozen=True, order=True)
class WalPoint:
    """A position in the log, on a timeline."""

    timeline: int
    lsn: Lsn

    def __str__(self) -> str:
        return f"{self.lsn} on timeline {self.timeline}"


@dataclass(frozen=True)
class Tablespace:
    """A tablespace beyond pg_default and pg_global: where it lay, and about how large it was."""

    oid: int
    location: str
    size_bytes: int

    @property
    def object_name(self) -> str:
        """What its tar is called among the objects."""
        return f"{self.oid}.tar.zst"


@dataclass(frozen=True)
class BaseManifest:
    """The record of one finished base backup. Immutable once written.

    The id's database is the cluster's name. `started_at` and `stopped_at` are by the server's clock, the
    first is the id's; `finished_at` is when the last WAL that it needs was seen in the archive.
    """

    id: BackupId
    started_at: datetime
    stopped_at: datetime
    finished_at: datetime
    start: WalPoint
    end: WalPoint
    system_identifier: str
    server_version: int  # server_version_num, 170010
    server_version_text: str
    segment_bytes: int
    from_standby: bool
    page_checksums: bool  # whether the cluster has them; then the server checked each page that it sent
    page_checksums_wrong: bool  # some page did not agree with its checksum: see `notes`
    source_bytes: int  # of all files, before compression
    tablespaces: tuple[Tablespace, ...]
    objects: tuple[ObjectDigest, ...]
    compression: str  # "zstd:1"
    settings: tuple[tuple[str, int], ...]  # of RECOVERY_SETTINGS
    software: str
    notes: tuple[str, ...] = ()  # in plain words
    parent: BackupId | None = None  # an incremental one holds only what changed since this one
    cluster_bytes: int = 0  # of an incremental one: about how large the cluster was; see `combined_bytes`

    @property
    def size_bytes(self) -> int:
        """The bytes that this backup takes in the store, without the WAL that it needs."""
        return sum(item.size_bytes for item in self.objects)

    @property
    def combined_bytes(self) -> int:
        """About what it comes to as a data directory, with all that an incremental one builds on."""
        return max(self.cluster_bytes, self.source_bytes)

    @property
    def duration_s(self) -> float:
        """Seconds in which the server made it."""
        return (self.stopped_at - self.started_at).total_seconds()

    def of_role(self, role: ObjectRole) -> tuple[ObjectDigest, ...]:
        """The objects of one role, in the order of their names."""
        return tuple(sorted((item for item in self.objects if item.role is role), key=lambda item: item.name))

    def needed_segments(self, history: TimelineHistory) -> tuple[WalSegment, ...]:
        """The WAL that makes it consistent, in order; `history` is that of the timeline it ended on."""
        return tuple(history.segments(self.start.lsn, self.end.lsn, self.segment_bytes))


@dataclass(frozen=True)
class BaseBackup:
    """A base backup as the catalog knows it."""

    manifest: BaseManifest
    pinned: bool = False
    proof: Proof | None = None  # by a drill, of a recovery that began with it
    last_attempt: Proof | None = None  # the newest, when it is not the one that stands
    unreadable_verdict: str = ""  # why the verdict's file cannot be read; then `proof` is None

    @property
    def verdict(self) -> Verdict:
        """The verdict that stands, or NONE."""
        return self.proof.verdict if self.proof else Verdict.NONE

    @property
    def id(self) -> BackupId:
        """Its id; the database in it is the cluster's name."""
        return self.manifest.id


@dataclass(frozen=True)
class BaseListing:
    """The base backups that exist, newest first, and what lies in the catalog but cannot be read."""

    backups: tuple[BaseBackup, ...]
    unreadable: tuple[tuple[str, str], ...] = ()  # (key, reason)


def base_to_json(manifest: BaseManifest, *, requires: Sequence[str] = ()) -> bytes:
    """The record for people and for base_from_json. Equal records make equal bytes."""
    chained: dict[str, object] = {}
    if manifest.parent:
        chained = {"parent": str(manifest.parent), "cluster_bytes": manifest.cluster_bytes}
    return seal(
        BASE_KIND,
        {
            "about": _ABOUT_INCREMENTAL if manifest.parent else _ABOUT,
            "id": str(manifest.id),
            **chained,
            "started_at": moment_text(manifest.started_at),
            "stopped_at": moment_text(manifest.stopped_at),
            "finished_at": moment_text(manifest.finished_at),
            "start": _point_values(manifest.start),
            "end": _point_values(manifest.end),
            "system_identifier": manifest.system_identifier,
            "server_version": manifest.server_version,
            "server_version_text": manifest.server_version_text,
            "segment_bytes": manifest.segment_bytes,
            "from_standby": manifest.from_standby,
            "page_checksums": manifest.page_checksums,
            "page_checksums_wrong": manifest.page_checksums_wrong,
            "source_bytes": manifest.source_bytes,
            "compression": manifest.compression,
            "software": manifest.software,
            "notes": list(manifest.notes),
            "settings": [{"name": name, "value": value} for name, value in manifest.settings],
            "tablespaces": [
                {"oid": item.oid, "location": item.location, "size_bytes": item.size_bytes}
                for item in manifest.tablespaces
            ],
            "objects": [digest_values(item) for item in manifest.objects],
        },
        requires=[*requires, *([INCREMENTAL] if manifest.parent else [])],
    )


def is_base_record(data: bytes) -> bool:
    """Whether a record in the catalog claims to be a base backup's: to be read by `base_from_json`."""
    return f'"kind": "{BASE_KIND}"'.encode() in data[:100]


def base_from_json(data: bytes, key: str) -> BaseManifest:
    """The record that lies at `key`, in the catalog or beside the objects. Raises Corrupt."""
    try:
        manifest = _manifest(open_sealed(data, BASE_KIND))
        _check(manifest, key)
    except Unreadable as error:
        raise corrupt("base backup's record", key, error) from error
    return manifest


def _manifest(fields: Fields) -> BaseManifest:
    incremental = INCREMENTAL in fields.texts("requires")
    return BaseManifest(
        id=id_from(fields, "id"),
        started_at=fields.moment("started_at"),
        stopped_at=fields.moment("stopped_at"),
        finished_at=fields.moment("finished_at"),
        start=_point(fields.section("start")),
        end=_point(fields.section("end")),
        system_identifier=fields.text("system_identifier"),
        server_version=fields.integer("server_version"),
        server_version_text=fields.text("server_version_text"),
        segment_bytes=fields.integer("segment_bytes"),
        from_standby=fields.flag("from_standby"),
        page_checksums=fields.flag("page_checksums"),
        page_checksums_wrong=fields.flag("page_checksums_wrong"),
        source_bytes=fields.integer("source_bytes"),
        tablespaces=tuple(
            Tablespace(item.integer("oid", minimum=1), item.text("location"), item.integer("size_bytes"))
            for item in fields.sections("tablespaces")
        ),
        objects=tuple(digest_from(item) for item in fields.sections("objects")),
        compression=fields.text("compression"),
        settings=tuple((item.text("name"), item.integer("value")) for item in fields.sections("settings")),
        software=fields.text("software"),
        notes=fields.texts("notes"),
        parent=id_from(fields, "parent") if incremental else None,
        cluster_bytes=fields.integer("cluster_bytes") if incremental else 0,
    )


def _check(manifest: BaseManifest, key: str) -> None:
    """The record lies under its own key, and is one that could be recovered from."""
    if _owner(key) != manifest.id:
        raise Unreadable(f"it is that of {manifest.id}, under another backup's key")
    if abs(manifest.started_at - manifest.id.taken_at) >= timedelta(seconds=1):
        raise Unreadable(
            f"it began at {moment_text(manifest.started_at)}, which is not when its id {manifest.id} says"
        )
    if manifest.parent and manifest.parent.database != manifest.id.database:
        raise Unreadable(f"its parent {manifest.parent} is another cluster's")
    if manifest.parent and manifest.parent.taken_at > manifest.id.taken_at:
        raise Unreadable(f"its parent {manifest.parent} is younger than itself")
    if manifest.parent == manifest.id:
        raise Unreadable("it names itself as its parent")
    if manifest.end.lsn < manifest.start.lsn or manifest.end.timeline < manifest.start.timeline:
        raise Unreadable(f"it ends at {manifest.end}, before it starts, at {manifest.start}")
    if not is_segment_size(manifest.segment_bytes) or not _SYSTEM.fullmatch(manifest.system_identifier):
        raise Unreadable("its WAL segment size or its system identifier is none of PostgreSQL's")
    check_digests(manifest.objects, base_prefix(manifest.id))
    expected = {(BASE_OBJECT, ObjectRole.BASE), (FILE_LIST_OBJECT, ObjectRole.FILE_LIST)}
    expected |= {(item.object_name, ObjectRole.TABLESPACE) for item in manifest.tablespaces}
    found = {(item.name, item.role) for item in manifest.objects if item.role is not ObjectRole.CONFIGURATION}
    if found != expected:
        raise Unreadable("its objects are not the data directory, each tablespace, and the list of files")


def _owner(key: str) -> BackupId:
    in_catalog = parse_catalog_key(key)
    if in_catalog and in_catalog[1] is Beside.MANIFEST:
        return in_catalog[0]
    copy = parse_base_key(key)
    if copy and copy[1] == COPY_NAMES[Beside.MANIFEST]:
        return copy[0]
    raise Unreadable("its key is not one that we give")


def _point_values(point: WalPoint) -> dict[str, object]:
    return {"lsn": str(point.lsn), "timeline": point.timeline}


def _point(fields: Fields) -> WalPoint:
    try:
        return WalPoint(fields.integer("timeline", minimum=1), Lsn.parse(fields.text("lsn")))
    except ConfigError as error:
        raise Unreadable(error.message) from None
