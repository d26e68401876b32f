"""One configured database with its store opened: what every action is given.

Made by cli.py and orchestration/ from the configuration; holds no connection and no decision.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from typing import Protocol

from backup_pipeline.config import Config, DatabaseConfig, ScratchConfig, Secret, StoreConfig
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import resolved
from backup_pipeline.errors import ConfigError
from backup_pipeline.storage.store import Store, open_store

NO_SCRATCH = ScratchConfig()


class Clock(Protocol):
    """Tells the time in UTC; handed in, so that tests fix it."""

    def __call__(self) -> datetime: ...


@dataclass(frozen=True)
class Protected:
    """A database under protection."""

    config: DatabaseConfig
    store: Store
    open_imports: Callable[[], Store] | None = None  # where dumps of an older layout lie, if there are any
    scratch: ScratchConfig = NO_SCRATCH

    @property
    def name(self) -> str:
        """The database's name in the configuration."""
        return self.config.name

    @cached_property
    def imports(self) -> Store | None:
        """The store of the older layout, opened when it is first asked for. Raises StoreError."""
        return self.open_imports() if self.open_imports else None

    def source(self) -> Endpoint:
        """Where dumps are taken from. Raises ConfigError when a secret cannot be read."""
        return _endpoint(self.config.dsn, self.config.password)

    def target(self) -> Endpoint:
        """The server that restores go to, unless another is named. Raises ConfigError."""
        if self.config.restore_dsn is None:
            raise ConfigError(
                f"databases.{self.name}.restore_dsn is missing",
                hint="Name a role that may create and rename databases, or give the server with --to.",
            )
        return _endpoint(self.config.restore_dsn, self.config.restore_password)

    def scratch_server(self) -> Endpoint | None:
        """The server that proofs restore to; None for a cluster of our own. Raises ConfigError."""
        return _endpoint(self.scratch.dsn, self.scratch.password) if self.scratch.dsn is not None else None

    def check_scratch_secrets(self) -> None:
        """Raise ConfigError when one of them cannot be read: before a dump takes an hour, not after."""
        for secret in (self.scratch.dsn, self.scratch.password):
            if secret is not None:
                secret.reveal()


def _endpoint(dsn: Secret, password: Secret | None) -> Endpoint:
    return resolved(Endpoint(dsn.reveal(), password))


def open_protected(config: Config, name: str) -> Protected:
    """The database `name` of the configuration, its store opened and reached.

    Raises ConfigError, StoreError.
    """
    database = config.database(name)
    return Protected(
        config=database,
        store=open_store(config.store),
        open_imports=partial(open_store, imports_config(config.store, database))
        if database.import_from
        else None,
        scratch=config.scratch,
    )


def imports_config(store: StoreConfig, database: DatabaseConfig) -> StoreConfig:
    """Where dumps of an older layout lie: reached as the store is."""
    return replace(store, url=database.import_from)
