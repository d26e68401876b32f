"""Work in a thread while a test does something else. What fails in it fails the test."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

from backup_pipeline_tests.waiting import wait_until


@contextlib.contextmanager
def meanwhile(
    work: Callable[[threading.Event], object],
    *,
    begun: Callable[[], bool] = lambda: True,
    ends_within_s: float = 90.0,
) -> Iterator[threading.Event]:
    """Let a thread `work` while the block runs, which begins when the work has `begun`.

    The event is the end: it is set when the block ends, and the block may set it earlier. What the work
    raises is raised at the end, and at once when it fails before it has begun.
    """
    ended = threading.Event()
    pool = ThreadPoolExecutor(1)
    working = pool.submit(work, ended)
    pool.shutdown(wait=False)
    try:
        wait_until(lambda: working.done() or begun())
        if working.done():
            working.result()
        yield ended
    finally:
        ended.set()
        wait([working], timeout=ends_within_s)
    working.result(timeout=0)
