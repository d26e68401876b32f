"""Receiving, of values: where it begins, what is said and told, and what is wrong with a slot."""

import contextlib
import struct
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from backup_pipeline.config import ReceiveConfig
from backup_pipeline.domain.wal import Lsn, TimelineHistory, TimelineSwitch, WalGap, WalSegment
from backup_pipeline.domain.wal_archive import ArchivedPartial, ArchivedSegment, ArchiveListing
from backup_pipeline.domain.wal_receiving import Beginning, archived_until, beginnings, lowest_hole
from backup_pipeline.domain.wal_stream import Keepalive, WalData, read_message, status_update
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.replication import Session
from backup_pipeline.engines.postgres.slots import SlotLook, SlotStatus
from backup_pipeline.engines.postgres.wal_stream import WalStream
from backup_pipeline.errors import ServerError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.wal import receive
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.receive import ReceiveOptions, Receiver
from backup_pipeline.wal.shipping import Shipping
from backup_pipeline_tests.wal.segments import MIB, SYSTEM
from backup_pipeline_tests.wal.test_status import CLUSTER, GOOD, setting

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
FORKED = TimelineHistory(2, (TimelineSwitch(1, Lsn(7 * MIB + 100)),))


def listing(whole: dict[int, list[int]], parts: tuple[tuple[int, int], ...] = ()) -> ArchiveListing:
    found = {
        timeline: tuple(ArchivedSegment(WalSegment(timeline, n), 1, AT, "") for n in numbers)
        for timeline, numbers in whole.items()
    }
    shipped = tuple(ArchivedPartial(WalSegment(*each), 1, AT) for each in parts)
    return ArchiveListing("main", SYSTEM, MIB, found, partials=shipped)


@pytest.mark.parametrize(
    ("there", "history", "expected"),
    [
        (listing({}), TimelineHistory(1), None),
        (listing({1: [3, 4]}), TimelineHistory(1), WalSegment(1, 5)),
        (listing({1: [3, 4]}, ((1, 5),)), TimelineHistory(1), WalSegment(1, 5)),
        (listing({}, ((1, 5),)), TimelineHistory(1), WalSegment(1, 5)),
        (listing({1: [5, 6]}, ((1, 7),)), FORKED, WalSegment(1, 7)),  # whose rest is on timeline 2
        (listing({1: [5, 6], 2: [7]}), FORKED, WalSegment(2, 8)),
        (listing({1: [5, 6, 7, 8]}), FORKED, WalSegment(1, 7)),  # 7 and 8 are of a branch that was left
        (listing({2: [5, 6]}), TimelineHistory(1), None),
    ],
)
def test_the_archive_ends_where_the_way_to_the_servers_timeline_does(
    there: ArchiveListing, history: TimelineHistory, expected: WalSegment | None
) -> None:
    assert archived_until(there, history) == expected


def test_a_receiver_begins_at_the_slot_or_at_the_end_of_the_archive_before_it() -> None:
    slot = WalSegment(1, 9)
    by_slot = Beginning(1, Lsn(9 * MIB))
    for archived in (None, WalSegment(1, 9), WalSegment(1, 12)):
        assert beginnings(slot, archived, segment_bytes=MIB) == (by_slot,)
    first, second = beginnings(slot, WalSegment(1, 7), segment_bytes=MIB)
    assert first == Beginning(1, Lsn(7 * MIB))
    assert second.start == by_slot.start
    assert second.gap == "000000010000000000000007 to 000000010000000000000008"
    assert beginnings(slot, WalSegment(1, 8), segment_bytes=MIB)[1].gap == "000000010000000000000008"


def test_behind_a_new_slot_a_hole_among_the_last_segments_is_read_again_or_named() -> None:
    there, slot = listing({1: [1, 2, 3, 4, 6, 7, 8]}), WalSegment(1, 9)
    hole = lowest_hole(there, TimelineHistory(1), within=10)
    assert hole == WalGap(1, 5, 5)
    archived = archived_until(there, TimelineHistory(1))
    first, second = beginnings(slot, archived, segment_bytes=MIB, hole=hole)
    assert first == Beginning(1, Lsn(5 * MIB))
    assert second == Beginning(1, Lsn(9 * MIB), "000000010000000000000005")
    assert lowest_hole(there, TimelineHistory(1), within=2) is None
    for whole in ([], [3], [3, 4, 5]):
        assert lowest_hole(listing({1: whole}), TimelineHistory(1), within=10) is None


