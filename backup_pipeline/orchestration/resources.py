"""What ops are given: the configuration's path, and nothing secret. No decision, no connection.

Resources hold what run configuration may show to anybody who opens the UI. The file behind the path
is read anew in each run, and the secrets that it names only when an action needs them.
"""

from datetime import UTC, datetime
from typing import Any

import dagster as dg

from backup_pipeline.actions.protected import Protected, open_protected
from backup_pipeline.actions.protected_cluster import ProtectedCluster, open_cluster
from backup_pipeline.config import Config, load


def now() -> datetime:
    """The time, in UTC: the one clock that actions are given from here."""
    return datetime.now(UTC)


class Backups(dg.ConfigurableResource[Any]):
    """The configuration that all databases, clusters and the store are described in."""

    path: str

    def config(self) -> Config:
        """The configuration as the file says it now. Raises ConfigError."""
        return load(self.path)

    def open(self, database: str) -> Protected:
        """One database with its stores opened. Raises ConfigError, StoreError."""
        return open_protected(self.config(), database)

    def cluster(self, name: str) -> ProtectedCluster:
        """One cluster with its store opened. Raises ConfigError, StoreError."""
        return open_cluster(self.config(), name)


class HandOver(dg.IOManager):
    """Hands small records from op to op within one process; keeps nothing, writes nothing.

    Plans may know servers and passwords' places, so they do not go to a disk.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Any, ...], object] = {}

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Keep the value for the ops that follow in this run."""
        self._values[tuple(context.get_identifier())] = obj

    def load_input(self, context: dg.InputContext) -> object:
        """The value that an earlier op of this run handed on."""
        upstream = context.upstream_output
        key = tuple(upstream.get_identifier()) if upstream else ()
        if key not in self._values:
            raise dg.Failure(
                "the steps before this one ran in another process, and what they found is gone\n"
                "What to do: launch the whole run again with “Re-execute all”.",
                allow_retries=False,
            )
        return self._values[key]
