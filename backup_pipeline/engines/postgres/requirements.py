"""What a backup needs of the server that it is restored to, and what that server lacks.

Called before a restore begins, so that it is refused at once and whole, not after an hour at its last
statement. Making the missing roles is roles.py's; deciding what to do about the rest is the caller's.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from backup_pipeline.domain.backup import DatabaseProperties, Source
from backup_pipeline.engines.postgres.server import Connection, ServerInfo, read_server_info
from backup_pipeline.units import show_bytes

SPACE_FACTOR = 1.2
"""A restore needs the database's size at its source, and some room for WAL and sorting."""

_PROVIDERS_SINCE = {"libc": 0, "icu": 150000, "builtin": 170000}
_ABSENT_LOCALE = (
    psycopg.errors.InvalidParameterValue,
    psycopg.errors.FeatureNotSupported,
    psycopg.errors.UndefinedObject,
    psycopg.errors.WrongObjectType,
)


@dataclass(frozen=True)
class Requirements:
    """What a server lacks for one backup; empty strings and tuples: nothing.

    `free_bytes` is None where the server's disk cannot be measured from here.
    """

    version: str
    standby: str
    roles: tuple[str, ...]
    extensions: tuple[str, ...]  # that cannot be created there
    untrusted_extensions: tuple[str, ...]  # that only a superuser may create, and the role is none
    extension_versions: tuple[tuple[str, str, str], ...]  # name, the source's, the one it would get
    tablespaces: tuple[str, ...]
    locale: str
    need_bytes: int
    free_bytes: int | None

    @property
    def problems(self) -> tuple[str, ...]:
        """Sentences: each alone makes a restore fail. Roles come last, because they can be created."""
        said = [self.version, self.standby, self.locale]
        if self.extensions:
            said.append(f"extensions are not installed there: {', '.join(self.extensions)}")
        if self.untrusted_extensions:
            said.append(f"only a superuser may create extensions {', '.join(self.untrusted_extensions)}")
        if self.tablespaces:
            said.append(f"tablespaces do not exist there: {', '.join(self.tablespaces)}")
        if self.free_bytes is not None and self.free_bytes < self.need_bytes:
            said.append(f"{show_bytes(self.need_bytes)} are needed, {show_bytes(self.free_bytes)} are free")
        if self.roles:
            said.append(f"roles do not exist there: {', '.join(self.roles)}")
        return tuple(each for each in said if each)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences: worth knowing, and no reason to refuse."""
        said = [
            f"extension {name} will have version {new} instead of {old}"
            for name, old, new in self.extension_versions
        ]
        if self.free_bytes is None:
            said.append(
                f"about {show_bytes(self.need_bytes)} are needed; the server's disk cannot be seen from here"
            )
        return tuple(said)


def missing_requirements(conn: Connection, source: Source) -> Requirements:
    """Compare what a backup of `source` needs with the server of `conn`, in any database of it.

    Changes nothing. What this role may not look at counts as there.
    """
    info = read_server_info(conn)
    roles = _column(conn, "SELECT rolname FROM pg_catalog.pg_roles")
    spaces = _column(conn, "SELECT spcname FROM pg_catalog.pg_tablespace")
    wanted_spaces = dict.fromkeys((source.database.tablespace, *source.tablespaces))
    extensions, untrusted, versions = _compare_extensions(conn, info, source)
    return Requirements(
        version=_too_old(info, source),
        standby="the server is a standby, which accepts no restore" if info.in_recovery else "",
        roles=tuple(sorted({source.database.owner, *source.roles} - roles)),
        extensions=extensions,
        untrusted_extensions=untrusted,
        extension_versions=versions,
        tablespaces=tuple(name for name in wanted_spaces if name not in spaces),
        locale=_absent_locale(conn, info, source.database),
        need_bytes=int(source.size_bytes * SPACE_FACTOR),
        free_bytes=_free_bytes(conn, info, source.database.tablespace),
    )


def _column(conn: Connection, query: str) -> frozenset[str]:
    return frozenset(str(value) for (value,) in conn.execute(query.encode()))


def _too_old(info: ServerInfo, source: Source) -> str:
    if info.major >= source.server_version // 10000:
        return ""
    return f"the backup is of PostgreSQL {source.server_version_text}, and the server is {info.version_text}"


def _compare_extensions(
    conn: Connection, info: ServerInfo, source: Source
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str, str], ...]]:
    rows = conn.execute(
        "SELECT a.name, a.default_version, v.superuser AND NOT v.trusted"
        " FROM pg_catalog.pg_available_extensions a JOIN pg_catalog.pg_available_extension_versions v"
        " ON v.name = a.name AND v.version = a.default_version WHERE a.name = ANY(%s)",
        [[name for name, _ in source.extensions]],
    ).fetchall()
    there = {str(name): (str(version), bool(restricted)) for name, version, restricted in rows}
    installable = [(name, old, *there[name]) for name, old in source.extensions if name in there]
    return (
        tuple(name for name, _ in source.extensions if name not in there),
        tuple(name for name, _, _, restricted in installable if restricted and not info.is_superuser),
        tuple((name, old, new) for name, old, new, _ in installable if old != new),
    )


def _absent_locale(conn: Connection, info: ServerInfo, wanted: DatabaseProperties) -> str:
    """Try each part of the locale as a temporary collation, and roll back: no list of them is complete."""
    provider = wanted.locale_provider
    if info.version < _PROVIDERS_SINCE.get(provider, info.version + 1):
        return f"locale provider {provider} is not known to PostgreSQL {info.version_text}"
    tries: list[tuple[str, dict[str, str]]] = []
    # A collation must fit the encoding of the database that it is tried in.
    if _column(conn, "SHOW server_encoding") == {wanted.encoding}:
        libc = {wanted.collate, wanted.ctype} - {"C", "POSIX", ""}
        tries += [(name, {"provider": "libc", "locale": name}) for name in sorted(libc)]
    if provider != "libc":
        tries.append((wanted.locale, {"provider": provider, "locale": wanted.locale}))
    for name, options in tries:
        given = [
            sql.SQL("{} = {}").format(sql.SQL(key), sql.Literal(value)) for key, value in options.items()
        ]
        statement = sql.SQL("CREATE COLLATION pg_temp.backup_pipeline_probe ({})")
        try:
            with conn.transaction(force_rollback=True):
                conn.execute(statement.format(sql.SQL(", ").join(given)))
        except _ABSENT_LOCALE as error:
            return f"locale {name} ({options['provider']}) is missing there: {error.diag.message_primary}"
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction):
            continue
    return ""


def _free_bytes(conn: Connection, info: ServerInfo, tablespace: str) -> int | None:
    """Free bytes where the database will lie, when that server's data directory is on this machine."""
    try:
        row = conn.execute(
            "SELECT pg_catalog.current_setting('data_directory'),"
            " (SELECT pg_catalog.pg_tablespace_location(oid)"
            " FROM pg_catalog.pg_tablespace WHERE spcname = %s)",
            [tablespace],
        ).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return None
    data, space = row or ("", "")
    try:
        # A path alone could be another server's, seen through a container's socket or port.
        control = (Path(str(data)) / "global" / "pg_control").read_bytes()
        if str(struct.unpack("=Q", control[:8])[0]) != info.system_identifier:
            return None
        room = os.statvfs(str(space or data))
    except (OSError, struct.error):
        return None
    return room.f_bavail * room.f_frsize
