"""What the UI says about clusters: descriptions, metadata, tables. Pure; decides nothing.

As in words.py: metadata comes as numbers, which Dagster plots under labels that are always the same, and in
words.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import dagster as dg

from backup_pipeline.actions.recover import RecoverResult
from backup_pipeline.actions.wal_look import WalLook
from backup_pipeline.actions.windows import ClusterWindows
from backup_pipeline.config import ClusterConfig, StoreConfig
from backup_pipeline.domain import layout
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseBackup, BaseManifest
from backup_pipeline.domain.base_chain import by_id, remarks
from backup_pipeline.domain.drill import Drill, summary
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.orchestration.words import MIB, NOTHING, Metadata, age, list_tables, table, when
from backup_pipeline.units import show_bytes, show_seconds


def base_description(cluster: ClusterConfig, store: StoreConfig) -> str:
    """What the page of a cluster's base backups says."""
    name = cluster.name
    between = f"; {when(cluster.incremental_cron)}, what has changed" if cluster.incremental_cron else ""
    return f"""Base backup of the cluster {name}, taken {when(cluster.base_backup_cron)}{between}.

- **Where**: `{store.url}/{layout.bases_prefix(name)}`, as standard `pg_basebackup` archives
- **What for**: a recovery begins with one, and replays the WAL behind it
- **Listed** only once the WAL that it needs is in the archive
- **Drilled** {_drilled(cluster)}: a random second is recovered into scratch and looked into;
  `rpo_s` and `rto_s` are what it measured
- **Take one now**: Materialize, which drills too; with Dagster down: `backup-pipeline base-backup {name}`
- **Recover**: launch `recover_cluster`; with Dagster down: `backup-pipeline recover {name} --to … --into …`
"""


def _drilled(cluster: ClusterConfig) -> str:
    return when(cluster.drill_cron) if cluster.drill_cron else "when somebody asks for it"


def wal_description(cluster: ClusterConfig, store: StoreConfig, every_s: int) -> str:
    """What the page of a cluster's WAL says."""
    name, window = cluster.name, show_seconds(cluster.recovery_window.total_seconds())
    return f"""WAL archive of the cluster {name}: from when to when any moment can be recovered.

- **Wanted**: any moment of the last {window}
- **Looked at** every {every_s // 60} minutes by the sensor, without a run; Materialize looks now
- **lag_s**: what would be lost with the server, in seconds; where it does not answer, the most that it may be
- **Where**: `{store.url}/{layout.wal_archive_prefix(name)}`
- **On PostgreSQL's machine**: `backup-pipeline wal status {name}` asks the agent too
- **Recover**: launch `recover_cluster`; with Dagster down: `backup-pipeline recover {name} --to … --into …`
"""


def list_description(cluster: ClusterConfig, store: StoreConfig) -> str:
    """What the page of a cluster's list of backups says."""
    window = show_seconds(cluster.recovery_window.total_seconds())
    return f"""All base backups of the cluster {cluster.name} in the store, once it was pruned.

- **Kept**: what any moment of the last {window} needs, with its WAL; what is pinned; the newest proven one
- **Look without deleting**: launch `prune_cluster`, which shows its plan by default
- **Where**: `{store.url}`; the records there are the truth, this table is a copy of what they said
- **With Dagster down**: `backup-pipeline list {cluster.name}`
"""


def base_metadata(backup: BaseBackup, store_url: str) -> Metadata:
    """What is shown, and plotted, of a published base backup."""
    manifest = backup.manifest
    return {
        "backup_id": str(backup.id),
        "taken_at": dg.MetadataValue.timestamp(manifest.stopped_at),
        "size": show_bytes(manifest.size_bytes),
        "duration": show_seconds(manifest.duration_s),
        "cluster_size": show_bytes(manifest.combined_bytes),
        **({"incremental": f"what changed since {manifest.parent}"} if manifest.parent else {}),
        "server": _server(manifest),
        "wal": f"from {manifest.start} to {manifest.end}, in the archive",
        "page_checksums": _checksums(manifest),
        "stored_in": f"{store_url}/{layout.base_prefix(backup.id)}",
        "recover_with": f"backup-pipeline recover {backup.id.database} --base {backup.id} --to … --into …",
        **base_numbers(manifest),
        **list_tables(notes=manifest.notes),
    }


def _server(manifest: BaseManifest) -> str:
    role = "a standby" if manifest.from_standby else "the primary"
    return f"PostgreSQL {manifest.server_version_text}, {role}, system {manifest.system_identifier}"


def _checksums(manifest: BaseManifest) -> str:
    if not manifest.page_checksums:
        return "the cluster has none"
    return "WRONG: the source is damaged" if manifest.page_checksums_wrong else "all right"


