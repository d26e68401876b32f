"""The tables of backups.toml, key by key, and what a value of each may be. Called by config_file.py.

Nothing else of the program sees them: they become the frozen values of config.py.
"""

import re
from datetime import timedelta
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from backup_pipeline.config import ARCHIVE_CLASSES
from backup_pipeline.domain.cron import canonical
from backup_pipeline.units import parse_duration, parse_size_bytes

_LONGEST = timedelta(days=5000)


def _cron(text: str) -> str:
    return canonical(text)


def _owner(text: str) -> str:
    if "@" in text and not text.startswith("team:"):
        known = bool(re.fullmatch(r"\w[\w.%+-]*@[A-Za-z0-9.-]+\.[A-Za-z]{2,7}", text, re.ASCII))
    else:
        known = not text or bool(text.removeprefix("team:").strip())
    if not known:
        raise ValueError(f'found "{text}", expected an address such as "ops@example.net", or "team:platform"')
    return text


def _size(text: str) -> str:
    parse_size_bytes(text)
    return text


def _duration(text: str) -> str:
    if not timedelta(milliseconds=1) <= parse_duration(text) <= _LONGEST:
        raise ValueError(f'found "{text}", expected a duration from "1ms" to "5000d"')
    return text


def _a_second(text: str) -> str:
    if parse_duration(text) < timedelta(seconds=1):
        raise ValueError(f'found "{text}", expected a duration of "1s" or longer')
    return text


def _an_hour(text: str) -> str:
    if parse_duration(text) < timedelta(hours=1):
        raise ValueError(f'found "{text}", expected a duration of "1h" or longer: manual backups expire then')
    return text


def _store_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme == "s3" and "@" not in parts.netloc and not parts.query:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", parts.netloc):
            raise ValueError(
                f'found the bucket "{parts.netloc}", expected two letters or more: "s3://bucket/prefix"'
            )
        if "//" in parts.path.rstrip("/"):
            raise ValueError(f'found "{text}", expected a prefix without empty parts')
        return text.rstrip("/")
    if parts.scheme == "file" and not parts.netloc and parts.path.strip("/"):
        return text.rstrip("/")
    raise ValueError('expected "s3://bucket/prefix" or "file:///folder", without keys in it')


def _endpoint_url(text: str) -> str:
    if text and not re.match(r"https?://.", text):
        raise ValueError(f'found "{text}", expected "https://…"')
    return text


def _storage_class(text: str) -> str:
    if text.upper() in ARCHIVE_CLASSES:
        raise ValueError(f'found "{text}", expected a class that is read at once')
    return text


def _dsn(text: str) -> str:
    keys = {key.lower() for key in re.findall(r"(\w+)\s*=", unquote(text))}
    if re.search(r"://[^/@]*:[^/@]+@", text) or any(key.endswith("password") for key in keys):
        raise ValueError(
            'it holds a password; move it to `password = { env = "…" }` or use libpq\'s passfile'
        )
    if any(re.fullmatch(r"scram_\w+_key|oauth_client_secret", key) for key in keys):
        raise ValueError("it holds a secret; move it to a service file, which only its owner may read")
    if not re.match(r"postgres(ql)?://|\w+\s*=", text):
        raise ValueError('expected "postgresql://user@host/database" or "host=… dbname=…"')
    return text


Cron = Annotated[str, AfterValidator(_cron)]
Owner = Annotated[str, AfterValidator(_owner)]
Size = Annotated[str, AfterValidator(_size)]
Duration = Annotated[str, AfterValidator(_duration)]
StoreUrl = Annotated[str, AfterValidator(_store_url)]
EndpointUrl = Annotated[str, AfterValidator(_endpoint_url)]
StorageClass = Annotated[str, AfterValidator(_storage_class)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class FromEnv(Table):
    env: str = Field(min_length=1)


class FromFile(Table):
    file: str = Field(min_length=1)


Source = FromEnv | FromFile
Dsn = Annotated[str, AfterValidator(_dsn)] | FromEnv | FromFile


class StoreTable(Table):
    url: StoreUrl
    endpoint: EndpointUrl | FromEnv | FromFile = ""
    region: str = ""
    storage_class: StorageClass = ""
    access_key_id: Source | None = None
    secret_access_key: Source | None = None
    timeout: Duration = "60s"


class TierTable(Table):
    cron: Cron
    keep: int = Field(ge=1)
    storage_class: StorageClass = ""


class UpToTable(Table):
    up_to: Size
    cron: Cron


class DefaultsTable(Table):
    """Any key of a database; all of them may be left out here."""

    engine: Literal["postgresql"] = "postgresql"
    dsn: Dsn | None = None
    password: Source | None = None
    restore_dsn: Dsn | None = None
    restore_password: Source | None = None
    critical_tables: list[str] = []
    jobs: int = Field(default=1, ge=1, le=64)
    proof: Literal["content", "counts"] = "content"
    prove: Literal["always"] | Cron | UpToTable = "always"
    import_from: StoreUrl | Literal[""] = ""
    tiers: dict[str, TierTable] = {}
    bin_dir: str = ""
    owner: Owner = ""
    lock_timeout: Duration = "60s"
    stall_timeout: Annotated[Duration, AfterValidator(_a_second)] = "15m"
    manual_keep: Annotated[Duration, AfterValidator(_an_hour)] = "14d"
    role_passwords: bool = False
    fingerprint_connections: int = Field(default=1, ge=1, le=16)


class DatabaseTable(DefaultsTable):
    dsn: Dsn


class BaseBackupTable(Table):
    cron: Cron = "0 2 * * *"
    incremental: Cron | Literal[""] = ""
    checkpoint: Literal["spread", "fast"] = "spread"
    max_rate: Size | Literal[""] = ""


class ReceiveTable(Table):
    slot: Annotated[str, Field(pattern=r"^([a-z0-9_]{1,63})?$")] = ""
    ship_every: Duration = "5s"


class ClusterTable(Table):
    dsn: Dsn
    password: Source | None = None
    data_directory: str = ""
    recovery_window: Duration = "24h"
    base_backup: BaseBackupTable = BaseBackupTable()
    receive: ReceiveTable | None = None
    archive_timeout: Duration = "60s"
    push_timeout: Duration = "90s"
    socket: str = ""
    bin_dir: str = ""
    owner: str = ""
    stall_timeout: Duration = "15m"
    drill: Cron | Literal[""] = "30 4 * * *"
    heartbeat: bool = False
    heartbeat_database: str = ""


class ScratchTable(Table):
    dsn: Dsn | None = None
    password: Source | None = None
    bin_dir: str = ""


class FileTable(Table):
    store: StoreTable
    databases: dict[str, DatabaseTable] = {}
    clusters: dict[str, ClusterTable] = {}
    defaults: DefaultsTable = DefaultsTable()
    scratch: ScratchTable = ScratchTable()
