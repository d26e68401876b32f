"""What a drill may be of: the moments that can be recovered, what stands in the way, what would be lost.

Called by drill_recovery.py, before anything is recovered. The windows are domain/recovery_window.py's.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from datetime import datetime

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.recovery_facts import RecoveryFacts, read_ending, read_facts
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.drill import Loss, Span, breaks, broken_end, drillable
from backup_pipeline.domain.recovery_route import find_route
from backup_pipeline.domain.recovery_target import LATEST
from backup_pipeline.domain.recovery_window import recovery_windows
from backup_pipeline.engines.postgres.server import connect, read_server_info, server_errors
from backup_pipeline.engines.postgres.source_cluster import server_clock
from backup_pipeline.engines.postgres.tools import find_tools
from backup_pipeline.errors import BackupError, NotProvable, ServerError, ToolError
from backup_pipeline.wal.settling import Pause


@dataclass(frozen=True)
class Outlook:
    """What can be recovered, `broken` what cannot and should be, and what would be lost with the source."""

    spans: tuple[Span, ...]
    broken: tuple[str, ...]
    loss: Loss
    notes: tuple[str, ...]


def look_out(
    cluster: ProtectedCluster, *, at: datetime, report: Report, pause: Pause = time.sleep
) -> Outlook:
    """Read the archive, and its end. A segment that may be under way is waited for, half a minute.

    Raises Refused where there is nothing to begin with, NotProvable without the programs, Corrupt where
    nothing is left that is consistent, StoreError.
    """
    facts = replace(read_facts(cluster, pause=pause), failed={})  # such a one is to be tried again
    since = at - cluster.config.recovery_window
    archive = facts.archive
    route = find_route(facts.points, archive, LATEST)
    try:
        tools = find_tools(
            cluster.config.bin_dir,
            exactly=facts.manifest(route.base.id).server_version // 10000,
            needs=("pg_waldump",),
        )
    except ToolError as error:
        raise NotProvable(error.message, detail=error.detail, hint=error.hint) from error
    ending, route = read_ending(cluster, facts, route, tools.path("pg_waldump"), report, target=LATEST)
    newest = ending.newest or route.base.stopped_at
    spans = drillable(recovery_windows(facts.points, archive), route.timeline, since=since, newest=newest)
    broken = (*breaks(facts.points, archive, route.timeline, since=since), *broken_end(route, archive))
    loss, notes = _loss(cluster, facts, newest, at)
    if spans and spans[0].from_at > since:
        notes = (*notes, "the recovery window is not full yet: nothing before its first moment is kept")
    return Outlook(spans, tuple(dict.fromkeys(broken)), loss, (*notes, *facts.notes))


def _loss(
    cluster: ProtectedCluster, facts: RecoveryFacts, newest: datetime, at: datetime
) -> tuple[Loss, tuple[str, ...]]:
    """How far the archive is behind the source's clock, or, where it cannot be asked, behind ours."""
    note = "the source was not asked for the time: the loss is at most what ours says"
    if cluster.config.dsn.named:
        try:
            now = _clock_of(cluster, facts.listing.system_identifier)
        except BackupError as error:
            note = f"{note} ({error.message})"
        else:
            return Loss(newest, max(0.0, (now - newest).total_seconds()), asked=True), ()
    return Loss(newest, max(0.0, (at - newest).total_seconds()), asked=False), (note,)


def _clock_of(cluster: ProtectedCluster, system_identifier: str) -> datetime:
    source = cluster.source()
    with (
        contextlib.closing(connect(source, purpose="drill", statement_timeout_s=10.0)) as session,
        server_errors(source, "cannot ask the server for the time"),
    ):
        refuse_another(read_server_info(session).system_identifier, system_identifier, source.shown)
        return server_clock(session)


def refuse_another(found: str, expected: str, where: str) -> None:
    """Raise ServerError where a server says that it is of another system; a role may not see that at all."""
    if found not in ("", expected):
        raise ServerError(f"{where} is another cluster, {found}, and not the one that archives, {expected}")
