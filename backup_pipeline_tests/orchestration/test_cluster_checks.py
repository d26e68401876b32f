"""What the checks of a cluster's WAL say of a look, and what its forms are; of values alone."""

from dataclasses import replace
from datetime import timedelta

import dagster as dg
import pytest

from backup_pipeline.actions.wal_look import WalLook
from backup_pipeline.actions.windows import ClusterWindows
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovery_window import Window, Windows
from backup_pipeline.domain.wal import Lsn, WalGap
from backup_pipeline.orchestration.build import definitions_of
from backup_pipeline.orchestration.cluster_checks import ARCHIVING, NO_GAPS, WINDOW_MET, findings
from backup_pipeline_tests.orchestration.configurations import HEAD, configuration
from backup_pipeline_tests.wal.segments import MIB
from backup_pipeline_tests.wal.test_status import AT, GOOD, archiver, listing

DAY = timedelta(days=1)
WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR
FORMS = {
    "recover_cluster": {
        "base": "",
        "cluster": "main",
        "dry_run": True,
        "exclusive": False,
        "into": "",
        "target": "latest",
        "timeline": 0,
    },
    "drill_recovery": {"cluster": "main", "target": "random"},
    "prune_cluster": {"cluster": "main", "dry_run": True},
}


def window(age: timedelta) -> Window:
    base = BackupId.make("main", AT - age, "3f9a1c")
    return Window(1, AT - age, Lsn(3 * MIB), AT, Lsn(6 * MIB), (base,))


def windows(*found: Window, gaps: tuple[WalGap, ...] = ()) -> ClusterWindows:
    return ClusterWindows("main", AT, DAY, Windows(found, gaps), MIB, 3, 30, AT, ("what is wrong",))


LONG = windows(window(2 * DAY))


def said(look: WalLook) -> dict[str, tuple[bool, dg.AssetCheckSeverity]]:
    return {each.check: (each.passed, each.severity) for each in findings(look) if not each.passed}


def test_an_archive_that_keeps_up_is_green() -> None:
    assert said(WalLook(LONG, GOOD)) == {}


def test_a_window_that_still_grows_is_yellow_and_none_at_all_is_red() -> None:
    assert said(WalLook(windows(window(DAY / 2)), GOOD)) == {WINDOW_MET: (False, WARN)}
    assert said(WalLook(windows(), GOOD)) == {WINDOW_MET: (False, ERROR)}


def test_wal_that_is_missing_is_red() -> None:
    gap = WalGap(1, 4, 4)
    gone = WalLook(windows(window(2 * DAY), gaps=(gap,)), replace(GOOD, archive=listing((3, 5))))
    assert said(gone)[NO_GAPS] == (False, ERROR)


def test_wal_that_postgresql_has_yet_to_hand_over_is_not_missing() -> None:
    gap = WalGap(1, 6, 6)
    status = replace(GOOD, archive=listing((3, 4, 5, 7)), archiver=archiver(ready=2, lsn=8 * MIB))
    assert said(WalLook(windows(window(2 * DAY), gaps=(gap,)), status)) == {}


def test_a_server_that_does_not_answer_is_yellow() -> None:
    assert said(WalLook(LONG, None, "it is off")) == {ARCHIVING: (False, WARN)}


def test_what_wal_status_finds_is_red() -> None:
    failing = replace(GOOD, agent=replace(GOOD.agent, answers=False, said="it is gone"))
    (found,) = [each for each in findings(WalLook(LONG, failing)) if not each.passed]
    assert (found.check, found.said, found.severity) == (ARCHIVING, "no agent: it is gone", ERROR)


@pytest.mark.parametrize("job", FORMS)
def test_the_forms_are_flat_explained_and_harmless_as_they_stand(job: str) -> None:
    loaded = definitions_of(configuration(HEAD + '[clusters.main]\ndsn = "host=h dbname=x"\n'))
    mapping = loaded.resolve_job_def(job).config_mapping
    assert mapping is not None
    fields = getattr(mapping.config_schema.as_field().config_type, "fields")  # noqa: B009 - not in its hints
    assert {name: field.default_value for name, field in fields.items()} == FORMS[job]
    assert all(field.description for field in fields.values())
    ops = dg.validate_run_config(loaded.resolve_job_def(job), {})["ops"]
    assert [dict(op["config"]) for op in ops.values() if op.get("config")] == [FORMS[job]]
