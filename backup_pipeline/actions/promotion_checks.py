"""Whether a recovered cluster may take over: it was finished, the archive is its, the source ended.

Called by promote.py before anything is changed. Two servers that archive one system as one cluster spoil each
other's archive: whoever is first with a name has it.
"""

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.domain.layout import wal_system_prefix
from backup_pipeline.domain.recovered import (
    PROMOTED_NAME,
    RECORD_NAME,
    RecoveredRecord,
    recovered_from_json,
)
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.domain.wal_archive import ArchivedSegment, ArchiveListing
from backup_pipeline.engines.postgres import daemon
from backup_pipeline.engines.postgres.cluster import is_nobodys, server_in
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect, server_errors
from backup_pipeline.engines.postgres.unpack import tablespaces_beside
from backup_pipeline.errors import ConfigError, ObjectNotFound, Refused, ServerError
from backup_pipeline.process import Identity
from backup_pipeline.storage.store import read_all
from backup_pipeline.units import show_seconds
from backup_pipeline.wal.listing import read_archive

QUIET = timedelta(minutes=10)
"""A source whose newest WAL is younger may be alive."""

_GONE = re.compile(
    r'failed: Connection refused|on socket "[^"]*" failed: No such file'
    r"|failed to resolve host .*: \[Errno -[25]\]"  # EAI_NONAME, EAI_NODATA: all else may pass
)


class TwinPromoted(Refused):
    """Another directory, recovered to the same target, archives already."""


