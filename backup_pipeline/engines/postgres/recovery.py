"""A data directory that was just unpacked, recovered: settings of ours, the replay, and what it came to.

Called by actions/recover.py, by actions/replay.py, and by drills. Where WAL comes from is what
`restore_command` says; which target, and whether it can be reached, was decided before. Nothing that the
source's own configuration says is run.

Source: PostgreSQL, "Continuous Archiving and Point-in-Time Recovery", "Archive Recovery", "Recovery Target".
"""

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.domain.recovery_target import RecoveryTarget, TargetKind, show_moment
from backup_pipeline.domain.replayable_wal import Route
from backup_pipeline.domain.wal import Lsn
from backup_pipeline.engines.postgres.event_triggers import OFF, SINCE_MAJOR
from backup_pipeline.errors import ServerError, ToolError
from backup_pipeline.process import Command, Identity

SOURCE_SUFFIX = ".source"
"""Ends the names of the source's own configuration files, which are kept beside ours and not read."""

CARRIED = f"configuration{SOURCE_SUFFIX}"
"""Below the data directory: the source's configuration that lay outside of its own, each file by its path."""

_CONFIGURATION = ("postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf")
_SIGNALS = ("standby.signal", "recovery.signal", "recovery.conf", "postmaster.pid", "postmaster.opts")
_TIMEOUT_S = 60.0
_TAIL_BYTES = 65536
_LIMITS = {
    # What the control file says: what WAL, and prepared transactions, may need at least.
    "max_connections": "max_connections setting",
    "max_worker_processes": "max_worker_processes setting",
    "max_wal_senders": "max_wal_senders setting",
    "max_prepared_transactions": "max_prepared_xacts setting",
    "max_locks_per_transaction": "max_locks_per_xact setting",
}
_FLOORS = {"max_prepared_transactions": 1000, "max_locks_per_transaction": 256}
"""What the replay has at least: the source's may have been raised after the base backup."""

_SAFE = {
    "archive_mode": "off",
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "shared_preload_libraries": "",
    "max_logical_replication_workers": "0",  # a copied subscription would take from the source's slot
    "max_sync_workers_per_subscription": "0",
}
_CONF = """\
# This cluster was recovered by backup-pipeline. These settings keep it to itself: it archives nothing,
# loads no library, subscribes to nothing, and listens where it was told and nowhere else. Those of its
# source are in the files beside this one that end in .source: take over what you need.
{lines}
"""
_HBA = """\
# The mode of the socket, and of the folder that it lies in, let in the server's own user alone.
local all all trust
"""
_HBA_TCP = "host all all 127.0.0.1/32 scram-sha-256\n"
_OWN_SOCKET = {"unix_socket_directories": "."}  # in the data directory, wherever it is moved to
_BEGUN = re.compile(r"starting (?:point-in-time|archive|backup) recovery|redo starts at")
_MISHAPS = re.compile(r"No space left on device|out of memory|terminated by signal 9")
_ENDED_EARLY = "recovery ended before configured recovery target was reached"
_READY = "database system is ready to accept connections"
_COMPLETE = "archive recovery complete"
_TIMELINE = re.compile(r"selected new timeline ID: (?P<timeline>\d+)")
_LAST_AT = re.compile(r"last completed transaction was at log time (?P<at>\S+ \S+)")
_REDO_DONE = re.compile(r"redo done at (?P<lsn>[0-9A-F]+/[0-9A-F]+)")
_OUTSIDE = re.compile(
    r'(?:FATAL|PANIC): [^"\n]*"(?P<path>(?:/|pg_tblspc/)[^"\n]*)"[^\n]*'
    r"(?:Permission denied|does not exist|No such file|File exists)"
)
_STOPPED = re.compile(r"recovery stopping (?:before|after|at) .*")


@dataclass(frozen=True)
class ControlFile:
    """What pg_controldata says of a data directory."""

    system_identifier: str
    major: int  # of PostgreSQL, as PG_VERSION says
    timeline: int
    settings: Mapping[str, str]  # of _LIMITS


