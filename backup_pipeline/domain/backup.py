"""What a backup is: its identity, its manifest, its verdict, its pin, its leases. Pure values.

The JSON forms of these values live in domain/manifest.py, their keys in domain/layout.py, the
reading and writing in storage/catalog.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from backup_pipeline.errors import ConfigError

MANUAL_TIER = "manual"
"""The tier of a backup that a person asked for; it has an expiry instead of a count."""

IMPORTED_PREFIX = "imported-"
"""Begins the random part of an imported dump's stamp; such a dump has no manifest."""

_STAMP = re.compile(r"(?P<time>[0-9]{8}T[0-9]{6}Z)-(?P<suffix>[0-9a-z-]{4,40})")
_STAMP_TIME = "%Y%m%dT%H%M%SZ"
_SUBJECT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def is_subject_name(name: str) -> bool:
    """Whether `name` may name a database, cluster or tier here: it becomes part of keys and tags."""
    return _SUBJECT.fullmatch(name) is not None


def _is_stamp(stamp: str) -> bool:
    if _STAMP.fullmatch(stamp) is None:
        return False
    try:
        _time_of(stamp)
    except ValueError:
        return False
    return True


def _time_of(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp[:15]).replace(tzinfo=UTC)  # strptime is forty times slower


@dataclass(frozen=True, order=True)
class BackupId:
    """One backup: the database it is of, and a stamp `YYYYMMDDTHHMMSSZ-<random>` of its snapshot."""

    database: str
    stamp: str

    def __post_init__(self) -> None:
        if not is_subject_name(self.database) or not _is_stamp(self.stamp):
            raise ConfigError(
                f"not a backup id: {self.database}/{self.stamp}",
                hint="An id looks like app/20260301T020000Z-3f9a1c; `backup-pipeline list` shows them.",
            )

    def __str__(self) -> str:
        return f"{self.database}/{self.stamp}"

    @property
    def imported(self) -> bool:
        """Whether this is a dump of an older layout, which has no manifest."""
        return self.stamp[17:].startswith(IMPORTED_PREFIX)

    @property
    def taken_at(self) -> datetime:
        """The moment of the snapshot, to the second."""
        return _time_of(self.stamp)

    @classmethod
    def make(cls, database: str, taken_at: datetime, suffix: str) -> "BackupId":
        """The id of a backup of `database` whose snapshot was taken at `taken_at`."""
        return cls(database, f"{taken_at.astimezone(UTC).strftime(_STAMP_TIME)}-{suffix}")

    @classmethod
    def parse(cls, text: str) -> "BackupId":
        """Read `database/stamp`. Raises ConfigError for anything else."""
        database, _, stamp = text.partition("/")
        return cls(database, stamp)


class ObjectRole(StrEnum):
    """What one object of a backup is for."""

    DUMP = "dump"  # the one archive of pg_dump -Fc, or one file of -Fd
    GLOBALS = "globals"  # pg_dumpall --globals-only
    FINGERPRINT = "fingerprint"  # domain/proof.py's value as JSON
    BASE = "base"  # of a base backup: the tar of the data directory, compressed
    TABLESPACE = "tablespace"  # the tar of one tablespace, compressed
    FILE_LIST = "file list"  # PostgreSQL's backup_manifest, as it is
    CONFIGURATION = "configuration"  # a file that lies outside of the data directory


@dataclass(frozen=True)
class ObjectDigest:
    """One stored object: its key below the store's prefix, its length, its SHA-256 in hex.

    `name` is the file's name when the backup is laid out on disk (`database.dump`,
    `dump/toc.dat`, `globals.sql`).
    """

    key: str
    name: str
    role: ObjectRole
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class DatabaseProperties:
    """What belongs to a database but to no dump of it: pg_restore into a new one loses all of this."""

    name: str
    owner: str
    encoding: str
    collate: str
    ctype: str
    locale_provider: str  # libc | icu | builtin
    locale: str  # the ICU or builtin locale, "" for libc
    icu_rules: str
    tablespace: str
    connection_limit: int  # -1: none
    allow_connections: bool
    is_template: bool
    comment: str | None
    settings: tuple[tuple[str, str], ...]  # ("" or role, "name=value"), sorted
    grants: tuple[tuple[str, str, str, bool], ...] | None  # (grantor, grantee or "", privilege, grantable)
    # None: the built-in default

    def without_roles(self, owner: str = "") -> "DatabaseProperties":
        """The same for `owner`, without all else that names a role: grants, and settings of single roles."""
        settings = tuple((role, setting) for role, setting in self.settings if not role)
        return replace(self, owner=owner, grants=None, settings=settings)


@dataclass(frozen=True)
class Source:
    """The server and database that a dump was taken from, as far as a restore needs to know."""

    server_version: int  # server_version_num, 170010
    server_version_text: str
    client_version: int
    client_path: str
    system_identifier: str
    database: DatabaseProperties
    size_bytes: int  # pg_database_size at the time
    roles: tuple[str, ...]  # that own or are granted something here
    extensions: tuple[tuple[str, str], ...]  # (name, version)
    tablespaces: tuple[str, ...]  # beyond pg_default
    notes: tuple[str, ...] = ()  # what a restore will not bring, in plain words


