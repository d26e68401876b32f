"""A cluster in Dagster: base backups, the look at its WAL, recoveries; real PostgreSQL, a real store."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from backup_pipeline.domain.layout import wal_archive_prefix
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.orchestration.build import definitions_of
from backup_pipeline.orchestration.resources import Backups
from backup_pipeline.storage import drills
from backup_pipeline.storage.base_backups import list_base_backups
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import execute
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.orchestration.configurations import configuration
from backup_pipeline_tests.servers import postgres as servers

BASE, WAL, LIST = (dg.AssetKey(["main", last]) for last in ("base_backup", "wal", "backups"))
CHECKS = ["archiving", "no_gaps", "window_met"]
TEXT = """
[store]
url = "file://{store}"

[clusters.main]
dsn = "{dsn}"
bin_dir = "{bin_dir}"
base_backup = {{ cron = "0 2 * * *", checkpoint = "fast" }}
stall_timeout = "60s"
"""


@dataclass(frozen=True)
class Site:
    """A cluster under protection, the configuration that names it, and an instance to run its jobs in."""

    box: RecoveryBox
    path: Path
    instance: dg.DagsterInstance
    base: dg.ExecuteInProcessResult  # the run that took the first base backup

    def job(self, name: str, **asked: Any) -> dg.ExecuteInProcessResult:
        """What a launch of the job does."""
        return run(self.path, self.instance, name, **asked)

    def recover(self, **form: object) -> dg.ExecuteInProcessResult:
        """What a launch of the recovery's form does."""
        return self.job("recover_cluster", run_config=form)

    def look(self) -> dg.ExecuteInProcessResult:
        """What Materialize on the page of the WAL does, with its checks."""
        loaded = definitions_of(configuration(self.path.read_text(), self.path))
        job = loaded.resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=self.instance,
            asset_selection=[WAL],
            raise_on_error=False,
        )

    def tick(self) -> dg.SensorResult:
        """What the sensor's tick does."""
        loaded = definitions_of(configuration(self.path.read_text(), self.path))
        resources = {"backups": Backups(path=str(self.path))}
        context = dg.build_sensor_context(instance=self.instance, resources=resources)
        result = loaded.resolve_sensor_def("watch_wal_of_main")(context)
        assert isinstance(result, dg.SensorResult)
        return result

    def tags(self, result: dg.ExecuteInProcessResult) -> dict[str, str]:
        """The audit that a run left behind."""
        found = self.instance.get_run_by_id(result.run_id)
        assert found is not None
        return {name[7:]: value for name, value in found.tags.items() if name.startswith("backup/")}


def run(path: Path, instance: dg.DagsterInstance, name: str, **asked: Any) -> dg.ExecuteInProcessResult:
    job = definitions_of(configuration(path.read_text(), path)).resolve_job_def(name)
    return job.execute_in_process(instance=instance, raise_on_error=False, **asked)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("clusters")
    (folder / "store").mkdir()
    with (
        a_recovery_box(servers.bin_dir_17(), DirectoryStore(folder / "store")) as box,
        dg.instance_for_test() as instance,
    ):
        path = folder / "backups.toml"
        text = TEXT.format(
            store=folder / "store", dsn=box.cluster.endpoint().dsn, bin_dir=servers.bin_dir_17()
        )
        path.write_text(text, encoding="utf-8")
        box.commit(2, switch=True)
        with box.shipping():
            base = run(path, instance, "take_base_backup")
        box.commit(2)
        box.switch()
        yield Site(box, path, instance, base)


def shown(event: dg.AssetMaterialization) -> dict[str, Any]:
    return {label: value.value for label, value in event.metadata.items()}


def rows(table: dg.TableMetadataValue) -> list[Mapping[str, Any]]:
    return [record.data for record in table.records]


def failure(result: dg.ExecuteInProcessResult, step: str) -> str:
    data = result.failure_data_for_node(step)
    assert data is not None
    assert data.user_failure_data is not None
    return data.user_failure_data.description or ""


def said(site: Site, result: dg.ExecuteInProcessResult) -> list[str]:
    return [
        entry.user_message for entry in site.instance.all_logs(result.run_id) if not entry.is_dagster_event
    ]


def test_a_base_backup_is_taken_shown_and_listed_in_one_run(site: Site) -> None:
    result = site.base
    assert result.success
    assert [str(event.step_key) for event in result.all_events if event.is_step_success] == [
        "main__base_backup.preflight",
        "main__base_backup.take",
        "main__backups",
    ]
    (backup,) = list_base_backups(site.box.store, "main").backups
    assert site.tags(result) == {
        "action": "backup",
        "database": "main",
        "queue": "main",
        "id": str(backup.id),
    }
    (taken,) = result.asset_materializations_for_node("main__base_backup")
    (listed,) = result.asset_materializations_for_node("main__backups")
    assert (taken.asset_key, listed.asset_key) == (BASE, LIST)
    numbers = shown(taken)
    assert numbers["backup_id"] == str(backup.id)
    assert numbers["size_bytes"] == backup.manifest.size_bytes
    assert all(numbers[name] >= 0 for name in ("duration_s", "throughput_mib_s", "wal_wait_s"))
    assert numbers["page_checksums"] in ("all right", "the cluster has none")
    assert listed.metadata["count"].value == 1
    (row,) = rows(listed.metadata["backups"])  # type: ignore[arg-type]
    assert row["base backup"] == backup.id.stamp


