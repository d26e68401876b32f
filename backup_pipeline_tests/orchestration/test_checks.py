"""What colour each verdict has."""

from dataclasses import replace

import dagster as dg
import pytest

from backup_pipeline.actions.prove import as_asked
from backup_pipeline.config import DatabaseConfig, Secret
from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.orchestration.checks import severity
from backup_pipeline_tests.domain.values import proof

CONTENT = DatabaseConfig("app", Secret(key="databases.app.dsn"))
OURS = BackupId("app", "20260301T020000Z-3f9a1c")
IMPORTED = BackupId("app", "20260301T020000Z-imported-daily")
COUNTS = replace(CONTENT, proof="counts")


@pytest.mark.parametrize(
    ("verdict", "database", "passed", "colour"),
    [
        (Verdict.PROVEN, CONTENT, True, dg.AssetCheckSeverity.WARN),
        (Verdict.PROVEN, COUNTS, True, dg.AssetCheckSeverity.WARN),
        (Verdict.RESTORED, CONTENT, False, dg.AssetCheckSeverity.WARN),
        (Verdict.RESTORED, COUNTS, True, dg.AssetCheckSeverity.WARN),
        (Verdict.FAILED, CONTENT, False, dg.AssetCheckSeverity.ERROR),
        (Verdict.FAILED, COUNTS, False, dg.AssetCheckSeverity.ERROR),
        (Verdict.NOT_PROVABLE, CONTENT, False, dg.AssetCheckSeverity.WARN),
    ],
)
def test_only_what_was_asked_for_is_green_and_only_what_is_bad_is_red(
    verdict: Verdict, database: DatabaseConfig, passed: bool, colour: dg.AssetCheckSeverity
) -> None:
    assert as_asked(proof(verdict), OURS, database) is passed
    assert severity(proof(verdict)) is colour


def test_of_an_imported_dump_no_more_is_asked_than_that_it_restores() -> None:
    assert as_asked(proof(Verdict.RESTORED), IMPORTED, CONTENT)
    assert not as_asked(proof(Verdict.NOT_PROVABLE), IMPORTED, CONTENT)
