"""When things are due: a schedule for each tier and cron, the proofs, and the prune as backstop.

All times are UTC. Databases of one tier with the same cron share a schedule, which yields one run for
each. The scheduled time travels in a tag, so that two tiers due at the same time share one dump.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import dagster as dg

from backup_pipeline.config import Config, DatabaseConfig, TierConfig
from backup_pipeline.orchestration import words
from backup_pipeline.orchestration.assets import LISTING, plain
from backup_pipeline.orchestration.checks import check_key
from backup_pipeline.orchestration.jobs import PROVE_NEWEST, PRUNE_ALL, AssetJob, tier_job_name
from backup_pipeline.orchestration.runs import (
    ACTION_TAG,
    DATABASE_TAG,
    SCHEDULED_TAG,
    TIER_TAG,
    shown_scheduled,
)

PRUNE_CRON = "30 6 * * *"
LONGEST_KEPT_CRON = "0 3 2 * *"

Request = Callable[[DatabaseConfig, dg.ScheduleEvaluationContext], dg.RunRequest]


def schedules_of(
    config: Config, asset_jobs: dict[str, AssetJob], verify_restore: dg.JobDefinition
) -> list[dg.ScheduleDefinition]:
    """All schedules; they run from the first moment, because a forgotten switch is no backup."""
    databases = tuple(config.databases.values())
    return [
        *_tier_schedules(config, asset_jobs),
        *_proof_schedules(config, verify_restore),
        _schedule(
            "prove_longest_kept",
            LONGEST_KEPT_CRON,
            asset_jobs[PROVE_NEWEST],
            databases,
            _prove_longest_kept,
            "Proves the newest monthly backup (or that of the rarest tier), whatever else is proven",
        ),
        _schedule(
            PRUNE_ALL,
            PRUNE_CRON,
            asset_jobs[PRUNE_ALL],
            databases,
            _prune,
            "Prunes each database, also when no new backup was taken or proven",
        ),
    ]


def _tier_schedules(config: Config, jobs: dict[str, AssetJob]) -> list[dg.ScheduleDefinition]:
    groups: dict[tuple[str, str], list[DatabaseConfig]] = defaultdict(list)
    for database in config.databases.values():
        for tier in database.tiers:
            groups[tier.name, tier.cron].append(database)
    return [
        _schedule(
            f"{plain(tier)}_{slug(cron)}",
            cron,
            jobs[tier_job_name(tier)],
            databases,
            _backup_as(tier),
            f"Takes {tier} backups",
        )
        for (tier, cron), databases in groups.items()
    ]


def _proof_schedules(config: Config, verify_restore: dg.JobDefinition) -> list[dg.ScheduleDefinition]:
    groups: dict[str, list[DatabaseConfig]] = defaultdict(list)
    for database in config.databases.values():
        if database.prove.cron:
            groups[database.prove.cron].append(database)
    return [
        _schedule(
            f"prove_{slug(cron)}", cron, verify_restore, databases, _prove_latest, "Proves the newest backup"
        )
        for cron, databases in groups.items()
    ]


def _schedule(
    name: str, cron: str, job: AssetJob, databases: Sequence[DatabaseConfig], request: Request, what: str
) -> dg.ScheduleDefinition:
    shown = ", ".join(database.name for database in databases[:5])
    rest = f" and {len(databases) - 5} more" if len(databases) > 5 else ""

    @dg.schedule(
        name=name,
        cron_schedule=cron,
        job=job,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"{what}, {words.when(cron)}: {shown}{rest}.",
    )
    def requests(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest]:
        context.log.info(f"{len(databases)} runs for {context.scheduled_execution_time:%Y-%m-%d %H:%M} UTC")
        return [request(database, context) for database in databases]

    return requests


def _backup_as(tier: str) -> Request:
    def request(database: DatabaseConfig, context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        checks = [check_key(database.name, tier)] if database.prove.always else []
        return dg.RunRequest(
            run_key=database.name,
            asset_selection=[dg.AssetKey([database.name, last]) for last in (tier, LISTING)],
            asset_check_keys=checks,
            tags={
                DATABASE_TAG: database.name,
                ACTION_TAG: "backup",
                TIER_TAG: tier,
                SCHEDULED_TAG: shown_scheduled(context.scheduled_execution_time),
            },
        )

    return request


def _prove_latest(database: DatabaseConfig, _context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=database.name,
        run_config={"database": database.name, "backup": "latest"},
        tags={DATABASE_TAG: database.name, ACTION_TAG: "prove"},
    )


def _prove_longest_kept(database: DatabaseConfig, _context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    tier = rarest(database.tiers).name
    return dg.RunRequest(
        run_key=database.name,
        asset_selection=[],
        asset_check_keys=[check_key(database.name, tier)],
        tags={DATABASE_TAG: database.name, ACTION_TAG: "prove", TIER_TAG: tier},
    )


def _prune(database: DatabaseConfig, _context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=database.name,
        asset_selection=[dg.AssetKey([database.name, LISTING])],
        tags={DATABASE_TAG: database.name, ACTION_TAG: "prune"},
    )


def rarest(tiers: Sequence[TierConfig]) -> TierConfig:
    """The tier whose backups are taken least often, and so have to last longest: monthly, by default."""
    return max(tiers, key=lambda tier: words.longest_gap(tier.cron))


def slug(cron: str) -> str:
    """A cron as part of a name, the same for ever: "0 2 * * 0" -> "0_2_x_x_0"."""
    words_of = cron.replace("*", "x").replace("/", "_each_").replace("-", "_to_").replace(",", "_and_")
    return re.sub(r"[^A-Za-z0-9]+", "_", words_of).strip("_")
