"""What postgresql.conf needs so that a server archives here: the plan, pure, and the command itself.

Called by commands/wal.py, which shows the plan or has it carried out. Settings are changed by
engines/postgres/archiving.py, the archive's owner by identity.py.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.config import ClusterConfig, StoreConfig
from backup_pipeline.engines.postgres.archiving import Archiving
from backup_pipeline.errors import Refused, ToolError
from backup_pipeline.process import Command, Identity
from backup_pipeline.wal import client

_NEEDS_RESTART = ("wal_level", "archive_mode")
_NO_INCREMENTAL = "the configuration has incremental base backups, and they need PostgreSQL 17 or newer"


def archive_command(cluster: ClusterConfig, config: Path, *, python: str = "") -> str:
    """The archive_command of a cluster: absolute paths, quoted for the shell and for PostgreSQL's `%`.

    Whatever becomes of the client, or of Python itself, the shell ends with 0 or 1: PostgreSQL's archiver
    would not count what is above 125.
    """
    argv = (
        python or sys.executable,
        "-I",
        "-S",
        str(Path(client.__file__).absolute()),
        "push",
        "--socket",
        cluster.agent_socket,
        "--config",
        str(config),
        "--cluster",
        cluster.name,
        "--timeout",
        f"{cluster.push_timeout.total_seconds():g}",
    )
    return shlex.join(argv).replace("%", "%%") + ' "%p" || exit 1'


def is_ours(command: str) -> bool:
    """Whether an archive_command starts our client."""
    try:
        words = shlex.split(command)
    except ValueError:
        return False
    return any(word.endswith("/backup_pipeline/wal/client.py") for word in words)


def needed_files(config: Path) -> tuple[str, ...]:
    """What archive_command names, and PostgreSQL's machine has to have."""
    return (sys.executable, str(Path(client.__file__).absolute()), str(config))


def refuse_elsewhere(cluster: str, data_directory: str) -> None:
    """Raise Refused when the data directory of a server is not on this machine."""
    if not data_directory or not _may_exist(Path(data_directory)):
        where = data_directory or "which the role may not see"
        raise Refused(
            f"the data directory of {cluster}, {where}, is not found on this machine",
            hint="Run this on PostgreSQL's own machine, as a role with pg_monitor; without --apply it shows "
            "what to set.",
        )


def refuse_unseen(cluster: str, missing: Sequence[str] | None) -> None:
    """Raise Refused for `missing` files, which the server does not see; None where it could not be asked."""
    if missing:
        raise Refused(
            f"the server of {cluster} does not see {', '.join(missing)}, which its archive_command needs",
            hint="Run this on PostgreSQL's own machine, or in its container, from where the program is "
            "installed for every user, in /opt say.",
        )


def _may_exist(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def refuse_unreadable(data_directory: Path) -> None:
    """Raise Refused when PostgreSQL's user, on this machine, cannot start the client. Only root can try.

    A Python in somebody's home is the usual case.
    """
    try:
        owner = data_directory.stat()
    except OSError:
        return  # PostgreSQL's own user alone may look
    if os.getuid() != 0 or owner.st_uid == 0:
        return
    argv = (sys.executable, "-I", "-S", str(Path(client.__file__).absolute()))
    why = ""
    try:
        identity = Identity(owner.st_uid, owner.st_gid)
        done = process.run(Command(argv, identity=identity, cwd="/"), timeout_s=20.0, check=False)
        why = "" if "usage: push" in done.stderr else done.stderr.strip()[-200:] or "it ended otherwise"
    except ToolError as error:
        why = error.message
    if why:
        raise Refused(
            f"the user of {data_directory} cannot run {sys.executable} on {argv[-1]}: {why}",
            hint="Install this program where every user may read it, in /opt say, and run it from there.",
        )


@dataclass(frozen=True)
class Change:
    """One setting that is to be another."""

    name: str
    present: str
    wanted: str

    @property
    def needs_restart(self) -> bool:
        """Whether a reload is not enough."""
        return self.name in _NEEDS_RESTART

    @property
    def line(self) -> str:
        """As postgresql.conf has it."""
        quoted = self.wanted.replace("\\", "\\\\").replace("'", "''")
        return f"{self.name} = '{quoted}'"


@dataclass(frozen=True)
class SetupPlan:
    """What is to be changed; `pending` was changed before and waits for a restart."""

    changes: tuple[Change, ...]
    pending: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> Mapping[str, str]:
        """The changes for ALTER SYSTEM."""
        return {change.name: change.wanted for change in self.changes}

    @property
    def restart(self) -> tuple[str, ...]:
        """The settings for which the server has to be restarted."""
        return tuple(sorted({*self.pending, *(each.name for each in self.changes if each.needs_restart)}))


def plan_setup(
    archiving: Archiving, cluster: ClusterConfig, store: StoreConfig, command: str, *, replace_command: bool
) -> SetupPlan:
    """What a server needs in order to archive by `command`.

    Raises Refused when it archives in another way, unless that is to be replaced.
    """
    present = archiving.settings
    if not replace_command:
        _refuse_foreign(cluster.name, present)
    timeout = f"{cluster.archive_timeout.total_seconds():.0f}"
    level, mode = present.get("wal_level", ""), present.get("archive_mode", "")
    wanted = {
        "wal_level": level if level in ("replica", "logical") else "replica",
        "archive_mode": mode if mode in ("on", "always") else "on",
        "archive_library": "",
        "archive_command": command,
        "archive_timeout": timeout,
        **({"summarize_wal": "on"} if cluster.incremental_cron else {}),
    }
    changes = tuple(
        Change(name, present[name], value)
        for name, value in wanted.items()
        if name in present and present[name] != value
    )
    too_old = cluster.incremental_cron and "summarize_wal" not in present
    notes = (*_notes(store), *([_NO_INCREMENTAL] if too_old else []))
    return SetupPlan(changes, archiving.pending, notes)


def _refuse_foreign(cluster: str, present: Mapping[str, str]) -> None:
    for name in ("archive_command", "archive_library"):
        value = present.get(name, "")
        if value and not (name == "archive_command" and is_ours(value)):
            raise Refused(
                f"the server of {cluster} archives by another {name}: {value}",
                hint="What it is for loses its WAL from then on. To replace it: backup-pipeline wal setup "
                f"{cluster} --replace-command",
            )


def _notes(store: StoreConfig) -> tuple[str, ...]:
    secrets = (store.access_key_id, store.secret_access_key, store.endpoint_from)
    named = sorted({secret.env for secret in secrets if secret and secret.env})
    if not named:
        return ()
    return (
        f"PostgreSQL does not have {', '.join(named)} in its environment: while no agent runs, nothing is "
        "archived. Name a file instead, { file = … }, that PostgreSQL's user may read.",
    )
