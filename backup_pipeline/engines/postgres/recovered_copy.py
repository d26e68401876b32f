"""A recovered cluster started to be looked at, cut off from all else, and asked whether it is whole.

Called by drills, on a copy that is thrown away. Who may enter it is the source's business, so a role of ours
is made in it first, by recovered_server.py; nothing that its databases or roles set for sessions is loaded.

Source: PostgreSQL, "amcheck", "pg_amcheck", "pg_checksums".
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import make_conninfo

from backup_pipeline import process
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.event_triggers import OFF, SINCE_MAJOR
from backup_pipeline.engines.postgres.recovered_server import ALWAYS_THERE, make_superuser
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import ServerError, ToolError
from backup_pipeline.process import Command
from backup_pipeline.units import show_count, show_line

_START_TIMEOUT_S = 600.0
_CHECK_TIMEOUT_S = 24 * 3600.0
_MOST_LINES = 20
_CORRUPT = 2  # pg_amcheck's exit code
_NO_EXTENSION = re.compile(r'extension "amcheck" is not available|could not open extension control file')
_BAD_PAGE = re.compile(r"checksum verification failed in file (?P<where>.*)")
# What the source keeps closed is looked into as well. What an interrupted DROP DATABASE left stays closed, by
# its limit of -2.
_OPEN = "UPDATE pg_catalog.pg_database SET datallowconn = true WHERE datname <> 'template0'"
# Of a session, they win over what ALTER ROLE and ALTER DATABASE say.
_SESSION = {
    "role": "none",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "lc_messages": "C",
    "session_preload_libraries": "",
    "local_preload_libraries": "",
    "default_transaction_read_only": "off",
    "row_security": "off",
}


@dataclass(frozen=True)
class Integrity:
    """What a check found: whether it was made at all, what is well, what is damaged, what is to be known."""

    made: bool
    checked: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecoveredCopy:
    """A running copy, and a superuser of ours in it."""

    server: LocalCluster
    role: str
    major: int

    def endpoint(self, database: str) -> Endpoint:
        """How to enter a database of it; no library of the source's choice is loaded there."""
        settings = {**_SESSION, **(OFF if self.major >= SINCE_MAJOR else {})}
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        plain = self.server.endpoint(database, user=self.role)
        return Endpoint(make_conninfo(plain.dsn, options=options))

    def databases(self) -> Mapping[str, bool]:
        """The databases, but for template0, and whether each can be entered: not what a broken DROP left."""
        query = (
            "SELECT datname, datallowconn AND datconnlimit <> -2 FROM pg_catalog.pg_database"
            " WHERE datname <> 'template0'"
        )
        with contextlib.closing(connect(self.endpoint(ALWAYS_THERE), purpose="drill")) as session:
            return {str(name): bool(enters) for name, enters in session.execute(query)}

    def unlogged(self, databases: Mapping[str, bool]) -> tuple[str, ...]:
        """A note on tables that came back empty, because no WAL is written of them."""
        count = 0
        query = "SELECT count(*) FROM pg_catalog.pg_class WHERE relpersistence = 'u' AND relkind = 'r'"
        for name in (name for name, enters in databases.items() if enters):
            with contextlib.closing(connect(self.endpoint(name), purpose="drill")) as session:
                row = session.execute(query).fetchone()
            count += int(str(row[0])) if row else 0
        return (
            (f"{show_count(count, 'unlogged table')} came back empty, as after any crash",) if count else ()
        )

    def amcheck(self, databases: Mapping[str, bool]) -> Integrity:
        """Look into every table and B-tree of every database: pg_amcheck, each index against its table.

        Raises ToolError when it could not come to an end.
        """
        program = Path(self.server.bin_dir) / "pg_amcheck"
        if not program.exists():
            return Integrity(False, notes=(f"tables and indexes were not checked: there is no {program}",))
        environment = {**self.endpoint(ALWAYS_THERE).environment(), "LC_ALL": "C"}
        command = Command(amcheck_argv(str(program)), environment)
        done = process.run(command, timeout_s=_CHECK_TIMEOUT_S, check=False)
        closed = sorted(name for name, enters in databases.items() if not enters)
        shown = ", ".join(map(show_line, closed))
        notes = (f"not checked, as an interrupted DROP DATABASE left it: {shown}",) if closed else ()
        if done.returncode == _CORRUPT:
            return Integrity(True, differences=_first(_damage(done.stdout)), notes=notes)
        if done.returncode and _NO_EXTENSION.search(done.stderr):
            lacking = f"tables and indexes were not checked: {self.server.bin_dir} has no extension amcheck"
            return Integrity(False, notes=(lacking,))
        if done.returncode:
            raise process.failure(command, done.returncode, done.stderr)
        entered = show_count(len(databases) - len(closed), "database")
        return Integrity(True, (f"amcheck: every table and B-tree index of {entered} is sound",), (), notes)


