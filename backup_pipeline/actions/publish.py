"""Give a finished copy its name: a free one, or that of the live database, which is kept.

Called by restore.py once the copy is complete and compared. The swap itself is engines/postgres/swap.py's.
"""

from dataclasses import dataclass
from datetime import datetime

from psycopg import sql

from backup_pipeline.actions import undo
from backup_pipeline.actions.protected import Protected
from backup_pipeline.actions.report import Report
from backup_pipeline.engines.postgres import swap
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.swap import CopyKind
from backup_pipeline.errors import BackupError, OutcomeUnknown
from backup_pipeline.units import show_count, show_seconds


@dataclass(frozen=True)
class Place:
    """Where a finished copy belongs."""

    server: Endpoint  # its maintenance database
    name: str
    replaces: bool  # a database has that name, and is to be kept under another
    to: Endpoint | None  # the server, if it was named
    program: tuple[str, ...]  # what begins the commands that are told


@dataclass(frozen=True)
class Published:
    """What came of it. `kept` is the name of the database that was replaced; "" when none was."""

    kept: str = ""
    lines: tuple[str, ...] = ()


def publish(protected: Protected, place: Place, copy: str, now: datetime, report: Report) -> Published:
    """Rename the database `copy` to its name, in one step that happens whole or not at all.

    What refuses that does not cost the copy: it is kept under another name, which the error tells.
    Raises Refused, Busy, ServerError; OutcomeUnknown, when the copy may have its name.
    """
    kept = ""
    try:
        if place.replaces:
            report.say(f"swapping: {place.name} is kept under another name, its sessions are ended")
            kept = undo.new_copy_name(place.server, place.name, CopyKind.BEFORE, now)
        return _rename(protected, place, copy, kept)
    except BackupError as error:
        _keep(protected, place, copy, kept, now, error)
        raise


def _rename(protected: Protected, place: Place, copy: str, kept: str) -> Published:
    if not place.replaces:
        swap.publish(place.server, copy, place.name)
        return Published()
    wait_s = protected.config.lock_timeout.total_seconds()
    done = swap.swap(place.server, place.name, copy, kept, wait_s=wait_s)
    lines = (
        f"the database that was live is kept as {kept}",
        *undo.swap_back_lines(protected, place.name, kept, to=place.to, program=place.program),
        f"{show_count(done.sessions_ended, 'session')} ended; new ones waited {show_seconds(done.held_s)}",
        *done.left_behind,
    )
    return Published(kept, lines)


def _keep(
    protected: Protected, place: Place, copy: str, kept: str, now: datetime, error: BackupError
) -> None:
    """Rename the finished copy, so that it outlives `error`, and let that say how to go on."""
    try:
        there = undo.databases_of(place.server)
        if copy not in there and place.name in there:  # it was renamed, and only the answer was lost
            _tell_renamed(protected, place, kept, error, f"is complete, and called {place.name}")
            return
        name = undo.new_copy_name(place.server, place.name, CopyKind.FINISHED, now)
        swap.publish(place.server, copy, name)
    except BackupError as second:
        if isinstance(error, OutcomeUnknown):
            _tell_renamed(protected, place, kept, error, f"is complete, and called {place.name} or {copy}")
        else:
            error.detail["the restored copy"] = f"could not be kept: {second.message}"
        return
    command, note = undo.command_to_swap_in(protected, place.name, name, to=place.to, program=place.program)
    drop = sql.SQL("DROP DATABASE {};").format(sql.Identifier(name)).as_string()
    error.detail["the restored copy"] = f"is complete, and kept as {name}"
    told = f"Nothing has to be restored again: `{command}` swaps the copy in{note}, `{drop}` drops it."
    error.hint = f"{error.hint} {told}".strip()


def _tell_renamed(protected: Protected, place: Place, kept: str, error: BackupError, said: str) -> None:
    error.detail["the restored copy"] = said
    if kept:
        error.detail["the restored copy"] = f"{said}; what was live is then kept as {kept}"
        (line,) = undo.swap_back_lines(protected, place.name, kept, to=place.to, program=place.program)
        error.hint = f"{error.hint} If {kept} exists, the swap was made: {line}.".strip()
