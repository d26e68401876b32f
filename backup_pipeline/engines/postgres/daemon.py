"""A server that outlives us: started by pg_ctl, as PostgreSQL's own user would, and stopped by it.

Called for a recovered cluster that goes on running, and for one that becomes production. Servers that end
with us are cluster.py's.
"""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.engines.postgres.cluster import server_in
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command, Identity

LOG = "log/backup-pipeline.log"
"""Below the data directory: what the server says before its own logging begins."""

_SLACK_S = 30.0
_TAIL_LINES = 6


@dataclass(frozen=True)
class Address:
    """Where a running server listens, as its postmaster.pid says."""

    port: int
    socket_folder: str  # "" when it has none; absolute
    host: str  # what it listens on by TCP; "" for nothing


def start_argv(pg_ctl: str, data: Path, *, timeout_s: int) -> tuple[str, ...]:
    """The command that starts it, and waits until it takes sessions."""
    return (
        pg_ctl,
        "start",
        f"--pgdata={data}",
        f"--log={data / LOG}",
        "--wait",
        f"--timeout={timeout_s}",
        "--silent",
    )


def stop_argv(pg_ctl: str, data: Path, *, timeout_s: int) -> tuple[str, ...]:
    """The command that ends it in order: sessions are ended, all is written."""
    return (pg_ctl, "stop", f"--pgdata={data}", "--mode=fast", "--wait", f"--timeout={timeout_s}", "--silent")


def start(pg_ctl: str, data: Path, *, owner: Identity | None, timeout_s: int = 120) -> Address:
    """Start the server of a data directory; it goes on when we end. Raises ToolError with its last words."""
    log = data / LOG
    if not log.parent.exists():
        log.parent.mkdir(mode=0o700)
        if owner is not None:
            os.chown(log.parent, owner.uid, owner.gid)
    command = Command(start_argv(pg_ctl, data, timeout_s=timeout_s), identity=owner, cwd="/")
    try:
        process.run(command, timeout_s=timeout_s + _SLACK_S)
    except ToolError as error:
        error.detail["server"] = _last_lines(log)
        raise
    found = address(data)
    if found is None:
        raise ToolError(f"the server in {data} ended right after its start", detail={"log": str(log)})
    return found


def stop(pg_ctl: str, data: Path, *, owner: Identity | None, timeout_s: int = 120) -> None:
    """Stop the server of a data directory, if one runs. Raises ToolError."""
    if server_in(data) is not None:
        command = Command(stop_argv(pg_ctl, data, timeout_s=timeout_s), identity=owner, cwd="/")
        process.run(command, timeout_s=timeout_s + _SLACK_S)


def address(data: Path) -> Address | None:
    """Where the server of a data directory listens; None when none runs.

    Source: PostgreSQL, "Database File Layout": postmaster.pid.
    """
    if server_in(data) is None:
        return None
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        folder = lines[4].strip()
        return Address(int(lines[3]), str(data / folder) if folder else "", lines[5].strip())
    return None


def is_free(port: int) -> bool:
    """Whether nothing listens on that port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _last_lines(log: Path) -> str:
    with contextlib.suppress(OSError), log.open("rb") as file:
        return "\n".join(process.tail(file).splitlines()[-_TAIL_LINES:])
    return ""
