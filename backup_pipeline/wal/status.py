"""How a cluster's WAL archiving stands: agent, archiver, archive, and how far behind it is.

Read for `wal status`; decides nothing, and changes nothing.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from backup_pipeline.config import ClusterConfig
from backup_pipeline.domain.wal_archive import ArchivedSegment, ArchiveListing
from backup_pipeline.engines.postgres.archiving import ArchiverCounts
from backup_pipeline.errors import ConfigError
from backup_pipeline.wal.protocol import MAX_LINE_BYTES, VERSION, Request, read_answer, request_line

_AGENT_WITHIN_S = 5.0


@dataclass(frozen=True)
class AgentStatus:
    """Whether an agent answers; `said` says why not. `told` is what it tells of itself."""

    answers: bool
    said: str = ""
    told: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class WalStatus:
    """All of it, at one moment."""

    cluster: str
    at: datetime
    agent: AgentStatus
    archiver: ArchiverCounts
    archive: ArchiveListing | None  # None: nothing was archived yet

    @property
    def newest(self) -> ArchivedSegment | None:
        """The newest segment of the server's timeline that is in the archive."""
        return self.archive.newest(self.archiver.timeline) if self.archive else None

    @property
    def lag_bytes(self) -> int | None:
        """How much WAL was written behind the newest archived segment; None before the first."""
        if self.archive is None or self.newest is None:
            return None
        end = self.newest.segment.end(self.archive.segment_bytes)
        return max(0, self.archiver.lsn.value - end.value)

    @property
    def lag_s(self) -> float | None:
        """How old what is archived is; 0 when nothing was written since, None before the first."""
        if self.newest is None:
            return None
        return max(0.0, (self.at - self.newest.archived_at).total_seconds()) if self.lag_bytes else 0.0

    @property
    def problems(self) -> tuple[str, ...]:
        """What somebody has to look at, a line each."""
        found: list[str] = []
        if not self.agent.answers:
            found.append(f"no agent: {self.agent.said}")
        if self.archiver.is_failing:
            found.append(f"the archiver fails at {self.archiver.last_failed}")
        if self.archive is None:
            return (*found, "nothing was archived yet")
        gaps = self.archive.gaps()
        found += [f"missing: {gap.names(self.archive.segment_bytes)}" for gap in gaps]
        found += [f"several objects: {name}" for name in self.archive.conflicts]
        return (*found, *(f"odd: {key}: {why}" for key, why in self.archive.odd))


def ask_agent(cluster: ClusterConfig) -> AgentStatus:
    """Ask the agent of a cluster, on this machine, how it is."""
    try:
        with _connected(Path(cluster.agent_socket)) as connection:
            connection.sendall(request_line(Request("status", cluster.name)))
            with connection.makefile("rb") as file:
                answer = read_answer(file.readline(MAX_LINE_BYTES))
    except PermissionError:
        return AgentStatus(False, f"only PostgreSQL's own user may ask at {cluster.agent_socket}")
    except (OSError, ConfigError) as error:
        reason = error.message if isinstance(error, ConfigError) else error.strerror or str(error)
        return AgentStatus(False, f"{cluster.agent_socket}: {reason}")
    if answer.version != VERSION or answer.code:
        return AgentStatus(False, answer.said or f"it speaks version {answer.version}, not {VERSION}")
    return AgentStatus(True, told=answer.told)


@contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(_AGENT_WITHIN_S)
        connection.connect(os.fspath(path))
        yield connection
