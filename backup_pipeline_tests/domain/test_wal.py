"""WAL as values: positions, names, headers, histories and gaps, as PostgreSQL has them."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_pipeline.domain import layout
from backup_pipeline.domain.wal import (
    HEADER_BYTES,
    Lsn,
    TimelineHistory,
    TimelineSwitch,
    WalGap,
    WalKind,
    WalName,
    WalSegment,
    check_segment,
    find_gaps,
    parse_history,
    parse_wal_name,
    read_segment_header,
)
from backup_pipeline.errors import ConfigError, Corrupt

MIB = 1024 * 1024
SIZES = st.sampled_from([1 << power for power in range(20, 31)])
SHA = "ab" * 32
SYSTEM = "7123456789012345678"


@given(st.integers(0, 2**64 - 1))
def test_an_lsn_is_read_as_it_is_written(value: int) -> None:
    assert Lsn.parse(str(Lsn(value))) == Lsn(value)


@pytest.mark.parametrize(
    "text", ["", "0", "0/", "/0", "0/0/0", "g/0", "0/123456789", " 0/1", "0/1\n", "-1/0"]
)
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not an LSN"):
        Lsn.parse(text)


@pytest.mark.parametrize(
    ("text", "kind", "number"),
    [
        ("000000010000000000000001", WalKind.SEGMENT, 1),
        ("0000000A00000002000000FF", WalKind.SEGMENT, 2 * 256 + 255),
        ("000000010000000000000002.partial", WalKind.PARTIAL, 2),
        ("000000010000000000000002.00000028.backup", WalKind.LABEL, 2),
    ],
)
def test_names_are_read(text: str, kind: WalKind, number: int) -> None:
    name = parse_wal_name(text)
    assert (name.text, name.kind, name.number(16 * MIB)) == (text, kind, number)


def test_the_name_of_a_history_is_read() -> None:
    assert parse_wal_name("0000000B.history") == WalName("0000000B.history", WalKind.HISTORY, 11)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00000001000000000000000",
        "0000000100000000000000011",
        "00000001000000000000000a",
        "000000010000000000000001.gz",
        "000000010000000000000001.partial.partial",
        "000000010000000000000001.0000002.backup",
        "../0000000100000000000001",
        "000000010000000000000001\n",
        "00000000.history",
        "000000000000000000000001",
        "00000001.HISTORY",
        "RECOVERYXLOG",
    ],
)
def test_names_are_matched_exactly(text: str) -> None:
    with pytest.raises(ConfigError, match="not a WAL file's name"):
        parse_wal_name(text)


@given(st.integers(1, 2**32 - 1), st.integers(0, 2**32 - 1), SIZES)
def test_a_segment_s_name_is_read_back(timeline: int, number: int, size: int) -> None:
    number %= 2**64 // size
    segment = WalSegment(timeline, number)
    name = parse_wal_name(segment.name(size))
    assert (name.timeline, name.number(size)) == (timeline, number)
    assert WalSegment.holding(timeline, segment.start(size), size) == segment
    assert WalSegment.before(timeline, segment.end(size), size) == segment


def test_a_name_beyond_the_last_segment_of_a_log_names_none() -> None:
    with pytest.raises(ConfigError, match="names no segment"):
        parse_wal_name("000000010000000000000100").number(16 * MIB)


def header(timeline: int = 1, start: int = 0x3000000, system: str = SYSTEM, size: int = 16 * MIB) -> bytes:
    return struct.pack("<HHIQI4xQII", 0xD116, 2, timeline, start, 0, int(system), size, 8192)


def test_a_segment_agrees_with_its_name() -> None:
    name = parse_wal_name("000000010000000000000003")
    found = read_segment_header(header(), name.text)
    check_segment(name, found, size_bytes=16 * MIB, system_identifier=SYSTEM)
    first = parse_wal_name("000000020000000000000003")  # of a timeline that began in it
    check_segment(first, found, size_bytes=16 * MIB, system_identifier=SYSTEM)


@pytest.mark.parametrize(
    ("data", "size_bytes", "said"),
    [
        (header(system="1"), 16 * MIB, "it is of cluster 1, not of"),
        (header(), 16 * MIB - 1, "its header says 16777216"),
        (header(start=0x2000000), 16 * MIB, "it begins at 0/2000000"),
        (header(timeline=2), 16 * MIB, "timeline 2"),
    ],
)
def test_a_segment_that_is_another_is_found(data: bytes, size_bytes: int, said: str) -> None:
    name = parse_wal_name("000000010000000000000003")
    with pytest.raises(Corrupt, match=said):
        check_segment(
            name, read_segment_header(data, name.text), size_bytes=size_bytes, system_identifier=SYSTEM
        )


@pytest.mark.parametrize("data", [b"", b"\0" * HEADER_BYTES, header()[:-1], header(size=12345)])
def test_what_does_not_begin_like_a_segment_is_found(data: bytes) -> None:
    with pytest.raises(Corrupt):
        read_segment_header(data, "000000010000000000000003")


HISTORY = b"""1\t0/3000148\tno recovery target specified

