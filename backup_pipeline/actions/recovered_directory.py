"""What a finished recovery leaves in its directory, and beside it: configuration, record, a running server.

Called by recover.py, when the replay was seen to be right. What is made of the directory afterwards is
promote.py's.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from backup_pipeline.actions.fetch import fetch_small
from backup_pipeline.domain.backup import ObjectRole
from backup_pipeline.domain.base_backup import CONFIGURATION_FOLDER, BaseManifest
from backup_pipeline.domain.recovered import PROMOTED_NAME, RECORD_NAME, RecoveredRecord, recovered_to_json
from backup_pipeline.engines.postgres import daemon
from backup_pipeline.engines.postgres.cluster import runs_as
from backup_pipeline.engines.postgres.recovery import CARRIED
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.errors import Refused, ToolError
from backup_pipeline.process import Identity
from backup_pipeline.storage.files import CREATE, FILE_MODE, sync_file, sync_names
from backup_pipeline.storage.store import Store
from backup_pipeline.units import show_count


def lay_carried(
    store: Store, manifest: BaseManifest, data: Path, *, owner: Identity | None
) -> tuple[str, ...]:
    """Lay out, unread, the configuration that lay outside of the source's data directory; its names.

    Raises Corrupt, StoreError.
    """
    for name in (RECORD_NAME, PROMOTED_NAME):  # the source may itself have been recovered once
        (data / name).unlink(missing_ok=True)
    names = []
    for item in manifest.of_role(ObjectRole.CONFIGURATION):
        path = data / CARRIED / item.name.removeprefix(f"{CONFIGURATION_FOLDER}/")
        for folder in (*reversed(path.relative_to(data).parents), Path()):
            _make_folder(data / folder, owner)
        write_owned(path, fetch_small(store, item), owner)
        names.append(str(path.relative_to(data)))
    return tuple(names)


def leave_record(data: Path, record: RecoveredRecord, *, owner: Identity | None) -> None:
    """Say in the directory that it was recovered, and checked; durable on return."""
    write_owned(data / RECORD_NAME, recovered_to_json(record), owner)


def _make_folder(path: Path, owner: Identity | None) -> None:
    if not path.exists():
        path.mkdir(mode=0o700)
        if owner is not None:
            os.chown(path, owner.uid, owner.gid)


def write_owned(path: Path, content: bytes, owner: Identity | None) -> None:
    """Write a file that is `owner`'s alone, or ours, in place of whatever has its name; durable on return."""
    path.unlink(missing_ok=True)
    handle = os.open(path, CREATE, FILE_MODE)
    with os.fdopen(handle, "wb") as file:
        if owner is not None:
            os.fchown(handle, owner.uid, owner.gid)
        file.write(content)
        file.flush()
        sync_file(handle)
    sync_names(path.parent)


def count_emptied(data: Path) -> int:
    """How many unlogged tables, indexes and sequences there are: each has an init fork, and is empty now.

    Source: PostgreSQL, "The Initialization Fork".
    """
    roots = (data / "base", *(data / "pg_tblspc").glob("*/PG_*"))
    return sum(1 for root in roots for _ in root.glob("*/[0-9]*_init"))


def refuse_port(port: int, tools: Tools, owner: Identity | None) -> None:
    """Raise Refused where no server could be left running on `port`."""
    if not daemon.is_free(port):
        raise Refused(f"port {port} of 127.0.0.1 is taken", hint="Name another one; nothing was touched.")
    if not runs_as(Path(tools.path("pg_ctl")), owner):
        raise Refused(
            f"the server's user cannot run {tools.path('pg_ctl')}, so none can be left running",
            hint="Install PostgreSQL where every user may read it, or run this as PostgreSQL's own user.",
        )


def leave_running(data: Path, port: int, tools: Tools, *, owner: Identity | None) -> tuple[str, ...]:
    """Start the server, on `port` of 127.0.0.1 alone, and leave it running.

    Raises ToolError: the directory stays, recovered and whole.
    """
    try:
        daemon.start(tools.path("pg_ctl"), data, owner=owner)
    except ToolError as error:
        error.detail["recovered"] = f"{data} is recovered and whole, and stays; only its server did not start"
        error.hint = f"Correct what the server says, then: {shlex.join(start_command(data, tools))}"
        raise
    quoted = shlex.quote(str(data))
    return (
        f"it runs, and listens on 127.0.0.1:{port} alone, for roles with a SCRAM password",
        f"its own user enters by its socket: psql -h {quoted} -p {port} postgres",
        f"to stop it: {tools.bin_dir}/pg_ctl -D {quoted} stop",
    )


def start_command(data: Path, tools: Tools) -> tuple[str, ...]:
    """What a person types to start the server of a recovered directory."""
    return (
        f"{tools.bin_dir}/pg_ctl",
        "-D",
        str(data),
        "-l",
        str(data.with_name(f"{data.name}.log")),
        "start",
    )


def stopped(data: Path, tools: Tools, *, owner: Identity | None) -> tuple[str, ...]:
    """The words for a server that was not asked to run."""

    def lines() -> Iterator[str]:
        if owner is not None:
            yield "owned by nobody: `chown -R` it to PostgreSQL's user first"
        yield f"to start it: {shlex.join(start_command(data, tools))}"
        yield f"its own user enters by its socket: psql -h {shlex.quote(str(data))} postgres"

    return tuple(lines())


def emptied_lines(data: Path) -> tuple[str, ...]:
    """What has to be said of unlogged tables; nothing where there are none."""
    count = count_emptied(data)
    if not count:
        return ()
    said = show_count(count, "unlogged table, index or sequence", "unlogged tables, indexes and sequences")
    return (f"warning: {said}: empty now, for WAL has none of them; pg_class names them, relpersistence 'u'",)
