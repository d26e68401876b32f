"""A new database takes the name of a live one, which is kept; and the way back.

Called by the restore, after the new copy is complete and checked: `publish` gives it a free name,
`swap` the name of a live database, which keeps another. Called by the undo: `copies_of` a live
database, and which of them to swap in. Making and filling the new copy is restore.py's; how a rename
gets past the sessions in the way is rename.py's.
"""

import contextlib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

import psycopg

from backup_pipeline.domain.names import NAME_BYTES, cut_name
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import advisory_lock
from backup_pipeline.engines.postgres.rename import (
    SWAP_PURPOSE,
    check_rights,
    find_renamable,
    rename,
    rename_session,
)
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.errors import BackupNotFound, Refused, ServerError

_STAMP = "%Y%m%dT%H%M%SZ"


class CopyKind(StrEnum):
    """What a copy of a live database was when it got its name; the word is part of that name."""

    BEFORE = "before"  # live, until a swap put it aside
    UNDONE = "undone"  # live, until that swap was undone
    FINISHED = "finished"  # restored and compared, and then not swapped in


# Letters were capital once, and a name with such must be quoted in SQL.
_STAMPED = re.compile(
    rf".+_(?P<kind>{'|'.join(CopyKind)})_(?P<stamp>\d{{8}}[Tt]\d{{6}}[Zz])(?:_(?P<number>[2-9]|[1-9]\d+))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class DatabaseCopy:
    """A database that bore a live database's name, or was to bear it."""

    name: str
    kind: CopyKind
    at: datetime  # when it got this name
    number: int = 1  # beyond 1 when several got theirs in one second


@dataclass(frozen=True)
class SwapReport:
    """What a swap did. `left_behind` are sentences: what stays with the database now called `kept`."""

    live: str
    kept: str
    sessions_ended: int
    held_s: float  # for which new connections waited
    left_behind: tuple[str, ...]


def copy_name(live: str, kind: CopyKind, at: datetime, taken: Iterable[str] = ()) -> str:
    """The name of a copy of `live` made at `at`, none of those `taken`: `<live>_before_20260301t020000z`.

    Which is the newest shall be known, whatever clocks their makers have: it is never stamped below
    another copy, and a second one of the same second is numbered, whatever its kind.
    """
    copies = copies_of(live, taken)
    second = max((at.astimezone(UTC).replace(microsecond=0), *(copy.at for copy in copies)))
    number = 1 + max((copy.number for copy in copies if copy.at == second), default=0)
    return _stamped(live, kind, second.strftime(_STAMP).lower(), number)


def _stamped(live: str, kind: str, stamp: str, number: int) -> str:
    suffix = f"_{kind}_{stamp}" + (f"_{number}" if number > 1 else "")
    return cut_name(live, NAME_BYTES - len(suffix)) + suffix


def read_copy(name: str, live: str) -> DatabaseCopy | None:
    """What `name` says of itself, if it is a copy of `live`; otherwise None."""
    match = _STAMPED.fullmatch(name)
    if match is None:
        return None
    number = int(match["number"] or 1)
    try:
        at = datetime.strptime(match["stamp"].upper(), _STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None
    if name != _stamped(live, match["kind"], match["stamp"], number):
        return None
    return DatabaseCopy(name, CopyKind(match["kind"]), at, number)


def copies_of(live: str, databases: Iterable[str]) -> tuple[DatabaseCopy, ...]:
    """The copies of `live` among `databases`, newest first."""
    copies = [copy for name in databases if (copy := read_copy(name, live)) is not None]
    return tuple(sorted(copies, key=lambda copy: (copy.at, copy.number), reverse=True))


def choose_copy(live: str, copies: Iterable[DatabaseCopy], named: str = "") -> DatabaseCopy:
    """Which of the `copies`, newest first, is to be `live`: the one `named`, else the last put aside.

    Raises BackupNotFound when there is none; Refused when the last swap of `live` was undone already: a
    second undo would go further back than anybody asked for.
    """
    found = tuple(copies)
    if named:
        for copy in found:
            if copy.name == named:
                return copy
        raise BackupNotFound(
            f"{named} is no copy of database {live} on this server",
            detail={"copies": _listed(found)},
            hint="Name one of these copies; a database under another name is renamed by hand.",
        )
    swapped = [copy for copy in found if copy.kind is not CopyKind.FINISHED]
    kept = [copy for copy in swapped if copy.kind is CopyKind.BEFORE]
    if not kept:
        raise BackupNotFound(
            f"no kept copy of database {live} is left on this server",
            detail={"copies": _listed(found)},
            hint="A swap can be undone until the copy it kept is dropped; name another copy with --copy, or "
            "restore an older backup instead.",
        )
    if swapped[0].kind is CopyKind.UNDONE:
        raise Refused(
            f"the last swap of {live} was undone already, at {swapped[0].at:%Y-%m-%dT%H:%M:%SZ}",
            detail={"copies": _listed(found)},
            hint=f"To go on, name a copy with --copy: {kept[0].name} goes one swap further back, "
            f"{swapped[0].name} takes the undo back.",
        )
    return kept[0]


def _listed(copies: tuple[DatabaseCopy, ...]) -> str:
    return ", ".join(copy.name for copy in copies) or "none"


def publish(endpoint: Endpoint, new: str, name: str) -> None:
    """Rename the finished database `new` to `name`, ending whatever sessions watch it.

    `endpoint` is a database beside them. Raises Refused when `name` is taken.
    """
    with contextlib.closing(rename_session(endpoint)) as session:
        (found,) = find_renamable(endpoint, session, [new], vacant=name)
        check_rights(endpoint, session, [found])
        rename(endpoint, session, [(found, name)])


def swap(endpoint: Endpoint, live: str, new: str, kept: str, *, wait_s: float = 0.0) -> SwapReport:
    """Rename `live` to `kept` and `new` to `live`, in one transaction.

    `endpoint` is a third database of the server, such as `postgres`. Sessions in both are ended, new
    ones wait. Dumps of `live` are waited for, for `wait_s`, and kept out meanwhile. Settings, grants
    and the connection limit belong to each database, so `new` must already have its own.

    Raises Refused, with nothing touched, when a database is missing, `kept` is taken, the role lacks
    a right, or prepared transactions block it; Busy when a dump holds `live`; ServerError when
    sessions would not end. Both names are as they were then, but for OutcomeUnknown: see `rename`.
    """
    with (
        advisory_lock(endpoint, live, purpose=SWAP_PURPOSE, wait_s=wait_s, renames=True),
        contextlib.closing(rename_session(endpoint)) as session,
    ):
        old, fresh = find_renamable(endpoint, session, [live, new], vacant=kept)
        check_rights(endpoint, session, [old, fresh])
        left = left_behind(endpoint, live)
        began = time.monotonic()
        ended = rename(endpoint, session, [(old, kept), (fresh, live)])
        return SwapReport(live, kept, ended, time.monotonic() - began, left)


def check_swap(endpoint: Endpoint, session: Connection, live: str) -> None:
    """Raise Refused, with the fix, when this role could not rename `live` now."""
    check_rights(endpoint, session, find_renamable(endpoint, session, [live]))


def left_behind(endpoint: Endpoint, live: str) -> tuple[str, ...]:
    """What belongs to the database itself and would stay with the copy that a swap keeps: sentences."""
    queries = (
        (
            endpoint,
            "SELECT pg_catalog.format('replication slot %%s (%%s) belongs to the former database', slot_name,"
            " CASE WHEN active THEN 'in use' ELSE 'idle' END)"
            " FROM pg_catalog.pg_replication_slots WHERE database = %s ORDER BY slot_name",
        ),
        (
            endpoint,
            "SELECT pg_catalog.format('subscription %%s (%%s) goes on in the former database', s.subname,"
            " CASE WHEN s.subenabled THEN 'enabled' ELSE 'disabled' END)"
            " FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid"
            " WHERE d.datname = %s ORDER BY s.subname",
        ),
        (
            endpoint.with_database(live),
            "SELECT pg_catalog.format('publication %%s: its subscribers follow the former database', pubname)"
            " FROM pg_catalog.pg_publication WHERE %s <> '' ORDER BY pubname",
        ),
    )
    said: list[str] = []
    for where, query in queries:
        try:
            with contextlib.closing(connect(where, purpose=SWAP_PURPOSE)) as conn:
                said += [str(text) for (text,) in conn.execute(query.encode(), [live])]
        except (ServerError, psycopg.Error):
            said.append(f"what {where.shown} replicates could not be read")
    return tuple(said)