def test_a_look_says_what_can_be_recovered_in_numbers_and_words(site: Site) -> None:
    result = site.look()
    assert result.success
    assert site.tags(result) == {"action": "look", "database": "main"}
    (found,) = result.asset_materializations_for_node("main__wal")
    numbers = shown(found)
    assert numbers["gaps"] == 0
    assert numbers["segments"] >= 2
    assert numbers["window_s"] >= 0
    assert 0 <= numbers["lag_s"] <= numbers["newest_age_s"] < 600
    assert numbers["server"].startswith("primary on timeline 1, at ")
    assert numbers["recoverable"].startswith("any moment from 20")
    (window,) = rows(found.metadata["windows"])  # type: ignore[arg-type]
    assert window["timeline"] == "1"
    checks = {each.check_name: each for each in result.get_asset_check_evaluations()}
    assert sorted(checks) == CHECKS
    assert checks["no_gaps"].passed
    assert "archive_command is true" in (checks["archiving"].description or "")  # see SETTINGS
    assert checks["window_met"].severity is dg.AssetCheckSeverity.WARN  # it still grows
    assert "is to be 1 d 0 h" in (checks["window_met"].description or "")


def test_the_sensor_shows_the_same_without_a_run(site: Site) -> None:
    materialized, *evaluations = site.tick().asset_events
    assert isinstance(materialized, dg.AssetMaterialization)
    assert materialized.asset_key == WAL
    assert {"lag_s", "newest_age_s", "segments", "stored_bytes", "gaps", "window_s"} <= set(
        shown(materialized)
    )
    checks = [each for each in evaluations if isinstance(each, dg.AssetCheckEvaluation)]
    assert sorted(each.check_name for each in checks) == CHECKS
    assert site.tick().run_requests in (None, [])


def segments_of(site: Site) -> list[Path]:
    return sorted((site.path.parent / "store").glob(f"{wal_archive_prefix('main')}**/*.zst"))


@contextlib.contextmanager
def without_a_segment(site: Site) -> Iterator[str]:
    """The archive lacks the segment that this names, between two others."""
    site.box.commit(1)
    site.box.switch()
    *_, gone, _newest = segments_of(site)
    data = gone.read_bytes()
    gone.unlink()
    try:
        yield gone.name[:24]
    finally:
        gone.write_bytes(data)


def test_a_missing_segment_turns_the_check_red(site: Site) -> None:
    with without_a_segment(site) as gone:
        _, *found = site.tick().asset_events
        look = site.look()
    for checks in (found, look.get_asset_check_evaluations()):
        (red,) = [each for each in checks if getattr(each, "check_name", "") == "no_gaps"]
        assert isinstance(red, dg.AssetCheckEvaluation)
        assert not red.passed
        assert red.severity is dg.AssetCheckSeverity.ERROR
        assert gone in (red.description or "")
        assert "backup-pipeline base-backup main" in (red.description or "")
    (materialized,) = look.asset_materializations_for_node("main__wal")
    assert materialized.metadata["gaps"].value == 1


def test_a_server_that_is_gone_hides_no_window(site: Site) -> None:
    text = site.path.read_text()
    site.path.write_text(
        text.replace(site.box.cluster.endpoint().dsn, "postgresql://nobody@127.0.0.1:1/postgres")
    )
    try:
        materialized, *found = site.tick().asset_events
    finally:
        site.path.write_text(text)
    assert isinstance(materialized, dg.AssetMaterialization)
    numbers = shown(materialized)
    assert numbers["server"].startswith("cannot be asked: ")
    assert numbers["recoverable"].startswith("any moment from 20")
    assert numbers["lag_s"] == numbers["newest_age_s"] > 0
    checks = {each.check_name: each for each in found if isinstance(each, dg.AssetCheckEvaluation)}
    assert (checks["archiving"].passed, checks["archiving"].severity) == (False, dg.AssetCheckSeverity.WARN)
    assert checks["no_gaps"].passed


