"""Chunks come in order, and so do errors; nothing is left running."""

import threading
from collections.abc import Generator, Iterator

import pytest

from backup_pipeline.errors import Corrupt
from backup_pipeline.read_ahead import read_ahead

NAMES = [f"{number}".encode() for number in range(100)]


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_all_chunks_come_in_order() -> None:
    with read_ahead(name for name in NAMES) as chunks:
        assert list(chunks) == NAMES
    with read_ahead(name for name in NAMES[:0]) as chunks:
        assert list(chunks) == []


def test_the_next_chunk_is_brought_while_one_is_used() -> None:
    brought = [threading.Event() for _ in range(3)]

    def bring() -> Generator[bytes, None, None]:
        for event in brought:
            event.set()
            yield b"x"

    with read_ahead(bring()) as chunks:
        next(chunks)
        assert all(event.wait(20) for event in brought)


def test_an_error_comes_after_what_was_before_it() -> None:
    def bring() -> Generator[bytes, None, None]:
        yield from NAMES[:3]
        raise Corrupt("not what was written")

    got: list[bytes] = []

    def use() -> None:
        with read_ahead(bring()) as chunks:
            got.extend(chunks)

    with pytest.raises(Corrupt, match="not what was written"):
        use()
    assert got == NAMES[:3]


@pytest.mark.parametrize("used", [0, 1, 50])
def test_who_leaves_early_closes_the_producer(used: int) -> None:
    """It waits for a place then: far more is there than is kept."""
    closed = []

    def bring() -> Generator[bytes, None, None]:
        try:
            while True:
                yield b"x"
        finally:
            closed.append(threading.current_thread().name)

    def use() -> None:
        with read_ahead(bring()) as chunks:
            for _ in range(used):
                next(chunks)
            raise Corrupt("of the user")

    with pytest.raises(Corrupt, match="of the user"):
        use()
    assert closed == ["read ahead"]
