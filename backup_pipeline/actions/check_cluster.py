"""Look at everything that a cluster's protection depends on, from this machine: for `check`.

Changes nothing but a scratch object in the store. How well the server archives at this moment, and whether
its agent answers, is `wal status`'s, on PostgreSQL's own machine; a database's check is in setup.py.
"""

from collections.abc import Iterator
from datetime import datetime

from backup_pipeline.actions.base_preflight import Preflight, preflight
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Lines
from backup_pipeline.actions.windows import windows_of
from backup_pipeline.engines.postgres.preflight import Check, CheckStatus
from backup_pipeline.errors import BackupError, Refused
from backup_pipeline.storage.base_backups import list_base_backups
from backup_pipeline.units import show_seconds
from backup_pipeline.wal.identity import read_identity


def check(cluster: ProtectedCluster, *, now: datetime) -> Iterator[Check]:
    """Look at server, store, archive, base backups and window, and yield each as soon as it is known.

    Raises the first failure at the end, after everything was looked at.
    """
    failures: list[BackupError] = []
    ready: Preflight | None = None
    said: list[str] = []
    try:
        ready = preflight(cluster, report=Lines(said.append))
        yield Check("server", CheckStatus.OK, said[0])
        yield Check("store", CheckStatus.OK, f"{cluster.store.url} can be written to")
    except BackupError as error:
        failures.append(error)
        yield Check("server", CheckStatus.FAILED, error.message, error.hint)
    try:
        yield _check_archive(cluster, ready.system_identifier if ready else "")
    except BackupError as error:
        failures.append(error)
        yield Check("archive", CheckStatus.FAILED, error.message, error.hint)
    for look in (_check_newest, _check_window):
        try:
            yield look(cluster, now)
        except BackupError as error:
            failures.append(error)
            yield Check(look.__name__.removeprefix("_check_"), CheckStatus.FAILED, error.message, error.hint)
    if failures:
        raise failures[0]


def _check_archive(cluster: ProtectedCluster, system_identifier: str) -> Check:
    """Whose WAL the archive takes, against the server that was reached, "" when none was."""
    identity, name = read_identity(cluster.store, cluster.name), cluster.name
    if identity is None:
        raise Refused(
            f"there is no WAL archive of {name} in {cluster.store.url}",
            hint=f"`backup-pipeline wal setup {name} --apply`, on PostgreSQL's machine, begins one.",
        )
    shown = f"it takes the WAL of PostgreSQL system {identity.system_identifier}"
    if system_identifier and system_identifier != identity.system_identifier:
        raise Refused(
            f"{shown}, and the server is system {system_identifier}",
            hint="Give this cluster a name of its own, or, only when it takes over: "
            f"`backup-pipeline wal setup {name} --adopt`.",
        )
    if not system_identifier:
        return Check("archive", CheckStatus.WARNING, f"{shown}; whether that is the server is not known")
    return Check("archive", CheckStatus.OK, f"{shown}, the server's; `wal status {name}` says how it stands")


def _check_newest(cluster: ProtectedCluster, now: datetime) -> Check:
    """The base backup that the next recovery would begin with."""
    listing = list_base_backups(cluster.store, cluster.name)
    for key, reason in listing.unreadable:
        hint = "Look at that object; until then no prune deletes anything of this cluster."
        return Check("newest", CheckStatus.WARNING, f"{key} cannot be read: {reason}", hint)
    if not listing.backups:
        hint = f"Take one: `backup-pipeline base-backup {cluster.name}`; WAL alone restores nothing."
        return Check("newest", CheckStatus.WARNING, "there is no base backup", hint)
    newest = listing.backups[0]
    age = show_seconds(max(0.0, (now - newest.manifest.stopped_at).total_seconds()))
    return Check("newest", CheckStatus.OK, f"the newest base backup, {newest.id}, is {age} old")


def _check_window(cluster: ProtectedCluster, now: datetime) -> Check:
    """What can be recovered, and what speaks against the window that is configured."""
    found = windows_of(cluster, now=now)
    shown = f"any moment {found.current}" if found.current else "no moment can be recovered"
    if found.problems:
        hint = f"`backup-pipeline list {cluster.name}` shows all; in a cluster's first days this is no fault."
        return Check("window", CheckStatus.WARNING, "; ".join((shown, *found.problems)), hint)
    return Check("window", CheckStatus.OK, shown)
