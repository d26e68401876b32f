"""Every error that an operator can meet, and the exit code that it becomes.

All layers raise these; only the entry points (cli.py, orchestration/) turn them into an exit
or a failed run. A message is one line that names the database, key or path, what was found
and what was expected; `hint` is one sentence that says what to do.
"""

from collections.abc import Mapping
from typing import ClassVar

from backup_pipeline.units import show_line


class BackupError(Exception):
    """The base of all errors of this software.

    `detail` holds facts, name to value, none of them secret. `hint` is a sentence: what to do. Names of
    people's choice stand in all three: what a terminal would obey is replaced.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, detail: Mapping[str, object] | None = None, hint: str = "") -> None:
        self.message = show_line(message)
        super().__init__(self.message)
        facts = (detail or {}).items()
        self.detail = {name: _set_in(value) if isinstance(value, str) else value for name, value in facts}
        self.hint = show_line(hint)

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  {show_line(name)}: {_set_in(str(value))}" for name, value in self.detail.items()]
        if self.hint:
            lines.append(f"HINT: {self.hint}")
        return "\n".join(lines)


def _set_in(text: str) -> str:
    """Lines below the first one are indented, so that none passes for a line of ours."""
    return "\n    ".join(show_line(line.removeprefix("    ")) for line in text.split("\n"))


class ConfigError(BackupError, ValueError):
    """The configuration, or an argument, cannot be used as it is."""

    exit_code = 3


class ServerError(BackupError):
    """A PostgreSQL server cannot be reached, or refuses what a backup or restore needs."""

    exit_code = 4
    retryable = True


class OutcomeUnknown(ServerError):
    """A server was told to change something, and whether it did could not be seen."""

    retryable = False


class ToolError(BackupError):
    """A client tool is missing, too old, or ended with an error."""

    exit_code = 4


class StoreError(BackupError):
    """The store cannot be reached, refuses, or does not answer in time."""

    exit_code = 5
    retryable = True


class ObjectNotFound(StoreError, FileNotFoundError):
    """No object has this key."""

    retryable = False


class ObjectExists(StoreError, FileExistsError):
    """Put-if-absent met an object of this key."""

    retryable = False


class ObjectArchived(StoreError):
    """The object lies in a storage class that is not read at once, GLACIER say."""

    retryable = False


class CopyUnsupported(StoreError):
    """The store cannot copy this object by itself; stream it."""

    retryable = False


class Refused(BackupError):
    """The action was not begun, because something good could be lost or nothing could be gained."""

    exit_code = 6


class Corrupt(BackupError):
    """Stored bytes are not the bytes that were written."""

    exit_code = 7


class ProofFailed(BackupError):
    """A restored backup is not equal to its source."""

    exit_code = 7


class NotProvable(BackupError):
    """The proof could not be made here: something that the backup needs is missing on this machine."""

    exit_code = 8


class BackupNotFound(BackupError, LookupError):
    """No backup matches."""

    exit_code = 9


class NotArchived(BackupNotFound):
    """A WAL archive that can be read is known not to hold this file, nor anything after it."""


class Busy(BackupError):
    """Another dump, restore or swap of the same database is running."""

    exit_code = 10
    retryable = True


EXIT_CODES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (1, "failed for a reason without a code of its own"),
    (2, "the command line was not understood"),
    (3, "the configuration or an argument cannot be used"),
    (4, "a server or a client tool failed, or is not fit"),
    (5, "the store failed, or `wal status` found something to look at"),
    (6, "refused before anything was touched"),
    (7, "a backup is corrupt, or its proof failed"),
    (8, "not proven: something is missing here, or contents were not compared though asked for"),
    (9, "no such backup or archive"),
    (10, "busy: another run holds the database or cluster"),
    (130, "aborted by Ctrl-C"),
    (143, "ended by SIGTERM"),
)
"""What each exit code of `backup-pipeline` means; the documentation is held against it by a test."""
