"""What an incremental base backup builds on: its chain back to a whole one, or why that cannot be used. Pure.

Called by recoveries, by listings, and by what takes the next one. Which chains are kept is retention's.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseBackup, BaseManifest
from backup_pipeline.domain.wal import TimelineHistory

OLDEST_MAJOR = 17
"""Older servers take no incremental base backups."""


@dataclass(frozen=True)
class Chain:
    """`links`, oldest first, the last being the backup that is meant; one alone is a whole backup.

    `broken` says why they make no data directory; "" when they do.
    """

    links: tuple[BaseManifest, ...]
    broken: str = ""

    @property
    def last(self) -> BaseManifest:
        """The backup that is meant."""
        return self.links[-1]

    @property
    def incremental(self) -> bool:
        """Whether there is anything to combine."""
        return self.last.parent is not None

    @property
    def size_bytes(self) -> int:
        """What all of it takes in the store."""
        return sum(link.size_bytes for link in self.links)

    @property
    def read_bytes(self) -> int:
        """What all of it comes to unpacked, before it is combined."""
        return sum(link.source_bytes for link in self.links)

    @property
    def written_bytes(self) -> int:
        """What a recovery writes before it replays: all links, and what they come to."""
        return self.read_bytes + (self.last.combined_bytes if self.incremental else 0)


def by_id(manifests: Iterable[BaseManifest]) -> dict[BackupId, BaseManifest]:
    """The records that a chain is looked for in."""
    return {manifest.id: manifest for manifest in manifests}


def chain_of(manifest: BaseManifest, known: Mapping[BackupId, BaseManifest]) -> Chain:
    """The chain that ends with `manifest`, whose links are among `known`."""
    links = [manifest]
    while (parent_id := links[0].parent) is not None:
        parent = known.get(parent_id)
        if parent is None or parent in links:
            return Chain(tuple(links), f"{parent_id}, which {links[0].id} builds on, is not there")
        if reason := _unfit(parent, links[0]):
            return Chain((parent, *links), reason)
        links.insert(0, parent)
    return Chain(tuple(links))


def _unfit(parent: BaseManifest, child: BaseManifest) -> str:
    """Why the one cannot be what the other was taken against; "" when it can."""
    what = ""
    if parent.system_identifier != child.system_identifier:
        what = f"is of another system, {parent.system_identifier}"
    elif parent.server_version // 10000 != child.server_version // 10000:
        what = f"is of another major version, {parent.server_version_text}"
    elif parent.end.lsn > child.start.lsn or parent.end.timeline > child.end.timeline:
        what = f"ends at {parent.end}, after the beginning of {child.id}"
    return f"{parent.id}, which {child.id} builds on, {what}" if what else ""


def remarks(backup: BaseBackup, known: Mapping[BackupId, BaseManifest]) -> tuple[list[str], list[str]]:
    """What a listing says of a base backup beside its figures: what is good to know, and what is wrong."""
    manifest = backup.manifest
    broken = chain_of(manifest, known).broken
    notes = [
        *(["pinned"] if backup.pinned else []),
        *([f"what changed since {manifest.parent.stamp}"] if manifest.parent else []),
        *(["from a standby"] if manifest.from_standby else []),
    ]
    alarms = [
        *(["DAMAGED PAGES IN THE SOURCE"] if manifest.page_checksums_wrong else []),
        *([f"OF NO USE: {broken}"] if broken else []),
    ]
    return notes, alarms


@dataclass(frozen=True)
class Server:
    """What a parent has to fit: the system that is to be read, its timeline, and its own time."""

    system_identifier: str
    major: int
    history: TimelineHistory
    now: datetime


def unfit_parent(chain: Chain, server: Server, *, failed: Collection[BackupId] = ()) -> str:
    """Why the next incremental backup of a server cannot build on this one; "" when it can.

    `failed` are those whose drill failed. Whether the server still knows what has changed, it says itself.
    """
    return chain.broken or _elsewhere(chain.last, server) or _doubtful(chain, failed)


def _elsewhere(parent: BaseManifest, server: Server) -> str:
    history = server.history
    if parent.system_identifier != server.system_identifier:
        return f"it is of another system, {parent.system_identifier}"
    if parent.server_version // 10000 != server.major:
        return f"it is of another major version, {parent.server_version_text}"
    if not history.comes_by(parent.end.timeline, parent.end.lsn):
        return f"it ends at {parent.end}, which does not lead to timeline {history.timeline}"
    if parent.id.taken_at > server.now:
        return "it is dated later than the server's clock"
    return ""


def _doubtful(chain: Chain, failed: Collection[BackupId]) -> str:
    if any(link.page_checksums_wrong for link in chain.links):
        return "it holds damaged pages, which a whole one would look at again"
    return next((f"a drill of {link.id} failed" for link in chain.links if link.id in failed), "")
