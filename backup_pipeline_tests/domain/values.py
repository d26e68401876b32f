"""Whole backups made from a few words: for tests that need many, or that change one thing in one."""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from backup_pipeline.domain.backup import (
    Backup,
    BackupId,
    DatabaseProperties,
    Manifest,
    ObjectDigest,
    ObjectRole,
    Proof,
    Source,
    Verdict,
)
from backup_pipeline.domain.base_backup import BaseManifest, Tablespace, WalPoint
from backup_pipeline.domain.drill import Drill, Loss, RecoveryTime, Span
from backup_pipeline.domain.layout import base_prefix, data_prefix
from backup_pipeline.domain.wal import Lsn

TOOK = RecoveryTime(1.0, 10.0, 20.0, 0.5)
NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)

PROPERTIES = DatabaseProperties(
    name="app",
    owner="app_owner",
    encoding="UTF8",
    collate="C.UTF-8",
    ctype="C.UTF-8",
    locale_provider="libc",
    locale="",
    icu_rules="",
    tablespace="pg_default",
    connection_limit=-1,
    allow_connections=True,
    is_template=False,
    comment="Orders, “live”\nsince 2024",
    settings=(("", "work_mem=64MB"), ("reporting", "statement_timeout=5min")),
    grants=(("app_owner", "", "CONNECT", False), ("app_owner", "reporting", "TEMPORARY", True)),
)

SOURCE = Source(
    server_version=170010,
    server_version_text="17.10",
    client_version=170010,
    client_path="/usr/lib/postgresql/17/bin/pg_dump",
    system_identifier="7312345678901234567",
    database=PROPERTIES,
    size_bytes=5_000_000,
    roles=("app_owner", "reporting"),
    extensions=(("pgcrypto", "1.3"),),
    tablespaces=(),
    notes=("the unlogged table public.cache comes back empty",),
)


def content_of(backup: BackupId, name: str) -> bytes:
    """What the tests store as an object of a backup."""
    return f"{backup} {name}".encode()


def manifest(
    database: str = "app",
    *,
    at: datetime = datetime(2026, 3, 1, 2, tzinfo=UTC),
    suffix: str = "3f9a1c",
    tier: str = "daily",
    names: tuple[str, ...] = ("database.dump", "globals.sql"),
    expires_at: datetime | None = None,
) -> Manifest:
    """A whole manifest; its objects hold content_of(id, name)."""
    backup = BackupId.make(database, at, suffix)
    objects = tuple(
        ObjectDigest(
            data_prefix(backup, tier) + name,
            name,
            ObjectRole.GLOBALS if name == "globals.sql" else ObjectRole.DUMP,
            len(content_of(backup, name)),
            hashlib.sha256(content_of(backup, name)).hexdigest(),
        )
        for name in names
    )
    return Manifest(
        id=backup,
        tier=tier,
        scheduled_for=at,
        started_at=at - timedelta(seconds=1),
        snapshot_at=at,
        finished_at=at + timedelta(seconds=30, microseconds=250000),
        expires_at=expires_at,
        format="custom",
        compression="zstd:1",
        jobs=1,
        objects=objects,
        source=SOURCE,
        software="0.1.0",
    )


def proof(verdict: Verdict = Verdict.PROVEN, at: datetime = NOW) -> Proof:
    """A proof with this verdict."""
    return Proof(
        verdict=verdict,
        at=at,
        restore_s=12.5,
        compare_s=1.25,
        checked=("12 tables, 3,400 rows: equal",),
        differences=("public.orders: 10 rows instead of 12",) if verdict is Verdict.FAILED else (),
        notes=(),
        by="drill-1, 0.1.0",
    )


