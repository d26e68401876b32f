"""A place to restore to and throw away: a cluster of our own, or a database on a server that was named.

Called by proofs and drills. What is restored there, and what is compared, is not known here. Whatever
happens, nothing stays: what a killed process left, or what could not be dropped, is collected by the
next one on the same machine, or on the same server.
"""

import contextlib
import os
import secrets
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from backup_pipeline import confinement, spool
from backup_pipeline.engines.postgres.blame import LOG_LINE_PREFIX, Blame, blame
from backup_pipeline.engines.postgres.cluster import LocalCluster, await_end, server_in
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.event_triggers import OFF, SINCE_MAJOR, without_event_triggers
from backup_pipeline.engines.postgres.lock import NEUTRAL_DATABASE, advisory_lock, lock_key
from backup_pipeline.engines.postgres.restore import drop_temporary
from backup_pipeline.engines.postgres.roles import create_plain_roles, drop_plain_roles
from backup_pipeline.engines.postgres.server import Connection, connect, read_server_info, server_errors
from backup_pipeline.engines.postgres.socket_folder import remove_socket_folder
from backup_pipeline.engines.postgres.tools import SERVER, find_tools
from backup_pipeline.errors import BackupError, Busy, NotProvable, ServerError, ToolError

DATABASE_PREFIX = "backup_scratch_"
"""Begins the name of every scratch database; on a scratch server, others are never touched."""

RECOVERY = "recovery"
"""The purpose of the folders that a cluster is recovered in, beside the place that it takes at the end."""

ROLE_MARK = "made for proofs by backup-pipeline, which drops it when no proof runs"
"""The comment on every role that a proof created."""

# The number of an object that was dropped, kept as a value (regclass, regproc), is written as a number only
# where no object has it. Below 2^31: the source's own functions may keep such numbers as int.
_FIRST_OID = 2_000_000_000
_DYING_S = 5.0
_ROLES_IN_USE = lock_key("\0roles in use by proofs")  # no database has such a name
_ROLES_IN_MAKING = lock_key("\0roles in making for a proof")
_ENGLISH = ("C", "POSIX", "en")
_TELLING = {
    "log_line_prefix": LOG_LINE_PREFIX,
    "log_min_error_statement": "panic",  # what is restored is nobody's to read there
    "lc_messages": "C",
}


