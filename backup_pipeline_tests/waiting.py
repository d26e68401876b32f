"""Waiting for what comes about by itself, in a server, a process or a thread: no test sleeps to be right."""

import time
from collections.abc import Callable
from pathlib import Path

_PAUSE_S = 0.01


def wait_until(reached: Callable[[], bool], *, within_s: float = 80.0) -> None:
    """Return as soon as it is so, and fail when it does not become so: after three failures PostgreSQL's
    archiver alone sleeps for a minute.
    """
    deadline = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < deadline, f"waited {within_s:g} s in vain"
        time.sleep(_PAUSE_S)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
