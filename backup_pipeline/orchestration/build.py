"""Puts the definitions together, from the configuration alone: no secret, no server, no store.

Called by definitions.py, and by tests with a configuration of their own.
"""

import dagster as dg

from backup_pipeline.config import Config, load
from backup_pipeline.errors import ConfigError
from backup_pipeline.orchestration.assets import assets_of
from backup_pipeline.orchestration.checks import checks_of
from backup_pipeline.orchestration.cluster_assets import cluster_assets_of
from backup_pipeline.orchestration.cluster_checks import wal_checks_of, wal_sensors_of
from backup_pipeline.orchestration.cluster_drills import drill_checks_of
from backup_pipeline.orchestration.jobs import cluster_jobs_of, form_jobs_of, tier_jobs_of
from backup_pipeline.orchestration.resources import Backups, HandOver
from backup_pipeline.orchestration.schedules import schedules_of


def load_definitions() -> dg.Definitions:
    """The definitions for the configuration that is found. Raises ConfigError naming file and key."""
    try:
        return definitions_of(load())
    except ConfigError as error:
        raise error.with_traceback(None) from None  # file, key and hint say more than the trace


def definitions_of(config: Config) -> dg.Definitions:
    """The definitions for all databases and clusters of a configuration."""
    if not config.clusters:
        config.any_database()
    jobs = {**tier_jobs_of(config), **cluster_jobs_of(config), **form_jobs_of(config)}
    return dg.Definitions(
        assets=[*assets_of(config), *cluster_assets_of(config)],
        asset_checks=[*checks_of(config), *wal_checks_of(config), *drill_checks_of(config)],
        jobs=list(jobs.values()),
        schedules=schedules_of(config, jobs),
        sensors=wal_sensors_of(config),
        resources={"backups": Backups(path=str(config.path)), "io_manager": HandOver()},
        executor=dg.in_process_executor,
    )
