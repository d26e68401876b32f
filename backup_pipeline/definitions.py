"""Dagster's door: what `dg dev`, the webserver, the daemon and each run's process load.

Nothing happens at import. The function reads the configuration, and nothing else: no secret, no
server, no store.
"""

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """All assets, checks, jobs and schedules of the configured databases."""
    from backup_pipeline.orchestration.build import load_definitions  # no work at import

    return load_definitions()
