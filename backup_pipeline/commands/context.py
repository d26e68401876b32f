"""What every command is given: the options before it, and the configuration, read when first needed.

Called by cli.py and the modules of commands beside this one. What a command does does not belong here.
"""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import click

from backup_pipeline.actions.protected import Protected, open_protected
from backup_pipeline.actions.protected_cluster import ProtectedCluster, open_cluster
from backup_pipeline.config import ClusterConfig, Config, DatabaseConfig, Secret, StoreConfig, load
from backup_pipeline.errors import ConfigError
from backup_pipeline.storage.store import Store, open_store


def now() -> datetime:
    """The time, in UTC: the one clock that actions are given from here."""
    return datetime.now(UTC)


class Context:
    """What the options before the command said; the configuration is read when first needed."""

    def __init__(self, path: str | None, store: StoreConfig | None, quiet: bool) -> None:
        self._path = path
        self._alone = store
        self.quiet = quiet
        self._config: Config | None = None

    @property
    def program(self) -> tuple[str, ...]:
        """What begins a command line that works with the same configuration or store."""
        path, store = self._path, self._alone
        given = {"--config": None if store else path, "--store": store and store.url}
        given |= {"--endpoint": store and store.endpoint, "--region": store and store.region}
        return ("backup-pipeline", *(word for item in given.items() if item[1] for word in map(str, item)))

    @property
    def alone(self) -> bool:
        """Whether there is only a store, and no configuration."""
        return self._alone is not None

    @property
    def config(self) -> Config:
        """The configuration; with --store, one that knows nothing but the store."""
        if self._config is None:
            self._config = Config(Path("--store"), self._alone) if self._alone else load(self._path)
        return self._config

    def store(self) -> Store:
        """The store, opened and reached."""
        return open_store(self.config.store)

    def protected(self, name: str) -> Protected:
        """The database `name` with its stores opened; with --store, known by its backups alone."""
        config = self.config
        if self._alone:
            nameless = DatabaseConfig(name, Secret(key=f"databases.{name}.dsn"))
            config = dataclasses.replace(config, databases={name: nameless})
        return open_protected(config, name)

    def cluster(self, name: str) -> ProtectedCluster:
        """The cluster `name` with its store opened; with --store, known by what lies there alone."""
        if self._alone:
            return ProtectedCluster(ClusterConfig(name, Secret(key=f"clusters.{name}.dsn")), self.store())
        return open_cluster(self.config, name)

    def configured(self, name: str | None) -> list[str]:
        """`name`, or all databases, of the configuration.

        Raises ConfigError where there is only a store, or no database.
        """
        self.refuse_alone()
        self.config.any_database()
        return [name] if name else list(self.config.databases)

    def refuse_alone(self) -> None:
        """Raise ConfigError where there is only a store."""
        if self._alone:
            raise ConfigError(
                "this needs the configuration, and --store does without",
                hint="A store does not know where a database is, nor how many of its backups are to be kept; "
                "name the configuration with --config.",
            )

    def subjects(self, name: str | None) -> list[str]:
        """`name`, or all databases and clusters, of the configuration. Raises ConfigError."""
        if self._alone or not self.config.clusters:
            return self.configured(name)
        known = [*self.config.databases, *self.config.clusters]
        if name and name not in known:
            raise ConfigError(
                f"no database or cluster {name} is configured", hint=f"Known here: {', '.join(known)}."
            )
        return [name] if name else known

    def owner_of(self, text: str) -> Protected:
        """The database that a backup's id names: `database/stamp`, or the beginning of one."""
        database, slash, _ = text.partition("/")
        if not slash:
            raise ConfigError(
                f"not a backup id: {text}",
                hint="Write it with its database, as `backup-pipeline list` does: agentweave/20260301T02",
            )
        return self.protected(database)


pass_context = click.make_pass_decorator(Context)
json_option = click.option("--json", "as_json", is_flag=True, help="The result as JSON, for scripts.")
