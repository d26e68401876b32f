"""A folder for the demo: one that any user may enter, with a space in its path."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not there yet; gone after the test, with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="demo test ", dir="/tmp" if os.getuid() == 0 else None) as made:
        Path(made).chmod(0o755)
        yield Path(made) / ".demo"


@pytest.fixture(autouse=True, scope="package")
def heard() -> Iterator[None]:
    """A shell's job in the background ignores Ctrl-C, and so would all that its tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
