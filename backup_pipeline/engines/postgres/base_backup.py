"""BASE_BACKUP: a whole cluster as a series of tar streams, read through the replication protocol.

Called by actions/base_backup.py. One connection carries all tablespaces and PostgreSQL's own manifest; why
not pg_basebackup is in docs/adr/007. Nothing is compressed or stored here.

Source: PostgreSQL, "Streaming Replication Protocol", BASE_BACKUP, UPLOAD_MANIFEST.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from backup_pipeline.domain.base_backup import WalPoint
from backup_pipeline.domain.wal import Lsn, TimelineHistory
from backup_pipeline.engines.postgres import slots
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.replication import (
    Session,
    message_of,
    replication_session,
    sqlstate_of,
)
from backup_pipeline.errors import ServerError

OLDEST_MAJOR = 15
"""Older servers send a backup in another form."""

CHUNK_BYTES = 1024 * 1024
_RATE_KB = range(32, 1024 * 1024 + 1)  # what MAX_RATE may be
_DATA_CORRUPTED = "XX001"
_NOT_IN_STATE = "55000"
_UPLOAD_BYTES = 64 * 1024
_CHECKSUM_FAILURE = "checksum verification failure during base backup"


@dataclass(frozen=True)
class Options:
    """What a base backup may be asked for."""

    label: str
    fast: bool = False  # begin with an immediate checkpoint
    max_rate_bytes_s: int | None = None
    verify_checksums: bool = True
    incremental: bool = False  # against the manifest that goes with it


@dataclass(frozen=True)
class SourceTablespace:
    """A tablespace as the server tells it before it sends anything; the cluster itself has oid 0."""

    oid: int
    location: str
    size_bytes: int  # to the KiB


@dataclass(frozen=True)
class Archive:
    """One file that the server sends: a tar, or its manifest. `chunks` is read to its end before the next."""

    name: str  # "base.tar", "16384.tar", "backup_manifest"
    oid: int  # of the tablespace; 0 for the cluster itself
    chunks: Iterator[bytes]


MANIFEST_NAME = "backup_manifest"
BASE_NAME = "base.tar"


@dataclass
class BaseBackup:
    """A base backup under way. `end` and all of `notices` are known once `archives` ended."""

    start: WalPoint
    tablespaces: tuple[SourceTablespace, ...]
    end: WalPoint | None = None
    page_checksums_wrong: bool = False
    read_bytes: int = 0
    _session: Session | None = field(default=None, repr=False)
    _announced: tuple[str, int] | None = None

    @property
    def size_bytes(self) -> int:
        """About how much will be sent."""
        return sum(item.size_bytes for item in self.tablespaces)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the server remarked."""
        session = self._open
        left_out = session.notices_left_out
        return (*session.notices, *([f"and {left_out} more"] if left_out else []))

    def archives(self) -> Iterator[Archive]:
        """Each tar, then the manifest. Raises ServerError, also when one was not read to its end."""
        self._open.checked(self._open.result(), "BASE_BACKUP")
        for _ in self._data(""):
            raise ServerError("the server sent data that belongs to no archive")
        while self._announced is not None:
            name, oid = self._announced
            yield Archive(name, oid, self._data(name))
            if (name, oid) == self._announced:
                raise ServerError(f"{name} was not read to its end")

    def ask(self, command: str) -> list[tuple[str | None, ...]]:
        """Ask the server something more, once `archives` ended. Raises ServerError."""
        return self._open.ask(command)

    @property
    def _open(self) -> Session:
        if self._session is None:
            raise ServerError("the base backup has ended")
        return self._session

    def _data(self, name: str) -> Iterator[bytes]:
        """What belongs to an archive, in chunks of about 1 MiB; then announces the next one.

        Ends only when the archive is whole, so that nobody stores a truncated one.
        """
        gathered = bytearray()
        announced: tuple[str, int] | None = None
        while (message := self._open.copied()) is not None:
            kind = message[0]
            if kind == ord("d"):
                gathered += message[1:]
                self.read_bytes += len(message) - 1
                if len(gathered) >= CHUNK_BYTES:
                    yield bytes(gathered)
                    gathered.clear()
            elif kind in (ord("n"), ord("m")):
                announced = _announced(bytes(message))
                break
            elif kind != ord("p"):
                raise ServerError(f"the server sent a message of an unknown kind, {chr(kind)!r}")
        if announced is None:
            self._finish(name)
        if gathered:
            yield bytes(gathered)
        self._announced = announced

    def _finish(self, name: str) -> None:
        (end,) = self._open.rows("BASE_BACKUP")
        if name != MANIFEST_NAME:
            raise ServerError("the server ended the backup without its manifest")
        # A page that failed its checksum is an error only now, when everything was sent.
        while (result := self._open.result()) is not None:
            if sqlstate_of(result) == _DATA_CORRUPTED and _CHECKSUM_FAILURE in message_of(result):
                self.page_checksums_wrong = True
            else:
                self._open.checked(result, "BASE_BACKUP")
        self.end = _wal_point(end)


