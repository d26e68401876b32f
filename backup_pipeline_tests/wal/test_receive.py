"""WAL that is received through a slot: nothing is acknowledged that is not there, whoever dies or is away."""

import random

import pytest

from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.receive_box import SEGMENT_BYTES, ReceiveBox, a_receive_box

SEGMENTS = 2  # so many have to be whole, or the load came to nothing
BIN_DIRS = {"15": servers.bin_dir_15, "17": servers.bin_dir_17}


@pytest.mark.parametrize(
    ("version", "kills"),
    [
        ("15", 1),
        ("17", 2),
        pytest.param("15", 20, marks=pytest.mark.slow),
        pytest.param("17", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_under_load_it_loses_nothing(version: str, kills: int) -> None:
    with a_receive_box(BIN_DIRS[version]()) as server:
        _kill_and_compare(server, kills)


def _kill_and_compare(server: ReceiveBox, kills: int) -> None:
    pauses = random.Random(7)
    with server.load():
        for _ in range(kills):
            with server.receiving() as child:
                seen = server.confirmed()
                wait_until(lambda seen=seen: server.confirmed() > seen)  # type: ignore[misc]
                wait_until(lambda: pauses.random() < 0.02)
                server.kill(child)
            server.assert_acknowledged_is_there()
        wait_until(lambda: server.position().value // SEGMENT_BYTES > SEGMENTS + 1)
    end = server.position()
    with server.receiving() as child:
        server.await_archived(end)
        child.terminate()
        assert child.wait(60) == 0, server.log
    server.assert_acknowledged_is_there()
    listing = server.listing()
    assert listing.gaps() == ()
    assert len(listing.numbers(1)) > SEGMENTS
    assert [each.segment.number for each in listing.partials] == [listing.numbers(1)[-1] + 1]
