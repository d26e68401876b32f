"""pg_dump and pg_dumpall: their command lines, and their output as it comes.

Called by the action that takes a dump. An iterator of this module ends only when the tool has ended
well; a consumer that publishes at the end never publishes a truncated dump. What is uploaded where,
and what a dump must equal, is decided elsewhere.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import select
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import IO, Protocol

from backup_pipeline import process
from backup_pipeline.engines.postgres.endpoint import APPLICATION, Endpoint
from backup_pipeline.engines.postgres.server import OUT_OF_LOCKS, OUT_OF_LOCKS_HINT
from backup_pipeline.engines.postgres.snapshot import DUMP_PURPOSE
from backup_pipeline.errors import ServerError, ToolError
from backup_pipeline.process import Command
from backup_pipeline.stderr import without_values

# The snapshot holds its locks already: pg_dump waits only behind somebody who waits for them, as all do then.
_LOCK_TIMEOUT_S = 5.0
_PIPE_BYTES = 1024 * 1024
_FULL_BYTES = 256 * 1024
_GATHER_S = 0.02
_CHECK_S = 5.0
_END_POLL_S = 0.02
_PATIENCE = 8
_GRACE_S = 2.0

_ERROR_BYTES = 1024 * 1024
# A worker takes its locks without waiting, and says so; the other is PostgreSQL's, of lock_timeout.
_LOCKED_OUT = re.compile("could not obtain lock on relation|canceling statement due to lock timeout")

# What pg_dump does not set itself, and what would change how it writes constants into a schema.
_OPTIONS = (
    "-c bytea_output=hex -c lc_monetary=C -c quote_all_identifiers=off"
    " -c standard_conforming_strings=on -c xmlbinary=base64"
)


class Watched(Protocol):
    """What is asked while a dump runs: a Snapshot."""

    @property
    def id(self) -> str:
        """For `pg_dump --snapshot`."""
        ...

    def check(self) -> None:
        """Raise when the dump must not go on."""
        ...

    def dump_is_working(self, *, within_s: float) -> bool:
        """Whether the server is at work for a pg_dump that is silent."""
        ...

    def contention(self) -> ServerError | None:
        """Who kept a failed pg_dump from a table, if somebody did."""
        ...


def tool_command(argv: tuple[str, ...], endpoint: Endpoint, purpose: str) -> Command:
    """`argv` with the variables that lead it to `endpoint`, seen there as `backup_pipeline <purpose>`."""
    environment = endpoint.environment()
    options = f"{environment.get('PGOPTIONS', '')} {_OPTIONS}".strip()
    ours = {
        "PGAPPNAME": f"{APPLICATION} {purpose}",
        "PGTZ": "UTC",
        "PGOPTIONS": options,
        "LC_ALL": "C",  # what it says is read
    }
    return Command(argv, environment | ours)


def dump_argv(
    pg_dump: str,
    dbname: str,
    *,
    snapshot_id: str,
    compress_option: str,
    lock_timeout_s: float,
    directory: Path | None = None,
    jobs: int = 1,
) -> tuple[str, ...]:
    """The command that dumps a database: to its standard output, or with `jobs` into a new directory.

    `compress_option` is tools.Compression's. Nothing is fsynced: the bytes are on their way to a store.
    """
    return (
        pg_dump,
        f"--dbname={dbname}",
        "--format=custom" if directory is None else "--format=directory",
        *(() if directory is None else (f"--jobs={jobs}", f"--file={directory}")),
        compress_option,
        f"--snapshot={snapshot_id}",
        f"--lock-wait-timeout={lock_timeout_s * 1000:.0f}",
        "--no-password",
        "--no-sync",
    )


def globals_argv(pg_dumpall: str, dbname: str, *, with_passwords: bool = False) -> tuple[str, ...]:
    """The command that writes roles, their settings and memberships, and tablespaces, as SQL.

    Without password hashes the role needs no right to read pg_authid.
    """
    return (
        pg_dumpall,
        f"--dbname={dbname}",
        "--globals-only",
        "--encoding=UTF8",
        "--no-password",
        *(() if with_passwords else ("--no-role-passwords",)),
    )


def dump_globals(
    pg_dumpall: str, endpoint: Endpoint, *, with_passwords: bool = False, stall_s: float = 900.0
) -> bytes:
    """Roles and tablespaces of the server, as UTF-8 SQL. Raises ToolError."""
    dbname = f"{endpoint.tool_dbname} dbname={_conninfo_value(endpoint.database)}".strip()
    argv = globals_argv(pg_dumpall, dbname, with_passwords=with_passwords)
    with process.stream(tool_command(argv, endpoint, "globals"), stall_s=stall_s) as chunks:
        return b"".join(chunks)


def _conninfo_value(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


@contextlib.contextmanager
def stream_custom(
    pg_dump: str,
    endpoint: Endpoint,
    snapshot: Watched,
    *,
    compress_option: str,
    stall_s: float = 900.0,
) -> Iterator[Iterator[bytes]]:
    """Run pg_dump in the custom format and yield its output in chunks of at most 1 MiB.

    Silence alone is no failure: after `stall_s` seconds the server is asked, and as long as it
    is at work for this pg_dump (a scan over dead rows, a slow disk), the wait goes on, up to eight
    times as long. Leaving the context ends pg_dump, whatever happened.

    The iterator raises ToolError when pg_dump fails, is killed or hangs, and ServerError when the
    snapshot was lost, or a session that waits for a table's lock kept pg_dump from it.
    """
    output, input_ = os.pipe()
    with open(output, "rb", buffering=0) as reader, open(input_, "wb", buffering=0) as writer:
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        how = DumpOptions(compress_option, stall_s)
        with running(pg_dump, endpoint, snapshot, how, stdout=writer) as watch:
            writer.close()
            yield _chunks(reader, watch)


@dataclass(frozen=True)
class DumpOptions:
    """How a dump is written, and after how much silence it is looked at. `directory` does not exist yet."""

    compress_option: str  # tools.Compression's
    stall_s: float
    directory: Path | None = None
    jobs: int = 1


@contextlib.contextmanager
def running(
    pg_dump: str,
    endpoint: Endpoint,
    snapshot: Watched,
    how: DumpOptions,
    *,
    stdout: IO[bytes] | None = None,
) -> Iterator["Watch"]:
    """A pg_dump under way in a snapshot; leaving the context ends it, whatever happened."""
    argv = dump_argv(
        pg_dump,
        endpoint.tool_dbname,
        snapshot_id=snapshot.id,
        compress_option=how.compress_option,
        lock_timeout_s=_LOCK_TIMEOUT_S,
        directory=how.directory,
        jobs=how.jobs,
    )
    command = tool_command(argv, endpoint, DUMP_PURPOSE)
    with tempfile.TemporaryFile() as errors:
        child = (
            process.start(command, stderr=errors)
            if stdout is None
            else process.start(command, stdout=stdout, stderr=errors)
        )
        try:
            yield Watch(command, child, errors, snapshot, how.stall_s)
        finally:
            process.terminate(child, grace_s=_GRACE_S)


@dataclass
class Watch:
    """What ends a dump that will not end well: a failed child, silence, a lost snapshot."""

    command: Command
    child: Popen[bytes]
    errors: IO[bytes]
    snapshot: Watched
    stall_s: float
    _spoke_at: float = field(default_factory=time.monotonic)
    _asked_at: float = field(default_factory=time.monotonic)
    _checked_at: float = field(default_factory=time.monotonic)

    def spoke(self) -> None:
        """The child was heard of just now."""
        self._spoke_at = self._asked_at = time.monotonic()

    def look(self) -> None:
        """Raise when there is reason to; cheap enough for every chunk."""
        now = time.monotonic()
        if now - self._checked_at >= min(_CHECK_S, self.stall_s):
            self.snapshot.check()
            self._checked_at = time.monotonic()
        if now - self._asked_at >= self.stall_s:
            self._asked_at = now
            silent_s = now - self._spoke_at
            if silent_s >= _PATIENCE * self.stall_s or not self.snapshot.dump_is_working(
                within_s=min(60.0, self.stall_s)
            ):
                self.child.kill()
                raise process.failure(
                    self.command, None, process.tail(self.errors), timeout_s=round(silent_s, 1)
                )

    def finish(self) -> None:
        """Wait for the child's own end. Raises unless it was a good one."""
        while self.child.poll() is None:
            self.look()
            time.sleep(_END_POLL_S)
        if self.child.returncode != 0:
            raise self._failure(_said(self.errors))
        self.snapshot.check()

    def _failure(self, said: str) -> ToolError | ServerError:
        failure = process.failure(self.command, self.child.returncode, said)
        contention = self.snapshot.contention() if self.child.returncode > 0 else None
        if contention is None and _LOCKED_OUT.search(said):
            contention = ServerError(
                "pg_dump was kept from a table by another session, which has ended or given up since",
                hint="Try again; if it happens again, look for migrations that run at this time.",
            )
        if contention is None:
            failure.hint = OUT_OF_LOCKS_HINT if OUT_OF_LOCKS in said else failure.hint
            return failure
        contention.detail["pg_dump"] = failure.detail.get("stderr", failure.message)
        contention.__cause__ = failure
        return contention