@contextlib.contextmanager
def base_backup(
    endpoint: Endpoint,
    options: Options,
    *,
    stall_s: float,
    checkpoint_s: float = 0.0,
    parent_manifest: bytes = b"",
) -> Iterator[BaseBackup]:
    """A base backup of the cluster at `endpoint`, begun. Leaving the block ends it, and leaves nothing.

    An incremental one is taken against the backup that `parent_manifest`, PostgreSQL's own, is of. The
    server may be silent for `stall_s`, and before it begins for `checkpoint_s` more: a spread checkpoint
    takes its time. Raises ServerError; NotSinceParent when it cannot be taken against that one.
    """
    with replication_session(endpoint, purpose="base backup", stall_s=stall_s) as session:
        with _against_parent() if options.incremental else contextlib.nullcontext():
            if options.incremental:
                session.copy_in("UPLOAD_MANIFEST", _pieces(parent_manifest))
            session.send(base_backup_command(options))
            (start,) = session.rows("BASE_BACKUP", stall_s=stall_s + checkpoint_s)
        found = tuple(_tablespace(row) for row in session.rows("BASE_BACKUP"))
        yield BaseBackup(_wal_point(start), found, _session=session)


class NotSinceParent(ServerError):
    """The server cannot tell what has changed since the parent; a whole base backup can be taken."""

    retryable = False


@contextlib.contextmanager
def _against_parent() -> Iterator[None]:
    try:
        yield
    except ServerError as error:
        # Only of these states: what a whole one would meet too is met again with that.
        if error.detail.get("sqlstate") != _NOT_IN_STATE:
            raise
        raise NotSinceParent(error.message, detail=error.detail, hint=error.hint) from error


def _pieces(data: bytes) -> Iterator[bytes]:
    return (data[at : at + _UPLOAD_BYTES] for at in range(0, len(data), _UPLOAD_BYTES))


def identify_system(endpoint: Endpoint, *, stall_s: float) -> tuple[str, int]:
    """(system identifier, timeline) of a server, over a replication connection: so it lets us in.

    Raises ServerError.
    """
    with replication_session(endpoint, purpose="preflight", stall_s=stall_s) as session:
        found = slots.identify(session)
    return found.system_identifier, found.timeline


def timeline_history(endpoint: Endpoint, timeline: int, *, stall_s: float) -> TimelineHistory:
    """Where a timeline of the server came from. Raises ServerError."""
    if timeline == 1:
        return TimelineHistory(1)
    with replication_session(endpoint, purpose="preflight", stall_s=stall_s) as session:
        return slots.read_history(session, timeline)[1]


def read_history(rows: list[tuple[str | None, ...]], timeline: int) -> TimelineHistory:
    """The answer to TIMELINE_HISTORY."""
    return slots.history_from(rows, timeline)[1]


def base_backup_command(options: Options) -> str:
    """The statement, for servers from 15 on. No WAL comes with it, nor does it wait for any."""
    given = {
        "LABEL": _quoted(options.label),
        "PROGRESS": "true",
        "CHECKPOINT": "'fast'" if options.fast else "'spread'",
        "WAL": "false",
        "WAIT": "false",
        "TABLESPACE_MAP": "true",
        "VERIFY_CHECKSUMS": "true" if options.verify_checksums else "false",
        "MANIFEST": "'yes'",
        "MANIFEST_CHECKSUMS": "'SHA256'",
        "TARGET": "'client'",
    }
    if options.incremental:
        given["INCREMENTAL"] = "true"
    if options.max_rate_bytes_s is not None:
        kilobytes = options.max_rate_bytes_s // 1024
        given["MAX_RATE"] = str(max(_RATE_KB.start, min(kilobytes, _RATE_KB.stop - 1)))
    return f"BASE_BACKUP ({', '.join(f'{name} {value}' for name, value in given.items())})"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _announced(message: bytes) -> tuple[str, int]:
    if message[:1] == b"m":
        return MANIFEST_NAME, 0
    name = message[1:].split(b"\0")[0].decode(errors="replace")
    stem = name.removesuffix(".tar")
    if name == BASE_NAME:
        return name, 0
    if not stem.isascii() or not stem.isdigit() or f"{int(stem)}.tar" != name:
        raise ServerError(f"the server sent an archive of an unknown name, {name!r}")
    return name, int(stem)


def _wal_point(row: tuple[str | None, ...]) -> WalPoint:
    lsn, timeline = row
    return WalPoint(int(timeline or 0), Lsn.parse(lsn or ""))


def _tablespace(row: tuple[str | None, ...]) -> SourceTablespace:
    oid, location, kilobytes = row
    return SourceTablespace(int(oid or 0), location or "", int(kilobytes or 0) * 1024)
