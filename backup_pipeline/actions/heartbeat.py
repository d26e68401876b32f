"""A cluster's heartbeat: set up once, then a row each minute, by whoever is there to write it.

Called by `heartbeat`, from cron or a timer, and by the agent beside PostgreSQL, which works with Dagster
down. It is opt-in: drills of a cluster without one prove less.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

from backup_pipeline.config import ClusterConfig
from backup_pipeline.domain.heartbeat import INTERVAL
from backup_pipeline.engines.postgres import heartbeat
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect, resolved
from backup_pipeline.errors import BackupError

_BEYOND_THE_WINDOW = timedelta(days=1)


def beats_at(config: ClusterConfig) -> Endpoint:
    """The database that the heartbeat of a cluster lies in. Raises ConfigError, ServerError."""
    source = resolved(Endpoint(config.dsn.reveal(), config.password))
    return source.with_database(config.heartbeat_database) if config.heartbeat_database else source


def set_up(config: ClusterConfig, role: str = "") -> None:
    """Make the table, and let `role` write and read it; may be run again. Raises ServerError."""
    with _session(config) as (session, endpoint):
        heartbeat.set_up(session, endpoint, role)


def beat(config: ClusterConfig) -> datetime:
    """Write one row, and delete those that no recovery will be held against; returns its time.

    Waits for nothing: a server that is slower than a few seconds has no heartbeat then. Raises ServerError.
    """
    with _session(config) as (session, endpoint):
        return heartbeat.beat(session, endpoint, config.recovery_window + _BEYOND_THE_WINDOW)


def keep_beating(config: ClusterConfig, stop: threading.Event, *, log: Callable[[str], object]) -> None:
    """Write one row each minute until `stop` is set. What fails is said once, and tried again."""
    said = ""
    while True:
        try:
            beat(config)
            failed = ""
        except BackupError as error:
            failed = str(error)
        if failed != said:
            log(failed or f"the heartbeat of {config.name} is written again")
            said = failed
        if stop.wait(INTERVAL.total_seconds()):
            return


@contextlib.contextmanager
def _session(config: ClusterConfig) -> Iterator[tuple[Connection, Endpoint]]:
    endpoint = beats_at(config)
    session = connect(
        endpoint,
        purpose="heartbeat",
        statement_timeout_s=heartbeat.STATEMENT_TIMEOUT_S,
        lock_timeout_s=heartbeat.LOCK_TIMEOUT_S,
    )
    with contextlib.closing(session):
        yield session, endpoint
