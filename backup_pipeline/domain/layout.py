"""Object keys, both ways. The only place that knows where in the store a thing lies.

Names that people chose (of PostgreSQL's databases, tables, roles) never become part of a key;
the names of databases and tiers in the configuration do, and are checked before (is_subject_name).
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from backup_pipeline.domain.backup import BackupId, is_subject_name
from backup_pipeline.domain.wal import WalKind, WalName, parse_wal_name
from backup_pipeline.errors import ConfigError

CATALOG = "catalog/"
DATA = "databases/"
CLUSTERS = "clusters/"
LEASES = "leases/"
SCRATCH = "probe/"
INDEX = "catalog.index.json.gz"


class Beside(StrEnum):
    """What lies in the catalog under a backup's stamp, by the end of its key."""

    MANIFEST = ".json"
    VERDICT = ".verdict.json"
    PIN = ".pin"


_CATALOG_KEY = re.compile(
    r"catalog/(?P<database>[^/]+)/(?P<stamp>[^/.]+)(?P<beside>\.json|\.verdict\.json|\.pin)"
)
_DATA_KEY = re.compile(r"databases/(?P<database>[^/]+)/dumps/(?P<tier>[^/]+)/(?P<stamp>[^/]+)/(?P<name>.+)")
_CLOCK_KEY = re.compile(r"leases/[^/]+/clock\.[0-9a-f]+")
_LEASE_KEY = re.compile(r"leases/(?P<database>[^/]+)/(?P<stamp>[^/.]+)\.(?P<token>[0-9a-f]+)\.json")


def catalog_key(backup: BackupId, beside: Beside = Beside.MANIFEST) -> str:
    """The key of a backup's manifest, verdict or pin."""
    return f"{CATALOG}{backup.database}/{backup.stamp}{beside}"


def catalog_prefix(database: str) -> str:
    """What the catalog keys of one database begin with; of all databases for an empty name."""
    return f"{CATALOG}{database}/" if database else CATALOG


def parse_catalog_key(key: str) -> tuple[BackupId, Beside] | None:
    """Whose, and what, a catalog key is; None for a key that we did not make."""
    match = _CATALOG_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return BackupId(match["database"], match["stamp"]), Beside(match["beside"])
    except ConfigError:
        return None


def data_prefix(backup: BackupId, tier: str) -> str:
    """What the keys of a backup's objects begin with."""
    return f"{DATA}{backup.database}/dumps/{tier}/{backup.stamp}/"


COPY_NAMES = {Beside.MANIFEST: "manifest.json", Beside.VERDICT: "verdict.json", Beside.PIN: "pin"}
"""How the copies of what lies in the catalog are called beside the objects; no object has such a name."""


def copy_key(backup: BackupId, tier: str, beside: Beside) -> str:
    """The copy, beside the objects, of a manifest, verdict or pin: a lost catalog is rebuilt from them."""
    return data_prefix(backup, tier) + COPY_NAMES[beside]


def parse_data_key(key: str) -> tuple[BackupId, str, str] | None:
    """(backup, tier, name) of an object's key; None for a key that we did not make."""
    match = _DATA_KEY.fullmatch(key)
    if match is None or not is_subject_name(match["tier"]):
        return None
    try:
        return BackupId(match["database"], match["stamp"]), match["tier"], match["name"]
    except ConfigError:
        return None


def lease_key(backup: BackupId, token: str) -> str:
    """The key of one lease."""
    return f"{LEASES}{backup.database}/{backup.stamp}.{token}.json"


def lease_prefix(database: str) -> str:
    """What the lease keys of one database begin with."""
    return f"{LEASES}{database}/"


def clock_key(database: str, token: str) -> str:
    """What a prune writes to see the store's clock; no lease has such a key."""
    return f"{lease_prefix(database)}clock.{token}"


def parse_clock_key(key: str) -> bool:
    """Whether a key is one that `clock_key` made."""
    return _CLOCK_KEY.fullmatch(key) is not None


def parse_lease_key(key: str) -> tuple[BackupId, str] | None:
    """(backup, token) of a lease's key; None for a key that we did not make."""
    match = _LEASE_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return BackupId(match["database"], match["stamp"]), match["token"]
    except ConfigError:
        return None


_BASE_KEY = re.compile(r"clusters/(?P<cluster>[^/]+)/base/(?P<stamp>[^/]+)/(?P<name>.+)")
_WAL_KEY = re.compile(
    r"clusters/(?P<cluster>[^/]+)/wal-archive/(?P<system>[0-9]{1,20})/"
    r"(?:(?P<history>[0-9A-F]{8}\.history)|(?P<timeline>[0-9A-F]{8})/(?P<log>[0-9A-F]{16})/"
    r"(?P<name>[0-9A-F]{24}[^-/]*)-(?P<sha256>[0-9a-f]{64})\.zst)"
)


