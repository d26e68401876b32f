"""pg_restore: its command line, and a run of it that is watched until it has ended well.

Called by restores and proofs, with a new, empty database and an archive whose digests were verified.
Where that database comes from and what becomes of it is restore.py's.
"""

import contextlib
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import IO

import psycopg

from backup_pipeline import process
from backup_pipeline.engines.postgres.endpoint import APPLICATION, Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect, server_errors
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.errors import BackupError, Refused, ToolError
from backup_pipeline.process import Command
from backup_pipeline.stderr import without_values

PURPOSE = "restore"
"""What pg_stat_activity shows of a running restore, after our name."""

_LIST_TIMEOUT_S = 300.0
_TICK_S = 0.5
_SAMPLE_S = 5.0
_GRACE_S = 5.0
_ITEM = re.compile(r"pg_restore: (?:creating|executing|processing)(?: data for)? (?P<item>(?!item \d).+)")
_ERROR = "pg_restore: error: "
# Nothing is lost by not waiting for each commit: the one that names the finished database waits for all.
# Money is read as pg_dump wrote it (dump.py), whatever the server's own currency.
_OPTIONS = "-c synchronous_commit=off -c default_transaction_read_only=off -c lc_monetary=C"
_UNKNOWN_BEFORE_17 = re.compile(r'pg_restore: error: could not execute query: .*"transaction_timeout"')
_ITS_COMMAND = "Command was: SET transaction_timeout = 0;"

_HINTS = (
    ("extension", "Install the extension's package on the server, or restore to one that has it."),
    ("tablespace", "Create the tablespace first."),
    ("role", "Create the missing roles first (--create-roles), or connect as a role that may use them."),
    ("permission denied", "Restore as a superuser, or as a role that is a member of the owners."),
    ("must be ", "Restore as a superuser, or as a role that is a member of the owners."),
    ("No space left", "Make room on the server's disk, and begin again."),
    ("does not support compression", "Use a pg_restore that was built with this compression."),
    ("unsupported version", "Use the pg_restore of the version that wrote the dump, or newer."),
)


@dataclass(frozen=True)
class LoadProgress:
    """How far a load has come. `loaded_bytes` is what the database takes now, None when unknown."""

    items_done: int
    items_total: int
    item: str  # what pg_restore named last, as `TABLE "public.users"`
    loaded_bytes: int | None


@dataclass(frozen=True)
class LoadLimits:
    """When a load that goes on is given up: nothing moves for `stall_s`."""

    stall_s: float = 900.0


DEFAULT_LIMITS = LoadLimits()


@dataclass(frozen=True)
class LoadOptions:
    """What of an archive is loaded, and how. Without `tablespaces`, all goes into the database's own."""

    jobs: int = 1
    tablespaces: bool = True
    owners: bool = True  # and grants


DEFAULT_OPTIONS = LoadOptions()


def restore_argv(
    pg_restore: str,
    archive: Path,
    dbname: str,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    stop_at_error: bool = True,
) -> tuple[str, ...]:
    """The command that loads an archive, a custom-format file or a directory."""
    return (
        pg_restore,
        f"--dbname={dbname}",
        f"--format={'directory' if archive.is_dir() else 'custom'}",
        "--verbose",
        "--no-password",
        *(("--exit-on-error",) if stop_at_error else ()),
        *((f"--jobs={options.jobs}",) if options.jobs > 1 else ()),
        *(() if options.tablespaces else ("--no-tablespaces",)),
        *(() if options.owners else ("--no-owner", "--no-privileges")),
        "--",
        str(archive),
    )


def count_items(archive: Path, tools: Tools) -> int:
    """How many items pg_restore will report. Raises ToolError when it cannot read the table of contents."""
    argv = (tools.path("pg_restore"), "--list", "--", str(archive))
    listed = process.run(Command(argv, {"LC_ALL": "C"}), timeout_s=_LIST_TIMEOUT_S).stdout
    return sum(1 for line in listed.splitlines() if line and not line.startswith(";"))


