"""The configuration as frozen values: what backups.toml says, parsed once, then trusted.

`load` finds and reads the file; the shape of the file is in config_file.py. Secrets are named in
the file and read only when an action needs them, so that a machine that may only list needs no
database's password. Times of schedules are UTC.
"""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from backup_pipeline.errors import ConfigError

T = TypeVar("T")

CONFIG_VARIABLE = "BACKUP_PIPELINE_CONFIG"
CONFIG_NAME = "backups.toml"

ARCHIVE_CLASSES = ("GLACIER", "DEEP_ARCHIVE")
"""S3's storage classes whose objects cannot be read until they are thawed, for hours. No store or tier
may have one: a backup is read again when it is taken, copied and proven.
"""


@dataclass(frozen=True)
class Secret:
    """A value that is never shown: given as it is, or named by variable or file and read late."""

    value: str = field(default="", repr=False)
    env: str = ""
    file: str = ""
    key: str = ""  # where it stands: the configuration's file, and the key in it

    @property
    def named(self) -> bool:
        """Whether anything was said of it; with a store alone nothing is."""
        return bool(self.value or self.env or self.file)

    def reveal(self) -> str:
        """The value. Raises ConfigError when its variable is not set or its file not readable."""
        if self.env:
            if self.env not in os.environ:
                raise ConfigError(
                    f"{self.key}: the environment variable {self.env} is not set",
                    hint=f"Set {self.env}, or name another source with {{ env = … }} or {{ file = … }}.",
                )
            return os.environ[self.env]
        if self.file:
            try:
                return Path(self.file).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                raise ConfigError(
                    f"{self.key}: cannot read the secret's file {self.file}: {reason}",
                    hint="The file must be readable by the user that runs backup-pipeline.",
                ) from error
        return self.value


@dataclass(frozen=True)
class StoreConfig:
    """Where backups lie, and how to get there. "" where nothing was said."""

    url: str
    endpoint: str = ""
    region: str = ""
    storage_class: str = ""
    access_key_id: Secret | None = None
    secret_access_key: Secret | None = None
    timeout_s: float = 60.0
    endpoint_from: Secret | None = None  # instead of `endpoint`: read when the store is opened

    def located(self) -> "StoreConfig":
        """The same with `endpoint` read from where it stands. Raises ConfigError when it cannot be."""
        if self.endpoint_from is None:
            return self
        endpoint = self.endpoint_from.reveal()
        if not re.match(r"https?://.", endpoint):
            raise ConfigError(
                f"{self.endpoint_from.key}: found {endpoint!r}, expected an address",
                hint='For example "https://s3.example.net".',
            )
        return replace(self, endpoint=endpoint, endpoint_from=None)


@dataclass(frozen=True)
class TierConfig:
    """When a dump is taken (cron, UTC) and how many are kept."""

    name: str
    cron: str
    keep: int
    storage_class: str = ""


DEFAULT_TIERS = (
    TierConfig("daily", "0 2 * * *", 7),
    TierConfig("weekly", "0 2 * * 0", 4),
    TierConfig("monthly", "0 2 1 * *", 12),
)


@dataclass(frozen=True)
class ProvePolicy:
    """Which dumps are proven right away, and when the newest one is proven besides."""

    always: bool = True
    up_to_bytes: int | None = None  # of the source database; None: whatever its size
    cron: str = ""

    def at_once(self, source_bytes: int) -> bool:
        """Whether a dump of a database of this size is proven right after it was taken."""
        return self.always and (self.up_to_bytes is None or source_bytes <= self.up_to_bytes)


@dataclass(frozen=True)
class DatabaseConfig:
    """One database to protect."""

    name: str
    dsn: Secret
    password: Secret | None = None
    restore_dsn: Secret | None = None
    restore_password: Secret | None = None
    critical_tables: tuple[str, ...] = ()
    jobs: int = 1
    proof: str = "content"  # "content" | "counts"
    prove: ProvePolicy = ProvePolicy()
    import_from: str = ""
    tiers: tuple[TierConfig, ...] = DEFAULT_TIERS
    engine: str = "postgresql"
    bin_dir: str = ""
    owner: str = ""
    lock_timeout: timedelta = timedelta(seconds=60)
    stall_timeout: timedelta = timedelta(minutes=15)
    manual_keep: timedelta = timedelta(days=14)
    role_passwords: bool = False
    fingerprint_connections: int = 1

    def tier(self, name: str) -> TierConfig:
        """The tier of this name. Raises ConfigError naming those that exist."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        known = ", ".join(tier.name for tier in self.tiers)
        raise ConfigError(
            f"database {self.name} has no tier {name}",
            hint=f"Its tiers are {known}; without one the backup is manual.",
        )


@dataclass(frozen=True)
class ScratchConfig:
    """Where proofs restore to. Nothing said: a local cluster of our own."""

    dsn: Secret | None = None
    password: Secret | None = None
    bin_dir: str = ""


@dataclass(frozen=True)
class ReceiveConfig:
    """A cluster's WAL is read through a replication slot."""

    slot: str
    ship_every: timedelta = timedelta(seconds=5)  # for a segment that is being written


