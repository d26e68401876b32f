"""Swap a copy of a live database back into its place: plan and show, then do.

Called by cli.py and by Dagster's undo job; restore.py names the command that undoes its swap. Which
copies there are, and the swap itself, are engines/postgres/swap.py's.
"""

import contextlib
import shlex
import time
from dataclasses import dataclass
from datetime import datetime

from backup_pipeline.actions.protected import Clock, Protected
from backup_pipeline.actions.report import Report
from backup_pipeline.actions.target import PROGRAM, database_names, maintenance, sessions_in, size_of
from backup_pipeline.engines.postgres import swap
from backup_pipeline.engines.postgres.endpoint import Endpoint, without_secrets
from backup_pipeline.engines.postgres.server import Connection, connect, server_errors
from backup_pipeline.engines.postgres.swap import CopyKind, DatabaseCopy
from backup_pipeline.errors import Refused
from backup_pipeline.units import show_bytes, show_count, show_line, show_seconds

_WAS = {
    CopyKind.BEFORE: "put aside by a restore",
    CopyKind.UNDONE: "put aside by an undo",
    CopyKind.FINISHED: "restored, and not swapped in",
}


@dataclass(frozen=True)
class UndoRequest:
    """What the operator asked for; the defaults swap back what the last restore put aside."""

    into: str = ""  # the live database; "": the configured one
    to: Endpoint | None = None  # another server; None: the one of restore_dsn
    copy: str = ""  # the copy to swap in; "": the one that the last swap put aside
    confirm: str = ""  # the live database's name once more, typed
    program: tuple[str, ...] = PROGRAM  # what begins the commands that are told


@dataclass(frozen=True)
class Plan:
    """An undo that may be carried out; `lines` are for the operator to read first."""

    request: UndoRequest
    target: Endpoint  # the maintenance database of the server
    live: str
    copy: DatabaseCopy
    replaces: bool  # whether a database bears the live name now
    lines: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(show_line(line) for line in self.lines))


@dataclass(frozen=True)
class UndoResult:
    """What an undo came to."""

    database: str  # the name that the copy bears now
    kept_as: str  # the name of the database that it replaced; "" when none was
    took_s: float
    lines: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(show_line(line) for line in self.lines))


def name_to_confirm(protected: Protected, request: UndoRequest) -> str:
    """The name of the live database, which is to be typed. Raises ConfigError when it is not known."""
    return request.into or protected.source().database


def plan(protected: Protected, request: UndoRequest, *, clock: Clock) -> Plan:
    """Look at the server, change nothing, and say what would be swapped with what.

    Raises BackupNotFound when there is no such copy; Refused when the name was not typed, when the role
    may not swap, or when the last swap was undone already; ConfigError, ServerError.
    """
    live = name_to_confirm(protected, request)
    target = maintenance(request.to or protected.target())
    with (
        contextlib.closing(connect(target, purpose="undo")) as session,
        server_errors(target, f"cannot look for copies of {live}"),
    ):
        there = database_names(session)
        copy = swap.choose_copy(live, swap.copies_of(live, there), request.copy)
        for name in (copy.name, *([live] if live in there else [])):
            swap.check_swap(target, session, name)
        lines = _lines(target, session, live, copy, replaces=live in there, now=clock())
    if request.confirm != live:
        typed = f"found {request.confirm!r}" if request.confirm else "nothing was typed"
        raise Refused(
            f"swapping {live} on {target.shown} with {copy.name} is not confirmed: {typed}",
            hint=f"Type {live} to confirm.",
        )
    return Plan(request, target, live, copy, live in there, lines)


def carry_out(protected: Protected, planned: Plan, *, clock: Clock, report: Report) -> UndoResult:
    """Swap as planned; what was live meanwhile is kept under another name.

    Raises Refused, Busy, ServerError; both databases then have the names that they had, but for
    OutcomeUnknown, which names what each may be called.
    """
    target, live, copy, begun_s = planned.target, planned.live, planned.copy, time.monotonic()
    said = f"{live} is now the database that was {_WAS[copy.kind]} at {copy.at:%Y-%m-%dT%H:%M:%SZ}"
    if not planned.replaces:
        swap.publish(target, copy.name, live)
        return UndoResult(live, "", time.monotonic() - begun_s, (said,))
    report.say(f"swapping: {copy.name} becomes {live}")
    kind = CopyKind.UNDONE if copy.kind is CopyKind.BEFORE else CopyKind.BEFORE
    kept = new_copy_name(target, live, kind, clock())
    done = swap.swap(target, live, copy.name, kept, wait_s=protected.config.lock_timeout.total_seconds())
    request = planned.request
    lines = (
        said,
        f"what was live meanwhile is now called {kept}; drop it when nobody needs it",
        *swap_back_lines(protected, live, kept, to=request.to, program=request.program),
        f"{show_count(done.sessions_ended, 'session')} ended; new ones waited {show_seconds(done.held_s)}",
        *done.left_behind,
    )
    return UndoResult(live, kept, time.monotonic() - begun_s, lines)


def new_copy_name(target: Endpoint, live: str, kind: CopyKind, at: datetime) -> str:
    """A name for a copy of `live` that is free on the server. Raises ServerError."""
    return swap.copy_name(live, kind, at, databases_of(target))


def databases_of(target: Endpoint) -> tuple[str, ...]:
    """The names of the server's databases. Raises ServerError."""
    with (
        contextlib.closing(connect(target, purpose="undo")) as session,
        server_errors(target, "cannot list the databases"),
    ):
        return database_names(session)


def swap_back_lines(
    protected: Protected, live: str, copy: str, *, to: Endpoint | None, program: tuple[str, ...]
) -> tuple[str, ...]:
    """Say the whole command that swaps `copy` into the place of `live`; no secret is in it."""
    command, note = command_to_swap_in(protected, live, copy, to=to, program=program)
    return (f"`{command}` swaps it back{note}",)


def command_to_swap_in(
    protected: Protected, live: str, copy: str, *, to: Endpoint | None, program: tuple[str, ...]
) -> tuple[str, str]:
    """The whole command that swaps `copy` into the place of `live`, and what is to be said beside it.

    A server is named as it was given; a password in it is left out, and that is said.
    """
    words, note = [*program, "undo", protected.name, "--into", live, "--copy", copy], ""
    if to is not None:
        shown = without_secrets(to.dsn)
        known = shown == to.dsn and to.password is None
        note = "" if known else " (its password is not shown: give it in PGPASSWORD)"
        words += ["--to", shown]
    return shlex.join(words), note


def _lines(
    target: Endpoint, session: Connection, live: str, copy: DatabaseCopy, *, replaces: bool, now: datetime
) -> tuple[str, ...]:
    size_bytes = size_of(session, copy.name)
    size = "its size is not known" if size_bytes is None else show_bytes(size_bytes)
    age = show_seconds(max(0.0, (now - copy.at).total_seconds()))
    kind = CopyKind.UNDONE if copy.kind is CopyKind.BEFORE else CopyKind.BEFORE
    then = f"then: it becomes {live}, a name that no database has now"
    if replaces:
        then = (
            f"then: {live} becomes {live}_{kind}_<time>, which stays, and the copy becomes {live}; "
            f"{show_count(sessions_in(session, live), 'session')} to be ended"
        )
    return (
        f"server: {target.shown}",
        f"copy: {copy.name}, {_WAS[copy.kind]} at {copy.at:%Y-%m-%dT%H:%M:%SZ}, {age} ago; {size}",
        then,
    )