def bases_prefix(cluster: str) -> str:
    """What the keys of all of a cluster's base backups begin with."""
    return f"{CLUSTERS}{cluster}/base/"


def base_prefix(backup: BackupId) -> str:
    """What the keys of a base backup's objects begin with; the id's database is the cluster's name."""
    return f"{bases_prefix(backup.database)}{backup.stamp}/"


def base_copy_key(backup: BackupId, beside: Beside) -> str:
    """The copy, beside the objects, of a base backup's record or verdict."""
    return base_prefix(backup) + COPY_NAMES[beside]


def base_waiting_key(backup: BackupId) -> str:
    """What is said beside the objects of a base backup that waits for its WAL."""
    return f"{base_prefix(backup)}waiting.json"


def recoveries_prefix(cluster: str) -> str:
    """What the keys of the figures of a cluster's recoveries begin with."""
    return f"{CLUSTERS}{cluster}/recoveries/"


def recovery_key(cluster: str, stamp: str) -> str:
    """The key of the figures of one finished recovery."""
    return f"{recoveries_prefix(cluster)}{stamp}.json"


def parse_base_key(key: str) -> tuple[BackupId, str] | None:
    """(backup, name) of an object of a base backup; None for a key that we did not make."""
    match = _BASE_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return BackupId(match["cluster"], match["stamp"]), match["name"]
    except ConfigError:
        return None


_DRILL_KEY = re.compile(r"clusters/(?P<cluster>[^/]+)/drills/(?P<stamp>[^/.]+)\.json")


def drills_prefix(cluster: str) -> str:
    """What the keys of all records of a cluster's drills begin with."""
    return f"{CLUSTERS}{cluster}/drills/"


def drill_key(drill: BackupId) -> str:
    """The key of the record of one drill; the id's database is the cluster's name."""
    return f"{drills_prefix(drill.database)}{drill.stamp}.json"


def parse_drill_key(key: str) -> BackupId | None:
    """Which drill's record a key is of; None for a key that we did not make."""
    match = _DRILL_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return BackupId(match["cluster"], match["stamp"])
    except ConfigError:
        return None


@dataclass(frozen=True)
class ArchivedWal:
    """What the key of an object in a WAL archive says. `sha256` is of the plain bytes; "" of a history."""

    cluster: str
    system_identifier: str
    name: WalName
    sha256: str


def wal_archive_prefix(cluster: str) -> str:
    """What all keys of a cluster's WAL archive begin with."""
    return f"{CLUSTERS}{cluster}/wal-archive/"


def wal_identity_key(cluster: str) -> str:
    """The record of the one cluster that may archive here."""
    return f"{wal_archive_prefix(cluster)}identity.json"


def wal_slot_key(cluster: str, slot: str) -> str:
    """What a receiver says of the replication slot that it made."""
    return f"{wal_archive_prefix(cluster)}slot-{slot}.txt"


def wal_system_prefix(cluster: str, system_identifier: str) -> str:
    """What the keys of one system's WAL begin with: histories, and segments of all timelines."""
    return f"{wal_archive_prefix(cluster)}{system_identifier}/"


def wal_timeline_prefix(cluster: str, system_identifier: str, timeline: int) -> str:
    """What the keys of one timeline's segments begin with."""
    return f"{wal_system_prefix(cluster, system_identifier)}{timeline:08X}/"


def wal_key(cluster: str, system_identifier: str, name: WalName, sha256: str) -> str:
    """The key of an archived file. A segment's holds the digest of its plain bytes: other bytes under one
    name never overwrite it, whatever a server does with conditions.
    """
    if name.kind is WalKind.HISTORY:
        return f"{wal_system_prefix(cluster, system_identifier)}{name.text}"
    return f"{wal_name_prefix(cluster, system_identifier, name)}{sha256}.zst"


def wal_name_prefix(cluster: str, system_identifier: str, name: WalName) -> str:
    """What the keys of all objects of this name begin with: there should be one at most."""
    if name.kind is WalKind.HISTORY:
        return f"{wal_system_prefix(cluster, system_identifier)}{name.text}"
    return f"{wal_timeline_prefix(cluster, system_identifier, name.timeline)}{name.text[:16]}/{name.text}-"


def parse_wal_key(key: str) -> ArchivedWal | None:
    """What an archive's key says; None for a key that we did not make."""
    match = _WAL_KEY.fullmatch(key)
    if match is None or not is_subject_name(match["cluster"]):
        return None
    try:
        name = parse_wal_name(match["history"] or match["name"])
    except ConfigError:
        return None
    found = ArchivedWal(match["cluster"], match["system"], name, match["sha256"] or "")
    return found if wal_key(found.cluster, found.system_identifier, name, found.sha256) == key else None
