"""What a base backup will need, tried before it begins: the server, the role, its WAL's archive, the store.

Called by base_backup.py, and by what looks at a cluster without taking one. Changes nothing but a scratch
object in the store.
"""

import contextlib
from dataclasses import dataclass

from backup_pipeline.actions.needed_wal import has_wal
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.layout import SCRATCH
from backup_pipeline.engines.postgres import base_backup as engine
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import ServerInfo, connect, read_server_info, server_errors
from backup_pipeline.engines.postgres.slots import look_at
from backup_pipeline.engines.postgres.source_cluster import (
    ClusterFacts,
    OutsideFiles,
    read_cluster_facts,
    read_outside_files,
)
from backup_pipeline.errors import Refused, ServerError
from backup_pipeline.zstd import LEVEL

COMPRESSION = f"zstd:{LEVEL}"


@dataclass(frozen=True)
class Preflight:
    """What a base backup will be made of."""

    source: Endpoint
    server: ServerInfo
    system_identifier: str
    facts: ClusterFacts
    outside: OutsideFiles
    timeline: int = 1


def preflight(cluster: ProtectedCluster, *, report: Report) -> Preflight:
    """Try everything that the backup will need; change nothing but a scratch object in the store.

    Raises ConfigError, ServerError, StoreError, Refused: what would make it fail.
    """
    source = cluster.source()
    with (
        contextlib.closing(connect(source, purpose="preflight")) as session,
        server_errors(source, "cannot ask the server what it is"),
    ):
        server, facts = read_server_info(session), read_cluster_facts(session)
        outside = read_outside_files(session)
        receive = cluster.config.receive
        receiver = look_at(session, receive.slot).status if receive else None
    if server.major < engine.OLDEST_MAJOR:
        raise ServerError(
            f"cluster {cluster.name} runs PostgreSQL {server.version_text}, and base backups need "
            f"{engine.OLDEST_MAJOR} or newer",
            hint="Take dumps of its databases, or upgrade it.",
        )
    if not facts.may_replicate:
        raise ServerError(
            f"the role {source.user} may not take base backups of cluster {cluster.name}",
            hint=f'ALTER ROLE "{source.user}" REPLICATION; or use a role that has it.',
        )
    stall_s = cluster.config.stall_timeout.total_seconds()
    system, timeline = engine.identify_system(source, stall_s=stall_s)
    archives = facts.archive_mode != "off" or (receiver is not None and receiver.active)
    if not archives and not has_wal(cluster, system):
        raise Refused(
            f"nothing archives the WAL of cluster {cluster.name}, and without it a base backup is of no use",
            detail={"system identifier": system, "archive_mode": facts.archive_mode},
            hint="Run `backup-pipeline wal setup` for it first; where it is received, start `wal receive`.",
        )
    cluster.store.put(f"{SCRATCH}preflight", [b"may this process write here?"])
    cluster.store.delete([f"{SCRATCH}preflight"])
    kind = "standby" if server.in_recovery else "primary"
    report.say(f"PostgreSQL {server.version_text}, {kind}, system {system}; {COMPRESSION}")
    return Preflight(source, server, system, facts, outside, timeline)
