"""What a recovery is planned from: the base backups and the WAL that the store holds, and where it ends.

Called by recover.py and by listings of what can be recovered. Deciding is domain/recovery_route.py's.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.domain.base_backup import BaseBackup, BaseManifest
from backup_pipeline.domain.base_chain import Chain, by_id, chain_of
from backup_pipeline.domain.layout import wal_key
from backup_pipeline.domain.recovery_route import Ending, begins_before
from backup_pipeline.domain.recovery_target import RecoveryTarget
from backup_pipeline.domain.replayable_wal import Archive, BasePoint, Route, archive_of, reaching, without
from backup_pipeline.domain.wal import Lsn, WalSegment, parse_wal_name
from backup_pipeline.domain.wal_archive import ArchiveListing
from backup_pipeline.engines.postgres.server import connect, server_errors
from backup_pipeline.engines.postgres.source_cluster import server_clock
from backup_pipeline.engines.postgres.waldump import TransactionEnd, last_transaction
from backup_pipeline.errors import BackupError, Corrupt, Refused
from backup_pipeline.storage import base_backups
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.listing import read_archive, read_settled_archive
from backup_pipeline.wal.settling import Pause

_LONG_PAGE_HEADER_BYTES = 40  # where an idle server stands after a switch


@dataclass(frozen=True)
class RecoveryFacts:
    """One system's base backups and WAL, as the store has them."""

    manifests: tuple[BaseManifest, ...]
    listing: ArchiveListing
    notes: tuple[str, ...] = ()
    damaged: Mapping[BackupId, str] = field(default_factory=dict)  # and what is wrong with each
    failed: Mapping[BackupId, str] = field(default_factory=dict)  # and what a drill found of each

    def chain(self, backup: BackupId) -> Chain:
        """The base backup of this id with all that it builds on; `broken` also where a link is damaged."""
        found = chain_of(self.manifest(backup), by_id(self.manifests))
        wrong = next((self.damaged[link.id] for link in found.links if link.id in self.damaged), "")
        return replace(found, broken=found.broken or wrong)

    def without(self, backup: BackupId, reason: str) -> "RecoveryFacts":
        """The same with a base backup, and what builds on it, found to be of no use."""
        return replace(self, damaged={**self.damaged, backup: reason})

    def passed_over(self, route: Route, target: RecoveryTarget) -> tuple[str, ...]:
        """The base backups that could have been begun with instead of the route's, and why they are not."""
        return tuple(
            f"{point.id} is passed over: {point.broken or point.failed}"
            for point in self.points
            if (point.broken or (point.failed and begins_before(point, target)))
            and point.end > route.base.end
        )

    def failure(self, backup: BackupId) -> str:
        """What a drill found wrong with a base backup or with what it builds on; "" where none failed."""
        ids = [link.id for link in self.chain(backup).links]
        return next((f"a drill of {id_} failed: {self.failed[id_]}" for id_ in ids if id_ in self.failed), "")

    @property
    def points(self) -> tuple[BasePoint, ...]:
        """The base backups as beginnings."""
        return tuple(
            BasePoint(
                each.id,
                each.end.timeline,
                each.start.lsn,
                each.end.lsn,
                each.stopped_at,
                each.size_bytes,
                self.chain(each.id).broken,
                self.failure(each.id),
            )
            for each in self.manifests
        )

    @property
    def archive(self) -> Archive:
        """The WAL as routes are found in it."""
        return archive_of(self.listing)

    def manifest(self, backup: BackupId) -> BaseManifest:
        """The base backup of this id."""
        return next(each for each in self.manifests if each.id == backup)

    def keys(self, segments: Iterable[WalSegment]) -> Mapping[str, str]:
        """Where in the store these segments lie, by name."""
        listing, wanted = self.listing, set(segments)
        names = {
            each.segment.name(listing.segment_bytes): each.sha256
            for found in listing.segments.values()
            for each in found
            if each.segment in wanted
        }
        return {
            name: wal_key(listing.cluster, listing.system_identifier, parse_wal_name(name), sha256)
            for name, sha256 in names.items()
        }

    def stored_bytes(self, segments: Iterable[WalSegment]) -> int:
        """What these segments take in the store."""
        sizes = {
            each.segment: each.stored_bytes for found in self.listing.segments.values() for each in found
        }
        parts = {each.segment: each.stored_bytes for each in self.listing.partials}
        return sum(sizes.get(segment, parts.get(segment, 0)) for segment in segments)