def load(
    endpoint: Endpoint,
    name: str,
    archive: Path,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    tools: Tools,
    progress: Callable[[LoadProgress], None] = lambda _: None,
    limits: LoadLimits = DEFAULT_LIMITS,
) -> None:
    """Load `archive` into the database `name`, which is new and empty, on the server of `endpoint`.

    `endpoint` is another database there. `progress` is called about twice a second, from this thread;
    what it raises ends the load. Its first error ends pg_restore, and so does the calling thread's end.
    pg_restore counts as hung when it says nothing, the database does not grow and no session of it
    is at work.

    Raises Refused when the database is not empty, ToolError when pg_restore fails or hangs; the
    database is then half full, and fit only to be dropped.
    """
    own = endpoint.with_database(name)
    with contextlib.closing(connect(own, purpose=PURPOSE)) as session:
        _check_empty(own, session)
        patched = tools.major >= 17 and session.info.server_version < 170000
    total = count_items(archive, tools)
    argv = restore_argv(
        tools.path("pg_restore"),
        archive,
        own.tool_dbname,
        # Its errors are told apart by neighbouring lines, which several workers would mix.
        replace(options, jobs=1 if patched else options.jobs),
        stop_at_error=not patched,
    )
    environment = own.environment()
    environment |= {
        "LC_ALL": "C",  # its words are counted
        "PGAPPNAME": f"{APPLICATION} {PURPOSE}",
        "PGOPTIONS": f"{environment.get('PGOPTIONS', '')} {_OPTIONS}".strip(),
    }
    command = Command(argv, environment)
    with (
        _pulse(endpoint, name, min(_SAMPLE_S, limits.stall_s / 4)) as pulse,
        tempfile.TemporaryFile() as said,
    ):
        # SIGTERM, which it passes on to its workers and to the server; SIGKILL would leave them at work.
        child = process.start(command, stderr=said, parent_death_signal=signal.SIGTERM)
        try:
            _follow(_Run(command, child, _Output(said, total), patched), pulse, progress, limits)
        finally:
            process.terminate(child, grace_s=_GRACE_S)


def _check_empty(endpoint: Endpoint, session: Connection) -> None:
    with server_errors(endpoint, "cannot look into the new database"):
        row = session.execute(
            "SELECT pg_catalog.count(*), pg_catalog.min(c.relname) FROM pg_catalog.pg_class c"
            " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
            " WHERE c.oid >= 16384 AND n.nspname !~ '^pg_(toast|temp)'"
        ).fetchone()
    count, example = row or (0, "")
    if count:
        raise Refused(
            f"database {endpoint.database} is not empty: it holds {count} relations",
            detail={"server": endpoint.shown, "for example": example},
            hint="Restore into a new database; loading over what exists doubles or mixes its rows.",
        )


@dataclass
class _Output:
    """What pg_restore has written, read as it grows."""

    file: IO[bytes]
    total: int
    done: int = 0
    item: str = ""
    errors: list[str] = field(default_factory=list)  # each with the line after it
    _read_to: int = 0
    _rest: bytes = b""
    _after_error: bool = False

    def read(self) -> bool:
        """Take in what is new; return whether anything was."""
        # By position: the child writes through the same open file, and its offset is the child's.
        new = b"".join(iter(self._pread, b""))
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace"))
        return bool(new)

    def _pread(self) -> bytes:
        chunk = os.pread(self.file.fileno(), process.CHUNK_BYTES, self._read_to)
        self._read_to += len(chunk)
        return chunk

    def _take(self, line: str) -> None:
        if self._after_error:
            self.errors[-1] += f"\n{line}"
        self._after_error = line.startswith(_ERROR)
        if self._after_error:
            self.errors.append(line)
        elif match := _ITEM.fullmatch(line):
            self.done, self.item = min(self.done + 1, self.total), match["item"]