@dataclass
class Scratch:
    """Where to restore to: create `database` through `endpoint`, and roles by `create_roles`.

    After the end, `left` says what could not be removed, and why.
    """

    endpoint: Endpoint
    database: str
    ours: bool  # a cluster of our own, that goes with all that is in it
    cut_off: bool  # what is restored there can reach no other machine
    hidden: bool  # nor files of this one, beside the server's own
    superuser: bool = True
    english: bool = True  # the server's messages can be told apart
    log: Path | None = None  # where a cluster of our own writes
    left: list[str] = field(default_factory=list)

    def blame(self, error: ToolError) -> Blame:
        """Judge a load that failed here. Raises ServerError when the server has gone meanwhile."""
        log = self.log.read_text(encoding="utf-8", errors="replace") if self.log else ""
        found = blame(
            error,
            log=log,
            superuser=self.superuser,
            english=self.english,
            hidden=self.hidden,
            cut_off=self.cut_off or (self.hidden and confinement.keeps_from_network()),
        )
        if found is Blame.BACKUP:
            connect(self.endpoint, purpose="scratch").close()
        return found


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

    At the end, the cluster is gone; or the database is gone from the existing server, and with the last
    proof there the roles.

    Raises NotProvable when the server is of another version, or is the source itself (the one of
    `source_identifier`), or when this machine has no PostgreSQL of this version.
    """
    if existing is None:
        with scratch_cluster(major, bin_dir=bin_dir, folder=folder, settings=settings) as cluster:
            yield Scratch(
                cluster.endpoint(),
                _new_name(),
                ours=True,
                cut_off=cluster.cut_off,
                hidden=cluster.hidden,
                log=cluster.log,
            )
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
    or a function of the dump may, is cut off from the network and from files that are not its own,
    where the system allows that.

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
            tools.bin_dir,
            own / "cluster",
            relaxed=True,
            first_oid=_FIRST_OID if (Path(tools.bin_dir) / "pg_resetwal").exists() else None,
            network=False,
            confined=True,
            settings={**_TELLING, **(OFF if major >= SINCE_MAJOR else {}), **(settings or {})},
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
    return spool.private_folder("scratch", parent=parent, mode=0o711, ending=end_cluster)


def collect_stale(parent: Path) -> tuple[Path, ...]:
    """End and remove the clusters that killed processes of this user left; return their folders."""
    return spool.collect_stale("scratch", parent, end_cluster)


def end_cluster(folder: Path) -> None:
    """End the servers, and remove the sockets, of what a killed process left in `folder`.

    That is a cluster, and the one that was being recovered beside it, to become it.
    """
    for place in (folder, *folder.glob(f"cluster/backup-{RECOVERY}-*")):
        _end_server(place / "cluster" / "data")
        remove_socket_folder(place / "cluster")


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


def create_roles(scratch: Scratch, names: Iterable[str]) -> None:
    """Create the roles of these names that are missing there, without login or any right.

    Those that another proof made are shared with it. Raises ServerError.
    """
    neutral = scratch.endpoint.with_database(NEUTRAL_DATABASE)
    with (
        contextlib.closing(connect(neutral, purpose="scratch")) as session,
        server_errors(neutral, "cannot create the roles"),
        session.transaction(),
    ):
        session.execute("SELECT pg_catalog.pg_advisory_xact_lock(%s)", [_ROLES_IN_MAKING])
        create_plain_roles(session, names, comment=ROLE_MARK)


@contextlib.contextmanager
def _on_existing(endpoint: Endpoint, major: int, source_identifier: str) -> Iterator[Scratch]:
    with contextlib.closing(connect(endpoint, purpose="scratch")) as session:
        scratch = _look(endpoint, session, major, source_identifier)
    try:
        # The lock says that the scratch database is in use; it goes with us, however we end.
        with (
            _sharing_roles(endpoint),
            advisory_lock(endpoint, scratch.database, purpose="scratch", wait_s=0, renames=True),
        ):
            _drop_stale(endpoint)
            try:
                yield scratch
            finally:
                with _tidying(scratch):
                    drop_temporary(endpoint, scratch.database)
        with _tidying(scratch):
            _drop_roles(endpoint)
    except BaseException as error:
        for line in scratch.left:
            error.add_note(line)
        raise


def _look(endpoint: Endpoint, session: Connection, major: int, source_identifier: str) -> Scratch:
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
    told, english = _in_english(endpoint, session)
    told, _ = without_event_triggers(told, session)  # a role that may not, may create none either
    return Scratch(
        told,
        _new_name(),
        ours=False,
        cut_off=False,
        hidden=False,
        superuser=info.is_superuser,
        english=english,
    )


def _in_english(endpoint: Endpoint, session: Connection) -> tuple[Endpoint, bool]:
    """The same server, with English messages where this role may ask for them; and whether they are."""
    try:
        session.execute("SET lc_messages = 'C'")
    except psycopg.errors.InsufficientPrivilege:
        row = session.execute("SELECT pg_catalog.current_setting('lc_messages')").fetchone()
        return endpoint, row is not None and str(row[0]).startswith(_ENGLISH)
    options = f"{conninfo_to_dict(endpoint.dsn).get('options') or ''} -c lc_messages=C".strip()
    return Endpoint(make_conninfo(endpoint.dsn, options=options), endpoint.password), True


@contextlib.contextmanager
def _tidying(scratch: Scratch) -> Iterator[None]:
    """Write down what cannot be removed: it is no error of the proof, and the next one tries again."""
    try:
        yield
    except BackupError as error:
        scratch.left.append(f"left on the scratch server: {error.message}")


@contextlib.contextmanager
def _sharing_roles(endpoint: Endpoint) -> Iterator[None]:
    """Keep other proofs on this server from dropping roles that this one uses."""
    neutral = endpoint.with_database(NEUTRAL_DATABASE)
    with contextlib.closing(connect(neutral, autocommit=False, purpose="scratch")) as session:
        with server_errors(neutral, "cannot lock the roles"):
            session.execute("SELECT pg_catalog.pg_advisory_xact_lock_shared(%s)", [_ROLES_IN_USE])
        yield
        with contextlib.suppress(psycopg.Error):  # a session that was lost holds nothing
            session.rollback()  # closing alone does not wait until the server has let go of the lock


def _drop_roles(endpoint: Endpoint) -> None:
    """Drop the roles that proofs made, killed ones too, unless another proof runs there."""
    neutral = endpoint.with_database(NEUTRAL_DATABASE)
    with (
        contextlib.closing(connect(neutral, purpose="scratch")) as session,
        server_errors(neutral, "cannot drop the roles of proofs"),
        session.transaction(),
    ):
        row = session.execute("SELECT pg_catalog.pg_try_advisory_xact_lock(%s)", [_ROLES_IN_USE]).fetchone()
        if not row or not row[0]:
            return
        query = (
            "SELECT rolname FROM pg_catalog.pg_roles"
            " WHERE pg_catalog.shobj_description(oid, 'pg_authid') = %s ORDER BY rolname"
        )
        marked = [str(name) for (name,) in session.execute(query, [ROLE_MARK])]
        staying = drop_plain_roles(session, marked)
    if staying:
        raise ServerError(f"something depends on roles that proofs made: {', '.join(staying)}")


def _drop_stale(endpoint: Endpoint) -> None:
    query = "SELECT datname FROM pg_catalog.pg_database WHERE pg_catalog.starts_with(datname, %s)"
    with contextlib.closing(connect(endpoint, purpose="scratch")) as session:
        names = [str(name) for (name,) in session.execute(query, [DATABASE_PREFIX])]
    for name in names:
        with (
            contextlib.suppress(Busy, ServerError),  # in use by its maker, or another role's
            advisory_lock(endpoint, name, purpose="scratch", wait_s=0, renames=True),
        ):
            drop_temporary(endpoint, name)
