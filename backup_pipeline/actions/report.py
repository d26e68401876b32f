"""How an action tells what it does while it runs.

Actions call a `Report`; cli.py makes it a progress bar or plain lines, orchestration/ makes it
Dagster's log. No action prints.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from backup_pipeline.units import show_bytes, show_seconds


@dataclass(frozen=True)
class Progress:
    """Where a long step is: bytes so far, of how many if that can be estimated, and since when."""

    step: str
    done_bytes: int
    total_bytes: int | None
    elapsed_s: float

    @property
    def share(self) -> float | None:
        """Done over total, between 0 and 1; None when nobody knows."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else None

    def __str__(self) -> str:
        rate = self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0
        share = "" if self.share is None else f", about {self.share:.0%}"
        return (
            f"{self.step}: {show_bytes(self.done_bytes)} in {show_seconds(self.elapsed_s)} "
            f"({show_bytes(rate)}/s{share})"
        )


class Report(Protocol):
    """Takes what an action says. Both may be called from several threads."""

    def say(self, line: str) -> None:
        """One fact or decision, at once."""
        ...

    def progress(self, progress: Progress) -> None:
        """Where a step is; called often, shown every few seconds."""
        ...


class Lines:
    """A Report that hands on a line for each fact, and for progress one every few seconds."""

    def __init__(self, write: Callable[[str], object], *, every_s: float = 5.0) -> None:
        self._write = write
        self._every_s = every_s
        self._shown_s: dict[str, float] = {}

    def say(self, line: str) -> None:
        """Hand on the line."""
        self._write(line)

    def progress(self, progress: Progress) -> None:
        """Hand on a line when the last one of this step is old enough."""
        last = self._shown_s.get(progress.step, 0.0)
        if progress.elapsed_s < last:
            last = 0.0
        if progress.elapsed_s - last >= self._every_s:
            self._shown_s[progress.step] = progress.elapsed_s
            self._write(str(progress))


def timed(report: Report, step: str) -> Callable[[int, int], None]:
    """What takes (bytes so far, bytes in total) and reports it as the progress of `step` from now on."""
    begun_s = time.monotonic()

    def tell(done_bytes: int, total_bytes: int) -> None:
        report.progress(Progress(step, done_bytes, total_bytes or None, time.monotonic() - begun_s))

    return tell