def read_record(cluster: ProtectedCluster, data: Path) -> RecoveredRecord:
    """The record that a recovery of this cluster left there. Raises Refused, ConfigError, Corrupt."""
    path = data / RECORD_NAME
    try:
        record = recovered_from_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        done = " (it was promoted already)" if (data / PROMOTED_NAME).exists() else ""
        raise Refused(
            f"{data} is not a directory that `recover` finished{done}",
            hint="Name the directory that it was told with --into.",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="Run this as the directory's owner."
        ) from error
    if record.cluster != cluster.name:
        raise Refused(
            f"{data} was recovered from cluster {record.cluster}, not from {cluster.name}",
            hint=f"backup-pipeline promote {record.cluster} {data}",
        )
    configured = cluster.config.data_directory
    if configured and not _same(Path(configured), data):
        raise Refused(
            f"clusters.{cluster.name}.data_directory is {configured}, and not {data}: archiving would "
            "refuse the WAL of this one",
            hint="Move the directory there (it is not running then), or correct the configuration.",
        )
    return record


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def major_of(data: Path) -> int:
    """The major version that a data directory is of. Raises ConfigError."""
    try:
        return int((data / "PG_VERSION").read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{data} has no PG_VERSION that can be read: {error}") from error


def owner_of(data: Path, *, as_nobody: bool) -> Identity | None:
    """Who the server runs as: the directory's owner, who is us, or whom we, as root, may become.

    Raises Refused, also where `recover`, run as root, left it to nobody: unless `as_nobody`.
    """
    found = data.stat()
    if found.st_uid == os.getuid() != 0:
        return None
    if os.getuid() != 0 or found.st_uid == 0:
        raise Refused(
            f"{data} belongs to another user, and its server runs as that one",
            hint="Run this as that user. Or, as root, end its server, where one runs (`kill -INT`, and the "
            f"first line of postmaster.pid), and then: `{_chown(data)}`.",
        )
    owner = Identity(found.st_uid, found.st_gid)
    if is_nobodys(owner) and not as_nobody:
        pid = server_in(data)
        raise Refused(
            f"{data} belongs to nobody still, whom `recover` ran its server as, and so would production's",
            hint=(f"End its server: `kill -INT {pid}`. Then" if pid else "First")
            + f" give it to PostgreSQL's user: `{_chown(data)}`.",
        )
    return owner


def _chown(data: Path) -> str:
    beside = tablespaces_beside(data)
    links = sorted(path for path in (data / "pg_tblspc").glob("*") if path.is_symlink())
    places = [beside if beside in link.resolve().parents else link.resolve() for link in links]
    return shlex.join(["chown", "-R", "postgres:", str(data), *dict.fromkeys(map(str, places))])


def system_in_archive(cluster: ProtectedCluster, record: RecoveredRecord, data: Path) -> ArchiveListing:
    """The archive, which is of this system, and whose timeline of that number is this one's or nobody's.

    Raises Refused, BackupNotFound, StoreError.
    """
    listing = read_archive(cluster.store, cluster.name)
    if listing.system_identifier != record.system_identifier:
        raise Refused(
            f"the WAL archive of {cluster.name} belongs to PostgreSQL system {listing.system_identifier}, "
            f"and {data} is of {record.system_identifier}",
            hint=f"When this one is to take over: backup-pipeline wal setup {cluster.name} --adopt",
        )
    name = f"{record.timeline:08X}.history"
    with contextlib.suppress(ObjectNotFound):
        archived = read_all(
            cluster.store, f"{wal_system_prefix(cluster.name, record.system_identifier)}{name}"
        )
        own = data / "pg_wal" / name
        if not own.exists() or own.read_bytes() != archived:
            raise Refused(
                f"timeline {record.timeline} in the archive of {cluster.name} is another branch's: something "
                f"else was promoted since {data} was recovered",
                hint="Recover again: the new directory takes the next timeline. Is the other one production?",
            )
    return listing


def refuse_taken(listing: ArchiveListing, record: RecoveredRecord, data: Path, *, has_archived: bool) -> None:
    """Raise TwinPromoted where the timeline's WAL in the archive is not this directory's.

    Two recoveries to one target have the same timeline and the same history. What `has_archived`, or may
    have, still has in its pg_wal what it archived last, and a twin all that the archive refused it.
    """
    found = listing.segments.get(record.timeline, ())
    if not has_archived and found:
        why = f"{data} has archived none"
    elif (other := _another(found, listing.segment_bytes, data)) is not None:
        why = f"{other} is another one in {data}"
    else:
        return
    raise TwinPromoted(
        f"timeline {record.timeline} of {record.cluster} has WAL in the archive already, and {why}: another "
        "directory that was recovered to the same target was promoted",
        hint="Stop the server of this one, if it runs, and recover again: the new directory takes the next "
        "timeline. Is the other one production?",
    )


def _another(found: Sequence[ArchivedSegment], segment_bytes: int, data: Path) -> str | None:
    """The newest segment that lies in both places, where it is not the same."""
    for each in reversed(found):
        name = each.segment.name(segment_bytes)
        with contextlib.suppress(FileNotFoundError), (data / "pg_wal" / name).open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == each.sha256
            return None if same else name
    return None


def refuse_doubt(
    cluster: ProtectedCluster,
    record: RecoveredRecord,
    listing: ArchiveListing,
    data: Path,
    *,
    gone: bool,
    at: datetime,
) -> list[str]:
    """Why the source may be alive, as warnings where a person said that it is gone.

    What could not be asked from here is a warning in any case. Raises Refused where nobody said so;
    ConfigError.
    """
    doubts = [*_of_archive(record, listing, at), *_of_server(cluster, record, data)]
    if doubts and not gone:
        raise Refused(
            f"the source of {data} may be alive: {doubts[0]}",
            detail={f"sign {number}": doubt for number, doubt in enumerate(doubts, 1)},
            hint="Two servers in one archive spoil it, and clients write to the wrong one. Stop the old one "
            "for good; then say --source-is-gone.",
        )
    return [*doubts, *_looked_here_alone(cluster)]


def _looked_here_alone(cluster: ProtectedCluster) -> Iterator[str]:
    if cluster.config.dsn.named and (hosts := _hosts(cluster.given)) and all(map(_is_here, hosts)):
        yield (
            f"the dsn of {cluster.name} leads to this machine alone ({cluster.given.shown}): "
            "if the old server was elsewhere, see for yourself that it has ended"
        )


def _hosts(given: Endpoint) -> list[str]:
    """Where a dsn leads; nothing where a service file knows."""
    return [] if given.by_service else given.address[0].split(",")


def _is_here(host: str) -> bool:
    return host in ("", "localhost", "::1") or host.startswith(("/", "@", "127."))


def _of_archive(record: RecoveredRecord, listing: ArchiveListing, at: datetime) -> Iterator[str]:
    """WAL that came a moment ago on a timeline that is not this one's."""
    others = [listing.newest(timeline) for timeline in listing.timelines if timeline != record.timeline]
    newest = max((each.archived_at for each in others if each is not None), default=None)
    if newest is not None and at - newest < QUIET:
        age = show_seconds(max(0.0, (at - newest).total_seconds()))
        yield f"it archived WAL at {show_moment(newest)}, {age} ago"


def _of_server(cluster: ProtectedCluster, record: RecoveredRecord, data: Path) -> Iterator[str]:
    """A server that answers where the source was, and is not this directory's own."""
    if not cluster.config.dsn.named:
        return
    given = cluster.given
    try:
        source = cluster.source()
        with (
            contextlib.closing(connect(source, purpose="promote", statement_timeout_s=10.0)) as session,
            server_errors(source, "cannot ask the server what it is"),
        ):
            row = session.execute(
                "SELECT system_identifier::text,"
                " CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN"
                " substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) END"
                " FROM pg_catalog.pg_control_system()"
            ).fetchone()
    except ServerError as error:
        if not _says_gone(error, _hosts(given)) and not _is_own(given, data):
            yield f"a server could not be asked whether it is the old one: {error.message}"
        return
    ours = (record.system_identifier, f"{record.timeline:08X}")
    if row is not None and row[0] == ours[0] and row[1] is not None and row[1] != ours[1]:
        yield f"a server of its system answers at {source.shown}, on timeline {int(str(row[1]), 16)}"
    elif row is not None and tuple(row) == ours and server_in(data) is None:
        yield f"a server of its system answers at {source.shown}, on this timeline, and is not that of {data}"


def _is_own(given: Endpoint, data: Path) -> bool:
    """Whether it is this directory's own server that lets nobody in: on this machine, at that port."""
    address, hosts = daemon.address(data), _hosts(given)
    if address is None or not hosts or not all(map(_is_here, hosts)):
        return False
    return given.address[1] == str(address.port)


def _says_gone(error: ServerError, hosts: Sequence[str]) -> bool:
    """Whether nobody listens there, at none of the addresses: all else may come from a server that lives."""
    said = str(error.__cause__)
    attempts = said.split("\n- ")[1:] or [said]  # psycopg's list, where there was more than one
    # Of several hosts, one whose name does not resolve is neither tried nor told.
    told = len(hosts) < 2 or all(
        any(each.startswith(f"host: {host!r},") for each in attempts) for host in hosts
    )
    return told and all(_GONE.search(each) for each in attempts)
