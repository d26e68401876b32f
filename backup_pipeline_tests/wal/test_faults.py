"""Agents that are killed at each request to the store, and stores that fail: nothing is lost or untrue."""

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from backup_pipeline.config import StoreConfig
from backup_pipeline.errors import StoreError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import open_store
from backup_pipeline.wal.archive import Pushed, WalArchive
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.listing import read_archive
from backup_pipeline_tests.servers.s3 import S3Server
from backup_pipeline_tests.storage.peers import Fault, Request, proxy, refusing, silent
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.box import WalBox, begin
from backup_pipeline_tests.wal.segments import DataDirectory, segment

TIMEOUT_S = 2.0


def place_at(server: S3Server, endpoint: str, prefix: str, timeout_s: float = 20.0) -> StoreConfig:
    """A store on `server`, reached by another address."""
    return replace(server.store(prefix, timeout_s=timeout_s), endpoint=endpoint)


def archive_of(place: StoreConfig) -> WalArchive:
    return WalArchive(open_store(place), "main")


def begun(place: StoreConfig) -> WalArchive:
    """An archive that takes the WAL of these tests."""
    begin(open_store(place))
    return archive_of(place)


def assert_whole(place: StoreConfig, numbers: range, folder: Path) -> None:
    """These segments are there, each once, with the bytes that they had."""
    store = open_store(place)
    listed = read_archive(store, "main")
    assert listed.numbers(1) == tuple(numbers)
    assert (listed.conflicts, listed.gaps(), listed.odd) == ((), (), ())
    for number in random.Random(1).sample(list(numbers), min(10, len(numbers))):
        name = listed.segments[1][number - numbers.start].segment.name(listed.segment_bytes)
        fetch(store, "main", name, folder / "fetched")
        assert (folder / "fetched").read_bytes() == segment(number)


@pytest.mark.parametrize("step", range(5))
def test_an_agent_killed_at_any_request_loses_nothing(
    rclone: S3Server, data: DataDirectory, tmp_path: Path, step: int
) -> None:
    """Reading the record, listing, writing, listing again, and none of them: the client does it by itself."""
    prefix, victim = f"killed-{step}", [0]
    begun(rclone.store(prefix)).push(data.segment(2))  # the record is there
    lost, requests = threading.Event(), itertools.count()

    def fault(number: int, request: Request) -> Fault:
        if not lost.is_set() and victim[0] and next(requests) == step:
            lost.set()
            os.kill(victim[0], signal.SIGKILL)
            return Fault.LOST
        return Fault.NONE

    with proxy(rclone.endpoint, fault) as endpoint:
        box = WalBox(tmp_path, place_at(rclone, endpoint, prefix))
        path = data.segment(3)
        with box.agent_process() as agent:
            wait_until(lambda: "takes WAL of" in (tmp_path / "agent.log").read_text())
            victim[0] = agent.pid
            done = box.push(path)
            assert done.returncode == 0, done.stderr
            assert ("by the full program" in done.stderr) == lost.is_set()
            assert lost.is_set() == (step < 4)  # there is no fifth request
        assert_whole(box.place, range(2, 4), tmp_path)


FAULTS: dict[str, Callable[[int, Request], Fault]] = {
    "denied": lambda *_: Fault.DENIED,
    "busy": lambda *_: Fault.BUSY,
    "no write": lambda _, request: Fault.SILENT if request.method == "PUT" else Fault.NONE,
    "cut listing": lambda _, request: Fault.CUT if "list-type" in request.path else Fault.NONE,
    "lost write": lambda _, request: Fault.LOST if request.method == "PUT" else Fault.NONE,
}


@pytest.mark.parametrize("kind", [*FAULTS, "refusing", "never answering"])
def test_a_store_that_fails_is_a_failure_and_the_next_push_is_whole(
    rclone: S3Server, data: DataDirectory, tmp_path: Path, kind: str
) -> None:
    prefix = f"failing-{kind.replace(' ', '-')}"
    begun(rclone.store(prefix)).push(data.segment(2))
    path = data.segment(3)

    def refused(endpoint: str) -> None:
        with pytest.raises(StoreError):
            archive_of(place_at(rclone, endpoint, prefix, TIMEOUT_S)).push(path)

    if kind == "refusing":
        refused(refusing())
    elif kind == "never answering":
        with silent() as endpoint:
            refused(endpoint)
    else:
        with proxy(rclone.endpoint, FAULTS[kind]) as endpoint:
            refused(endpoint)
    assert archive_of(rclone.store(prefix)).push(path).already == (kind == "lost write")
    assert_whole(rclone.store(prefix), range(2, 4), tmp_path)


class Forgetful(DirectoryStore):
    """Says that it has written, and has not."""

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        """Take it, and keep nothing."""


def test_a_write_that_was_answered_and_not_kept_is_a_failure(data: DataDirectory, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    begin(DirectoryStore(tmp_path / "store"))
    with pytest.raises(StoreError, match="is not there after"):
        WalArchive(Forgetful(tmp_path / "store"), "main").push(data.segment(3))


class Halving(DirectoryStore):
    """Says that it has written, and has kept the first half."""

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        """Take it, and keep half."""
        whole = b"".join(chunks)
        half = whole[: len(whole) // 2]
        super().put(key, [half], size_hint_bytes=size_hint_bytes, storage_class=storage_class)


def test_half_an_object_is_never_acknowledged_and_made_whole_by_the_next_push(
    data: DataDirectory, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    begin(DirectoryStore(tmp_path / "store"))
    path = data.segment(3)
    for _ in range(2):  # PostgreSQL asks again
        with pytest.raises(StoreError, match=r"has \d+ bytes after \d+ bytes were written"):
            WalArchive(Halving(tmp_path / "store"), "main").push(path)
    whole = DirectoryStore(tmp_path / "store")
    assert not WalArchive(whole, "main").push(path).already
    assert WalArchive(whole, "main").push(path).already
    fetch(whole, "main", path.name, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == segment(3)


@pytest.mark.parametrize(
    "count", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_a_store_that_fails_three_times_in_ten_keeps_all_that_was_acknowledged(
    rclone: S3Server, data: DataDirectory, tmp_path: Path, count: int
) -> None:
    chosen, lock = random.Random(count), threading.Lock()
    prefix = f"flaky-{count}"
    begin(open_store(rclone.store(prefix)))

    def fault(number: int, request: Request) -> Fault:
        with lock:
            share = chosen.random()
        return Fault.BUSY if share < 0.3 else Fault.LOST if share < 0.33 else Fault.NONE

    with proxy(rclone.endpoint, fault) as endpoint:
        archive = _Counting(open_store(place_at(rclone, endpoint, prefix, 5.0)), "main")
        box = WalBox(tmp_path, place_at(rclone, endpoint, prefix, 5.0))
        names = [data.segment(number, ready=True) for number in range(1, count + 1)]
        with box.agent(archive) as agent:
            for path in names:
                tries = 0
                while True:  # as PostgreSQL does: the same file again, until it is acknowledged
                    try:
                        agent.pusher.push(path).result(timeout=60)
                        break
                    except StoreError:
                        tries += 1
                        assert tries < 20
                (data.ready / f"{path.name}.ready").unlink()
    assert_whole(rclone.store(prefix), range(1, count + 1), tmp_path)
    assert archive.calls < 2 * count  # no storm of our own


class _Counting(WalArchive):
    calls = 0

    def push(self, path: Path) -> Pushed:
        self.calls += 1
        return super().push(path)