def test_a_store_that_is_away_is_neither_good_nor_bad_and_loading_does_not_need_it(site: Site) -> None:
    store = site.path.parent / "store"
    away = store.rename(store.with_name("away"))
    try:
        found = site.tick().asset_events
        look = site.look()
    finally:
        away.rename(store)
    checks = [each for each in found if isinstance(each, dg.AssetCheckEvaluation)]
    assert len(found) == len(checks) == 3
    assert {(each.passed, each.severity) for each in checks} == {(False, dg.AssetCheckSeverity.WARN)}
    assert all("could not be looked at" in (each.description or "") for each in checks)
    assert not look.success


def test_a_recovery_shows_its_plan_first_and_makes_nothing(site: Site) -> None:
    result = site.recover(into=str(site.box.folder / "shown"))
    assert result.success
    lines = said(site, result)
    assert lines[0].startswith("any moment from 20")
    assert "target: the end of the archive" in lines
    assert lines[-1].startswith("Nothing was recovered: dry_run is true.")
    assert site.tags(result)["action"] == "recover"
    assert list(site.box.folder.iterdir()) == []


def test_a_recovery_stops_where_the_form_says(site: Site) -> None:
    site.box.commit(2)
    site.box.switch()
    last = site.box.ledger[-1]
    result = site.recover(
        into=str(site.box.folder / "recovered"), target=str(last.xid), exclusive=True, dry_run=False
    )
    assert result.success, failure(result, "carry_out_recovery")
    assert site.box.numbers() == [each.number for each in site.box.ledger[:-1]]


def test_a_drill_shows_on_the_base_backups_with_its_numbers(site: Site) -> None:
    result = site.job("drill_recovery")
    assert result.success, failure(result, "drill")
    (evaluation,) = result.get_asset_check_evaluations()
    assert (evaluation.asset_key, evaluation.check_name, evaluation.passed) == (BASE, "drilled", True)
    assert evaluation.metadata["verdict"].value == "restored"  # it has no heartbeat
    (observed,) = result.asset_observations_for_node("drill")
    assert {"rpo_s", "rto_s", "size_bytes", "duration_s"} <= set(observed.metadata)
    assert observed.metadata["rto_s"].value > 0  # type: ignore[operator]
    assert site.tags(result)["action"] == "drill"
    (recorded,) = drills.drills(site.box.store, "main").drills
    assert site.tags(result)["id"] == str(recorded.id)


