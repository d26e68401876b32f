"""A recovery that was asked for, and the plan of it: what an operator reads before anything is touched.

Made by recover.py, carried out by it and by replay.py. How a target is reached is domain/recovery_route.py's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backup_pipeline.actions.bring import chain_lines
from backup_pipeline.actions.recovery_facts import RecoveryFacts
from backup_pipeline.actions.recovery_history import duration_line
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.domain.recovered import RecoveryFigures
from backup_pipeline.domain.recovery_route import Ending, Judgement
from backup_pipeline.domain.recovery_target import RecoveryTarget, show_moment
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.engines.postgres.unpack import Places, plan_places
from backup_pipeline.errors import ConfigError
from backup_pipeline.units import show_bytes, show_count, show_line

UNCONFINED = "a tablespace that was made after the base backup would be written where the source's lies"
"""What a replay could do that is not kept to its own directory."""


@dataclass(frozen=True)
class RecoverRequest:
    """What the operator asked for."""

    target: RecoveryTarget
    into: Path  # the data directory to be; it does not exist yet, or is empty
    timeline: int = 0  # 0: the newest
    base: BackupId | None = None  # None: the newest that was finished before the target
    tablespaces: Mapping[int, Path] = field(default_factory=dict)  # others go to <into>.tablespaces/<oid>
    also_write: tuple[Path, ...] = ()  # where tablespaces may be that were made after the base backup
    unconfined: bool = False  # let the replay write wherever the WAL says: not on the source's own machine
    port: int | None = None  # leave the server running, on this port of 127.0.0.1
    patience_s: float = 300.0  # how long a store that does not answer is waited for
    try_failed: bool = False  # begin also with one whose drill failed: a drill looks whether it still does


@dataclass(frozen=True)
class Plan:
    """A recovery that may be carried out; `lines` are for the operator to read first."""

    request: RecoverRequest
    manifest: BaseManifest
    judged: Judgement
    tools: Tools
    ending: Ending
    wal_bytes: int
    facts: RecoveryFacts
    known: tuple[RecoveryFigures, ...] = ()  # of earlier recoveries, newest first

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words."""
        manifest, judged, target = self.manifest, self.judged, self.request.target
        placed = self.places.tablespaces
        newest = show_moment(self.ending.newest) if self.ending.newest else "not known"
        # Which segment a moment is in is known by when each was archived, which may have been late.
        about = "" if judged.to_the_end else "about "
        wal = f"{about}{show_count(len(judged.needed), 'segment')}, {show_bytes(self.wal_bytes)} compressed"
        lines = (
            f"target: {target}",
            f"begins with: {manifest.id}, consistent at {show_moment(manifest.stopped_at)}, "
            f"{show_bytes(manifest.combined_bytes)}, PostgreSQL {manifest.server_version_text}",
            *chain_lines(self.facts.chain(manifest.id)),
            f"replays: {wal}, to timeline {judged.route.timeline}",
            f"newest that can be recovered: {newest}, LSN {judged.route.end}",
            duration_line(
                self.known,
                source_bytes=self.facts.chain(manifest.id).written_bytes,
                wal_bytes=len(judged.needed) * manifest.segment_bytes,
            ),
            f"into: {self.request.into}",
            *([f"then: runs on 127.0.0.1:{self.request.port}"] if self.request.port else []),
            *(
                f"tablespace {item.oid}, once {item.location}: {placed[item.oid]}"
                for item in manifest.tablespaces
                if item.oid in placed
            ),
            *self._remarks,
        )
        return tuple(show_line(line) for line in lines)

    @property
    def _remarks(self) -> tuple[str, ...]:
        judged, failure = self.judged, self.facts.failure(self.manifest.id)
        notes = (
            *judged.notes,
            *self.facts.notes,
            *self.facts.passed_over(judged.route, self.request.target),
            *self.manifest.notes,
        )
        return (
            *(f"note: {note}" for note in notes),
            *([f"warning: {failure}"] if failure else []),
            *([f"warning: not confined: {UNCONFINED}"] if self.request.unconfined else []),
        )

    @property
    def places(self) -> Places:
        """Where the data directory and its tablespaces go."""
        return plan_places(self.request.into, self.manifest.tablespaces, self.request.tablespaces)


def parse_tablespaces(given: Sequence[str]) -> Mapping[int, Path]:
    """Read `OID=DIRECTORY`s. Raises ConfigError."""
    found: dict[int, Path] = {}
    for text in given:
        oid, _, folder = text.partition("=")
        if not oid.isascii() or not oid.isdigit() or not folder:
            raise ConfigError(f"not a tablespace's place: {text!r}", hint="Write 16384=/srv/fast/main.")
        found[int(oid)] = Path(folder)
    return found
