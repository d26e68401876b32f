"""What an incremental base backup is taken against: chosen, shielded from prune, and its manifest fetched.

Called by base_backup.py. Whether the server knows what has changed since, only the server can say.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backup_pipeline.actions.fetch import fetch_backup_manifest
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.domain.base_chain import OLDEST_MAJOR, Chain, Server, by_id, chain_of, unfit_parent
from backup_pipeline.errors import BackupError, BackupNotFound, Refused
from backup_pipeline.storage import base_backups, leases
from backup_pipeline.storage.store import Store

_WHOLE = "Take a whole one: `backup-pipeline base-backup {cluster}`."


@dataclass(frozen=True)
class Against:
    """A parent that no prune takes away while this is used."""

    chain: Chain
    manifest: bytes  # PostgreSQL's own, of the chain's last
    check: Callable[[], None]  # raises StoreError when a lease of the chain has run out


class NoParent(Refused):
    """No base backup fits; the message says of each why."""


def refuse_unable(cluster: ProtectedCluster, server: Server, *, summarizes_wal: bool) -> None:
    """Raise Refused when the server takes no incremental base backups until somebody changes it."""
    if server.major < OLDEST_MAJOR:
        raise Refused(
            f"cluster {cluster.name} runs PostgreSQL {server.major}, and incremental base backups need "
            f"{OLDEST_MAJOR} or newer",
            hint=_WHOLE.format(cluster=cluster.name),
        )
    if not summarizes_wal:
        raise Refused(
            f"summarize_wal is off in cluster {cluster.name}: its server does not keep what has changed",
            hint="ALTER SYSTEM SET summarize_wal = on, and reload; `backup-pipeline wal setup` does it where "
            "the configuration has incremental base backups. Then take a whole one first.",
        )


def choose(cluster: ProtectedCluster, server: Server, named: BackupId | None) -> Chain:
    """The newest base backup that the next one can build on, or the one that was named, with its chain.

    Raises NoParent, or BackupNotFound when none has the name; StoreError.
    """
    listed = base_backups.list_base_backups(cluster.store, cluster.name).backups
    failed = {each.id for each in listed if each.verdict is Verdict.FAILED}
    found = [each.manifest for each in listed]
    known, wanted = by_id(found), sorted(found, key=lambda each: each.end.lsn, reverse=True)
    if named is not None:
        wanted = [each for each in found if each.id == named]
        if not wanted:
            raise BackupNotFound(
                f"there is no base backup {named}",
                hint=f"`backup-pipeline list {cluster.name}` shows what there is.",
            )
    reasons = {}
    for manifest in wanted:
        chain = chain_of(manifest, known)
        if not (reason := unfit_parent(chain, server, failed=failed)):
            wrong = base_backups.missing_link(cluster.store, chain)
            if wrong is None:
                return chain
            reason = wrong[1]
        reasons[manifest.id] = reason
    raise NoParent(
        f"{named} cannot be built on: {reasons[named]}"
        if named
        else f"no base backup of {cluster.name} can be built on",
        detail={str(each): reason for each, reason in list(reasons.items())[:3]} if not named else {},
        hint=_WHOLE.format(cluster=cluster.name),
    )


def whole_instead(error: BackupError, *, named: BackupId | None, report: Report) -> str:
    """Say, loudly, that a whole base backup is taken for what `error` says, and return it as a note.

    The error again where a parent was named: then nothing else will do.
    """
    if named is not None:
        raise error
    why = "; ".join((error.message, *(f"{name}: {said}" for name, said in error.detail.items())))
    report.say(f"warning: A WHOLE BASE BACKUP INSTEAD OF AN INCREMENTAL ONE: {why}")
    return f"whole, though an incremental one was asked for: {why}"


@contextlib.contextmanager
def held(store: Store, chain: Chain, *, clock: Clock) -> Iterator[Against]:
    """Keep prune away from each link while the block runs. Raises BackupNotFound when it was there first."""
    with contextlib.ExitStack() as stack:
        taken = [
            stack.enter_context(leases.hold(store, link.id, leases.PARENT, clock=clock))
            for link in chain.links
        ]

        def check() -> None:
            for lease in taken:
                lease.check()

        yield Against(chain, fetch_backup_manifest(store, chain.last), check)
