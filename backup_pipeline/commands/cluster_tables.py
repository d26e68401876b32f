"""A cluster's WAL and base backups as tables for a terminal, and as records for JSON.

Called by the commands beside this one and by cli.py; decides nothing.
"""

from collections.abc import Sequence
from datetime import datetime

from rich.table import Table
from rich.text import Text

from backup_pipeline.actions.windows import ClusterWindows
from backup_pipeline.domain.base_backup import BaseBackup
from backup_pipeline.domain.base_chain import by_id, remarks
from backup_pipeline.domain.layout import base_prefix
from backup_pipeline.engines.postgres.slots import SlotLook
from backup_pipeline.terminal import proof_values, show_age, show_verdict, two_columns
from backup_pipeline.units import show_bytes, show_line, show_seconds
from backup_pipeline.wal.slot_status import slot_line
from backup_pipeline.wal.status import WalStatus


def wal_record(status: WalStatus) -> dict[str, object]:
    """How archiving stands, as JSON for scripts; times ISO 8601 in UTC, sizes in bytes."""
    archiver, archive, newest = status.archiver, status.archive, status.newest
    segment_bytes = archive.segment_bytes if archive else 0
    return {
        "cluster": status.cluster.name,
        "at": status.at.isoformat(),
        "agent": {"answers": status.agent.answers, "said": status.agent.said, **dict(status.agent.told)},
        "ready": archiver.ready,
        "oldest_ready_s": _seconds_since(archiver.oldest_ready_at, status.at),
        "archived_count": archiver.archived,
        "failed_count": archiver.failed,
        "failing": archiver.is_failing,
        "last_failed_wal": archiver.last_failed or None,
        "last_failed_at": archiver.last_failed_at.isoformat() if archiver.last_failed_at else None,
        "timeline": archiver.timeline,
        "lsn": str(archiver.lsn),
        "newest": newest.segment.name(segment_bytes) if newest else None,
        "newest_at": newest.archived_at.isoformat() if newest else None,
        "slot": _slot_record(status.slot),
        "lag_bytes": status.lag_bytes,
        "lag_s": status.lag_s,
        "segments": sum(len(found) for found in archive.segments.values()) if archive else 0,
        "stored_bytes": archive.stored_bytes if archive else 0,
        "gaps": [gap.names(segment_bytes) for gap in status.gaps],
        "problems": list(status.problems),
    }


def _slot_record(look: SlotLook | None) -> dict[str, object] | None:
    """The slot of a cluster that is received; its state is None where the server has none."""
    if look is None:
        return None
    slot = look.status
    return {
        "name": slot.name if slot else None,
        "active": slot.active if slot else False,
        "wal_status": slot.wal_status if slot else None,
        "archived_until": str(slot.confirmed) if slot and slot.confirmed else None,
        "kept_bytes": slot.kept_bytes if slot else 0,
        "safe_bytes": slot.safe_bytes if slot else None,
        "max_slot_wal_keep_size_mb": look.max_keep_mb,
    }


def _seconds_since(moment: datetime | None, now: datetime) -> float | None:
    return max(0.0, (now - moment).total_seconds()) if moment else None


def wal_details(status: WalStatus) -> Table:
    """How archiving stands, for a person."""
    archiver, archive, newest = status.archiver, status.archive, status.newest
    told = dict(status.agent.told)
    rows = [("slot", slot_line(status.slot))] if status.slot else []
    if status.is_handed:
        rows += [
            (
                "agent",
                f"version {told.get('program')}, process {told.get('pid')}, {told.get('archived')} archived"
                if status.agent.answers
                else f"NONE ({status.agent.said})",
            ),
            ("waiting", "not shown to this role" if archiver.ready is None else _waiting(status)),
            ("archiver", f"{archiver.archived} archived, {archiver.failed} failed"),
        ]
    if status.is_handed and archiver.last_failed_at:
        rows.append(
            ("last failure", f"{archiver.last_failed}, {show_age(archiver.last_failed_at, status.at)}")
        )
    if archive and newest:
        name = newest.segment.name(archive.segment_bytes)
        rows.append(("newest", f"{name}, {show_age(newest.archived_at, status.at)}"))
    if archive and status.lag_bytes is not None:
        behind = f"{show_bytes(status.lag_bytes or 0)}, {show_seconds(status.lag_s or 0.0)}"
        rows.append(("behind", f"{behind} (the server is at {archiver.lsn}, timeline {archiver.timeline})"))
    rows += [("PROBLEM", line) for line in status.problems]
    return two_columns([(name, show_line(value)) for name, value in rows])


def _waiting(status: WalStatus) -> str:
    oldest = status.archiver.oldest_ready_at
    return f"{status.archiver.ready} files" + (
        f", the oldest {show_age(oldest, status.at)}" if oldest else ""
    )


