"""A place to restore to and throw away: a cluster of our own, or a database on a server that was named.

Called by proofs and drills. What is restored there, and what is compared, is not known here. Whatever
happens, nothing stays: what a killed process left is collected by the next one on the same machine,
or on the same server.
"""

import contextlib
import os
import secrets
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql

from backup_pipeline import spool
from backup_pipeline.engines.postgres.cluster import LocalCluster, await_end, remove_socket_folder, server_in
from backup_pipeline.engines.postgres.roles import drop_plain_roles
from backup_pipeline.engines.postgres.server import (
    Connection,
    Endpoint,
    advisory_lock,
    connect,
    read_server_info,
    server_errors,
)
from backup_pipeline.engines.postgres.tools import SERVER, find_tools
from backup_pipeline.errors import BackupError, Busy, NotProvable, ServerError, ToolError

DATABASE_PREFIX = "backup_scratch_"
"""Begins the name of every scratch database; on a scratch server, others are never touched."""

_DYING_S = 5.0


@dataclass
class Scratch:
    """Where to restore to: create `database` through `endpoint`, and append what roles you create."""

    endpoint: Endpoint
    database: str
    ours: bool  # a cluster of our own, that goes with all that is in it
    cut_off: bool  # what is restored there can reach no other machine
    roles: list[str] = field(default_factory=list)


@contextlib.contextmanager
def scratch_server(
    major: int,
    *,
    existing: Endpoint | None = None,
    bin_dir: str = "",
    folder: Path | None = None,
    source_identifier: str = "",
    settings: Mapping[str, str] | None = None,
) -> Iterator[Scratch]:
    """A scratch server of this major version: `existing`, or a cluster of our own below `folder`.

    At the end, the cluster is gone; or the database and `roles` are gone from the existing server.

    Raises NotProvable when the server is of another version, or is the source itself (the one of
    `source_identifier`), or when this machine has no PostgreSQL of this version.
    """
    if existing is None:
        with scratch_cluster(major, bin_dir=bin_dir, folder=folder, settings=settings) as cluster:
            yield Scratch(cluster.endpoint(), _new_name(), ours=True, cut_off=cluster.cut_off)
    else:
        with _on_existing(existing, major, source_identifier) as scratch:
            yield scratch


@contextlib.contextmanager
def scratch_cluster(
    major: int, *, bin_dir: str = "", folder: Path | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[LocalCluster]:
    """A cluster of this major version on a private socket that is gone at the end.

    It lies below `folder`, or the system's folder for temporary files. No credential of ours reaches
    its environment, it is stopped at once when we are killed, and what runs in it, as a foreign table
    or a function of the dump may, is cut off from the network where the system allows that.

    Raises NotProvable when this machine has no PostgreSQL of this version.
    """
    try:
        tools = find_tools(bin_dir, exactly=major, needs=SERVER)
    except ToolError as error:
        raise NotProvable(
            f"a proof needs a PostgreSQL {major} server on this machine: {error.message}",
            detail=error.detail,
            hint=f"{error.hint} Or name an existing server of this version with [scratch] dsn.",
        ) from error
    with private_folder(folder) as own:
        cluster = LocalCluster(
            tools.bin_dir, own / "cluster", relaxed=True, network=False, settings=settings or {}
        )
        try:
            _begin(cluster, major)
            yield cluster
        finally:
            cluster.stop()


def _begin(cluster: LocalCluster, major: int) -> None:
    try:
        cluster.create()
        cluster.start()
    except ToolError as error:
        raise NotProvable(
            f"a scratch cluster of PostgreSQL {major} cannot be started: {error.message}",
            detail=error.detail,
            hint=error.hint
            or "Look at the space below TMPDIR, or name an existing server with [scratch] dsn.",
        ) from error


def private_folder(parent: Path | None = None) -> contextlib.AbstractContextManager[Path]:
    """A folder for a cluster: a server that runs as another user passes through it."""
    return spool.private_folder("scratch", parent=parent, mode=0o711, ending=_end_cluster)


def collect_stale(parent: Path) -> tuple[Path, ...]:
    """End and remove the clusters that killed processes of this user left; return their folders."""
    return spool.collect_stale("scratch", parent, _end_cluster)


def _end_cluster(folder: Path) -> None:
    _end_server(folder / "cluster" / "data")
    remove_socket_folder(folder / "cluster")


def _end_server(data: Path) -> None:
    """Wait for a server that lost its parent to end; end it when it does not."""
    try:
        await_end(data, timeout_s=_DYING_S)
    except ToolError:
        if (pid := server_in(data)) is not None:
            os.kill(pid, signal.SIGKILL)
        await_end(data, timeout_s=_DYING_S)


def _new_name() -> str:
    return f"{DATABASE_PREFIX}{secrets.token_hex(8)}"


@contextlib.contextmanager
def _on_existing(endpoint: Endpoint, major: int, source_identifier: str) -> Iterator[Scratch]:
    scratch = Scratch(endpoint, _new_name(), ours=False, cut_off=False)
    with contextlib.closing(connect(endpoint, purpose="scratch")) as session:
        info = read_server_info(session)
        if info.major != major:
            raise NotProvable(
                f"the scratch server {endpoint.shown} is PostgreSQL {info.version_text}, not {major}",
                hint=f"Name a server of version {major} with [scratch] dsn, or none: we start one.",
            )
        if source_identifier and info.system_identifier == source_identifier:
            raise NotProvable(
                f"the scratch server {endpoint.shown} is the cluster that the backup was taken from",
                hint="Name another server with [scratch] dsn, or none: we start one.",
            )
        # The lock says that the scratch database is in use; it goes with us, however we end.
        with advisory_lock(endpoint, scratch.database, purpose="scratch", wait_s=0, renames=True):
            _drop_stale(endpoint, session)
            try:
                yield scratch
            except BaseException as error:
                try:
                    _clear(endpoint, scratch)
                except BackupError as left:
                    error.add_note(str(left))
                raise
            _clear(endpoint, scratch)


def _drop_stale(endpoint: Endpoint, session: Connection) -> None:
    query = "SELECT datname FROM pg_catalog.pg_database WHERE pg_catalog.starts_with(datname, %s)"
    for (name,) in session.execute(query, [DATABASE_PREFIX]).fetchall():
        with (
            contextlib.suppress(Busy, ServerError),  # in use by its maker, or another role's
            advisory_lock(endpoint, str(name), purpose="scratch", wait_s=0, renames=True),
            server_errors(endpoint, f"cannot drop {name}"),
        ):
            _drop_database(session, str(name))


def _drop_database(session: Connection, name: str) -> None:
    session.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def _clear(endpoint: Endpoint, scratch: Scratch) -> None:
    """Drop the database and the roles, by a new session: the first may have been lost."""
    with contextlib.closing(connect(endpoint, purpose="scratch")) as session:
        try:
            _drop_database(session, scratch.database)
            staying = drop_plain_roles(session, scratch.roles)
        except psycopg.Error as error:
            raise ServerError(
                f"database {scratch.database} or its roles stay on {endpoint.shown}: {error}",
                hint=f"Drop it, and roles {', '.join(scratch.roles) or '(none)'}, by hand.",
            ) from error
    if staying:
        raise ServerError(
            f"roles stay on the scratch server {endpoint.shown}: {', '.join(staying)}",
            hint="Something there depends on them; DROP OWNED in that database, then DROP ROLE.",
        )