def _said(errors: IO[bytes]) -> str:
    """What pg_dump complained of, without the statements that it repeats: perhaps longer than all else."""
    errors.seek(0)
    said = errors.read(_ERROR_BYTES).decode(errors="replace")
    return without_values(said)


def _chunks(output: io.RawIOBase, watch: Watch) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(output, select.POLLIN | select.POLLHUP)
    buffer = memoryview(bytearray(process.CHUNK_BYTES))
    ended = False
    while not ended:
        filled, patience_s = 0, min(_CHECK_S, watch.stall_s)
        # pg_dump writes a few KiB at a time, and each chunk costs whoever hashes and uploads it.
        while filled < _FULL_BYTES and poll.poll(patience_s * 1000):
            count = output.readinto(buffer[filled:]) or 0
            filled, patience_s, ended = filled + count, _GATHER_S, count == 0
            if ended:
                break
        if filled:
            yield bytes(buffer[:filled])
            watch.spoke()  # after the consumer, whose time is not the child's
        watch.look()
    watch.finish()


class Hashing:
    """Chunks passed through, with their SHA-256 and number of bytes so far.

    `progress`, if given, is called with the number of bytes after each chunk.
    """

    def __init__(self, chunks: Iterable[bytes], *, progress: Callable[[int], None] | None = None) -> None:
        self._chunks = chunks
        self._digest = hashlib.sha256()
        self._progress = progress
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._digest.update(chunk)
            self.size_bytes += len(chunk)
            if self._progress is not None:
                self._progress(self.size_bytes)
            yield chunk

    @property
    def sha256(self) -> str:
        """In hex, of what has passed."""
        return self._digest.hexdigest()