def bases_table(backups: Sequence[BaseBackup], now: datetime) -> Table:
    """The base backups, newest first, a line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("BASE BACKUP", "AGE", "SIZE", "CLUSTER SIZE", "TOOK", "VERDICT", "NOTE"):
        table.add_column(column, no_wrap=True, justify="right" if "SIZE" in column else "left")
    known = by_id(backup.manifest for backup in backups)
    for backup in backups:
        manifest = backup.manifest
        notes, alarms = remarks(backup, known)
        table.add_row(
            Text(str(backup.id)),
            show_age(manifest.stopped_at, now),
            show_bytes(manifest.size_bytes),
            show_bytes(manifest.combined_bytes),
            show_seconds(manifest.duration_s),
            show_verdict(backup.verdict),
            Text(show_line(", ".join(notes + alarms)), style="bold red" if alarms else ""),
        )
    return table


def base_record(backup: BaseBackup) -> dict[str, object]:
    """One base backup as JSON for scripts; times ISO 8601 in UTC, sizes in bytes."""
    manifest = backup.manifest
    return {
        "kind": "base backup",
        "id": str(backup.id),
        "cluster": backup.id.database,
        "parent": str(manifest.parent) if manifest.parent else None,
        "started_at": manifest.started_at.isoformat(),
        "stopped_at": manifest.stopped_at.isoformat(),
        "start_lsn": str(manifest.start.lsn),
        "end_lsn": str(manifest.end.lsn),
        "timeline": manifest.end.timeline,
        "system_identifier": manifest.system_identifier,
        "server_version": manifest.server_version_text,
        "size_bytes": manifest.size_bytes,
        "source_bytes": manifest.source_bytes,
        "cluster_bytes": manifest.combined_bytes,
        "duration_s": manifest.duration_s,
        "from_standby": manifest.from_standby,
        "page_checksums": manifest.page_checksums,
        "page_checksums_wrong": manifest.page_checksums_wrong,
        "pinned": backup.pinned,
        "verdict": str(backup.verdict),
        "proof": proof_values(backup.proof) if backup.proof else None,
        "last_attempt": proof_values(backup.last_attempt) if backup.last_attempt else None,
        "notes": list(manifest.notes),
    }


def base_details(backup: BaseBackup, where: str, now: datetime) -> Table:
    """Everything of one base backup that helps to decide whether to recover from it."""
    manifest = backup.manifest
    kind = "standby" if manifest.from_standby else "primary"
    checked = "none" if not manifest.page_checksums else "WRONG" if manifest.page_checksums_wrong else "right"
    rows: list[tuple[str, str]] = [
        ("base backup", str(backup.id) + (", pinned" if backup.pinned else "")),
        ("taken", f"{manifest.stopped_at:%Y-%m-%d %H:%M:%S} UTC, {show_age(manifest.stopped_at, now)}"),
        *(
            [("incremental", f"what changed since {manifest.parent}; a recovery needs both")]
            if manifest.parent
            else []
        ),
        ("size", f"{show_bytes(manifest.size_bytes)}, of a cluster of {show_bytes(manifest.combined_bytes)}"),
        ("server", f"PostgreSQL {manifest.server_version_text}, {kind}, system {manifest.system_identifier}"),
        ("WAL", f"from {manifest.start} to {manifest.end}, in the archive"),
        ("page checksums", checked),
        *(("tablespace", f"{item.oid}  {item.location}") for item in manifest.tablespaces),
        *(("note", note) for note in manifest.notes),
        ("verdict", _verdict(backup, now)),
        *(("WRONG", line) for line in (backup.proof.differences if backup.proof else ())),
        *(
            ("object", f"{item.name}  {show_bytes(item.size_bytes)}  sha256 {item.sha256}")
            for item in manifest.objects
        ),
        ("stored", f"{where}/{base_prefix(backup.id)}"),
    ]
    return two_columns(rows)


def windows_table(found: Sequence[ClusterWindows]) -> Table:
    """What can be recovered of each cluster, in words."""
    return two_columns(
        [
            (f"{each.cluster} can be recovered to" if not number else "", show_line(line))
            for each in found
            for number, line in enumerate(each.lines)
        ]
    )


def windows_record(found: ClusterWindows) -> dict[str, object]:
    """What can be recovered of a cluster, as JSON for scripts; times ISO 8601 in UTC, sizes in bytes."""
    return {
        "kind": "recovery windows",
        "cluster": found.cluster,
        "at": found.at.isoformat(),
        "wanted_s": found.wanted.total_seconds(),
        "met": found.is_met,
        "windows": [
            {
                "timeline": each.timeline,
                "from": each.from_at.isoformat(),
                "from_lsn": str(each.from_lsn),
                "to": each.to_at.isoformat(),
                "to_lsn": str(each.to_lsn),
                "base_backups": [str(base) for base in each.bases],
            }
            for each in found.found.windows
        ],
        "gaps": [gap.names(found.segment_bytes) for gap in found.found.gaps],
        "segments": found.segments,
        "stored_bytes": found.stored_bytes,
        "newest_at": found.newest_at.isoformat() if found.newest_at else None,
        "problems": list(found.problems),
    }


def _verdict(backup: BaseBackup, now: datetime) -> str:
    if backup.unreadable_verdict:
        return f"cannot be read: {backup.unreadable_verdict}"
    proof = backup.proof
    return f"{proof.verdict}, by a drill {show_age(proof.at, now)}" if proof else "no drill began with it yet"
