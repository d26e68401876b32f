"""PostgreSQL's write-ahead log as values: positions, timelines, file names, histories, gaps. Pure.

Names and numbers are PostgreSQL's own. What lies in an archive, and where, is in domain/layout.py; which
moments can be recovered, in domain/recovery_window.py.

Source: PostgreSQL, "WAL Internals" and "Continuous Archiving", `xlog_internal.h` for the names of files.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from backup_pipeline.errors import ConfigError, Corrupt

_LSN = re.compile(r"(?P<high>[0-9A-Fa-f]{1,8})/(?P<low>[0-9A-Fa-f]{1,8})")
_NAME = re.compile(
    r"(?P<timeline>[0-9A-F]{8})(?:(?P<history>\.history)|(?P<log>[0-9A-F]{8})(?P<segment>[0-9A-F]{8})"
    r"(?:\.(?P<offset>[0-9A-F]{8})\.backup|(?P<partial>\.partial))?)"
)
_PER_LOG = 0x1_0000_0000
_HISTORY_LINE = re.compile(r"(?P<timeline>\d+)\s+(?P<lsn>[0-9A-Fa-f]+/[0-9A-Fa-f]+)(?:\s+(?P<reason>.*))?")
# xlp_magic, xlp_info, xlp_tli, xlp_pageaddr, xlp_rem_len, padding, xlp_sysid, xlp_seg_size, xlp_xlog_blcksz
_LONG_HEADER = struct.Struct("<HHIQI4xQII")
_IS_LONG = 0x0002
HEADER_BYTES = _LONG_HEADER.size
"""So many first bytes of a segment `read_segment_header` needs."""


@dataclass(frozen=True, order=True)
class Lsn:
    """A position in the write-ahead log: a count of bytes from its beginning."""

    value: int

    def __str__(self) -> str:
        return f"{self.value >> 32:X}/{self.value & 0xFFFFFFFF:X}"

    @classmethod
    def parse(cls, text: str) -> "Lsn":
        """Read PostgreSQL's `16/B374D848`. Raises ConfigError for anything else."""
        match = _LSN.fullmatch(text)
        if match is None:
            raise ConfigError(f"not an LSN: {text!r}", hint="An LSN looks like 16/B374D848.")
        return cls(int(match["high"], 16) << 32 | int(match["low"], 16))


class WalKind(StrEnum):
    """What PostgreSQL hands to archive_command."""

    SEGMENT = "segment"
    PARTIAL = "partial"  # the last segment of a timeline that ended in it
    LABEL = "label"  # a base backup's history file, `.backup`
    HISTORY = "history"  # where a timeline came from


