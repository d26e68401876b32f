"""How a cluster's WAL archiving stands: agent, archiver, archive, and how far behind it is.

Read for `wal status`; decides nothing, and changes nothing.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from backup_pipeline.config import ClusterConfig
from backup_pipeline.domain.wal import WalGap, WalSegment
from backup_pipeline.domain.wal_archive import ArchivedSegment, ArchiveIdentity, ArchiveListing
from backup_pipeline.engines.postgres.archiving import ArchiverCounts, Archiving
from backup_pipeline.engines.postgres.server import ServerInfo
from backup_pipeline.engines.postgres.slots import SlotLook
from backup_pipeline.errors import BackupNotFound, ConfigError
from backup_pipeline.storage.store import Store
from backup_pipeline.units import show_bytes, show_seconds
from backup_pipeline.wal.identity import read_identity
from backup_pipeline.wal.listing import read_archive
from backup_pipeline.wal.protocol import MAX_LINE_BYTES, VERSION, Request, read_answer, request_line
from backup_pipeline.wal.setup import is_ours
from backup_pipeline.wal.slot_status import slot_problems

_AGENT_WITHIN_S = 5.0
_LAG_SEGMENTS = 2  # the one that is being written is always behind
_LAG_S = 300.0


@dataclass(frozen=True)
class AgentStatus:
    """Whether an agent answers; `said` says why not. `told` is what it tells of itself."""

    answers: bool
    said: str = ""
    told: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class WalStatus:
    """All of it, at one moment."""

    cluster: ClusterConfig
    at: datetime
    agent: AgentStatus
    server: ServerInfo
    archiving: Archiving
    archiver: ArchiverCounts
    identity: ArchiveIdentity | None
    archive: ArchiveListing | None  # None: nothing was archived yet
    slot: SlotLook | None = None  # None: it is not received

    @property
    def is_handed(self) -> bool:
        """Whether PostgreSQL is to hand its WAL to archive_command; it may be received beside that."""
        return self.slot is None or is_ours(self.archiving.settings.get("archive_command", ""))

    @property
    def newest(self) -> ArchivedSegment | None:
        """The newest segment of the server's timeline that is in the archive."""
        return self.archive.newest(self.archiver.timeline) if self.archive else None

    @property
    def lag_bytes(self) -> int | None:
        """How much WAL was written behind what is archived; None before the first."""
        if self.slot and self.slot.status and self.slot.status.confirmed:
            return max(0, self.archiver.lsn.value - self.slot.status.confirmed.value)
        if self.archive is None or self.newest is None:
            return None
        end = self.newest.segment.end(self.archive.segment_bytes)
        return max(0, self.archiver.lsn.value - end.value)

    @property
    def lag_s(self) -> float | None:
        """How old what is archived is; 0 when nothing was written since, None before the first."""
        if self.newest_at is None:
            return None
        return max(0.0, (self.at - self.newest_at).total_seconds()) if self.lag_bytes else 0.0

    @property
    def newest_at(self) -> datetime | None:
        """When something of the server's timeline was archived last, if only a part of a segment."""
        parts = self.archive.partials if self.archive and self.slot else ()
        shipped = [each.archived_at for each in parts if each.segment.timeline == self.archiver.timeline]
        whole = [self.newest.archived_at] if self.newest else []
        return max((*whole, *shipped), default=None)

    @property
    def gaps(self) -> tuple[WalGap, ...]:
        """What is missing in the archive."""
        return tuple(gap for gap in self.archive.gaps() if not self._is_to_come(gap)) if self.archive else ()

    def _is_to_come(self, gap: WalGap) -> bool:
        """Whether PostgreSQL has yet to hand it over: the agent archives what follows meanwhile."""
        confirmed = self.slot.status.confirmed if self.slot and self.slot.status else None
        if confirmed is not None and gap.timeline == self.archiver.timeline:
            return gap.first >= confirmed.value // self.archiving.segment_bytes
        name = WalSegment(gap.timeline, gap.first).name(self.archiving.segment_bytes)
        is_handed_over = self.archiver.ready == 0 or name <= self.archiver.last_archived[: len(name)]
        return gap.timeline == self.archiver.timeline and not is_handed_over

    @property
    def problems(self) -> tuple[str, ...]:
        """What somebody has to look at, a line each."""
        found = [*self._not_handed()] if self.is_handed else []
        found += self._wrong_system()
        if self.slot is not None:
            found += slot_problems(self.cluster, self.slot, self.archiving.segment_bytes)
        found += self._delays()
        if self.archive is None:
            return (*found, "nothing was archived yet")
        found += [f"missing: {gap.names(self.archive.segment_bytes)}" for gap in self.gaps]
        found += [f"several objects: {name}" for name in self.archive.conflicts]
        return (*found, *(f"odd: {key}: {why}" for key, why in self.archive.odd))

    def _not_handed(self) -> Iterator[str]:
        """Why archive_command may not work."""
        if not self.agent.answers:
            yield f"no agent: {self.agent.said}"
        yield from self._wrong_settings()
        if self.archiver.is_failing:
            yield f"the archiver fails at {self.archiver.last_failed}"

    def _wrong_settings(self) -> Iterator[str]:
        """Why the server does not archive by this program. PostgreSQL counts no failure of any of these."""
        settings, setup = self.archiving.settings, f"backup-pipeline wal setup {self.cluster.name} --apply"
        mode, command = settings.get("archive_mode", ""), settings.get("archive_command", "")
        if self.server.in_recovery and mode != "always":
            return  # its primary archives
        yield from (f"{name} waits for a restart of the server" for name in self.archiving.pending)
        if mode == "off" and "archive_mode" not in self.archiving.pending:
            yield f"archive_mode is off: nothing is archived; {setup}, and restart the server"
        if library := settings.get("archive_library", ""):
            yield f"archive_library is {library}, and not this program's client: {setup} --replace-command"
        elif not command:
            yield f"archive_command is empty: nothing is archived; {setup}"
        elif not is_ours(command):
            yield f"archive_command is {command}, and not this program's client: {setup} --replace-command"

    def _wrong_system(self) -> Iterator[str]:
        system = self.server.system_identifier
        if self.identity is not None and system and self.identity.system_identifier != system:
            yield (
                f"the archive belongs to PostgreSQL system {self.identity.system_identifier}, not to "
                f"{system}, the server's: give this cluster a name of its own, or, only when it takes over: "
                f"backup-pipeline wal setup {self.cluster.name} --adopt"
            )

    def _delays(self) -> Iterator[str]:
        """What waits for too long, and what nobody waits for and is not there."""
        oldest_at = self.archiver.oldest_ready_at
        if self.is_handed and oldest_at is not None and self.at - oldest_at > 2 * self.cluster.push_timeout:
            waited = show_seconds((self.at - oldest_at).total_seconds())
            yield (
                f"a file has waited for {waited}: look into the server's log, and with ps whether its "
                "archive_command hangs"
            )
        lag_bytes, lag_s = self.lag_bytes or 0, self.lag_s or 0.0
        allowed_s = max(_LAG_S, 3 * float(self.archiving.settings.get("archive_timeout") or 0))
        is_far = lag_bytes >= _LAG_SEGMENTS * self.archiving.segment_bytes and lag_s > allowed_s
        if is_far and self.slot is not None:
            yield (
                f"the archive ends {show_bytes(lag_bytes)} before the server, {show_seconds(lag_s)} ago: "
                "look into what `wal receive` says; the WAL stays on the server meanwhile"
            )
        elif is_far and not self.archiver.ready:
            yield (
                f"the archive ends {show_bytes(lag_bytes)} before the server, {show_seconds(lag_s)} ago, and "
                "no file is seen to wait: what PostgreSQL gave away is lost; when it archives here again: "
                f"backup-pipeline base-backup {self.cluster.name}"
            )


def look(
    store: Store,
    cluster: ClusterConfig,
    server: ServerInfo,
    archiving: Archiving,
    archiver: ArchiverCounts,
    *,
    agent: AgentStatus,
    at: datetime,
    slot: SlotLook | None = None,
) -> WalStatus:
    """Look at the archive after the server told how it stands. Raises StoreError, Corrupt, Refused.

    A listing takes a while, in which files come in before and behind it: what it misses is looked for again.
    """

    def listed() -> ArchiveListing | None:
        try:
            return read_archive(store, cluster.name, system_identifier=server.system_identifier)
        except BackupNotFound:
            return None

    identity = read_identity(store, cluster.name)
    found = WalStatus(cluster, at, agent, server, archiving, archiver, identity, listed(), slot)
    return replace(found, archive=listed()) if found.gaps else found


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
