"""Take a dump: preflight, one snapshot for dump and fingerprint, upload as it comes, publish.

Called by cli.py and by Dagster's ops, which call the three steps one by one. Nothing is listed
before `publish`; a failure before it takes away what it had stored.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import version

from backup_pipeline.actions.fetch import ARCHIVE_NAME, DIRECTORY_NAME
from backup_pipeline.actions.protected import Clock, Protected
from backup_pipeline.actions.report import Report, timed
from backup_pipeline.actions.shared_dump import (
    copy_shared,
    inherit_proof,
    same_schedule,
    storage_class_of,
    taken_away_on_failure,
)
from backup_pipeline.domain import layout
from backup_pipeline.domain.backup import (
    MANUAL_TIER,
    Backup,
    BackupId,
    Manifest,
    ObjectDigest,
    ObjectRole,
    Source,
)
from backup_pipeline.domain.fingerprint import Fingerprint, fingerprint_to_json
from backup_pipeline.engines.postgres import dump as tool
from backup_pipeline.engines.postgres import fingerprint
from backup_pipeline.engines.postgres import preflight as checks
from backup_pipeline.engines.postgres.dump_directory import dump_directory
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import HeldLock, advisory_lock
from backup_pipeline.engines.postgres.properties import read_source
from backup_pipeline.engines.postgres.server import connect, read_server_info
from backup_pipeline.engines.postgres.snapshot import Snapshot, exported_snapshot
from backup_pipeline.engines.postgres.tools import Compression, Tools, choose_compression, find_tools
from backup_pipeline.errors import BackupNotFound, Corrupt, ServerError, StoreError
from backup_pipeline.spool import private_folder
from backup_pipeline.storage import catalog, leases
from backup_pipeline.units import show_bytes, show_seconds

SOFTWARE = version("backup-pipeline")


@dataclass(frozen=True)
class Preflight:
    """What a dump will be made of; `warnings` do not stop it."""

    server_version: str
    client_version: str
    client_path: str
    source_bytes: int
    compression: str
    warnings: tuple[str, ...]


def take(
    protected: Protected,
    *,
    tier: str,
    scheduled_for: datetime | None,
    clock: Clock,
    report: Report,
    proving: bool | None = None,
) -> Backup:
    """Preflight, dump, upload and publish; return the published backup. `proving` is preflight's.

    Raises ServerError, ToolError, StoreError, Busy; nothing is listed then.
    """
    if tier != MANUAL_TIER:
        protected.config.tier(tier)
    preflight(protected, report=report, proving=proving)
    manifest = dump_and_upload(protected, tier=tier, scheduled_for=scheduled_for, clock=clock, report=report)
    return publish(protected, manifest, report=report)


def preflight(protected: Protected, *, report: Report, proving: bool | None = None) -> Preflight:
    """Try everything that the dump will need; change nothing but a scratch object in the store.

    `proving` says whether a proof follows at once, None that the configuration decides: then what it
    needs to be told must be there too. Raises ConfigError, ServerError, ToolError, StoreError: what
    would make the dump fail.
    """
    config, source = protected.config, protected.source()
    if config.prove.always if proving is None else proving:
        protected.check_scratch_secrets()
    found = checks.check_source(
        source,
        bin_dir=config.bin_dir,
        critical_tables=config.critical_tables,
        role_passwords=config.role_passwords,
    )
    checks.raise_first_failure(found)
    tools, compression = _tools(protected)
    try_store(protected)
    with contextlib.closing(connect(source, purpose="preflight")) as session:
        details = read_source(session, tools)
    warnings = tuple(check.found for check in found if check.status is checks.CheckStatus.WARNING)
    ready = Preflight(
        server_version=details.server_version_text,
        client_version=tools.version_text,
        client_path=tools.path("pg_dump"),
        source_bytes=details.size_bytes,
        compression=compression.name,
        warnings=warnings,
    )
    report.say(
        f"PostgreSQL {ready.server_version}, {show_bytes(ready.source_bytes)}; "
        f"pg_dump {ready.client_version} ({ready.client_path}), {ready.compression}"
    )
    for warning in warnings:
        report.say(f"warning: {warning}")
    return ready


def dump_and_upload(
    protected: Protected, *, tier: str, scheduled_for: datetime | None, clock: Clock, report: Report
) -> Manifest:
    """Store everything that the backup consists of, and return the manifest to publish.

    A tier due at the same scheduled time as another one that is already published copies it, or is
    dumped anew when that one is damaged or cannot be read.
    Raises ServerError, ToolError, StoreError, Busy; what was stored is taken away again.
    """
    config, source = protected.config, protected.source()
    if tier != MANUAL_TIER:
        config.tier(tier)
    wait_s = config.lock_timeout.total_seconds()
    purpose = f"dump of {config.name}"
    with advisory_lock(source, source.database, purpose=purpose, wait_s=wait_s) as lock:
        shared = same_schedule(protected, tier, scheduled_for)
        if shared is not None:
            try:
                return copy_shared(protected, shared, tier=tier, clock=clock, report=report)
            except (BackupNotFound, Corrupt, StoreError) as error:
                report.say(f"{shared.id} cannot be copied, {tier} gets a dump of its own: {error.message}")
        return _Dump(protected, tier, scheduled_for, lock, clock, report).run()


def publish(protected: Protected, manifest: Manifest, *, report: Report) -> Backup:
    """Make an uploaded dump a backup: write its manifest, last. May be repeated.

    A copy that shares a proven dump's bytes is proven with it. Raises StoreError, Refused.
    """
    catalog.publish(protected.store, manifest)
    if manifest.copied_from is not None:
        inherit_proof(protected, manifest)
    size, took = show_bytes(manifest.size_bytes), show_seconds(manifest.duration_s)
    report.say(f"published {manifest.id}: {size} in {took}")
    return catalog.load(protected.store, manifest.id)


@dataclass
class _Dump:
    """One dump under way: what its steps share."""

    protected: Protected
    tier: str
    scheduled_for: datetime | None
    lock: HeldLock
    clock: Clock
    report: Report
    objects: list[ObjectDigest] = field(default_factory=list)
    prefix: str = ""
    expected_bytes: int = 0  # of all objects together; 0 when there is nothing to judge by
    tell: Callable[[int, int], None] = lambda *_: None

    def run(self) -> Manifest:
        started_at = self.clock()
        config, source = self.protected.config, self.protected.source()
        tools, compression = _tools(self.protected)
        lock_timeout_s = config.lock_timeout.total_seconds()
        with exported_snapshot(source, lock_timeout_s=lock_timeout_s) as snapshot:
            backup = BackupId.make(config.name, snapshot.taken_at, secrets.token_hex(3))
            self.prefix = layout.data_prefix(backup, self.tier)
            with (
                leases.hold(self.protected.store, backup, "dump", clock=self.clock) as lease,
                taken_away_on_failure(self.protected.store, self.prefix, self.report),
            ):
                with snapshot.reading() as session:
                    details = read_source(session, tools)  # a role granted a moment ago is in the dump too
                self.expected_bytes = self._expected_bytes(details, compression)
                prepared = fingerprint.prepare(
                    source,
                    pg_dump=tools.path("pg_dump"),
                    critical_tables=config.critical_tables,
                    contents=config.proof == "content",
                    stall_s=config.stall_timeout.total_seconds(),
                    snapshot=snapshot,
                )
                found = self._read(prepared, snapshot, tools, compression, details)
                snapshot.release()
                found = fingerprint.finish(found, prepared)
                self._ride_along(source, tools, replace(found, properties=details.database))
                lease.check()
                if not self.lock.still_held():
                    raise ServerError(
                        f"the lock that keeps other dumps and swaps of {config.name} away was lost",
                        hint="The server closed its session; look into its log, then take the dump again.",
                    )
        return Manifest(
            id=backup,
            tier=self.tier,
            scheduled_for=self.scheduled_for,
            started_at=started_at,
            snapshot_at=snapshot.taken_at,
            finished_at=self.clock(),
            expires_at=self.clock() + config.manual_keep if self.tier == MANUAL_TIER else None,
            format=self._format,
            compression=compression.name,
            jobs=config.jobs,
            objects=tuple(self.objects),
            source=details,
            software=SOFTWARE,
        )

    @property
    def _format(self) -> str:
        return "custom" if self.protected.config.jobs == 1 else "directory"

    def _expected_bytes(self, source: Source, compression: Compression) -> int:
        """How large this dump will be if it shrinks its database as the newest one of its kind did."""
        for backup in catalog.list_backups(self.protected.store, self.protected.name).backups:
            before = backup.manifest
            if (
                before is not None
                and (before.format, before.compression) == (self._format, compression.name)
                and before.source.size_bytes > 0
            ):
                return round(source.size_bytes * before.size_bytes / before.source.size_bytes)
        return 0

    def _read(
        self,
        prepared: fingerprint.Prepared,
        snapshot: Snapshot,
        tools: Tools,
        compression: Compression,
        details: Source,
    ) -> Fingerprint:
        """Dump and fingerprint side by side; whichever fails ends the other."""
        self.tell = timed(self.report, "dump and upload")
        with ThreadPoolExecutor(1, "fingerprint") as pool:
            taking = pool.submit(
                fingerprint.take,
                prepared,
                snapshot,
                connections=self.protected.config.fingerprint_connections,
                progress=timed(self.report, "fingerprint"),
            )
            try:
                self._dump(snapshot, tools.path("pg_dump"), compression, details)
                return taking.result()
            except BaseException:
                snapshot.cancel()
                raise

    def _dump(self, snapshot: Snapshot, pg_dump: str, compression: Compression, details: Source) -> None:
        config, source = self.protected.config, snapshot.endpoint
        stall_s = config.stall_timeout.total_seconds()
        if config.jobs == 1:
            with tool.stream_custom(
                pg_dump,
                source,
                snapshot,
                compress_option=compression.option,
                stall_s=stall_s,
            ) as chunks:
                self._put(ARCHIVE_NAME, ObjectRole.DUMP, chunks, size_hint_bytes=details.size_bytes)
            return
        with (
            private_folder("dump") as spool,
            dump_directory(
                pg_dump,
                source,
                snapshot,
                spool=spool,
                jobs=config.jobs,
                compress_option=compression.option,
                stall_s=stall_s,
            ) as files,
        ):
            for file in files:
                name = f"{DIRECTORY_NAME}/{file.name}"
                self._put(name, ObjectRole.DUMP, file.chunks(), size_hint_bytes=file.size_bytes)

    def _ride_along(self, source: Endpoint, tools: Tools, found: Fingerprint) -> None:
        """What no dump holds: roles and tablespaces; and what the proof will compare with."""
        config = self.protected.config
        roles = tool.dump_globals(
            tools.path("pg_dumpall"),
            source,
            with_passwords=config.role_passwords,
            stall_s=config.stall_timeout.total_seconds(),
        )
        self._put("globals.sql", ObjectRole.GLOBALS, [roles])
        self._put("fingerprint.json", ObjectRole.FINGERPRINT, [fingerprint_to_json(found)])

    def _put(self, name: str, role: ObjectRole, chunks: Iterable[bytes], *, size_hint_bytes: int = 0) -> None:
        before = sum(item.size_bytes for item in self.objects)
        hashing = tool.Hashing(chunks, progress=lambda done: self.tell(before + done, self.expected_bytes))
        self.protected.store.put(
            self.prefix + name,
            hashing,
            size_hint_bytes=size_hint_bytes,
            storage_class=storage_class_of(self.protected, self.tier),
        )
        self.objects.append(ObjectDigest(self.prefix + name, name, role, hashing.size_bytes, hashing.sha256))


def _tools(protected: Protected) -> tuple[Tools, Compression]:
    with contextlib.closing(connect(protected.source(), purpose="preflight")) as session:
        major = read_server_info(session).major
    tools = find_tools(protected.config.bin_dir, at_least=major)
    return tools, choose_compression(tools)


def try_store(protected: Protected) -> None:
    """Write where only scratch lies. A writer that may not delete is as it should be: one object stays."""
    key = f"{layout.SCRATCH}preflight"
    protected.store.put(key, [b"may this process write here?"])
    protected.store.delete([key])
