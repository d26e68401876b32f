"""What an incremental base backup builds on, what breaks that, and what the next one may build on."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from backup_pipeline.domain.base_backup import BaseManifest, WalPoint
from backup_pipeline.domain.base_chain import Server, by_id, chain_of, unfit_parent
from backup_pipeline.domain.wal import Lsn, TimelineHistory, TimelineSwitch
from backup_pipeline_tests.domain.values import SOURCE, base_manifest

SEGMENT = 16 * 1024 * 1024


def link(hour: int, parent: BaseManifest | None = None, **changes: Any) -> BaseManifest:
    """Taken at that hour, in the segment of that number."""
    made = base_manifest(at=datetime(2026, 3, 1, 2, tzinfo=UTC) + timedelta(hours=hour))
    point = WalPoint(1, Lsn(hour * SEGMENT + 40))
    made = replace(made, start=point, end=replace(point, lsn=Lsn(hour * SEGMENT + 4096)))
    return replace(made, parent=parent.id if parent else None, **changes)


WHOLE = link(1)
ONE = link(2, WHOLE)
TWO = link(3, ONE)


def broken(wanted: BaseManifest, known: Sequence[BaseManifest]) -> str:
    return chain_of(wanted, by_id(known)).broken


def test_a_chain_goes_back_to_a_whole_one() -> None:
    chain = chain_of(TWO, by_id([TWO, link(9), ONE, WHOLE]))
    assert chain.links == (WHOLE, ONE, TWO)
    assert (chain.last, chain.incremental, chain.broken) == (TWO, True, "")
    assert chain.size_bytes == 3 * WHOLE.size_bytes
    assert chain.read_bytes == 3 * WHOLE.source_bytes
    alone = chain_of(WHOLE, {})
    assert (alone.links, alone.incremental, alone.broken) == ((WHOLE,), False, "")


def test_a_link_that_is_missing_or_does_not_fit_breaks_it() -> None:
    assert broken(TWO, [TWO, WHOLE]) == f"{ONE.id}, which {TWO.id} builds on, is not there"
    assert broken(TWO, [TWO, ONE]) == f"{WHOLE.id}, which {ONE.id} builds on, is not there"
    assert "is of another system, 7" in broken(ONE, [replace(WHOLE, system_identifier="7")])
    assert "is of another major version" in broken(ONE, [replace(WHOLE, server_version=180001)])
    late = replace(WHOLE, end=WalPoint(1, Lsn(ONE.start.lsn.value + 1)))
    assert "after the beginning of" in broken(ONE, [late])
    assert "after the beginning of" in broken(ONE, [replace(WHOLE, end=replace(WHOLE.end, timeline=2))])


def test_a_circle_ends() -> None:
    ring = [replace(WHOLE, parent=TWO.id), ONE, TWO]
    assert "is not there" in broken(TWO, ring) or "after the beginning" in broken(TWO, ring)
    same = replace(WHOLE, parent=WHOLE.id)
    assert "is not there" in broken(same, [same])


SERVER = Server(SOURCE.system_identifier, 17, TimelineHistory(1), link(9).started_at)
PROMOTED = TimelineHistory(2, (TimelineSwitch(1, Lsn(3 * SEGMENT)),))


@pytest.mark.parametrize(
    ("server", "parent", "reason"),
    [
        (SERVER, TWO, ""),
        (replace(SERVER, history=PROMOTED), ONE, ""),
        (replace(SERVER, history=PROMOTED), TWO, "does not lead to timeline 2"),
        (SERVER, replace(TWO, end=replace(TWO.end, timeline=2)), "does not lead to timeline 1"),
        (replace(SERVER, system_identifier="7"), TWO, "of another system"),
        (replace(SERVER, major=18), TWO, "of another major version, 17.10"),
        (SERVER, replace(TWO, page_checksums_wrong=True), "damaged pages"),
        (SERVER, link(4, link(8)), "is not there"),
        (replace(SERVER, now=TWO.id.taken_at), TWO, ""),
        (replace(SERVER, now=ONE.id.taken_at), TWO, "dated later than the server's clock"),
    ],
)
def test_what_the_next_one_can_build_on(server: Server, parent: BaseManifest, reason: str) -> None:
    said = unfit_parent(chain_of(parent, by_id([WHOLE, ONE])), server)
    assert (reason in said) if reason else not said


def test_a_failed_drill_anywhere_in_the_chain_asks_for_a_whole_one() -> None:
    chain = chain_of(TWO, by_id([WHOLE, ONE]))
    assert unfit_parent(chain, SERVER, failed={WHOLE.id}) == f"a drill of {WHOLE.id} failed"
    assert not unfit_parent(chain, SERVER, failed={link(9).id})


def test_damaged_pages_anywhere_in_the_chain_ask_for_a_whole_one() -> None:
    damaged = replace(WHOLE, page_checksums_wrong=True)
    assert "damaged pages" in unfit_parent(chain_of(TWO, by_id([damaged, ONE])), SERVER)