@dataclass
class _Run:
    command: Command
    child: Popen[bytes]
    output: _Output
    patched: bool

    def failed(self, code: int | None, *, after_s: float = 0.0) -> ToolError:
        error = process.failure(self.command, code, process.tail(self.output.file), timeout_s=after_s)
        errors = self.errors()
        if not errors:
            return error
        first, _, more = without_values(errors[0]).removeprefix(_ERROR).rstrip().partition("\n")
        detail = {**error.detail, **({"then": more} if more else {}), "at": self.output.item}
        return ToolError(f"pg_restore failed: {first}", detail=detail, hint=_hint(first))

    def errors(self) -> list[str]:
        """The errors that count: before PostgreSQL 17, not the one about a setting that does not exist."""
        return [each for each in self.output.errors if not (self.patched and _is_harmless(each))]


def _hint(said: str) -> str:
    for part, hint in _HINTS:
        if part in said:
            return hint
    return ""


def _is_harmless(error: str) -> bool:
    first, _, second = error.partition("\n")
    return second == _ITS_COMMAND and _UNKNOWN_BEFORE_17.fullmatch(first) is not None


def _follow(
    run: _Run,
    pulse: "_Pulse",
    progress: Callable[[LoadProgress], None],
    limits: LoadLimits,
) -> None:
    heard_at = time.monotonic()
    code: int | None = None
    while code is None:
        with contextlib.suppress(TimeoutExpired):
            code = run.child.wait(_TICK_S)
        now = time.monotonic()
        if run.output.read():
            heard_at = now
        if code is None and run.patched and any("\n" in each for each in run.errors()):
            raise run.failed(1)
        if code is None and now - max(heard_at, pulse.alive_at) > limits.stall_s:
            raise run.failed(None, after_s=limits.stall_s)
        progress(LoadProgress(run.output.done, run.output.total, run.output.item, pulse.size_bytes))
    if run.errors() or code != (1 if run.output.errors else 0):
        raise run.failed(code)
    # Two workers may write their lines into one another, and an item is not counted then.
    progress(LoadProgress(run.output.total, run.output.total, run.output.item, pulse.size_bytes))


@dataclass
class _Pulse:
    """What the server says of a database that is being loaded."""

    size_bytes: int | None = None
    alive_at: float = 0.0


@contextlib.contextmanager
def _pulse(endpoint: Endpoint, name: str, interval_s: float) -> Iterator[_Pulse]:
    """Ask in a thread: a server that does not answer must not keep us from seeing that."""
    pulse, stop = _Pulse(), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with (
                contextlib.suppress(BackupError, psycopg.Error),
                contextlib.closing(connect(endpoint, statement_timeout_s=30, purpose=PURPOSE)) as session,
            ):
                while not stop.is_set():
                    _sample(session, name, pulse)
                    stop.wait(interval_s)
            stop.wait(interval_s)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield pulse
    finally:
        stop.set()
        thread.join(_GRACE_S)


def _sample(session: Connection, name: str, pulse: _Pulse) -> None:
    # By itself: the size of a database of very many files may take longer than a statement may.
    working = session.execute(
        "SELECT FROM pg_catalog.pg_stat_activity WHERE datname = %s AND state = 'active'"
        " AND COALESCE(wait_event_type, '') NOT IN ('Client', 'Lock') LIMIT 1",
        [name],
    ).fetchone()
    if working is not None:
        pulse.alive_at = time.monotonic()
    row = session.execute(
        "SELECT CASE WHEN pg_catalog.has_database_privilege(oid, 'CONNECT')"
        " THEN pg_catalog.pg_database_size(oid) END FROM pg_catalog.pg_database WHERE datname = %s",
        [name],
    ).fetchone()
    if row is None:
        return
    size_bytes = None if row[0] is None else int(str(row[0]))
    if size_bytes != pulse.size_bytes:
        pulse.alive_at = time.monotonic()
    pulse.size_bytes = size_bytes
