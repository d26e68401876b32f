"""How an action tells what it does while it runs.

Actions call a `Report`; cli.py makes it a progress bar or plain lines, orchestration/ makes it
Dagster's log. No action prints.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from backup_pipeline.engines.postgres.load import LoadProgress
from backup_pipeline.units import show_bytes, show_line, show_seconds


@dataclass(frozen=True)
class Progress:
    """Where a long step is: bytes so far, of how many if that can be estimated, and since when.

    What comes in items and not in bytes has `items_done` of `items_total`.
    """

    step: str
    done_bytes: int
    total_bytes: int | None
    elapsed_s: float
    items_done: int = 0
    items_total: int = 0

    @property
    def share(self) -> float | None:
        """Done over total, between 0 and 1; None when nobody knows, or an estimate was too low."""
        done, total = (
            (self.items_done, self.items_total) if self.items_total else (self.done_bytes, self.total_bytes)
        )
        return done / total if total and done <= total else None

    def __str__(self) -> str:
        rate = self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0
        how = [f"{show_bytes(rate)}/s"] if self.done_bytes else []
        if self.items_total:
            how.append(f"item {self.items_done} of {self.items_total}")
        elif self.share is not None:
            how.append(f"about {self.share:.0%}")
        said = f" ({', '.join(how)})" if how else ""
        return f"{self.step}: {show_bytes(self.done_bytes)} in {show_seconds(self.elapsed_s)}{said}"


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
        """Hand on the line; names in it may hold anything."""
        self._write(show_line(line))

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


def loading(report: Report) -> Callable[[LoadProgress], None]:
    """What takes where a load is, and reports it as the progress of the step "restore" from now on."""
    begun_s = time.monotonic()

    def tell(seen: LoadProgress) -> None:
        elapsed_s = time.monotonic() - begun_s
        report.progress(
            Progress("restore", seen.loaded_bytes or 0, None, elapsed_s, seen.items_done, seen.items_total)
        )

    return tell