def read_facts(
    cluster: ProtectedCluster, *, base: BackupId | None = None, pause: Pause | None = None
) -> RecoveryFacts:
    """Read the base backups and the WAL of the system that archives now, or of the one that `base` is of.

    With `pause`, a gap that may be filled is waited for. Raises BackupNotFound where there is no archive, or
    no such base backup; Refused, StoreError.
    """
    found = base_backups.list_base_backups(cluster.store, cluster.name)
    wanted = base_backups.load(cluster.store, base).manifest if base else None
    system = wanted.system_identifier if wanted else ""
    read = partial(read_settled_archive, pause=pause) if pause else read_archive
    listing = read(cluster.store, cluster.name, system_identifier=system)
    if wanted and wanted.segment_bytes != listing.segment_bytes:
        raise Refused(
            f"{base} was taken with WAL segments of {wanted.segment_bytes} bytes, and those of its system, "
            f"{system}, are counted in {listing.segment_bytes}",
            hint="The size was changed, as by pg_resetwal: choose a base backup that was taken since.",
        )
    mine = [each for each in found.backups if each.manifest.system_identifier == listing.system_identifier]
    notes = [f"{key} cannot be read: {reason}" for key, reason in (*found.unreadable, *listing.odd)]
    other_size = [each for each in mine if each.manifest.segment_bytes != listing.segment_bytes]
    notes += [f"{each.id} is not looked at: its WAL has segments of another size" for each in other_size]
    mine = [each for each in mine if each not in other_size]
    others = sorted({each.manifest.system_identifier for each in found.backups} - {listing.system_identifier})
    if others and not mine:
        raise Refused(
            f"every base backup of {cluster.name} is of another system than its WAL, "
            f"{listing.system_identifier}",
            detail={"base backups of": ", ".join(others)},
            hint="Take a base backup of the system that archives now, or name an earlier one with --base.",
        )
    failed = {each.id: _found_wrong(each) for each in mine if each.verdict is Verdict.FAILED}
    return RecoveryFacts(tuple(each.manifest for each in mine), listing, tuple(notes), failed=failed)


def _found_wrong(backup: BaseBackup) -> str:
    return "; ".join(backup.proof.differences[:3] if backup.proof else ()) or "it did not say why"


def read_ending(
    cluster: ProtectedCluster,
    facts: RecoveryFacts,
    route: Route,
    pg_waldump: str,
    report: Report,
    *,
    target: RecoveryTarget,
) -> tuple[Ending, Route]:
    """When the last transaction of a route ended, by the segments themselves; and whether the server, if it
    can be asked, has written nothing since. The route ends before a segment that turns out to be damaged.

    Raises StoreError, ToolError; Corrupt when that leaves nothing that is consistent.
    """
    last_at, archive = None, facts.archive
    with tempfile.TemporaryDirectory(prefix="backup-waldump-") as folder:
        for segment in reversed(route.segments):
            try:
                found, content_bytes = _last_in(cluster, facts, segment, Path(folder), pg_waldump)
                if segment == route.partial:
                    route = reaching(route, content_bytes, archive)
            except Corrupt as error:
                route = without(route, segment, error.message, archive)
                report.say(f"warning: {error.message}")
                if not route.complete:
                    raise
                continue
            if found is not None:
                last_at = found.at
                break
            if target.at is not None and archive.archived_at(segment) < target.at:
                break  # nor is a commit beyond the target in any before it
    covered = None
    if route.missing is None and route.unusable is None and cluster.config.dsn.named:
        try:
            covered = _idle_at(cluster, route, facts.listing.system_identifier)
        except BackupError as error:
            report.say(f"the server cannot be asked whether it has written more: {error.message}")
    return Ending(last_at or route.base.stopped_at, covered), route


def _last_in(
    cluster: ProtectedCluster, facts: RecoveryFacts, segment: WalSegment, folder: Path, pg_waldump: str
) -> tuple[TransactionEnd | None, int]:
    """The last transaction that ended in a segment, and how many bytes of it are written."""
    path = folder / segment.name(facts.listing.segment_bytes)
    try:
        system = facts.listing.system_identifier
        fetched = fetch(cluster.store, cluster.name, path.name, path, system_identifier=system)
        found = last_transaction(pg_waldump, path, ends_early=fetched.partial)
        return found, fetched.content_bytes
    finally:
        path.unlink(missing_ok=True)


def _idle_at(cluster: ProtectedCluster, route: Route, system_identifier: str) -> datetime | None:
    """The server's time when all that it ever wrote is in the route; else None."""
    source = cluster.source()
    with (
        contextlib.closing(connect(source, purpose="recovery", statement_timeout_s=10.0)) as session,
        server_errors(source, "cannot ask the server how far it has written"),
    ):
        at = server_clock(session)
        row = session.execute(
            "SELECT system_identifier::text, pg_catalog.pg_is_in_recovery(),"
            " CASE WHEN NOT pg_catalog.pg_is_in_recovery()"
            " THEN pg_catalog.pg_current_wal_insert_lsn()::text END,"
            " CASE WHEN NOT pg_catalog.pg_is_in_recovery()"
            " THEN pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) END"
            " FROM pg_catalog.pg_control_system()"
        ).fetchone()
    if row is None or row[0] != system_identifier or row[1] or row[2] is None:
        return None
    written, timeline = Lsn.parse(str(row[2])), int(str(row[3])[:8], 16)
    there = timeline == route.timeline and written.value <= route.end.value + _LONG_PAGE_HEADER_BYTES
    return at if there else None