def backup(
    *,
    at: datetime,
    tier: str = "daily",
    verdict: Verdict = Verdict.NONE,
    suffix: str = "3f9a1c",
    database: str = "app",
    pinned: bool = False,
    expires_at: datetime | None = None,
    unreadable_verdict: str = "",
) -> Backup:
    """A backup as the catalog lists it."""
    record = manifest(database, at=at, tier=tier, suffix=suffix, expires_at=expires_at)
    return Backup(
        id=record.id,
        tier=tier,
        taken_at=record.id.taken_at,
        size_bytes=record.size_bytes,
        manifest=record,
        proof=None if verdict is Verdict.NONE else proof(verdict),
        pinned=pinned,
        expires_at=expires_at,
        unreadable_verdict=unreadable_verdict,
    )


def imported(*, at: datetime, tier: str = "daily", verdict: Verdict = Verdict.NONE) -> Backup:
    """A dump of an older layout as it is listed."""
    found = backup(at=at, tier=tier, verdict=verdict, suffix=f"imported-{tier}")
    key = f"{tier}/backup_{tier}_{at:%Y%m%d_%H%M%S}.sql.gz"
    return replace(found, manifest=None, imported_key=key, size_bytes=1000)


def base_manifest(
    cluster: str = "main", *, at: datetime = datetime(2026, 3, 1, 2, tzinfo=UTC)
) -> BaseManifest:
    """The whole record of a base backup; its objects hold content_of(id, name)."""
    backup = BackupId.make(cluster, at, "3f9a1c")
    roles = {
        "16384.tar.zst": ObjectRole.TABLESPACE,
        "base.tar.zst": ObjectRole.BASE,
        "backup_manifest": ObjectRole.FILE_LIST,
        "configuration/etc/postgresql.conf": ObjectRole.CONFIGURATION,
    }
    contents = {name: content_of(backup, name) for name in roles}
    return BaseManifest(
        id=backup,
        started_at=at,
        stopped_at=at + timedelta(minutes=1),
        finished_at=at + timedelta(minutes=2),
        start=WalPoint(1, Lsn.parse("0/5000028")),
        end=WalPoint(1, Lsn.parse("0/6000100")),
        system_identifier=SOURCE.system_identifier,
        server_version=170010,
        server_version_text="17.10",
        segment_bytes=16 * 1024 * 1024,
        from_standby=False,
        page_checksums=True,
        page_checksums_wrong=False,
        source_bytes=50_000_000,
        tablespaces=(Tablespace(16384, "/srv/fast", 1_000_000),),
        objects=tuple(
            ObjectDigest(base_prefix(backup) + name, name, role, len(data), hashlib.sha256(data).hexdigest())
            for (name, role), data in zip(roles.items(), contents.values(), strict=True)
        ),
        compression="zstd:1",
        settings=(("max_connections", 100), ("max_wal_senders", 10)),
        software="0.1.0",
        notes=("a page did not agree with its checksum",),
    )


def drill(
    cluster: str = "main",
    *,
    at: datetime = NOW,
    verdict: Verdict = Verdict.PROVEN,
    recovery: RecoveryTime | None = TOOK,
    segments: int = 40,
    source_bytes: int = 1000,
) -> Drill:
    """A whole record of a drill that began at `at`."""
    begin = at - timedelta(hours=24)
    return Drill(
        id=BackupId.make(cluster, at, "3f9a1c"),
        verdict=verdict,
        finished_at=at + timedelta(minutes=1),
        seed=2**64 - 1,
        spans=(Span(begin, at),),
        target_at=at - timedelta(hours=3),
        base=BackupId.make(cluster, begin, "aaaa"),
        timeline=2,
        segments=segments,
        wal_bytes=5_000_000,
        base_bytes=500,
        source_bytes=source_bytes,
        recovery=recovery,
        check_s=4.5,
        loss=Loss(at - timedelta(seconds=61), 61.5, asked=True),
        checked=("the heartbeat before the target is there",),
        differences=("the heartbeat after the target is there",) if verdict is Verdict.FAILED else (),
        notes=("2 unlogged tables came back empty",),
        by="drill-1, 0.1.0",
    )
