"""A recovered copy held against its source's heartbeats: the rows read on both sides, and what they say.

Called by drill_attempt.py. How rows are judged is domain/heartbeat.py's.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from backup_pipeline.actions.drill_outlook import refuse_another
from backup_pipeline.actions.heartbeat import beats_at
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.config import ClusterConfig
from backup_pipeline.domain.heartbeat import CopyBeats, HeartbeatFinding, SourceBeats, judge_beats
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.heartbeat import read_copy, read_source
from backup_pipeline.engines.postgres.recovered_copy import RecoveredCopy
from backup_pipeline.engines.postgres.server import connect, read_server_info, server_errors
from backup_pipeline.errors import BackupError

_NO_HEARTBEAT = (
    "no heartbeat is configured, so that nothing told whether all commits up to the target are in: set "
    "heartbeat = true"
)


def hold_against_heartbeat(
    cluster: ProtectedCluster,
    target_at: datetime,
    copy: RecoveredCopy,
    databases: Mapping[str, bool],
    system_identifier: str,
) -> HeartbeatFinding:
    """Whether the copy holds what it should by `target_at`, as far as the heartbeat tells.

    Raises ServerError where the copy cannot be asked; that the source cannot is a note.
    """
    config = cluster.config
    if not config.heartbeat:
        return HeartbeatFinding(False, notes=(_NO_HEARTBEAT,))
    source, said = _source_beats(cluster, target_at, system_identifier)
    name, beats = _beats_lie_in(config), None
    if databases.get(name):
        endpoint = copy.endpoint(name)
        with (
            contextlib.closing(connect(endpoint, purpose="drill")) as session,
            server_errors(endpoint, "cannot read the recovered heartbeat"),
        ):
            beats = read_copy(session, source)
    found = judge_beats(target_at, beats or CopyBeats(None), source)
    return replace(found, notes=(*([said] if said else []), *found.notes))


def _beats_lie_in(config: ClusterConfig) -> str:
    """The database of the heartbeat, as far as it is known without the source; "" when it is not."""
    with contextlib.suppress(BackupError):
        return config.heartbeat_database or beats_at(config).database
    with contextlib.suppress(BackupError):
        return Endpoint(config.dsn.reveal(), config.password).database
    return ""


def _source_beats(
    cluster: ProtectedCluster, target_at: datetime, system_identifier: str
) -> tuple[SourceBeats | None, str]:
    """The source's own rows; None, and why, where it cannot be asked."""
    try:
        endpoint = beats_at(cluster.config)
        with (
            contextlib.closing(connect(endpoint, purpose="drill", statement_timeout_s=10.0)) as session,
            server_errors(endpoint, "cannot read the source's heartbeat"),
        ):
            found = read_server_info(session).system_identifier
            refuse_another(found, system_identifier, endpoint.shown)
            beats = read_source(session, target_at)
    except BackupError as error:
        return None, f"the source's heartbeat was not read: {error.message}"
    if beats is not None:
        return beats, ""
    return None, (
        f"the role of clusters.{cluster.name} sees no heartbeat in {endpoint.shown}: "
        f"`backup-pipeline heartbeat {cluster.name} --setup` shows what it takes"
    )