def base_numbers(manifest: BaseManifest) -> Metadata:
    """The plotted numbers."""
    waited_s = (manifest.finished_at - manifest.stopped_at).total_seconds()
    return {
        "size_bytes": manifest.size_bytes,
        "duration_s": round(manifest.duration_s, 3),
        "throughput_mib_s": round(manifest.source_bytes / MIB / max(manifest.duration_s, 0.001), 3),
        "wal_wait_s": round(max(0.0, waited_s), 3),
    }


def bases_table(backups: Sequence[BaseBackup], now: datetime) -> dg.TableMetadataValue:
    """The base backups that exist, newest first."""
    known = by_id(backup.manifest for backup in backups)
    rows = [
        (
            backup.id.stamp,
            age(now - backup.manifest.stopped_at),
            show_bytes(backup.manifest.size_bytes),
            show_bytes(backup.manifest.combined_bytes),
            show_seconds(backup.manifest.duration_s),
            _note(backup, known),
        )
        for backup in backups
    ]
    return table(("base backup", "age", "size", "cluster size", "took", "note"), rows)


def _note(backup: BaseBackup, known: Mapping[BackupId, BaseManifest]) -> str:
    notes, alarms = remarks(backup, known)
    return ", ".join(notes + alarms) or NOTHING


def wal_metadata(found: WalLook) -> Metadata:
    """What is shown, and plotted, of a cluster's WAL."""
    windows, current = found.windows, found.windows.current
    length_s = (current.to_at - current.from_at).total_seconds() if current else 0.0
    return {
        "recoverable": in_words(windows),
        "windows": windows_table(windows),
        "lag": show_seconds(found.lag_s) if found.lag_s is not None else "nothing was archived yet",
        "server": _asked(found),
        "stored_size": show_bytes(windows.stored_bytes),
        "looked_at": dg.MetadataValue.timestamp(windows.at),
        **({"lag_s": round(found.lag_s, 3)} if found.lag_s is not None else {}),
        **({"newest_age_s": round(found.newest_age_s, 3)} if found.newest_age_s is not None else {}),
        "window_s": round(length_s, 3),
        "segments": windows.segments,
        "stored_bytes": windows.stored_bytes,
        "gaps": len(found.missing),
        **list_tables(missing=found.missing),
    }


def in_words(windows: ClusterWindows) -> str:
    """The newest window in a sentence."""
    if windows.current is None:
        return "NO MOMENT can be recovered"
    more = len(windows.found.windows) - 1
    span = f"from {_second(windows.current.from_at)} to about {_second(windows.current.to_at)} UTC"
    return f"any moment {span}" + (f"; and {more} older, below" if more else "")


def windows_table(windows: ClusterWindows) -> dg.TableMetadataValue:
    """From when to when, newest first."""
    rows = [
        (
            _second(each.from_at),
            _second(each.to_at),
            show_seconds((each.to_at - each.from_at).total_seconds()),
            str(each.timeline),
        )
        for each in windows.found.windows
    ]
    return table(("from (UTC)", "to about (UTC)", "length", "timeline"), rows)


def _second(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d\u00a0%H:%M:%S}"


def _asked(found: WalLook) -> str:
    if found.status is None:
        return f"cannot be asked: {found.unasked}"
    role = "standby" if found.status.server.in_recovery else "primary"
    archiver = found.status.archiver
    return f"{role} on timeline {archiver.timeline}, at {archiver.lsn}; {archiver.failed} failures to archive"


def recovered_metadata(result: RecoverResult, said: str) -> Metadata:
    """What a recovery came to."""
    recovered = result.recovered
    return {
        "result": said,
        "into": str(result.into),
        "last_transaction": show_moment(recovered.last_commit_at),
        "replayed_to": str(recovered.replayed_to),
        "timeline": recovered.timeline,
        "unpack_s": round(result.unpack_s, 3),
        "replay_s": round(result.replay_s, 3),
    }


def drill_numbers(drill: Drill) -> Metadata:
    """The plotted numbers: what would have been lost, and what the recovery took."""
    numbers = {"rpo_s": drill.loss_s, "rto_s": drill.recovery_s}
    return {name: round(value, 3) for name, value in numbers.items() if value is not None}


def drill_metadata(drill: Drill) -> Metadata:
    """What a check, and a drill's run, show of a drill. Lists are tables, as of a proof."""
    return {
        "drill": str(drill.id),
        "verdict": str(drill.verdict),
        "target": show_moment(drill.target_at) if drill.target_at else NOTHING,
        "began_with": str(drill.base or NOTHING),
        "segments": drill.segments,
        "drilled_on": drill.by,
        **drill_numbers(drill),
        **list_tables(differences=drill.differences, checked=drill.checked, notes=drill.notes),
    }


def drill_sentence(drill: Drill) -> str:
    """A drill in one line, for a check's description and a failure's first line."""
    return summary(drill) + (f": {drill.differences[0]}" if drill.differences else "")
