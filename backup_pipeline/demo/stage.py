"""How the demo speaks, and how it runs the product: the commands that anybody would type.

Called by story.py and dev.py; knows nothing of what is shown.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import click

from backup_pipeline import process
from backup_pipeline.errors import BackupError
from backup_pipeline.process import Command

PROGRAM = "backup-pipeline"
_GRACE_S = 5.0


class DemoFailed(BackupError):
    """Something that the demo is there to show did not happen."""


class Stage:
    """Numbered steps on `out`, and commands with what they say, indented."""

    variables: Mapping[str, str]
    """What the commands find in their environment, beside the usual."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.variables = {}
        self._out = out or sys.stdout
        self._step = 0

    def step(self, title: str) -> None:
        """Begin the next numbered step."""
        self._step += 1
        self._write("\n" + click.style(f"{self._step}. {title}", bold=True))

    def heading(self, title: str) -> None:
        """A title without a number."""
        self._write("\n" + click.style(title, bold=True))

    def say(self, line: str = "") -> None:
        """One line of ours."""
        self._write(f"   {line}" if line else "")

    def command(self, *arguments: str) -> float:
        """Show a command of the product and run it as it is, with what it says; return its seconds.

        Raises DemoFailed when it fails.
        """
        self._write(click.style(f"   $ {PROGRAM} {shlex.join(arguments)}", fg="cyan"))
        started = time.monotonic()
        self._run(arguments)
        return time.monotonic() - started

    def ask(self, *arguments: str) -> Any:
        """What a command of the product answers to --json; not shown."""
        command = Command((*_argv(), *arguments, "--json"), self.variables)
        return json.loads(process.run(command, timeout_s=120.0).stdout)

    def _run(self, arguments: tuple[str, ...]) -> None:
        reading, writing = os.pipe()
        command = Command((*_argv(), *arguments), {**self.variables, "COLUMNS": "110"})
        with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
            try:
                child = process.start(command, stdout=writing, stderr=writing)
            finally:
                os.close(writing)
            try:
                for line in lines:
                    self._write(f"     {line.rstrip()}")
                code = child.wait()
            finally:
                process.terminate(child, grace_s=_GRACE_S)
        if code != 0:
            raise DemoFailed(
                f"`{PROGRAM} {shlex.join(arguments)}` ended with exit code {code}",
                hint="Its own words are above.",
            )

    def _write(self, text: str) -> None:
        click.echo(text, file=self._out)
        self._out.flush()


def expect(condition: bool, otherwise: str) -> None:
    """Go on only when `condition` holds. Raises DemoFailed saying what is wrong."""
    if not condition:
        raise DemoFailed(otherwise)


def _argv() -> tuple[str, ...]:
    return (sys.executable, "-m", "backup_pipeline.cli")