def amcheck_argv(program: str) -> tuple[str, ...]:
    """The command that looks into all databases; the extension is made where it is missing."""
    return (
        program,
        "--all",
        f"--maintenance-db={ALWAYS_THERE}",
        "--install-missing",
        "--heapallindexed",
        "--no-password",
    )


def _damage(said: str) -> list[str]:
    """pg_amcheck's findings, a line each: the relation in one, what is wrong in the next."""
    found: list[str] = []
    for line in said.splitlines():
        if line.startswith((" ", "\t")) and found:
            found[-1] += f" {line.strip()}"
        elif line.strip():
            found.append(line.strip())
    return found or ["amcheck says that something is corrupt, and not what"]


def _first(lines: list[str]) -> tuple[str, ...]:
    shown = [show_line(f"amcheck: {line}") for line in lines[:_MOST_LINES]]
    return (
        *shown,
        *([f"amcheck: and {len(lines) - _MOST_LINES:,} more"] if len(lines) > _MOST_LINES else []),
    )


@contextlib.contextmanager
def looking_into(server: LocalCluster, major: int) -> Iterator[RecoveredCopy]:
    """Start a recovered cluster with a superuser of ours; it is stopped in order at the end.

    Raises ToolError, ServerError when it does not let us in.
    """
    copy = RecoveredCopy(server, make_superuser(server, _OPEN), major)
    server.answers = lambda: _lets_in(copy)
    try:
        server.start(timeout_s=_START_TIMEOUT_S)
        yield copy
    finally:
        server.stop()


def _lets_in(copy: RecoveredCopy) -> bool:
    with contextlib.suppress(ServerError):
        connect(copy.endpoint(ALWAYS_THERE)).close()
        return True
    return False


def check_pages(server: LocalCluster) -> Integrity:
    """Compare each page of a stopped cluster with its checksum: pg_checksums. For clusters that have them.

    Raises ToolError when it could not come to an end.
    """
    if not (Path(server.bin_dir) / "pg_checksums").exists():
        lacking = f"page checksums were not compared: {server.bin_dir} has no pg_checksums"
        return Integrity(False, notes=(lacking,))
    done = server.run("pg_checksums", "--check", "-D", str(server.data), timeout_s=_CHECK_TIMEOUT_S)
    bad = [match["where"] for match in _BAD_PAGE.finditer(done.stderr)]
    if bad:
        shown = tuple(show_line(f"wrong page checksum in {where}") for where in bad[:_MOST_LINES])
        more = (f"and {len(bad) - _MOST_LINES:,} more wrong pages",) if len(bad) > _MOST_LINES else ()
        return Integrity(True, differences=(*shown, *more))
    if done.returncode:
        raise ToolError(f"pg_checksums ended with {done.returncode}: {show_line(done.stderr.strip()[-300:])}")
    return Integrity(True, ("every page agrees with its checksum",))
