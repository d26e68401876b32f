"""What `wal setup` asks of a server for incremental base backups; the rest is tested on real ones."""

from dataclasses import replace

import pytest

from backup_pipeline.config import ClusterConfig, Secret, StoreConfig
from backup_pipeline.engines.postgres.archiving import Archiving
from backup_pipeline.wal.setup import SetupPlan, plan_setup

SET_UP = {
    "wal_level": "replica",
    "archive_mode": "on",
    "archive_command": "ours",
    "archive_library": "",
    "archive_timeout": "60",
}
CLUSTER = ClusterConfig("main", dsn=Secret("postgresql:///postgres"))
INCREMENTAL = replace(CLUSTER, incremental_cron="0 2 * * 1-6")


def plan(cluster: ClusterConfig, **settings: str) -> SetupPlan:
    archiving = Archiving({**SET_UP, **settings}, (), "/data", 16 << 20)
    return plan_setup(archiving, cluster, StoreConfig("file:///store"), "ours", replace_command=True)


@pytest.mark.parametrize(
    ("cluster", "present", "wanted"),
    [
        (INCREMENTAL, "off", ["summarize_wal = 'on'"]),
        (INCREMENTAL, "on", []),
        (CLUSTER, "off", []),
        (CLUSTER, "on", []),  # what somebody else set stays
    ],
)
def test_summarize_wal_is_set_where_it_is_needed(
    cluster: ClusterConfig, present: str, wanted: list[str]
) -> None:
    planned = plan(cluster, summarize_wal=present)
    assert [change.line for change in planned.changes] == wanted
    assert not planned.restart
    assert not planned.notes


def test_a_server_that_has_no_such_setting_is_told() -> None:
    (note,) = plan(INCREMENTAL).notes
    assert "need PostgreSQL 17" in note
    assert not plan(CLUSTER).notes
