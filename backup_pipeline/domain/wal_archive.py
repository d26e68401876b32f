"""A WAL archive as values: whose it is, and what lies in it. Pure.

Made by wal/identity.py and wal/listing.py, asked by recovery windows and plans. Where in the store the files
lie is domain/layout.py's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from backup_pipeline.domain.layout import parse_wal_key
from backup_pipeline.domain.sealed import Unreadable, corrupt, moment_text, open_sealed, seal
from backup_pipeline.domain.wal import (
    TimelineHistory,
    WalGap,
    WalKind,
    WalName,
    WalSegment,
    find_gaps,
    is_segment_size,
)
from backup_pipeline.errors import ConfigError

IDENTITY_KIND = "backup-pipeline wal archive"


@dataclass(frozen=True)
class ArchiveIdentity:
    """The one PostgreSQL system that may archive as `cluster`, since when, and those before it."""

    cluster: str
    system_identifier: str
    segment_bytes: int
    since: datetime
    earlier: tuple[str, ...] = ()


def identity_to_json(identity: ArchiveIdentity) -> bytes:
    """The record, sealed."""
    values = {
        "cluster": identity.cluster,
        "system_identifier": identity.system_identifier,
        "segment_bytes": identity.segment_bytes,
        "since": moment_text(identity.since),
        "earlier": list(identity.earlier),
    }
    return seal(IDENTITY_KIND, values)


def identity_from_json(data: bytes, key: str) -> ArchiveIdentity:
    """Read the record that lies at `key`. Raises Corrupt."""
    try:
        fields = open_sealed(data, IDENTITY_KIND)
        identity = ArchiveIdentity(
            cluster=fields.text("cluster"),
            system_identifier=fields.text("system_identifier"),
            segment_bytes=fields.integer("segment_bytes"),
            since=fields.moment("since"),
            earlier=fields.texts("earlier"),
        )
        if not is_segment_size(identity.segment_bytes):
            raise Unreadable(f"segment_bytes is {identity.segment_bytes}, no size of a WAL segment")
    except Unreadable as error:
        raise corrupt("record of a WAL archive", key, error) from error
    return identity


@dataclass(frozen=True)
class ListedWal:
    """One object of an archive, as a listing tells it."""

    key: str
    size_bytes: int
    archived_at: datetime


@dataclass(frozen=True)
class ArchivedSegment:
    """A segment that can be fetched; `stored_bytes` are compressed."""

    segment: WalSegment
    stored_bytes: int
    archived_at: datetime
    sha256: str


@dataclass(frozen=True)
class ArchivedPartial:
    """A segment as far as it had been written: of several objects, the one that was archived last.

    A receiver ships the segment that is being written again and again; a server leaves one where its timeline
    ended. Several of one segment are no conflict: each is the beginning of the same.
    """

    segment: WalSegment
    stored_bytes: int
    archived_at: datetime
    objects: int = 1


@dataclass(frozen=True)
class ArchiveListing:
    """What the archive of one system holds.

    `segments` are per timeline, in the order of the log. A name with several objects is in `conflicts`, not
    among them: it cannot be fetched. `partials` may lie beside the whole segment. `odd` are keys that are not
    ours, and histories that cannot be read, each with the reason.
    """

    cluster: str
    system_identifier: str
    segment_bytes: int
    segments: Mapping[int, tuple[ArchivedSegment, ...]] = field(default_factory=dict)
    histories: Mapping[int, TimelineHistory] = field(default_factory=dict)
    labels: tuple[WalName, ...] = ()
    partials: tuple[ArchivedPartial, ...] = ()
    conflicts: tuple[str, ...] = ()
    odd: tuple[tuple[str, str], ...] = ()

    @property
    def timelines(self) -> tuple[int, ...]:
        """The timelines of which there is a segment or a history."""
        return tuple(sorted(self.segments.keys() | self.histories.keys()))

    @property
    def stored_bytes(self) -> int:
        """What the segments take in the store."""
        return sum(each.stored_bytes for found in self.segments.values() for each in found)

    def numbers(self, timeline: int) -> tuple[int, ...]:
        """The numbers of a timeline's segments, in order."""
        return tuple(each.segment.number for each in self.segments.get(timeline, ()))

    def newest(self, timeline: int) -> ArchivedSegment | None:
        """The last segment of a timeline that is there."""
        return self.segments[timeline][-1] if self.segments.get(timeline) else None

    def gaps(self) -> tuple[WalGap, ...]:
        """What is missing between segments that are there, of all timelines."""
        return tuple(
            gap for timeline in sorted(self.segments) for gap in find_gaps(timeline, self.numbers(timeline))
        )


def list_archive(
    identity: ArchiveIdentity,
    system_identifier: str,
    objects: Iterable[ListedWal],
    histories: Mapping[int, TimelineHistory],
    unreadable: Sequence[tuple[str, str]] = (),
    *,
    segment_bytes: int,
) -> ArchiveListing:
    """What the `objects` under one system's prefix come to; `histories` were read, or were `unreadable`.

    `segment_bytes` is that system's; the `identity` tells it of the one that archives now.
    """
    seen: dict[str, int] = {}
    names: list[tuple[WalName, ListedWal, str]] = []
    odd = list(unreadable)
    for each in objects:
        found = parse_wal_key(each.key)
        if found is None:
            odd.append((each.key, "not a key that an archive has"))
            continue
        seen[found.name.text] = seen.get(found.name.text, 0) + 1
        names.append((found.name, each, found.sha256))
    segments: dict[int, list[ArchivedSegment]] = {}
    partials: dict[WalSegment, ArchivedPartial] = {}
    for name, each, sha256 in names:
        conflicts = name.kind is WalKind.SEGMENT and seen[name.text] > 1
        if name.kind not in (WalKind.SEGMENT, WalKind.PARTIAL) or conflicts:
            continue
        try:
            segment = WalSegment(name.timeline, name.number(segment_bytes))
        except ConfigError as error:
            odd.append((each.key, error.message))
            continue
        if name.kind is WalKind.PARTIAL:
            partials[segment] = _newer(partials.get(segment), segment, each)
            continue
        archived = ArchivedSegment(segment, each.size_bytes, each.archived_at, sha256)
        segments.setdefault(name.timeline, []).append(archived)
    kinds = {name.text: name.kind for name, _, _ in names}
    return ArchiveListing(
        cluster=identity.cluster,
        system_identifier=system_identifier,
        segment_bytes=segment_bytes,
        segments={
            timeline: tuple(sorted(found, key=lambda one: one.segment))
            for timeline, found in segments.items()
        },
        histories=dict(histories),
        labels=_named(names, WalKind.LABEL),
        partials=tuple(partials[segment] for segment in sorted(partials)),
        conflicts=tuple(
            sorted(text for text, count in seen.items() if count > 1 and kinds[text] is not WalKind.PARTIAL)
        ),
        odd=tuple(odd),
    )


def _newer(before: ArchivedPartial | None, segment: WalSegment, found: ListedWal) -> ArchivedPartial:
    if before is None:
        return ArchivedPartial(segment, found.size_bytes, found.archived_at)
    if found.archived_at < before.archived_at:
        return replace(before, objects=before.objects + 1)
    return ArchivedPartial(segment, found.size_bytes, found.archived_at, before.objects + 1)


def _named(names: Iterable[tuple[WalName, ListedWal, str]], kind: WalKind) -> tuple[WalName, ...]:
    found = {name.text: name for name, _, _ in names if name.kind is kind}
    return tuple(found[text] for text in sorted(found))
