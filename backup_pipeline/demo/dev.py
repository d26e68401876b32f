"""`make dev`: the demo's servers, the application that writes, and Dagster's UI, until Ctrl-C.

Called by __main__.py. Uses what `make demo` left, and makes it when there is nothing.
"""

import contextlib
import os
import signal
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from subprocess import Popen

from backup_pipeline import process
from backup_pipeline.demo import filler, servers, story_recovery
from backup_pipeline.demo.place import CHECKOUT, Place, shown, sourced
from backup_pipeline.demo.servers import Servers
from backup_pipeline.demo.stage import PROGRAM, Stage
from backup_pipeline.demo.writer import Writer
from backup_pipeline.engines.postgres.cluster import free_port
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import Busy
from backup_pipeline.process import Command
from backup_pipeline.units import show_bytes

PORT = 3000
_OTHER_PORTS = 3
_PER_SECOND = 5.0
_GRACE_S = 20.0
_LEFT_BEHIND_S = 5.0
_READY_WITHIN_S = 300.0
_POLL_S = 0.2


def serve(place: Place, *, port: int | None, rows: int) -> int:
    """Serve the UI at `port`, or 3000 when that is free, or any; return dg's exit code when it ends."""
    stage = Stage(place.log)
    chosen = port or (PORT if _is_free(PORT) else free_port())
    stage.heading(f"Dagster's UI will be at {_url(chosen)}")
    with servers.running(place) as running:
        stage.variables = running.variables
        _fill_when_empty(stage, running, rows)
        story_recovery.begin(stage)
        with servers.receiving(place, running), Writer(running.application(), per_second=_PER_SECOND):
            for _ in range(_OTHER_PORTS):
                try:
                    return _serve(stage, place, running, chosen)
                except Busy:
                    if port:
                        raise
                    taken, chosen = chosen, free_port()
                    stage.say(f"Port {taken} was taken meanwhile: the UI will be at {_url(chosen)}")
            return _serve(stage, place, running, chosen)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _fill_when_empty(stage: Stage, running: Servers, rows: int) -> None:
    with contextlib.closing(connect(running.postgres.endpoint())) as session:
        query = "SELECT 1 FROM pg_catalog.pg_database WHERE datname = %s"
        exists = session.execute(query, [filler.DATABASE]).fetchone()
    if exists:
        return
    filler.create_database(running.postgres.endpoint())
    filled = filler.fill(running.database(), rows=rows, today=datetime.now(UTC).date())
    stage.say(f"{filler.DATABASE} was made: {filled.rows:,} rows, {show_bytes(filled.size_bytes)}.")


def _serve(stage: Stage, place: Place, running: Servers, port: int) -> int:
    log_path = place.folder / "dagster.log"
    argv = (servers.program("dg"), "dev", "--host", "127.0.0.1", "--port", str(port))
    # All of our environment: Dagster, and what a user adds to it, is configured by variables too.
    command = Command(argv, {**os.environ, **running.variables}, cwd=str(CHECKOUT))
    with log_path.open("wb") as log:
        child = process.start(command, stdout=log, stderr=log, parent_death_signal=signal.SIGINT)
        try:
            _await(child, command, port, log_path)
            stage.say(f"Ready: {_url(port)}   (its log: {shown(log_path)})")
            _hints(stage, place)
            return child.wait()
        finally:
            _end(child)


def _end(child: Popen[bytes], *, grace_s: float = _GRACE_S, left_behind_s: float = _LEFT_BEHIND_S) -> None:
    """End dg and what it started: its servers outlive it when it does not end in order."""
    started = _descendants(child.pid)
    process.terminate(child, grace_s=grace_s, signum=signal.SIGINT)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + left_behind_s
        while (left := [pid for pid, since in started.items() if since and _since(pid) == since]) and (
            time.monotonic() < deadline
        ):
            time.sleep(_POLL_S)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


def _descendants(pid: int) -> dict[int, str]:
    """The processes below `pid`, and since when they run: a number may be given again."""
    found: dict[int, str] = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text(encoding="utf-8").split()):
                found |= {child: _since(child), **_descendants(child)}
    return found


def _since(pid: int) -> str:
    """When the process began, in the kernel's count; "" when it has ended."""
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if after_name[0] == "Z" else after_name[19]
    return ""


def _hints(stage: Stage, place: Place) -> None:
    stage.say("In another terminal, the same by command line:")
    stage.say(f"  {sourced(place.environment)}")
    for command in (f"backup {filler.DATABASE} --tier daily", "list", f"restore {filler.DATABASE}"):
        stage.say(f"  {PROGRAM} {command}")
    stage.say('  PGPASSWORD="$DEMO_PASSWORD" psql "$DEMO_DSN"')
    stage.say("Ctrl-C stops everything; the data stays, until the next `make demo`.")


def _await(child: Popen[bytes], command: Command, port: int, log_path: Path) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while not _serves(child.pid, port):
        if not _is_free(port) and not _serves(child.pid, port):  # dg itself would not end
            raise Busy(f"port {port} was taken by another process", hint="Name another with --port.")
        if child.poll() is not None or time.monotonic() > deadline:
            with log_path.open("rb") as log:
                raise process.failure(command, child.poll(), process.tail(log), timeout_s=_READY_WITHIN_S)
        time.sleep(_POLL_S)


def _serves(pid: int, port: int) -> bool:
    """Whether this process, or one below it, listens there: somebody else may have come first."""
    lines = Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()[1:]
    fields = [line.split() for line in lines]
    listening = {f"socket:[{each[9]}]" for each in fields if (each[3], each[1][-4:]) == ("0A", f"{port:04X}")}
    for ours in (pid, *_descendants(pid)):
        for handle in Path(f"/proc/{ours}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if os.readlink(handle) in listening:
                    return True
    return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
