"""What a recovery begins with: a base backup that is there with all that it builds on, brought into place.

Called by recover.py. Each link of a chain is checked file by file as it is unpacked, what they come to once
more; the links are gone before that. How one is unpacked is unpack.py's.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence

from backup_pipeline.actions.fetch import fetch_backup_manifest
from backup_pipeline.actions.protected import Clock
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.recovery_facts import RecoveryFacts
from backup_pipeline.actions.recovery_place import Workplace
from backup_pipeline.actions.report import Report
from backup_pipeline.actions.unpack import require_space, space_wanted, unpack
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_chain import Chain
from backup_pipeline.domain.recovery_route import find_route
from backup_pipeline.domain.recovery_target import RecoveryTarget
from backup_pipeline.domain.replayable_wal import Route
from backup_pipeline.engines.postgres import combine
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.unpack import Places
from backup_pipeline.errors import Corrupt, ObjectNotFound, Refused, ToolError
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.store import Store
from backup_pipeline.units import show_bytes, show_count

_DAMAGED = "damaged base backup"
_NOT_COMBINED = (
    "Where it is for want of space, free some; else begin with a base backup that is older, by --base: "
    "`backup-pipeline list` shows them."
)


def whole_route(
    cluster: ProtectedCluster,
    facts: RecoveryFacts,
    target: RecoveryTarget,
    *,
    timeline: int,
    base: BackupId | None,
) -> tuple[RecoveryFacts, Route]:
    """The route to a target whose base backup is there object by object, with all that it builds on.

    The facts say which were passed over. Raises Refused as `find_route` does, StoreError.
    """
    archive = facts.archive
    while True:
        route = find_route(facts.points, archive, target, timeline=timeline, base=base)
        wrong = base_backups.missing_link(cluster.store, facts.chain(route.base.id))
        if wrong is None:
            return facts, route
        facts = facts.without(*wrong)


@contextlib.contextmanager
def naming_another(facts: RecoveryFacts, target: RecoveryTarget, *, timeline: int) -> Iterator[None]:
    """What is found damaged is told with the base backup that does without it."""
    try:
        yield
    except (Corrupt, ObjectNotFound) as error:
        if _DAMAGED not in error.detail:
            raise
        left = facts.without(BackupId.parse(str(error.detail[_DAMAGED])), "it is damaged")
        try:
            other = find_route(left.points, left.archive, target, timeline=timeline).base.id
        except Refused:
            error.hint = f"{error.hint} No other base backup leads to {target}."
        else:
            error.hint = f"{error.hint} {other} does without it: --base {other}"
        raise


def chain_lines(chain: Chain) -> tuple[str, ...]:
    """What a plan says of a chain; nothing of a whole base backup."""
    if not chain.incremental:
        return ()
    older = " and ".join(str(link.id) for link in chain.links[:-1])
    needed = show_bytes(chain.written_bytes)
    return (
        f"which is incremental: it is combined with {older}, {show_bytes(chain.size_bytes)} compressed; all "
        f"of it takes {needed} of space meanwhile",
    )


def require_room(chain: Chain, places: Places) -> None:
    """Refuse when a file system has too little room for a chain and what it comes to, or a whole base backup.

    A link is unpacked on the file systems of the places that it is combined in.
    """
    if not chain.incremental:
        require_space([space_wanted(chain.last, places)], str(chain.last.id))
        return
    require_space(
        [
            *(space_wanted(link, places) for link in chain.links),
            space_wanted(chain.last, places, combined=True),
        ],
        f"{chain.last.id}, all that it builds on, and what they come to",
    )


def bring(
    store: Store, chain: Chain, work: Workplace, *, bin_dir: str, insists: bool, clock: Clock, report: Report
) -> None:
    """Fill the workplace's data directory and tablespaces. What fails leaves them to the workplace's end.

    With `insists`, nothing is combined unless it can be kept to its own files. Raises Corrupt, naming the
    link in `detail`, BackupNotFound, Refused, StoreError, ToolError.
    """
    if not chain.incremental:
        with _naming(chain.last.id):
            unpack(
                store, chain.last, work.inside, clock=clock, report=report, owner=work.owner, durable=False
            )
        return
    require_room(chain, work.inside)
    places = [work.places_beside(number, link) for number, link in enumerate(chain.links)]
    links = []
    for manifest, place in zip(chain.links, places, strict=True):
        with _naming(manifest.id):
            unpack(store, manifest, place, clock=clock, report=report, owner=work.owner, durable=False)
            links.append(combine.Link(place, fetch_backup_manifest(store, manifest)))
    _combine(chain, links, work, bin_dir=bin_dir, insists=insists)
    read_bytes = combine.verify(work.inside)
    report.say(
        f"combined {show_count(len(links), 'base backup')}: {show_bytes(read_bytes)}, every file as listed"
    )


def _combine(
    chain: Chain, links: Sequence[combine.Link], work: Workplace, *, bin_dir: str, insists: bool
) -> None:
    beside = [str(folder) for link in links for folder in link.places.all]
    cluster = LocalCluster(
        bin_dir,
        work.folder,
        confined=True,
        insists=insists,
        network=False,
        readable=tuple(beside),
        writable=tuple(map(str, work.inside.tablespaces.values())),
    )
    try:
        combine.combine(cluster, links, work.inside, size_bytes=chain.last.combined_bytes)
    except ToolError as error:
        error.hint = error.hint or _NOT_COMBINED
        raise
    finally:
        for folder in beside:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _naming(backup: BackupId) -> Iterator[None]:
    """What is found wrong here is wrong with this base backup."""
    try:
        yield
    except (Corrupt, ObjectNotFound) as error:
        error.detail[_DAMAGED] = str(backup)
        raise
