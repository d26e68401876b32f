"""Object keys, both ways. The only place that knows where in the store a thing lies.

Names that people chose (of PostgreSQL's databases, tables, roles) never become part of a key;
the names of databases and tiers in the configuration do, and are checked before (is_subject_name).
"""

import re
from enum import StrEnum

from backup_pipeline.domain.backup import BackupId, is_subject_name
from backup_pipeline.errors import ConfigError

CATALOG = "catalog/"
DATA = "databases/"
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


def parse_lease_key(key: str) -> tuple[BackupId, str] | None:
    """(backup, token) of a lease's key; None for a key that we did not make."""
    match = _LEASE_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return BackupId(match["database"], match["stamp"]), match["token"]
    except ConfigError:
        return None