@dataclass(frozen=True, order=True)
class WalSegment:
    """One segment of one timeline: the `number`-th, counted from the beginning of the log."""

    timeline: int
    number: int

    def name(self, segment_bytes: int) -> str:
        """The file's name, 24 hexadecimal digits."""
        per_log = _PER_LOG // segment_bytes
        return f"{self.timeline:08X}{self.number // per_log:08X}{self.number % per_log:08X}"

    def start(self, segment_bytes: int) -> Lsn:
        """Where it begins."""
        return Lsn(self.number * segment_bytes)

    def end(self, segment_bytes: int) -> Lsn:
        """Where the next one begins."""
        return Lsn((self.number + 1) * segment_bytes)

    @classmethod
    def holding(cls, timeline: int, lsn: Lsn, segment_bytes: int) -> "WalSegment":
        """The segment that `lsn` lies in."""
        return cls(timeline, lsn.value // segment_bytes)

    @classmethod
    def before(cls, timeline: int, lsn: Lsn, segment_bytes: int) -> "WalSegment":
        """The segment that holds the byte before `lsn`: the last that must be there to reach it."""
        return cls(timeline, max(0, lsn.value - 1) // segment_bytes)


@dataclass(frozen=True)
class WalName:
    """The name of a file in pg_wal that may be archived."""

    text: str
    kind: WalKind
    timeline: int
    log: int = 0  # the middle 8 digits of a segment's name
    segment: int = 0  # its last 8

    def number(self, segment_bytes: int) -> int:
        """Which segment of its timeline it is, or belongs to. Raises ConfigError when there is none such."""
        per_log = _PER_LOG // segment_bytes
        if self.kind is WalKind.HISTORY or self.segment >= per_log:
            raise ConfigError(f"{self.text} names no segment of {segment_bytes} bytes")
        return self.log * per_log + self.segment


def parse_wal_name(text: str) -> WalName:
    """Read the name of a segment, `.partial`, `.backup` or `.history`, exactly. Raises ConfigError."""
    match = _NAME.fullmatch(text)
    if match is None or int(match["timeline"], 16) == 0:
        raise ConfigError(
            f"not a WAL file's name: {text!r}",
            hint="archive_command passes %p; names have 24 hexadecimal digits, or 8 and .history.",
        )
    timeline = int(match["timeline"], 16)
    if match["history"]:
        return WalName(text, WalKind.HISTORY, timeline)
    kind = WalKind.LABEL if match["offset"] else WalKind.PARTIAL if match["partial"] else WalKind.SEGMENT
    return WalName(text, kind, timeline, int(match["log"], 16), int(match["segment"], 16))


@dataclass(frozen=True)
class SegmentHeader:
    """What a segment's first page says of it."""

    timeline: int
    start: Lsn
    system_identifier: str
    segment_bytes: int


def read_segment_header(data: bytes, name: str) -> SegmentHeader:
    """The header in a segment's first HEADER_BYTES, as a little-endian server wrote it. Raises Corrupt."""
    if len(data) < HEADER_BYTES:
        raise Corrupt(f"{name} is too short for a WAL segment: {len(data)} bytes")
    _magic, info, timeline, address, _left, system, segment_bytes, _page = _LONG_HEADER.unpack_from(data)
    if not info & _IS_LONG or not is_segment_size(segment_bytes):
        raise Corrupt(
            f"{name} does not begin like a WAL segment",
            hint="It was cut, overwritten, or comes from a machine of another byte order.",
        )
    return SegmentHeader(timeline, Lsn(address), str(system), segment_bytes)


def is_segment_size(size_bytes: int) -> bool:
    """Whether PostgreSQL's segments may be of this size: a power of two from 1 MiB to 1 GiB."""
    return 1 << 20 <= size_bytes <= 1 << 30 and size_bytes & (size_bytes - 1) == 0


def check_segment(name: WalName, header: SegmentHeader, *, size_bytes: int, system_identifier: str) -> None:
    """Raise Corrupt unless a segment's header agrees with its name, its size and its cluster.

    A segment that was recycled, cut, renamed, or is another cluster's is found here. The page of a timeline's
    first segment may still say the timeline before.
    """
    wrong = ""
    if header.system_identifier != system_identifier:
        wrong = f"it is of cluster {header.system_identifier}, not of {system_identifier}"
    elif size_bytes != header.segment_bytes and name.kind is WalKind.SEGMENT:
        wrong = f"it has {size_bytes} bytes, and its header says {header.segment_bytes}"
    elif header.start != Lsn(name.number(header.segment_bytes) * header.segment_bytes):
        wrong = f"its header says that it begins at {header.start}"
    elif header.timeline > name.timeline:
        wrong = f"its header says timeline {header.timeline}"
    if wrong:
        raise Corrupt(
            f"{name.text} is not the segment that its name says: {wrong}",
            hint="Look at pg_wal and at what runs there; nothing was archived.",
        )


@dataclass(frozen=True)
class TimelineSwitch:
    """A timeline that this one descends from, and where it was left."""

    timeline: int
    end: Lsn
    reason: str = ""


@dataclass(frozen=True)
class TimelineHistory:
    """Where a timeline came from; `ancestors` from the oldest on. Timeline 1 has none."""

    timeline: int
    ancestors: tuple[TimelineSwitch, ...] = ()

    def timeline_at(self, lsn: Lsn) -> int:
        """Which timeline the byte at `lsn` belongs to, on the way to this one."""
        return next((switch.timeline for switch in self.ancestors if lsn < switch.end), self.timeline)

    def comes_by(self, timeline: int, lsn: Lsn) -> bool:
        """Whether what was written up to `lsn` on `timeline` belongs to this history."""
        if timeline == self.timeline:
            return True
        return any(each.timeline == timeline and lsn <= each.end for each in self.ancestors)

    def segments(self, start: Lsn, end: Lsn, segment_bytes: int) -> Iterable[WalSegment]:
        """The segments that a replay from `start` to `end` reads, in order.

        The segment in which a timeline was left is read from the later timeline, which begins with a copy
        of it.
        """
        first, last = start.value // segment_bytes, max(start.value, end.value - 1) // segment_bytes
        for number in range(first, last + 1):
            final = Lsn(min((number + 1) * segment_bytes, max(end.value, start.value + 1)) - 1)
            yield WalSegment(self.timeline_at(final), number)


def parse_history(timeline: int, data: bytes) -> TimelineHistory:
    """Read a `.history` file. Raises Corrupt."""
    ancestors: list[TimelineSwitch] = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _HISTORY_LINE.fullmatch(line.strip())
        if match is None:
            raise Corrupt(f"the history of timeline {timeline} cannot be read in line {number}: {line!r}")
        found = TimelineSwitch(int(match["timeline"]), Lsn.parse(match["lsn"]), match["reason"] or "")
        if ancestors and (found.timeline <= ancestors[-1].timeline or found.end < ancestors[-1].end):
            raise Corrupt(f"the history of timeline {timeline} goes back in line {number}: {line!r}")
        ancestors.append(found)
    if ancestors and ancestors[-1].timeline >= timeline:
        raise Corrupt(f"the history of timeline {timeline} names {ancestors[-1].timeline} as its origin")
    return TimelineHistory(timeline, tuple(ancestors))


@dataclass(frozen=True)
class WalGap:
    """Missing segments of one timeline, `first` to `last` inclusive, between others that are there."""

    timeline: int
    first: int
    last: int

    def names(self, segment_bytes: int) -> str:
        """`A`, or `A to B`."""
        ends = [WalSegment(self.timeline, number).name(segment_bytes) for number in (self.first, self.last)]
        return ends[0] if self.first == self.last else f"{ends[0]} to {ends[1]}"


def find_gaps(timeline: int, numbers: Sequence[int]) -> tuple[WalGap, ...]:
    """The gaps between the segments `numbers` of one timeline, in any order, in the order of the log."""
    ordered = sorted(set(numbers))
    return tuple(
        WalGap(timeline, before + 1, after - 1) for before, after in pairwise(ordered) if after > before + 1
    )
