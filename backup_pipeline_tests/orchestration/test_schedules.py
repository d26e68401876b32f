"""The schedules: what each tick asks for, without a daemon."""

from datetime import UTC, datetime

import dagster as dg
import pytest

from backup_pipeline.orchestration.build import definitions_of
from backup_pipeline.orchestration.schedules import slug
from backup_pipeline_tests.orchestration.configurations import configuration

SUNDAY_THE_FIRST = datetime(2026, 3, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return definitions_of(configuration())


def tick(definitions: dg.Definitions, name: str, at: datetime) -> list[dg.RunRequest]:
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_schedule_context(
            instance=instance, scheduled_execution_time=at, repository_def=definitions.get_repository_def()
        )
        requests = definitions.resolve_schedule_def(name).evaluate_tick(context).run_requests
        assert requests is not None
        return list(requests)


def test_there_is_one_schedule_per_tier_and_cron(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    crons = {schedule.name: schedule.cron_schedule for schedule in repository.schedule_defs}
    assert crons == {
        "daily_at_0200": "0 2 * * *",
        "weekly_at_0200_weekday_0": "0 2 * * 0",
        "monthly_at_0200_day_1": "0 2 1 * *",
        "yearly_at_0500_day_1_month_1": "0 5 1 1 *",
        "prove_at_0400_weekday_6": "0 4 * * 6",
        "prove_longest_kept": "0 3 2 * *",
        "prune_every_day": "30 6 * * *",
    }
    assert {schedule.execution_timezone for schedule in repository.schedule_defs} == {"UTC"}
    assert {schedule.default_status for schedule in repository.schedule_defs} == {
        dg.DefaultScheduleStatus.RUNNING
    }


def test_a_tick_asks_for_one_run_per_database(definitions: dg.Definitions) -> None:
    requests = tick(definitions, "daily_at_0200", SUNDAY_THE_FIRST)
    assert [request.run_key for request in requests] == ["agentweave", "shop-eu", "archive"]
    assert requests[0].asset_selection == [
        dg.AssetKey(["agentweave", "daily"]),
        dg.AssetKey(["agentweave", "backups"]),
    ]
    assert {tag: requests[0].tags[tag] for tag in requests[0].tags if tag.startswith("backup/")} == {
        "backup/database": "agentweave",
        "backup/action": "backup",
        "backup/queue": "agentweave",
        "backup/tier": "daily",
        "backup/scheduled_for": "2026-03-01T02:00:00+00:00",
    }


def test_tiers_due_together_are_told_the_same_time(definitions: dg.Definitions) -> None:
    """On a Sunday that is the first all three tiers are due, and share one dump."""
    names = ("daily_at_0200", "weekly_at_0200_weekday_0", "monthly_at_0200_day_1")
    due = [tick(definitions, name, SUNDAY_THE_FIRST)[0] for name in names]
    assert {request.tags["backup/scheduled_for"] for request in due} == {"2026-03-01T02:00:00+00:00"}
    assert [request.tags["backup/tier"] for request in due] == ["daily", "weekly", "monthly"]
    assert {request.tags["backup/database"] for request in due} == {"agentweave"}


def test_a_proof_runs_with_its_dump_unless_the_policy_leaves_it_for_later(
    definitions: dg.Definitions,
) -> None:
    requests = tick(definitions, "daily_at_0200", SUNDAY_THE_FIRST)
    checks = {request.run_key: request.asset_check_keys for request in requests}
    assert checks == {
        "agentweave": [dg.AssetCheckKey(dg.AssetKey(["agentweave", "daily"]), "proven")],
        "shop-eu": [dg.AssetCheckKey(dg.AssetKey(["shop-eu", "daily"]), "proven")],
        "archive": [],
    }


def test_the_policy_s_cron_proves_the_newest_of_those_who_have_one(definitions: dg.Definitions) -> None:
    requests = tick(definitions, "prove_at_0400_weekday_6", datetime(2026, 3, 7, 4, tzinfo=UTC))
    assert [request.run_config for request in requests] == [
        {"database": "shop-eu", "backup": "latest"},
        {"database": "archive", "backup": "latest"},
    ]


def test_the_newest_of_the_rarest_tier_is_proven_each_month(definitions: dg.Definitions) -> None:
    requests = tick(definitions, "prove_longest_kept", datetime(2026, 3, 2, 3, tzinfo=UTC))
    assert [request.run_config for request in requests] == [
        {"database": "agentweave", "backup": "monthly"},
        {"database": "shop-eu", "backup": "yearly"},
        {"database": "archive", "backup": "monthly"},
    ]


def test_the_backstop_prunes_every_database(definitions: dg.Definitions) -> None:
    requests = tick(definitions, "prune_every_day", datetime(2026, 3, 1, 6, 30, tzinfo=UTC))
    assert [request.run_config for request in requests] == [
        {"database": name, "dry_run": False} for name in ("agentweave", "shop-eu", "archive")
    ]


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 2 * * *", "at_0200"),
        ("30 14 * * 0", "at_1430_weekday_0"),
        ("0 2 1 */3 *", "at_0200_day_1_month_x_each_3"),
        ("0 2 * * 1-5", "at_0200_weekday_1_to_5"),
        ("0 2 * * 1#1", "at_0200_weekday_1_1"),
        ("*/15 * * * *", "cron_x_each_15_x_x_x_x"),
        ("0 4,16 * * 1-5", "cron_0_4_and_16_x_x_1_to_5"),
    ],
)
def test_a_cron_becomes_part_of_a_name(cron: str, expected: str) -> None:
    assert slug(cron) == expected
