"""What a base backup has to know of its cluster, asked over a plain session, and files that lie beside it.

Called by actions/base_backup.py before and after the files are read.
"""

import posixpath
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg

from backup_pipeline.domain.base_backup import CONFIGURATION_FOLDER, RECOVERY_SETTINGS
from backup_pipeline.engines.postgres.server import Connection
from backup_pipeline.errors import ServerError

_NAMED = ("config_file", "hba_file", "ident_file")
_MAX_FILE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class ClusterFacts:
    """A running cluster, as far as its base backup has to say it."""

    may_replicate: bool
    page_checksums: bool
    segment_bytes: int
    archive_mode: str  # "off" | "on" | "always"
    checkpoint_timeout_s: int
    settings: tuple[tuple[str, int], ...]  # of RECOVERY_SETTINGS
    summarizes_wal: bool = False  # from PostgreSQL 17 on; incremental base backups need it


def read_cluster_facts(session: Connection) -> ClusterFacts:
    """Ask the server. Raises ServerError."""
    names = ("data_checksums", "wal_segment_size", "archive_mode", "checkpoint_timeout", *RECOVERY_SETTINGS)
    rows = session.execute(
        "SELECT name, setting FROM pg_catalog.pg_settings WHERE name = ANY(%s)",
        ([*names, "summarize_wal"],),
    ).fetchall()
    found = {str(name): str(setting) for name, setting in rows}
    missing = sorted(set(names) - found.keys())
    if missing:
        raise ServerError(f"the server does not tell {', '.join(missing)}")
    role = session.execute(
        "SELECT rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user"
    ).fetchone()
    return ClusterFacts(
        may_replicate=bool(role and role[0]),
        page_checksums=found["data_checksums"] == "on",
        segment_bytes=int(found["wal_segment_size"]),
        archive_mode=found["archive_mode"],
        checkpoint_timeout_s=int(found["checkpoint_timeout"]),
        settings=tuple((name, int(found[name])) for name in RECOVERY_SETTINGS),
        summarizes_wal=found.get("summarize_wal") == "on",
    )


def server_clock(session: Connection) -> datetime:
    """The time by the server's clock, in UTC. Raises ServerError."""
    row = session.execute("SELECT pg_catalog.clock_timestamp()").fetchone()
    if row is None or not isinstance(row[0], datetime):
        raise ServerError("the server did not say what time it is")
    return row[0].astimezone(UTC)


@dataclass(frozen=True)
class OutsideFiles:
    """Configuration that no base backup holds: (name among the objects, content), and what is missing."""

    files: tuple[tuple[str, bytes], ...]
    notes: tuple[str, ...]


def read_outside_files(session: Connection) -> OutsideFiles:
    """The configuration files that lie outside of the data directory, as far as the role may read them."""
    rows = session.execute(
        "SELECT name, setting FROM pg_catalog.pg_settings WHERE name = ANY(%s)",
        ([*_NAMED, "data_directory"],),
    ).fetchall()
    found = {str(name): str(setting) for name, setting in rows}
    if "data_directory" not in found:
        return OutsideFiles((), (_UNSEEN,))
    files, notes = [], []
    for path in outside(_config_paths(session, found), found["data_directory"]):
        content = _read(session, path)
        name = object_name(path)
        if content is None or name is None:
            notes.append(f"{path} lies outside of the data directory, and could not be carried along")
        else:
            files.append((name, content))
    return OutsideFiles(tuple(files), tuple(notes))


_UNSEEN = (
    "where the configuration lies is hidden from this role (pg_read_all_settings shows it, and "
    "pg_read_server_files carries it along): what lies outside of the data directory is not in this backup"
)


def outside(paths: list[str], data_directory: str) -> list[str]:
    """Those of the server's `paths` that do not lie below its data directory, each once, in order."""
    root = posixpath.normpath(data_directory)
    below = (path for path in dict.fromkeys(map(posixpath.normpath, paths)) if path)
    return [path for path in below if not path.startswith(root + "/")]


def object_name(path: str) -> str | None:
    """What a file of the server is called among a backup's objects; None when no key can say it."""
    parts = path.removeprefix("/").split("/")
    plain = path.startswith("/") and path.isprintable() and "\\" not in path and len(path) < 200
    return f"{CONFIGURATION_FOLDER}/{'/'.join(parts)}" if plain and all(parts) else None


def _config_paths(session: Connection, found: dict[str, str]) -> list[str]:
    """The main files, and those that they include, where the role may know."""
    paths = [found[name] for name in _NAMED if found.get(name)]
    try:
        rows = session.execute("SELECT DISTINCT sourcefile FROM pg_catalog.pg_file_settings").fetchall()
    except psycopg.errors.InsufficientPrivilege:
        return paths
    return paths + sorted(str(row[0]) for row in rows if row[0])


def _read(session: Connection, path: str) -> bytes | None:
    try:
        row = session.execute(
            "SELECT pg_catalog.pg_read_binary_file(%s, 0, %s, true)", (path, _MAX_FILE_BYTES + 1)
        ).fetchone()
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.SystemError):
        return None
    content = row[0] if row else None
    return content if isinstance(content, bytes) and len(content) <= _MAX_FILE_BYTES else None
