"""What a finished recovery leaves behind: the record in its directory, and its figures in the store. Pure.

The first lets `promote` know a directory that was recovered and checked; the second tells later plans how
long one takes. Where they lie is said here and in domain/layout.py; actions/ write and read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.manifest import id_from
from backup_pipeline.domain.sealed import Unreadable, corrupt, moment_text, open_sealed, seal
from backup_pipeline.domain.wal import Lsn
from backup_pipeline.errors import ConfigError

RECORD_NAME = "backup_pipeline.recovered.json"
"""The record's name in a recovered data directory, until it is promoted."""

PROMOTED_NAME = "backup_pipeline.promoted.json"
"""And afterwards."""

_RECOVERED_KIND = "backup-pipeline recovered cluster"
_FIGURES_KIND = "backup-pipeline recovery"


@dataclass(frozen=True)
class RecoveredRecord:
    """A data directory that `recover` finished: of which cluster, and what it came to."""

    cluster: str
    system_identifier: str
    base_backup: BackupId
    target: str
    source_timeline: int  # that the WAL led to
    timeline: int  # that it is on since
    replayed_to: Lsn
    recovered_at: datetime


def recovered_to_json(record: RecoveredRecord) -> bytes:
    """The record, sealed."""
    return seal(
        _RECOVERED_KIND,
        {
            "cluster": record.cluster,
            "system_identifier": record.system_identifier,
            "base_backup": str(record.base_backup),
            "target": record.target,
            "source_timeline": record.source_timeline,
            "timeline": record.timeline,
            "replayed_to": str(record.replayed_to),
            "recovered_at": moment_text(record.recovered_at),
        },
    )


def recovered_from_json(data: bytes, path: str) -> RecoveredRecord:
    """Read the record that lies at `path`. Raises Corrupt."""
    try:
        fields = open_sealed(data, _RECOVERED_KIND)
        return RecoveredRecord(
            cluster=fields.text("cluster"),
            system_identifier=fields.text("system_identifier"),
            base_backup=id_from(fields, "base_backup"),
            target=fields.text("target"),
            source_timeline=fields.integer("source_timeline", minimum=1),
            timeline=fields.integer("timeline", minimum=2),
            replayed_to=Lsn.parse(fields.text("replayed_to")),
            recovered_at=fields.moment("recovered_at"),
        )
    except (Unreadable, ConfigError) as error:
        raise corrupt("record of a recovered cluster", path, error) from error


@dataclass(frozen=True)
class RecoveryFigures:
    """How long a recovery took, and of how much."""

    cluster: str
    base_backup: BackupId
    finished_at: datetime
    source_bytes: int  # of the base backup, before compression
    segments: int  # that were replayed
    segment_bytes: int
    unpack_s: float
    replay_s: float

    @property
    def took_s(self) -> float:
        """From the first byte to the checked cluster."""
        return self.unpack_s + self.replay_s


def figures_to_json(figures: RecoveryFigures) -> bytes:
    """The record, sealed."""
    return seal(
        _FIGURES_KIND,
        {
            "cluster": figures.cluster,
            "base_backup": str(figures.base_backup),
            "finished_at": moment_text(figures.finished_at),
            "source_bytes": figures.source_bytes,
            "segments": figures.segments,
            "segment_bytes": figures.segment_bytes,
            "unpack_s": round(figures.unpack_s, 3),
            "replay_s": round(figures.replay_s, 3),
        },
    )


def figures_from_json(data: bytes, key: str) -> RecoveryFigures:
    """Read the record that lies at `key`. Raises Corrupt."""
    try:
        fields = open_sealed(data, _FIGURES_KIND)
        return RecoveryFigures(
            cluster=fields.text("cluster"),
            base_backup=id_from(fields, "base_backup"),
            finished_at=fields.moment("finished_at"),
            source_bytes=fields.integer("source_bytes"),
            segments=fields.integer("segments"),
            segment_bytes=fields.integer("segment_bytes", minimum=1),
            unpack_s=fields.seconds("unpack_s"),
            replay_s=fields.seconds("replay_s"),
        )
    except (Unreadable, ConfigError) as error:
        raise corrupt("record of a recovery", key, error) from error


def estimate(known: Sequence[RecoveryFigures], *, source_bytes: int, wal_bytes: int) -> timedelta | None:
    """How long a recovery of that much may take, by the slowest rates of the last few; None without any.

    `known` is newest first, `wal_bytes` not compressed. The slowest: a person plans a night by it.
    """
    recent = [each for each in known[:_RECENT] if each.source_bytes]
    if not recent:
        return None
    unpack_s = max(each.unpack_s / each.source_bytes for each in recent) * source_bytes
    # A short replay is a fixed cost, the server's start and checkpoint, and no rate.
    replay_s = max(
        each.replay_s / max(_LEAST_WAL_BYTES, each.segments * each.segment_bytes) for each in recent
    )
    return timedelta(seconds=unpack_s + replay_s * max(_LEAST_WAL_BYTES, wal_bytes))


_RECENT = 5
_LEAST_WAL_BYTES = 256 * 1024 * 1024