@dataclass(frozen=True)
class Manifest:
    """The record of one finished dump: all that a restore needs. Immutable once written."""

    id: BackupId
    tier: str
    scheduled_for: datetime | None
    started_at: datetime
    snapshot_at: datetime
    finished_at: datetime
    expires_at: datetime | None  # manual backups only
    format: str  # "custom" | "directory"
    compression: str  # "zstd:1" | "gzip:1" | ...
    jobs: int
    objects: tuple[ObjectDigest, ...]
    source: Source
    software: str  # of this project, "0.1.0"
    copied_from: BackupId | None = None
    engine: str = "postgresql"

    @property
    def size_bytes(self) -> int:
        """The bytes that this backup takes in the store."""
        return sum(item.size_bytes for item in self.objects)

    @property
    def dump_bytes(self) -> int:
        """The bytes of the dump itself, without what rides along."""
        return sum(item.size_bytes for item in self.objects if item.role is ObjectRole.DUMP)

    @property
    def duration_s(self) -> float:
        """Seconds from the start of the dump to its last object."""
        return (self.finished_at - self.started_at).total_seconds()

    def of_role(self, role: ObjectRole) -> tuple[ObjectDigest, ...]:
        """The objects of one role, in the order of their names."""
        return tuple(sorted((item for item in self.objects if item.role is role), key=lambda item: item.name))


class Verdict(StrEnum):
    """What a proof found. Only PROVEN sets floors for retention."""

    PROVEN = "proven"  # restored, and its content equals the source's snapshot
    RESTORED = "restored"  # restored; counts only, no definitions, or no fingerprint to compare with
    FAILED = "failed"  # did not restore, or restored to something else
    NOT_PROVABLE = "not provable"  # something it needs is missing here
    NONE = "unproven"  # nobody has looked yet


@dataclass(frozen=True)
class Proof:
    """The result of one proof of one backup."""

    verdict: Verdict
    at: datetime
    restore_s: float
    compare_s: float
    checked: tuple[str, ...]  # the checklist, each a sentence of what was found
    differences: tuple[str, ...]  # what was not equal, or what is missing; empty when proven
    notes: tuple[str, ...]  # what cannot be compared, said
    by: str  # "host, version"


@dataclass(frozen=True)
class ProofRecord:
    """What is known of a backup's proofs: the one that stands, and the newest when it is another.

    A proof that looked less closely never replaces one that looked more closely: NOT_PROVABLE says
    nothing of the backup, and RESTORED compared no contents. FAILED always stands until the backup
    is PROVEN, whatever was found in between.
    """

    standing: Proof
    latest: Proof | None = None

    def followed_by(self, proof: Proof, *, comparable: bool = True) -> "ProofRecord":
        """This record after one more proof. Of a backup that has nothing to compare with
        (`comparable` is false) RESTORED is the best there is, and replaces FAILED.
        """
        replaces = {
            Verdict.PROVEN: True,
            Verdict.FAILED: True,
            Verdict.RESTORED: self.standing.verdict not in (Verdict.PROVEN, Verdict.FAILED)
            or (self.standing.verdict is Verdict.FAILED and not comparable),
            Verdict.NOT_PROVABLE: self.standing.verdict in (Verdict.NOT_PROVABLE, Verdict.NONE),
            Verdict.NONE: self.standing.verdict is Verdict.NONE,
        }
        return ProofRecord(proof) if replaces[proof.verdict] else ProofRecord(self.standing, proof)


@dataclass(frozen=True)
class Lease:
    """A running upload's or restore's claim on a backup: prune keeps away until it ends.

    The purpose "prune" is a prune's own: it keeps other prunes away, and shields nothing.
    """

    id: BackupId
    token: str
    purpose: str  # "dump" | "base backup" | "parent" | "restore" | "proof" | "prune" | "unreadable"
    until: datetime


@dataclass(frozen=True)
class Backup:
    """A backup as the catalog knows it: the manifest, and what lies beside it."""

    id: BackupId
    tier: str
    taken_at: datetime
    size_bytes: int
    manifest: Manifest | None  # None: an imported dump of an older layout
    proof: Proof | None = None
    pinned: bool = False
    expires_at: datetime | None = None
    imported_key: str = ""  # where an imported dump lies, below its own store's prefix
    last_attempt: Proof | None = None  # the newest proof, when it is not the one that stands
    unreadable_verdict: str = ""  # why the verdict's file cannot be read; then `proof` is None

    @property
    def verdict(self) -> Verdict:
        """The verdict that stands, or NONE."""
        return self.proof.verdict if self.proof else Verdict.NONE


@dataclass(frozen=True)
class CatalogListing:
    """The backups that exist, newest first, and what lies in the catalog but cannot be read."""

    backups: tuple[Backup, ...]
    unreadable: tuple[tuple[str, str], ...] = ()  # (key, reason)


def newest_first(backups: Iterable[Backup]) -> tuple[Backup, ...]:
    """Ordered by the time in the id, then by the rest of it; never by when an object was written."""
    return tuple(
        sorted(backups, key=lambda item: (item.taken_at, item.id.stamp, item.id.database), reverse=True)
    )
