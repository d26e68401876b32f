"""A new database takes the name of a live one, which is kept; and the way back.

Called by the restore, after the new copy is complete and checked: `publish` gives it a free name,
`swap` the name of a live database, which keeps another; `undo` swaps back. Making and filling the
new copy is restore.py's; how a rename gets past the sessions in the way is rename.py's.
"""

import contextlib
import hashlib
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg

from backup_pipeline.engines.postgres.rename import (
    NAME_BYTES,
    SWAP_PURPOSE,
    check_rights,
    find_renamable,
    rename,
    rename_session,
)
from backup_pipeline.engines.postgres.server import (
    Connection,
    Endpoint,
    advisory_lock,
    connect,
    server_errors,
)
from backup_pipeline.errors import BackupNotFound, ServerError

_STAMP = "%Y%m%dT%H%M%SZ"
_STAMPED = re.compile(r".+_(?P<word>before|undone)_(?P<stamp>\d{8}T\d{6}Z)", re.DOTALL)


@dataclass(frozen=True)
class KeptCopy:
    """The database that bore a live database's name before a swap."""

    name: str
    kept_at: datetime


@dataclass(frozen=True)
class SwapReport:
    """What a swap did. `left_behind` are sentences: what stays with the database now called `kept`."""

    live: str
    kept: str
    sessions_ended: int
    held_s: float  # for which new connections waited
    left_behind: tuple[str, ...]


def cut_name(name: str, limit_bytes: int) -> str:
    """`name`, or, when it is longer than that, as much of it as fits, ending in a digest of the whole.

    Never splits a character, and two long names with one beginning stay two.
    """
    encoded = name.encode()
    if len(encoded) <= limit_bytes:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: limit_bytes - 9].decode(errors='ignore')}~{digest}"


def kept_name(live: str, at: datetime) -> str:
    """The name that `live` gets when it is swapped out at `at`: `<live>_before_20260301T020000Z`."""
    return _stamped(live, "before", at)


def undone_name(live: str, at: datetime) -> str:
    """The name that `live` gets when its swap is undone at `at`: `<live>_undone_20260301T020000Z`."""
    return _stamped(live, "undone", at)


def _stamped(live: str, word: str, at: datetime) -> str:
    suffix = f"_{word}_{at.astimezone(UTC).strftime(_STAMP)}"
    return cut_name(live, NAME_BYTES - len(suffix)) + suffix


def kept_at(name: str, live: str) -> datetime | None:
    """When `name` was swapped out, if it is a kept copy of `live`; otherwise None."""
    match = _STAMPED.fullmatch(name)
    if match is None or match["word"] != "before":
        return None
    try:
        at = datetime.strptime(match["stamp"], _STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None
    return at if name == kept_name(live, at) else None


def kept_copies(conn: Connection, live: str) -> tuple[KeptCopy, ...]:
    """The databases that were swapped out of the name `live` and are still there, newest first."""
    names = [str(name) for (name,) in conn.execute("SELECT datname FROM pg_catalog.pg_database")]
    copies = [KeptCopy(name, at) for name in names if (at := kept_at(name, live)) is not None]
    return tuple(sorted(copies, key=lambda copy: copy.kept_at, reverse=True))


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
    sessions would not end. Whatever is raised, both names are as they were.
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


def undo(endpoint: Endpoint, live: str, at: datetime, *, wait_s: float = 0.0) -> SwapReport:
    """Give the name `live` back to its newest kept copy; what bears it now becomes `undone_name(live, at)`.

    Raises BackupNotFound when there is no kept copy, otherwise what `swap` raises.
    """
    with (
        contextlib.closing(rename_session(endpoint)) as session,
        server_errors(endpoint, "cannot list databases"),
    ):
        copies = kept_copies(session, live)
    if not copies:
        raise BackupNotFound(
            f"no kept copy of database {live} is left on this server",
            detail={"server": endpoint.shown, "looked for": kept_name(live, at)},
            hint="A swap can be undone until the copy it kept is dropped; restore an older backup instead.",
        )
    return swap(endpoint, live, copies[0].name, undone_name(live, at), wait_s=wait_s)


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
