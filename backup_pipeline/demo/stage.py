"""How the demo speaks, and how it runs the product: the commands that anybody would type.

Called by story.py and dev.py; knows nothing of what is shown.
"""

import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import click

from backup_pipeline import process
from backup_pipeline.errors import BackupError
from backup_pipeline.process import Command

PROGRAM = "backup-pipeline"
_GRACE_S = 5.0
_NOTHING = r"(?!)"


class DemoFailed(BackupError):
    """Something that the demo is there to show did not happen."""


class Stage:
    """Numbered steps on `out`, and commands with the lines that matter, indented.

    What a command says besides goes to `log` alone.
    """

    variables: Mapping[str, str]
    """What the commands find in their environment, beside the usual."""

    def __init__(self, log: Path, out: TextIO | None = None) -> None:
        self.variables = {}
        self._log = log
        self._out = out or sys.stdout
        self._step = 0
        self._code = 0

    def step(self, title: str) -> None:
        """Begin the next numbered step."""
        self._step += 1
        self.heading(f"{self._step}. {title}")

    def heading(self, title: str) -> None:
        """A title without a number."""
        self._write("\n" + click.style(title, bold=True))

    def say(self, line: str) -> None:
        """One line of ours."""
        self._write(f"   {line}")

    def command(self, *arguments: str, show: str = "") -> float:
        """Show a command of the product and run it as it is; return its seconds.

        Of what it says, the lines that match `show` are shown as they come. Raises DemoFailed when it fails.
        """
        return self._run(arguments, show, None)

    def ask(self, *arguments: str, show: str) -> tuple[Any, float]:
        """The same, and what the command answers to --json."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
            took_s = self._run(arguments, show, answer)
            answer.seek(0)
            return json.loads(answer.read()), took_s

    def look(self, *arguments: str) -> Any:
        """What a command answers to --json; only the log has it."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
            self._run(arguments, _NOTHING, answer, silent=True)
            answer.seek(0)
            return json.loads(answer.read())

    def _run(
        self, arguments: tuple[str, ...], show: str, answer: TextIO | None, *, silent: bool = False
    ) -> float:
        shown = f"$ {PROGRAM} {shlex.join(arguments)}"
        if not silent:
            self._write(click.style(f"   {shown}", fg="cyan"))
        started = time.monotonic()
        with self._log.open("a", encoding="utf-8") as log:
            print(shown, file=log, flush=True)
            said: list[str] = []
            argv = (sys.executable, "-m", "backup_pipeline.cli", *arguments, *(["--json"] if answer else []))
            for line in self._lines(argv, answer):
                print(line, file=log, flush=True)
                said.append(line)
                if re.search(show, line):
                    self._write(f"     {line}")
        self._raise_if_failed(shown, said)
        return time.monotonic() - started

    def _lines(self, argv: tuple[str, ...], answer: TextIO | None) -> Iterator[str]:
        """What the command writes, line by line; to standard error alone when it has an `answer` to give."""
        command = Command(argv, {**self.variables, "COLUMNS": "110", "PYTHONUNBUFFERED": "1"})
        reading, writing = os.pipe()
        with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
            try:
                stdout = writing if answer is None else answer.fileno()
                child = process.start(command, stdout=stdout, stderr=writing)
            finally:
                os.close(writing)
            try:
                yield from (line.rstrip() for line in lines)
                self._code = child.wait()
            finally:
                process.terminate(child, grace_s=_GRACE_S)

    def _raise_if_failed(self, shown: str, said: list[str]) -> None:
        if self._code != 0:
            for line in said:
                self._write(f"     {line}")
            raise DemoFailed(
                f"`{shown[2:]}` ended with exit code {self._code}", hint="Its own words are above."
            )

    def _write(self, text: str) -> None:
        click.echo(text, file=self._out)
        self._out.flush()


def expect(condition: bool, otherwise: str) -> None:
    """Go on only when `condition` holds. Raises DemoFailed saying what is wrong."""
    if not condition:
        raise DemoFailed(otherwise)