@dataclass(frozen=True)
class Recovered:
    """What a replay came to, as the server says it."""

    timeline: int
    replayed_to: Lsn
    last_commit_at: datetime | None
    stopped: str  # the server's own words on the target; "" at the end of the WAL


def read_control_file(pg_controldata: str, data: Path) -> ControlFile:
    """Ask pg_controldata. Raises ToolError for a directory that has none, or one of another version."""
    said = _control_data(pg_controldata, data)
    try:
        return ControlFile(
            system_identifier=said["Database system identifier"],
            major=int((data / "PG_VERSION").read_text(encoding="ascii").strip()),
            timeline=int(said["Latest checkpoint's TimeLineID"]),
            settings={
                name: str(max(int(said[label]), _FLOORS.get(name, 0))) for name, label in _LIMITS.items()
            },
        )
    except (KeyError, ValueError, OSError) as error:
        raise ToolError(f"{data} has no control file that {pg_controldata} understands: {error}") from error


def _control_data(pg_controldata: str, data: Path) -> dict[str, str]:
    command = Command((pg_controldata, "-D", str(data)), {"LC_ALL": "C"})
    lines = process.run(command, timeout_s=_TIMEOUT_S).stdout.splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def lay_out(
    data: Path, control: ControlFile, *, owner: Identity | None, port: int | None = None
) -> tuple[str, ...]:
    """Put settings of ours into a data directory, and keep the source's beside them, unread.

    Planted commands and libraries lie in those, also where pg_verifybackup does not look. Returns the names
    that were kept. With a `port` the server will listen there on 127.0.0.1, else on its socket alone.
    """
    for name in (*_SIGNALS, *(f"{name}{SOURCE_SUFFIX}" for name in _CONFIGURATION)):
        (data / name).unlink(missing_ok=True)  # of .source files those that the source had from its own
    shutil.rmtree(data / CARRIED, ignore_errors=True)
    kept = []
    for name in _CONFIGURATION:
        if (data / name).exists():
            os.replace(data / name, data / f"{name}{SOURCE_SUFFIX}")
            kept.append(f"{name}{SOURCE_SUFFIX}")
    listening = {"listen_addresses": "127.0.0.1", "port": str(port)} if port else {}
    given = {**_SAFE, **_OWN_SOCKET, **listening, **control.settings}
    lines = "\n".join(f"{name} = '{value}'" for name, value in given.items())
    for name, text in (
        ("postgresql.conf", _CONF.format(lines=lines)),
        ("pg_hba.conf", _HBA + (_HBA_TCP if port else "")),
        ("pg_ident.conf", ""),
        ("recovery.signal", ""),
    ):
        path = data / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        if owner is not None:
            os.chown(path, owner.uid, owner.gid)
    return tuple(kept)


def recovery_settings(
    target: RecoveryTarget, *, to_the_end: bool, timeline: int, restore_command: str, control: ControlFile
) -> dict[str, str]:
    """The settings of the replay, for the server's command line: they win over every file.

    With `to_the_end` PostgreSQL is given no target: there is no record at which it could stop.
    """
    return {
        **_SAFE,
        **control.settings,
        **(OFF if control.major >= SINCE_MAJOR else {}),
        "restore_command": restore_command,
        "recovery_target_timeline": str(timeline),
        "recovery_target_action": "promote",
        "recovery_init_sync_method": "fsync",  # what was unpacked is made durable before the replay
        "recovery_prefetch": "off",  # it asks for segments far beyond the target, and fails at a gap
        "lc_messages": "C",  # what it says of the replay is read
        "timezone": "UTC",
        "log_timezone": "UTC",
        "hot_standby": "off",  # then no setting of the source's has to be matched while it replays
        **({} if to_the_end else target.settings()),
    }


