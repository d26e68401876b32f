"""One configured cluster with its store opened: what every action on a whole cluster is given.

Made by cli.py and orchestration/ from the configuration; holds no connection and no decision.
"""

from dataclasses import dataclass

from backup_pipeline.config import ClusterConfig, Config
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import resolved
from backup_pipeline.storage.store import Store, open_store


@dataclass(frozen=True)
class ProtectedCluster:
    """A cluster under continuous protection."""

    config: ClusterConfig
    store: Store

    @property
    def name(self) -> str:
        """The cluster's name in the configuration."""
        return self.config.name

    @property
    def given(self) -> Endpoint:
        """Where the cluster is, as it is configured. Raises ConfigError when a secret cannot be read."""
        return Endpoint(self.config.dsn.reveal(), self.config.password)

    def source(self) -> Endpoint:
        """Where base backups are taken from; a server that a service file names is asked what it is.

        Raises ConfigError when a secret cannot be read, ServerError.
        """
        return resolved(self.given)


def open_cluster(config: Config, name: str) -> ProtectedCluster:
    """The cluster `name` of the configuration, its store opened and reached.

    Raises ConfigError, StoreError.
    """
    return ProtectedCluster(config.cluster(name), open_store(config.store))