def test_a_drill_that_finds_damage_is_red(site: Site) -> None:
    site.box.commit(1)
    site.box.switch()
    target = show_moment(site.box.ledger[-1].at)
    *_, newest = segments_of(site)
    data = newest.read_bytes()
    newest.write_bytes(data[: len(data) // 2])
    try:
        result = site.job("drill_recovery", run_config={"target": target})
    finally:
        newest.write_bytes(data)
    assert not result.success
    key = dg.AssetCheckKey(BASE, "drilled")
    record = site.instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    evaluation = record.evaluation
    assert evaluation is not None
    assert (evaluation.passed, evaluation.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert newest.name[:24] in (evaluation.description or "")
    assert failure(result, "drill").splitlines()[1].startswith("What to do: ")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({}, "into has to be a new directory's whole path, and it is empty"),
        ({"into": "recovered"}, "found 'recovered'"),
        ({"into": "/nowhere/x", "target": "2026-03-01 02:00:00"}, "does not say its time zone"),
        ({"into": "/nowhere/x", "target": "2020-03-01T02:00:00Z"}, "2020-03-01"),
        ({"into": "/nowhere/x", "timeline": -1}, "timeline -1"),
        ({"into": "/tmp"}, "not an empty directory"),
    ],
)
def test_what_cannot_be_is_refused_in_the_first_step(
    site: Site, form: dict[str, object], expected: str
) -> None:
    result = site.recover(**form, dry_run=False)
    assert not result.success
    first, *todo = failure(result, "plan_recovery").splitlines()
    assert expected in first
    assert todo
    assert todo[0].startswith("What to do: ")
    assert not [event for event in result.all_events if event.is_step_success]


def test_a_prune_only_looks_unless_it_is_told_otherwise(site: Site) -> None:
    shown = site.job("prune_cluster")
    assert shown.success
    assert said(site, shown)[-1].startswith("Nothing was deleted: dry_run is true.")
    assert any("keep" in line for line in said(site, shown))
    result = site.job("prune_cluster", run_config={"dry_run": False})
    assert result.success
    (listed,) = result.asset_materializations_for_node("carry_out_cluster_prune")
    assert (listed.asset_key, listed.metadata["count"].value) == (LIST, 1)
    assert site.tags(result)["action"] == "prune"


def test_a_target_that_replay_does_not_meet_leaves_no_directory(site: Site) -> None:
    into = site.box.folder / "never"
    result = site.recover(into=str(into), target="a_point_that_nobody_made", dry_run=False)
    assert not result.success
    assert "a_point_that_nobody_made" in failure(result, "carry_out_recovery")
    assert not into.exists()
    assert [path for path in site.box.folder.iterdir() if path.name != "recovered"] == []


def test_a_cluster_alone_is_enough() -> None:
    text = TEXT.format(store="/srv/backups", dsn="postgresql://nobody@127.0.0.1:1/x", bin_dir="")
    loaded = definitions_of(configuration(text))
    dg.Definitions.validate_loadable(loaded)
    specs = {spec.key.to_user_string(): spec for spec in loaded.resolve_all_asset_specs()}
    assert set(specs) == {"main/base_backup", "main/wal", "main/backups"}
    assert {spec.group_name for spec in specs.values()} == {"main"}
    policies = {key: spec.freshness_policy for key, spec in specs.items()}
    assert policies == {
        "main/base_backup": dg.FreshnessPolicy.time_window(
            warn_window=timedelta(hours=26), fail_window=timedelta(hours=30)
        ),
        "main/wal": dg.FreshnessPolicy.time_window(
            warn_window=timedelta(minutes=15), fail_window=timedelta(minutes=30)
        ),
        "main/backups": None,
    }
    for spec in specs.values():
        title = (spec.description or "").splitlines()[0]
        assert title.endswith((".", "recovered."))
        assert not set(title) & set("*`#[]|")
    jobs = {job.name for job in loaded.resolve_all_job_defs() if not job.name.startswith("__")}
    assert jobs == {"take_base_backup", "recover_cluster", "drill_recovery", "prune_cluster"}


def test_base_backups_are_due_by_their_cron_one_at_a_time() -> None:
    text = TEXT.format(store="/srv/backups", dsn="postgresql://nobody@127.0.0.1:1/x", bin_dir="")
    loaded = definitions_of(configuration(text + '[clusters.other-one]\ndsn = "host=h dbname=x"\n'))
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_schedule_context(
            instance=instance,
            scheduled_execution_time=datetime(2026, 3, 1, 2, tzinfo=UTC),
            repository_def=loaded.get_repository_def(),
        )
        requests = loaded.resolve_schedule_def("base_backup_at_0200").evaluate_tick(context).run_requests
        drilling = loaded.resolve_schedule_def("drill_at_0430").evaluate_tick(context).run_requests
    assert requests is not None
    assert drilling is not None
    assert [request.run_config for request in drilling] == [
        {"cluster": "main", "target": "random"},
        {"cluster": "other-one", "target": "random"},
    ]
    assert [request.run_key for request in requests] == ["main", "other-one"]
    assert [request.asset_check_keys for request in requests] == [[], []]
    assert requests[1].asset_selection == [
        dg.AssetKey(["other-one", last]) for last in ("base_backup", "backups")
    ]
    assert requests[0].tags["backup/queue"] == "main"
    assert requests[0].tags["backup/scheduled_for"] == "2026-03-01T02:00:00+00:00"
    job = loaded.resolve_job_def("take_base_backup")
    assert {node.pool for node in job.graph.iterate_op_defs() if node.pool} == {
        "base_backup_main",
        "base_backup_other_one",
    }


def test_incremental_ones_have_a_schedule_of_their_own() -> None:
    text = TEXT.format(store="/srv/backups", dsn="postgresql://nobody@127.0.0.1:1/x", bin_dir="")
    both = text.replace("checkpoint", 'incremental = "0 2 * * 1-6", checkpoint')
    loaded = definitions_of(configuration(both))
    names = {schedule.name for schedule in loaded.schedules or ()}
    assert {"base_backup_at_0200", "incremental_at_0200_weekday_1_to_6"} <= names
    without = definitions_of(configuration(text))
    assert not [each.name for each in without.schedules or () if each.name.startswith("incremental")]
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_schedule_context(
            instance=instance,
            scheduled_execution_time=datetime(2026, 3, 2, 2, tzinfo=UTC),
            repository_def=loaded.get_repository_def(),
        )
        schedule = loaded.resolve_schedule_def("incremental_at_0200_weekday_1_to_6")
        (request,) = schedule.evaluate_tick(context).run_requests or ()
    assert request.tags["backup/incremental"] == "yes"
    assert request.tags["backup/queue"] == "main"


def test_a_run_with_that_tag_takes_what_has_changed(site: Site) -> None:
    execute(site.box.cluster.endpoint(), "ALTER SYSTEM SET summarize_wal = on")
    execute(site.box.cluster.endpoint(), "SELECT pg_reload_conf()")
    with site.box.shipping():
        whole = site.job("take_base_backup")
        child = site.job("take_base_backup", tags={"backup/incremental": "yes"})
    assert (whole.success, child.success) == (True, True)
    ids = [site.tags(result)["id"] for result in (whole, child)]
    found = list_base_backups(site.box.store, "main").backups
    parents = {str(each.id): each.manifest.parent for each in found}
    assert (parents[ids[0]], str(parents[ids[1]])) == (None, ids[0])
