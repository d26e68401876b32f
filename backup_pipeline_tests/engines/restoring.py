"""What the tests of restores share: dumps, looks at servers, a restore in a process of its own."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.domain.backup import DatabaseProperties, Source
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.properties import read_properties, read_source
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.process import Command

HOSTILE = '= "it\'s" -d\n\\x;é'


def names(session: Connection) -> set[str]:
    return {str(name) for (name,) in session.execute("SELECT datname FROM pg_database")}


def database_names(endpoint: Endpoint) -> set[str]:
    with contextlib.closing(connect(endpoint)) as session:
        return names(session)


def execute(endpoint: Endpoint, *queries: str) -> None:
    with contextlib.closing(connect(endpoint)) as session:
        for query in queries:
            session.execute(query.encode())


def fetch(endpoint: Endpoint, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(connect(endpoint)) as session:
        return session.execute(query.encode()).fetchall()


def dump(endpoint: Endpoint, target: Path, tools: Tools, *, directory: bool = False) -> Path:
    how = ("--format=directory", "--jobs=2") if directory else ("--format=custom",)
    argv = (tools.path("pg_dump"), f"--dbname={endpoint.tool_dbname}", f"--file={target}", *how)
    process.run(Command(argv, endpoint.environment()), timeout_s=60)
    return target


def source_of(endpoint: Endpoint, tools: Tools) -> Source:
    with contextlib.closing(connect(endpoint)) as session:
        return read_source(session, tools)


def plain(endpoint: Endpoint) -> DatabaseProperties:
    with contextlib.closing(connect(endpoint)) as session:
        return read_properties(session, endpoint.database)


def restoring_sessions(admin: Endpoint) -> list[tuple[object, ...]]:
    return fetch(
        admin,
        "SELECT pid FROM pg_stat_activity WHERE datname LIKE 'target.restoring-%' AND state = 'active'"
        " AND query LIKE 'CREATE INDEX slow_index%'",
    )


def tool_pids() -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"pg_restore\0--dbname" in (entry / "cmdline").read_bytes():
                status = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                pids += [int(entry.name)] if status != "Z" else []
    return pids


def own_tool(parent: int) -> int:
    for pid in tool_pids():
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == parent:
                return pid
    return 0


CHILD = """
import sys
from pathlib import Path
from backup_pipeline.engines.postgres import restore
from backup_pipeline.engines.postgres.load import load
from backup_pipeline.engines.postgres.properties import read_properties
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.swap import publish
from backup_pipeline.engines.postgres.tools import find_tools
dsn, source, archive, bin_dir = sys.argv[1:]
admin = Endpoint(dsn)
with connect(admin) as session:
    properties = read_properties(session, source)
print("begun", flush=True)
with restore.temporary_database(admin, "target", properties) as name:
    load(admin, name, Path(archive), tools=find_tools(bin_dir))
    restore.apply_properties(admin, name, properties)
    publish(admin, name, "target")
print("done", flush=True)
"""


@contextlib.contextmanager
def restoring(
    admin: Endpoint, properties: DatabaseProperties, archive: Path, tools: Tools
) -> Iterator["subprocess.Popen[bytes]"]:
    argv = [sys.executable, "-c", CHILD, admin.dsn, properties.name, str(archive), tools.bin_dir]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == b"begun\n"
        yield child
