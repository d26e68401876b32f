"""What a receiver does with parts of a segment that another life of it, or another history, archived."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline.domain.wal import Lsn, parse_wal_name
from backup_pipeline.domain.wal_stream import NOWHERE
from backup_pipeline.errors import Refused
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.listing import read_archive
from backup_pipeline.wal.partials import push_partial
from backup_pipeline.wal.shipping import Shipping
from backup_pipeline_tests.wal.box import begin
from backup_pipeline_tests.wal.segments import MIB, SYSTEM, DataDirectory, segment

NAME = parse_wal_name("000000010000000000000004")
START = Lsn(4 * MIB)


class Recording(DirectoryStore):
    """Remembers what was settled."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.settled: list[str] = []

    def settle(self, key: str) -> None:
        self.settled.append(key)
        super().settle(key)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    (tmp_path / "store").mkdir()
    made = DirectoryStore(tmp_path / "store")
    begin(made)
    return made


def part(store: DirectoryStore, data: DataDirectory, content: bytes, length: int) -> str:
    with data.put("spool", content).open("rb") as file:
        return push_partial(WalArchive(store, "main"), NAME, file, SYSTEM, length=length)


@contextlib.contextmanager
def begun(store: DirectoryStore, said: list[str] | None = None, start: Lsn = START) -> Iterator[Shipping]:
    """A receiver's new life, at the beginning of the segment."""
    log = (said if said is not None else []).append
    shipping = Shipping(WalArchive(store, "main"), SYSTEM, MIB, 0.0, log)
    with contextlib.closing(shipping):
        shipping.begin(1, start)
        yield shipping


def parts(store: DirectoryStore) -> list[str]:
    prefix = "clusters/main/"
    return [info.key for info in store.list(prefix) if ".partial" in info.key]


@pytest.mark.parametrize("length", [60_000, MIB])
def test_a_part_of_another_history_is_neither_confirmed_nor_deleted(
    store: DirectoryStore, data: DataDirectory, length: int
) -> None:
    key = part(store, data, segment(4), 50_000)
    with begun(store) as shipping:
        with pytest.raises(Refused, match="with other bytes than the server has"):  # noqa: PT012
            shipping.write(START, segment(4, seed=1)[:length])
            shipping.finish(10.0)
        assert shipping.durable == NOWHERE
    assert parts(store) == [key]
    assert read_archive(store, "main").segments == {}


@pytest.mark.parametrize("length", [60_000, MIB])
def test_a_part_that_the_server_goes_on_from_is_confirmed_and_replaced(
    store: DirectoryStore, data: DataDirectory, length: int
) -> None:
    key = part(store, data, segment(4), 50_000)
    with begun(store) as shipping:
        shipping.write(START, segment(4)[:40_000])
        shipping.tick()
        assert shipping.durable == NOWHERE
        shipping.write(Lsn(START.value + 40_000), segment(4)[40_000:length])
        assert shipping.finish(10.0)
        assert shipping.durable == Lsn(START.value + length)
    assert key not in parts(store)
    assert len(parts(store)) == (length < MIB)


def test_neither_is_one_of_a_segment_that_comes_later(store: DirectoryStore, data: DataDirectory) -> None:
    """As when the slot that was put back stood before the segment that was parted."""
    key = part(store, data, segment(4), 50_000)
    with begun(store, start=Lsn(3 * MIB)) as shipping:
        shipping.write(Lsn(3 * MIB), segment(3) + segment(4, seed=1))
        with pytest.raises(Refused, match="with other bytes than the server has"):
            shipping.finish(10.0)
        assert shipping.durable <= START
    assert parts(store) == [key]


def test_a_part_of_an_earlier_life_is_durable_before_it_is_confirmed(
    tmp_path: Path, store: DirectoryStore, data: DataDirectory
) -> None:
    key = part(store, data, segment(4), 50_000)
    recording = Recording(tmp_path / "store")
    with begun(recording):
        assert recording.settled == [key]


def test_parts_that_cannot_be_used_stay_beside_the_whole(store: DirectoryStore, data: DataDirectory) -> None:
    keys = {part(store, data, segment(4, seed=seed), 50_000) for seed in (1, 2)}
    said: list[str] = []
    with begun(store, said) as shipping:
        shipping.write(START, segment(4)[:60_000])
        assert shipping.finish(10.0)
        assert len(parts(store)) == 3
        shipping.write(Lsn(START.value + 60_000), segment(4)[60_000:])
        assert shipping.finish(10.0)
    assert set(parts(store)) == keys
    assert read_archive(store, "main").numbers(1) == (4,)
    assert any("cannot be used, and stays" in line for line in said)