2\t0/5000000\tbefore 2026-03-01 02:00:00+00
"""


def test_a_history_is_read_and_says_where_each_byte_is() -> None:
    history = parse_history(3, HISTORY)
    assert [(each.timeline, str(each.end)) for each in history.ancestors] == [
        (1, "0/3000148"),
        (2, "0/5000000"),
    ]
    assert history.timeline_at(Lsn.parse("0/3000147")) == 1
    assert history.timeline_at(Lsn.parse("0/3000148")) == 2
    assert history.timeline_at(Lsn.parse("0/5000000")) == 3


def test_a_replay_reads_the_segment_of_a_switch_from_the_later_timeline() -> None:
    history = parse_history(3, HISTORY)
    read = history.segments(Lsn.parse("0/2000028"), Lsn.parse("0/6000000"), 16 * MIB)
    assert [(each.timeline, each.number) for each in read] == [(1, 2), (2, 3), (2, 4), (3, 5)]
    only = history.segments(Lsn.parse("0/2000028"), Lsn.parse("0/3000100"), 16 * MIB)
    assert [(each.timeline, each.number) for each in only] == [(1, 2), (1, 3)]


@pytest.mark.parametrize(
    "data", [b"nonsense", b"1\t0/1\n1\t0/2\n", b"1\t0/2\n2\t0/1\n", b"3\t0/1\n", b"1 zero\n"]
)
def test_a_history_that_cannot_be_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt):
        parse_history(3, data)


def test_the_first_timeline_has_no_ancestors() -> None:
    assert parse_history(1, b"") == TimelineHistory(1)
    assert TimelineHistory(1).timeline_at(Lsn(0)) == 1
    assert TimelineSwitch(1, Lsn(5)).reason == ""


@given(st.sets(st.integers(0, 40)))
def test_gaps_are_what_is_missing_between(numbers: set[int]) -> None:
    missing = {number for gap in find_gaps(1, list(numbers)) for number in range(gap.first, gap.last + 1)}
    whole = set(range(min(numbers), max(numbers) + 1)) if numbers else set()
    assert missing == whole - numbers


def test_a_gap_is_told_by_its_names() -> None:
    assert WalGap(1, 3, 3).names(16 * MIB) == "000000010000000000000003"
    assert WalGap(1, 3, 256).names(16 * MIB) == "000000010000000000000003 to 000000010000000100000000"


@pytest.mark.parametrize(
    "text",
    [
        "000000010000000000000001",
        "000000010000000000000002.partial",
        "000000010000000000000002.00000028.backup",
        "00000002.history",
    ],
)
def test_keys_of_an_archive_are_read_both_ways(text: str) -> None:
    name = parse_wal_name(text)
    sha = "" if name.kind is WalKind.HISTORY else SHA
    key = layout.wal_key("main", SYSTEM, name, SHA)
    assert layout.parse_wal_key(key) == layout.ArchivedWal("main", SYSTEM, name, sha)
    assert key.startswith(layout.wal_name_prefix("main", SYSTEM, name))
    assert key.startswith(layout.wal_archive_prefix("main"))


def test_no_name_s_prefix_is_another_s() -> None:
    texts = ("000000010000000000000002", "000000010000000000000002.partial")
    keys = [layout.wal_key("main", SYSTEM, parse_wal_name(text), SHA) for text in texts]
    prefixes = [layout.wal_name_prefix("main", SYSTEM, parse_wal_name(text)) for text in texts]
    assert [[key.startswith(prefix) for key in keys] for prefix in prefixes] == [[True, False], [False, True]]


@pytest.mark.parametrize(
    "key",
    [
        f"clusters/main/wal-archive/{SYSTEM}/00000002/0000000100000000/000000010000000000000001-{SHA}.zst",
        f"clusters/main/wal-archive/{SYSTEM}/00000001/0000000100000001/000000010000000000000001-{SHA}.zst",
        f"clusters/main/wal-archive/{SYSTEM}/00000001/0000000100000000/000000010000000000000001-{SHA[1:]}.zst",
        f"clusters/main/wal-archive/x/00000001/0000000100000000/000000010000000000000001-{SHA}.zst",
        "clusters/main/wal-archive/1/00000002.history.zst",
        "clusters/main/wal-archive/identity.json",
        "",
    ],
)
def test_foreign_keys_are_no_wal(key: str) -> None:
    assert layout.parse_wal_key(key) is None