def test_messages_are_what_the_protocol_says() -> None:
    data = memoryview(b"w" + struct.pack(">QQq", 0x1_0000_0010, 0x2_0000_0000, 5) + b"abc")
    assert read_message(data) == WalData(Lsn(0x1_0000_0010), b"abc")
    assert read_message(memoryview(b"k" + struct.pack(">Qq?", 7, 5, True))) == Keepalive(Lsn(7), asks=True)
    with pytest.raises(ServerError, match="unknown kind"):
        read_message(memoryview(b"k\x00"))
    at = datetime(2000, 1, 1, 0, 0, 1, tzinfo=UTC)
    said = status_update(received=Lsn(9), durable=Lsn(4), at=at, ask=True)
    assert said == b"r" + struct.pack(">QQQq?", 9, 4, 0, 1_000_000, True)


def test_a_server_that_goes_on_after_it_asked_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "_LET_GO_S", -1.0)  # at once
    archive = WalArchive(DirectoryStore(tmp_path), "main")
    receiver = Receiver(
        archive, lambda: Endpoint("host=nowhere"), ReceiveOptions("ours", 3600.0), lambda: AT, print
    )
    shipping = Shipping(archive, SYSTEM, MIB, 3600.0, print)
    with contextlib.closing(shipping):
        shipping.begin(1, Lsn(4 * MIB))
        pump = receive._Pump(receiver, WalStream(cast(Session, None)), shipping, threading.Event())
        pump._take(Keepalive(Lsn(4 * MIB), asks=True))
        pump._take(WalData(Lsn(4 * MIB), b"abc" * 100))
        pump._look_after()
        pump._take(Keepalive(Lsn(4 * MIB + 300), asks=True))
        with pytest.raises(ServerError, match=r"asked for .*WAL up to 0/40012C is not archived"):
            pump._look_after()


SLOT = SlotStatus("ours", True, Lsn(6 * MIB), "reserved", None, 0)
RECEIVED = replace(
    GOOD,
    cluster=replace(CLUSTER, receive=ReceiveConfig("ours")),
    archiving=setting(archive_mode="off", archive_command=""),
    slot=SlotLook(SLOT, -1),
    agent=replace(GOOD.agent, answers=False),
)


def looked(status: SlotStatus | None, limit: int = -1) -> tuple[str, ...]:
    return replace(RECEIVED, slot=SlotLook(status, limit)).problems


def test_a_cluster_that_is_received_needs_no_archive_command() -> None:
    assert RECEIVED.problems == ()
    assert RECEIVED.lag_bytes == 0
    both = replace(RECEIVED, archiving=GOOD.archiving)
    assert [line.split(":")[0] for line in both.problems] == ["no agent"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (None, "no slot of ours"),
        (replace(SLOT, active=False), "no receiver reads"),
        (replace(SLOT, wal_status="lost"), "is a GAP"),
        (replace(SLOT, confirmed=None), "--accept-gap"),
        (replace(SLOT, wal_status="unreserved"), "raise max_slot_wal_keep_size"),
        (
            replace(SLOT, wal_status="extended", kept_bytes=90 * MIB),
            "no limit (max_slot_wal_keep_size is -1)",
        ),
    ],
)
def test_what_is_wrong_with_a_slot_is_said(status: SlotStatus | None, said: str) -> None:
    (problem,) = looked(status)
    assert said in problem


def test_the_room_that_a_slot_has_is_said() -> None:
    (problem,) = looked(replace(SLOT, wal_status="extended", kept_bytes=90 * MIB, safe_bytes=10 * MIB), 100)
    assert "10.0 MiB more before it is lost" in problem


def test_a_receiver_that_does_not_keep_up_is_told_and_what_it_has_yet_to_read_is_no_gap() -> None:
    behind = replace(SLOT, confirmed=Lsn(3 * MIB))
    late = replace(RECEIVED, slot=SlotLook(behind, -1), at=AT + timedelta(hours=1))
    (problem,) = late.problems
    assert "before the server" in problem
    holes = replace(late, at=RECEIVED.at, archive=listing({1: [2, 4]}))
    assert holes.gaps == ()
    assert replace(holes, slot=SlotLook(SLOT, -1)).gaps != ()
