"""How a cluster's WAL stands: what its server says, if it can be asked, and what can be recovered.

Called by `wal status` and by Dagster's asset of a cluster's WAL. What is wrong is judged in wal/status.py and
windows.py.
"""

import contextlib
from dataclasses import dataclass
from datetime import datetime

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.windows import ClusterWindows, windows_of
from backup_pipeline.engines.postgres import slots
from backup_pipeline.engines.postgres.archiving import read_archiver, read_archiving
from backup_pipeline.engines.postgres.server import connect, read_server_info, server_errors
from backup_pipeline.errors import ConfigError, ServerError
from backup_pipeline.wal.status import AgentStatus, WalStatus, look

ELSEWHERE = AgentStatus(True, "it runs beside PostgreSQL, and was not asked from here")
"""For who looks from another machine: an agent answers on its own alone."""

_STATEMENT_S = 20.0


@dataclass(frozen=True)
class WalLook:
    """What can be recovered, and how archiving stands; `unasked` says why the server could not be asked."""

    windows: ClusterWindows
    status: WalStatus | None
    unasked: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The WAL that is missing, or has two versions; without what PostgreSQL has yet to hand over."""
        if self.status is None or self.status.archive is None:
            return tuple(gap.names(self.windows.segment_bytes) for gap in self.windows.found.gaps)
        archive = self.status.archive
        twice = (f"{name}, of which there are two versions" for name in archive.conflicts)
        return (*(gap.names(archive.segment_bytes) for gap in self.status.gaps), *twice)

    @property
    def newest_age_s(self) -> float | None:
        """How long ago the newest segment was archived; None before the first."""
        newest_at = self.windows.newest_at
        return max(0.0, (self.windows.at - newest_at).total_seconds()) if newest_at else None

    @property
    def lag_s(self) -> float | None:
        """What would be lost with the server now, in seconds; if it cannot be asked, the most that may be.

        None before the first segment was archived.
        """
        return self.status.lag_s if self.status is not None else self.newest_age_s


def look_at(cluster: ProtectedCluster, *, now: datetime) -> WalLook:
    """Ask the server, if it answers, then read the archive. Raises StoreError, Corrupt."""
    status, unasked = None, ""
    try:
        status = wal_status(cluster, agent=ELSEWHERE, at=now)
    except (ServerError, ConfigError) as error:
        unasked = error.message
    return WalLook(windows_of(cluster, now=now), status, unasked)


def wal_status(cluster: ProtectedCluster, *, agent: AgentStatus, at: datetime) -> WalStatus:
    """Ask the server how it archives, then look into the archive.

    Raises ConfigError, ServerError where the server cannot be asked; StoreError, Corrupt, Refused.
    """
    source = cluster.source()
    with (
        contextlib.closing(
            connect(source, purpose="wal status", statement_timeout_s=_STATEMENT_S)
        ) as session,
        server_errors(source, "wal status failed"),
    ):
        server, archiving = read_server_info(session), read_archiving(session)
        archiver = read_archiver(session)
        received = cluster.config.receive
        slot = slots.look_at(session, received.slot) if received else None
    return look(cluster.store, cluster.config, server, archiving, archiver, agent=agent, at=at, slot=slot)
