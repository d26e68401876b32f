"""What the UI says of a cluster's base backups."""

from dataclasses import replace
from datetime import timedelta

from backup_pipeline.domain.base_backup import BaseBackup
from backup_pipeline.orchestration import cluster_words
from backup_pipeline.units import show_bytes
from backup_pipeline_tests.domain.test_base_chain import ONE, TWO, WHOLE
from backup_pipeline_tests.orchestration.test_words import rows_of

INCREMENTAL = replace(ONE, cluster_bytes=50 * ONE.source_bytes)
NOW = TWO.stopped_at + timedelta(hours=1)


def notes_of(*backups: BaseBackup) -> list[object]:
    return [row["note"] for row in rows_of(cluster_words.bases_table(backups, NOW))]


def test_the_table_says_what_builds_on_what_and_what_is_of_no_use() -> None:
    since = f"what changed since {WHOLE.id.stamp}"
    both = BaseBackup(INCREMENTAL), BaseBackup(WHOLE, pinned=True)
    assert notes_of(*both) == [since, "pinned"]
    (alone,) = notes_of(BaseBackup(INCREMENTAL))
    assert str(alone).startswith(f"{since}, OF NO USE: {WHOLE.id}")


def test_the_size_of_a_cluster_is_not_what_an_incremental_one_read() -> None:
    size = show_bytes(INCREMENTAL.cluster_bytes)
    (row,) = rows_of(cluster_words.bases_table([BaseBackup(INCREMENTAL)], NOW))
    shown = cluster_words.base_metadata(BaseBackup(INCREMENTAL), "file:///backups")
    assert (row["cluster size"], shown["cluster_size"]) == (size, size)
    assert shown["incremental"] == f"what changed since {WHOLE.id}"
    assert "incremental" not in cluster_words.base_metadata(BaseBackup(WHOLE), "file:///backups")
