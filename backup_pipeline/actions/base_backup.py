"""Take a base backup: read and upload as it comes, wait for the WAL that it needs, publish.

Called by cli.py and by Dagster's op. Nothing is listed before its WAL is in the archive; a failure takes away
what was stored, but for a backup that lacks nothing but that WAL.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version

from backup_pipeline.actions import base_parent
from backup_pipeline.actions.base_parent import Against
from backup_pipeline.actions.base_preflight import COMPRESSION, Preflight, preflight
from backup_pipeline.actions.needed_wal import await_wal
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Report, timed
from backup_pipeline.actions.shared_dump import taken_away_on_failure
from backup_pipeline.actions.waiting_base_backup import finish_waiting
from backup_pipeline.domain.backup import BackupId, ObjectDigest, ObjectRole
from backup_pipeline.domain.base_backup import (
    BASE_OBJECT,
    FILE_LIST_OBJECT,
    BaseBackup,
    BaseListing,
    BaseManifest,
    Tablespace,
)
from backup_pipeline.domain.base_chain import Server
from backup_pipeline.domain.choice import LATEST
from backup_pipeline.domain.layout import base_prefix
from backup_pipeline.domain.wal import TimelineHistory
from backup_pipeline.engines.postgres import base_backup as engine
from backup_pipeline.engines.postgres.dump import Hashing
from backup_pipeline.engines.postgres.server import connect, server_errors
from backup_pipeline.engines.postgres.source_cluster import server_clock
from backup_pipeline.errors import BackupNotFound, Corrupt, ObjectNotFound, Refused, ServerError
from backup_pipeline.storage import base_backups, leases
from backup_pipeline.storage.waiting import forget_waiting, keep_waiting
from backup_pipeline.units import show_bytes, show_seconds
from backup_pipeline.zstd import compressed

SOFTWARE = version("backup-pipeline")

_NO_CHECKSUMS = (
    "the cluster has no page checksums: a page that its disk spoiled cannot be told from a good one"
)
_WRONG_PAGES = (
    "PAGES THAT DO NOT AGREE WITH THEIR CHECKSUMS were copied as they are: the source is damaged. Look at "
    "the server's disks; keep older base backups until the pages are known to be whole"
)


def take(
    cluster: ProtectedCluster,
    *,
    clock: Clock,
    report: Report,
    fast: bool | None = None,
    incremental: bool = False,
    parent: BackupId | None = None,
    refuse: Callable[[], None] = lambda: None,
) -> BaseBackup:
    """One base backup, published. `fast` is as configured when None.

    An `incremental` one holds what has changed since the newest that it can build on. Where there is none,
    or the server does not know what has changed since, a whole one is taken, and says so: the next can
    build on that. With `parent` nothing else will do.

    `refuse` is asked last, before it is listed or left to wait for its WAL; where it raises Refused, what was
    stored is taken away. Earlier ones that waited for their WAL are listed afterwards, where it came, also
    when this one fails. Raises ConfigError, ServerError, StoreError, Refused; what was stored is taken away
    again, unless only its WAL is late.
    """
    try:
        ready = preflight(cluster, report=report)
        wanted = cluster.config.checkpoint == "fast" if fast is None else fast
        taking = _Taking(cluster, ready, clock, report, fast=wanted, refuse=refuse)
        return _incremental(taking, parent) if incremental or parent is not None else taking.run()
    finally:
        finish_waiting(cluster, clock=clock, report=report)


def _incremental(taking: "_Taking", parent: BackupId | None) -> BaseBackup:
    report = taking.report
    with contextlib.ExitStack() as kept:
        try:
            against = kept.enter_context(_parent(taking, parent))
        except (base_parent.NoParent, BackupNotFound, ObjectNotFound, Corrupt) as error:
            why = base_parent.whole_instead(error, named=parent, report=report)
            return replace(taking, instead=why).run()
        try:
            return replace(taking, against=against).run()
        except engine.NotSinceParent as error:  # nothing was stored yet
            why = base_parent.whole_instead(error, named=parent, report=report)
    return replace(taking, instead=why).run()


@contextlib.contextmanager
def _parent(taking: "_Taking", named: BackupId | None) -> Iterator[Against]:
    cluster, ready = taking.cluster, taking.ready
    stall_s = cluster.config.stall_timeout.total_seconds()
    history = engine.timeline_history(ready.source, ready.timeline, stall_s=stall_s)
    server = Server(ready.system_identifier, ready.server.major, history, taking.server_time())
    base_parent.refuse_unable(cluster, server, summarizes_wal=ready.facts.summarizes_wal)
    chain = base_parent.choose(cluster, server, named)
    with base_parent.held(cluster.store, chain, clock=taking.clock) as against:
        taking.report.say(f"what has changed since {chain.last.id}, link {len(chain.links) + 1} of its chain")
        yield against


@dataclass
class _Taking:
    """One base backup under way: what its steps share."""

    cluster: ProtectedCluster
    ready: Preflight
    clock: Clock
    report: Report
    fast: bool
    against: Against | None = None
    instead: str = ""  # why it is a whole one
    refuse: Callable[[], None] = lambda: None
    objects: list[ObjectDigest] = field(default_factory=list)
    prefix: str = ""
    tell: Callable[[int, int], None] = lambda *_: None

    def run(self) -> BaseBackup:
        config, facts, store = self.cluster.config, self.ready.facts, self.cluster.store
        options = engine.Options(
            f"backup-pipeline {config.name}",
            fast=self.fast,
            max_rate_bytes_s=config.max_rate_bytes_s,
            incremental=self.against is not None,
        )
        self.report.say(f"asked for a {'fast' if self.fast else 'spread'} checkpoint")
        stall_s = config.stall_timeout.total_seconds()
        checkpoint_s = 0.0 if self.fast else facts.checkpoint_timeout_s
        with contextlib.ExitStack() as begun:
            reading = engine.base_backup(
                self.ready.source,
                options,
                stall_s=stall_s,
                checkpoint_s=checkpoint_s,
                parent_manifest=self.against.manifest if self.against else b"",
            )
            backup = begun.enter_context(reading)
            started_at = self.server_time()
            id_ = BackupId.make(config.name, started_at, secrets.token_hex(3))
            self.prefix = base_prefix(id_)
            with leases.hold(store, id_, leases.BASE_BACKUP, clock=self.clock) as lease:
                with taken_away_on_failure(store, self.prefix, self.report):
                    self._upload(backup)
                    manifest, history = self._manifest(id_, started_at, backup)
                    begun.close()
                    if self.against:
                        base_backups.refuse_broken(store, manifest)
                    keep_waiting(store, manifest)
                self.report.say(f"waiting for the WAL up to {manifest.end}")
                try:
                    await_wal(self.cluster, manifest, history, timeout_s=stall_s, report=self.report)
                finally:
                    self._refuse()
                lease.check()
                if self.against:
                    self.against.check()
                published = base_backups.publish(store, replace(manifest, finished_at=self.clock()))
                forget_waiting(store, manifest.id)
        size, took = show_bytes(manifest.size_bytes), show_seconds(manifest.duration_s)
        self.report.say(f"published {manifest.id}: {size} in {took}")
        for note in manifest.notes:
            self.report.say(f"warning: {note}")
        return published

    def _refuse(self) -> None:
        try:
            self.refuse()
        except Refused:
            with taken_away_on_failure(self.cluster.store, self.prefix, self.report):
                raise

    def _upload(self, backup: engine.BaseBackup) -> None:
        self.tell = timed(self.report, "base backup")
        tell = partial(self._tell, backup)
        sizes = {item.oid: item.size_bytes for item in backup.tablespaces}
        for archive in backup.archives():
            if archive.name == engine.MANIFEST_NAME:
                self._put(FILE_LIST_OBJECT, ObjectRole.FILE_LIST, archive.chunks, 0, tell)
                continue
            role = ObjectRole.TABLESPACE if archive.oid else ObjectRole.BASE
            name = f"{archive.oid}.tar.zst" if archive.oid else BASE_OBJECT
            self._put(name, role, compressed(archive.chunks), sizes.get(archive.oid, 0), tell)
        for name, content in self.ready.outside.files:
            self._put(name, ObjectRole.CONFIGURATION, [content])

    def _tell(self, backup: engine.BaseBackup, _object_bytes: int) -> None:
        """Of all that is read, not of the object that is being stored."""
        self.tell(backup.read_bytes, backup.size_bytes)

    def _put(
        self,
        name: str,
        role: ObjectRole,
        chunks: Iterable[bytes],
        size_hint_bytes: int = 0,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        hashing = Hashing(chunks, progress=tell)
        self.cluster.store.put(self.prefix + name, hashing, size_hint_bytes=size_hint_bytes)
        self.objects.append(ObjectDigest(self.prefix + name, name, role, hashing.size_bytes, hashing.sha256))

    def _manifest(
        self, id_: BackupId, started_at: datetime, backup: engine.BaseBackup
    ) -> tuple[BaseManifest, TimelineHistory]:
        """The record, but for its end, and the history of the timeline that the backup ended on."""
        ready, facts = self.ready, self.ready.facts
        if backup.end is None:
            raise ServerError("the server did not say where the base backup ended")
        history = TimelineHistory(backup.end.timeline)
        if backup.end.timeline > 1:
            rows = backup.ask(f"TIMELINE_HISTORY {backup.end.timeline}")
            history = engine.read_history(rows, backup.end.timeline)
        stopped_at = self.server_time()
        manifest = BaseManifest(
            id=id_,
            started_at=started_at,
            stopped_at=stopped_at,
            finished_at=self.clock(),
            start=backup.start,
            end=backup.end,
            system_identifier=ready.system_identifier,
            server_version=ready.server.version,
            server_version_text=ready.server.version_text,
            segment_bytes=facts.segment_bytes,
            from_standby=ready.server.in_recovery,
            page_checksums=facts.page_checksums,
            page_checksums_wrong=backup.page_checksums_wrong,
            source_bytes=backup.read_bytes,
            tablespaces=tuple(
                Tablespace(item.oid, item.location, item.size_bytes)
                for item in backup.tablespaces
                if item.oid
            ),
            objects=tuple(self.objects),
            compression=COMPRESSION,
            settings=facts.settings,
            software=SOFTWARE,
            parent=self.against.chain.last.id if self.against else None,
            cluster_bytes=backup.size_bytes if self.against else 0,
            notes=(
                *([self.instead] if self.instead else []),
                *([_WRONG_PAGES] if backup.page_checksums_wrong else []),
                *([] if facts.page_checksums else [_NO_CHECKSUMS]),
                *backup.notices,
                *ready.outside.notes,
            ),
        )
        return manifest, history

    def server_time(self) -> datetime:
        """What the source's own clock says, by which base backups are dated."""
        source = self.ready.source
        with (
            contextlib.closing(connect(source, purpose="base backup")) as session,
            server_errors(source, "cannot ask the server for its time"),
        ):
            return server_clock(session)


def choose(listing: BaseListing, text: str) -> BaseBackup:
    """The base backup that `cluster/stamp`, or the beginning of it, names; `cluster/latest` is the newest.

    Raises BackupNotFound when there is none or more than one.
    """
    cluster, _, wanted = text.partition("/")
    of_cluster = [backup for backup in listing.backups if backup.id.database == cluster]
    found = of_cluster[:1] if wanted == LATEST else []
    found = found or [backup for backup in of_cluster if backup.id.stamp == wanted]
    found = found or [backup for backup in of_cluster if wanted and backup.id.stamp.startswith(wanted)]
    if len(found) != 1:
        raise BackupNotFound(
            f"{text} names {len(found)} base backups" if found else f"no base backup is named {text}",
            hint=f"`backup-pipeline list {cluster}` shows what there is.",
        )
    return found[0]
