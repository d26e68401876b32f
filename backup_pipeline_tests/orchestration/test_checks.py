"""What colour each verdict has."""

from dataclasses import replace

import dagster as dg
import pytest

from backup_pipeline.config import DatabaseConfig, Secret
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.orchestration.checks import passes, severity
from backup_pipeline_tests.domain.values import proof

CONTENT = DatabaseConfig("app", Secret(key="databases.app.dsn"))
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
    assert passes(proof(verdict), database) is passed
    assert severity(proof(verdict)) is colour