@dataclass(frozen=True)
class ClusterConfig:
    """One cluster under continuous protection: its WAL, its base backups, and its recovery window."""

    name: str
    dsn: Secret
    password: Secret | None = None
    data_directory: str = ""  # where PostgreSQL's files are, on the machine that the agent runs on
    recovery_window: timedelta = timedelta(hours=24)
    base_backup_cron: str = "0 2 * * *"
    incremental_cron: str = ""  # when an incremental one is taken; "": never
    receive: ReceiveConfig | None = None  # None: PostgreSQL hands its WAL to archive_command
    archive_timeout: timedelta = timedelta(seconds=60)
    push_timeout: timedelta = timedelta(seconds=90)  # for one file, before archive_command gives up
    socket: str = ""  # of the agent; "": /run/backup_pipeline/<name>.sock
    checkpoint: str = "spread"  # "spread" | "fast": how a base backup begins
    max_rate_bytes_s: int | None = None  # of a base backup; None: as fast as it comes
    bin_dir: str = ""
    owner: str = ""
    stall_timeout: timedelta = timedelta(minutes=15)
    drill_cron: str = "30 4 * * *"  # when a random second is recovered into scratch; "": never
    heartbeat: bool = False  # a row each minute, by which drills tell how far a recovery came
    heartbeat_database: str = ""  # "": the dsn's

    @property
    def agent_socket(self) -> str:
        """Where the agent listens."""
        return self.socket or f"/run/backup_pipeline/{self.name}.sock"


@dataclass(frozen=True)
class Config:
    """The whole configuration; `path` is where it was read from."""

    path: Path
    store: StoreConfig
    databases: Mapping[str, DatabaseConfig] = field(default_factory=dict)
    scratch: ScratchConfig = ScratchConfig()
    clusters: Mapping[str, ClusterConfig] = field(default_factory=dict)

    def cluster(self, name: str) -> ClusterConfig:
        """The cluster of this name. Raises ConfigError naming the nearest one."""
        return self._named(name, self.clusters, "cluster")

    def any_database(self) -> None:
        """Raise ConfigError when none is configured."""
        if not self.databases:
            raise ConfigError(
                f"{self.path}: no database is configured", hint="Add one as [databases.<name>] with its dsn."
            )

    def database(self, name: str) -> DatabaseConfig:
        """The database of this name. Raises ConfigError naming the nearest one."""
        return self._named(name, self.databases, "database")

    def _named(self, name: str, known: Mapping[str, T], what: str) -> T:
        if name in known:
            return known[name]
        from backup_pipeline.config_file import nearest

        other, others = ("cluster", self.clusters) if what == "database" else ("database", self.databases)
        found = f"{name} is a {other}, and this wants a {what}" if name in others else ""
        raise ConfigError(
            f"{self.path}: {found or f'no {what} {name} is configured'}",
            hint=nearest(name, list(known)) or f"Add it as [{what}s.<name>].",
        )


def find(explicit: str | None = None) -> Path:
    """The configuration's file: `explicit`, else $BACKUP_PIPELINE_CONFIG, else ./backups.toml.

    Raises ConfigError when there is none.
    """
    named = explicit or os.environ.get(CONFIG_VARIABLE) or CONFIG_NAME
    path = Path(named)
    try:
        found = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        found = False
    except OSError as error:
        raise ConfigError(
            f"{path.absolute()}: cannot be read: {error.strerror}",
            hint="The user that runs backup-pipeline must be able to read it, and to enter its folder.",
        ) from error
    if not found:
        raise ConfigError(
            f"no configuration at {path.absolute()}",
            hint=f"Name it with --config or {CONFIG_VARIABLE}, or write one with `backup-pipeline init`.",
        )
    return path.absolute()


def load(explicit: str | None = None) -> Config:
    """Find, read and check the configuration. No secret is read. Raises ConfigError."""
    from backup_pipeline.config_file import parse

    path = find(explicit)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse(text, path)