class ReplayFailed(ToolError):
    """PostgreSQL replayed what it was given, and did not come to where it should."""


def explain(error: ToolError, log: str, target: RecoveryTarget, data: Path) -> ToolError | None:
    """The error for a replay that did not meet its target, or left its directory, or met what it could not
    replay; None where it did not come to replaying, or this machine is to blame.
    """
    if outside := _last(_OUTSIDE, log):
        link = data.joinpath(*Path(outside["path"]).parts[:2])
        place = os.readlink(link) if link.is_symlink() else outside["path"]
        return ToolError(
            f"the replay wanted to write outside of its own directory: {place}",
            detail={"server": error.message},
            hint="A tablespace was made there after the base backup. Begin with a later one; or, on a "
            "machine where nothing of the source's lies there, allow it with --also-write.",
        )
    if _ENDED_EARLY not in log:
        if not _BEGUN.search(log) or _MISHAPS.search(log):
            return None
        return ReplayFailed(error.message, detail=error.detail, hint=error.hint)
    last, done = _last(_LAST_AT, log), _last(_REDO_DONE, log)
    hint = "Choose an earlier target, or `latest`."
    if target.kind in (TargetKind.NAME, TargetKind.XID):
        hint = (
            "It lies before the base backup, after the end of the archive, or on another timeline: name an "
            "earlier base backup with --base, or another target."
        )
    return ReplayFailed(
        f"{target} was not met: the replay ended at {done['lsn'] if done else 'an unknown position'}",
        detail={"last transaction": last["at"] if last else "none was replayed", "server": error.message},
        hint=hint,
    )


def is_ready(log: Path) -> bool:
    """Whether the server has said that it replayed all it was to, and takes sessions."""
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return _READY.encode() in file.read()
    return False


def read_recovered(log: str, target: RecoveryTarget, *, to_the_end: bool, route: Route) -> Recovered:
    """What a server that is ready said of its replay. Raises ServerError unless the target was reached.

    That it started says nothing: it has to have ended its recovery on a timeline of its own, to have stopped
    at the target, and to have replayed nothing beyond it or beyond the route. Nobody enters it for this:
    who may is the source's business.
    """
    done, stopped, last = _last(_REDO_DONE, log), _last(_STOPPED, log), _last(_LAST_AT, log)
    found = _last(_TIMELINE, log)
    timeline = int(found["timeline"]) if found else 0
    last_at = datetime.fromisoformat(last["at"]).astimezone(UTC) if last else None
    wrong = ""
    if _COMPLETE not in log or done is None:
        wrong = "it does not say where the replay ended"
    elif timeline <= route.timeline:
        wrong = f"it is on timeline {timeline}, and the WAL led to {route.timeline}"
    elif stopped is None and not to_the_end:
        wrong = "it does not say that it stopped at the target"
    elif Lsn.parse(done["lsn"]) >= route.end:
        wrong = f"it replayed to {done['lsn']}, beyond the end of the plan, {route.end}"
    elif target.at is not None and last_at is not None and last_at > target.at:
        wrong = f"it replayed a transaction of {show_moment(last_at)}"
    if wrong or done is None:
        said = f"the recovery to {target} cannot be believed: {wrong}"
        raise ServerError(said, detail={"log": log[-2000:]})
    return Recovered(timeline, Lsn.parse(done["lsn"]), last_at, stopped[0] if stopped else "")


def check_stopped(pg_controldata: str, data: Path, recovered: Recovered) -> None:
    """Raise ServerError unless the server has ended in order, on the timeline that it said."""
    said = _control_data(pg_controldata, data)
    found = said.get("Database cluster state"), said.get("Latest checkpoint's TimeLineID")
    if found != ("shut down", str(recovered.timeline)):
        raise ServerError(
            f"the recovered cluster is {found[0]} on timeline {found[1]}, and should be shut down on "
            f"{recovered.timeline}"
        )


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = list(pattern.finditer(text))
    return found[-1] if found else None
