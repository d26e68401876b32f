"""When things are due: a schedule for each tier and cron, the proofs, and the prune as backstop.

All times are UTC. Databases of one tier with the same cron share a schedule, which yields one run for
each. The scheduled time travels in a tag, so that two tiers due at the same time share one dump.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import dagster as dg

from backup_pipeline.actions.drill_recovery import RANDOM
from backup_pipeline.config import ClusterConfig, Config, DatabaseConfig, TierConfig
from backup_pipeline.orchestration import words
from backup_pipeline.orchestration.assets import LISTING, plain
from backup_pipeline.orchestration.checks import check_key
from backup_pipeline.orchestration.cluster_assets import BASE_BACKUP
from backup_pipeline.orchestration.jobs import TAKE_BASE_BACKUP, Job, tier_job_name
from backup_pipeline.orchestration.runs import (
    ACTION_TAG,
    DATABASE_TAG,
    INCREMENTAL_TAG,
    SCHEDULED_TAG,
    TIER_TAG,
    queue_tag,
    shown_scheduled,
)
from backup_pipeline.units import show_count

PRUNE_CRON = "30 6 * * *"
LONGEST_KEPT_CRON = "0 3 2 * *"
_TAKES, _DRILLS = "Takes base backups", "Recovers a random second into scratch, and looks into it"
_TAKES_CHANGES = "Takes incremental base backups: what has changed since the last"
_PRUNES = "Prunes each cluster, also when no base backup was taken"

Subject = TypeVar("Subject", DatabaseConfig, ClusterConfig)
Request = Callable[[Subject, dg.ScheduleEvaluationContext], dg.RunRequest]


def schedules_of(config: Config, jobs: Mapping[str, Job]) -> list[dg.ScheduleDefinition]:
    """All schedules; they run from the first moment, because a forgotten switch is no backup."""
    return [
        *(_database_schedules(config, jobs) if config.databases else ()),
        *_cluster_schedules(config, jobs),
    ]


def _database_schedules(config: Config, jobs: Mapping[str, Job]) -> list[dg.ScheduleDefinition]:
    databases = tuple(config.databases.values())
    verify, prune = jobs["verify_restore"], jobs["prune_backups"]
    monthly = "Proves the newest monthly backup (or that of the rarest tier), whatever else is proven"
    backstop = "Prunes each database, also when no new backup was taken or proven"
    return [
        *_tier_schedules(config, jobs),
        *_proof_schedules(config, verify),
        _schedule("prove_longest_kept", LONGEST_KEPT_CRON, verify, databases, _prove_longest_kept, monthly),
        _schedule("prune_every_day", PRUNE_CRON, prune, databases, _prune, backstop),
    ]


def _tier_schedules(config: Config, jobs: Mapping[str, Job]) -> list[dg.ScheduleDefinition]:
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


def _proof_schedules(config: Config, verify: Job) -> list[dg.ScheduleDefinition]:
    groups: dict[str, list[DatabaseConfig]] = defaultdict(list)
    for database in config.databases.values():
        if database.prove.cron:
            groups[database.prove.cron].append(database)
    return [
        _schedule(f"prove_{slug(cron)}", cron, verify, databases, _prove_latest, "Proves the newest backup")
        for cron, databases in groups.items()
    ]


def _cluster_schedules(config: Config, jobs: Mapping[str, Job]) -> list[dg.ScheduleDefinition]:
    clusters = list(config.clusters.values())
    if not clusters:
        return []
    base = [
        _schedule(f"base_backup_{slug(cron)}", cron, jobs[TAKE_BASE_BACKUP], due, _base_backup, _TAKES)
        for cron, due in _by_cron(clusters, lambda cluster: cluster.base_backup_cron)
    ]
    changes = [
        _schedule(
            f"incremental_{slug(cron)}", cron, jobs[TAKE_BASE_BACKUP], due, _incremental, _TAKES_CHANGES
        )
        for cron, due in _by_cron(clusters, lambda cluster: cluster.incremental_cron)
    ]
    drills = [
        _schedule(f"drill_{slug(cron)}", cron, jobs["drill_recovery"], due, _drill, _DRILLS)
        for cron, due in _by_cron(clusters, lambda cluster: cluster.drill_cron)
    ]
    prune = _schedule(
        "prune_clusters_every_day", PRUNE_CRON, jobs["prune_cluster"], clusters, _prune_cluster, _PRUNES
    )
    return [*base, *changes, *drills, prune]


def _by_cron(
    clusters: Sequence[ClusterConfig], cron_of: Callable[[ClusterConfig], str]
) -> list[tuple[str, list[ClusterConfig]]]:
    """The clusters that share a cron; those that have none are left out."""
    groups: dict[str, list[ClusterConfig]] = defaultdict(list)
    for cluster in clusters:
        groups[cron_of(cluster)].append(cluster)
    return [(cron, due) for cron, due in groups.items() if cron]


def _schedule(
    name: str, cron: str, job: Job, subjects: Sequence[Subject], request: Request[Subject], what: str
) -> dg.ScheduleDefinition:
    shown = ", ".join(subject.name for subject in subjects[:5])
    rest = f" and {len(subjects) - 5} more" if len(subjects) > 5 else ""

    @dg.schedule(
        name=name,
        cron_schedule=cron,
        job=job,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"{what}, {words.when(cron)}: {shown}{rest}.",
    )
    def requests(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest]:
        context.log.info(
            f"{show_count(len(subjects), 'run')} for {context.scheduled_execution_time:%Y-%m-%d %H:%M} UTC"
        )
        return [request(subject, context) for subject in subjects]

    return requests


def _base_backup(cluster: ClusterConfig, context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return _backup_request(cluster.name, BASE_BACKUP, context)


def _incremental(cluster: ClusterConfig, context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return _backup_request(cluster.name, BASE_BACKUP, context, tags={INCREMENTAL_TAG: "yes"})


def _backup_as(tier: str) -> Request[DatabaseConfig]:
    def request(database: DatabaseConfig, context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        checks = [check_key(database.name, tier)] if database.prove.always else []
        return _backup_request(database.name, tier, context, checks=checks, tags={TIER_TAG: tier})

    return request


def _backup_request(
    subject: str,
    asset: str,
    context: dg.ScheduleEvaluationContext,
    *,
    checks: Sequence[dg.AssetCheckKey] = (),  # none of a base backup: a drill has a time of its own
    tags: Mapping[str, str] | None = None,
) -> dg.RunRequest:
    """A backup, and the list of what there is after it."""
    return dg.RunRequest(
        run_key=subject,
        asset_selection=[dg.AssetKey([subject, last]) for last in (asset, LISTING)],
        asset_check_keys=list(checks),
        tags={
            DATABASE_TAG: subject,
            ACTION_TAG: "backup",
            **queue_tag("backup", subject),
            SCHEDULED_TAG: shown_scheduled(context.scheduled_execution_time),
            **(tags or {}),
        },
    )


def _prune_cluster(cluster: ClusterConfig, _context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return _form_request(cluster.name, "prune", {"cluster": cluster.name, "dry_run": False})


def _drill(cluster: ClusterConfig, _context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return _form_request(cluster.name, "drill", {"cluster": cluster.name, "target": RANDOM})


def _prove_latest(database: DatabaseConfig, _context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return _form_request(database.name, "prove", {"database": database.name, "backup": "latest"})


def _prove_longest_kept(database: DatabaseConfig, _context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    tier = rarest(database.tiers).name
    return _form_request(database.name, "prove", {"database": database.name, "backup": tier})


def _prune(database: DatabaseConfig, _context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return _form_request(database.name, "prune", {"database": database.name, "dry_run": False})


def _form_request(subject: str, action: str, form: Mapping[str, object]) -> dg.RunRequest:
    return dg.RunRequest(run_key=subject, run_config=form, tags={DATABASE_TAG: subject, ACTION_TAG: action})


def rarest(tiers: Sequence[TierConfig]) -> TierConfig:
    """The tier whose backups are taken least often, and so have to last longest: monthly, by default."""
    return max(tiers, key=lambda tier: words.longest_gap(tier.cron))


def slug(cron: str) -> str:
    """A cron as part of a name, the same for ever: "0 2 * * 0" -> "at_0200_weekday_0"."""
    minute, hour, *rest = cron.split()
    if not (minute.isdigit() and hour.isdigit() and len(rest) == 3):
        return f"cron_{_as_name(cron)}"
    named = zip(("day", "month", "weekday"), rest, strict=True)
    return "_".join(
        [f"at_{hour:0>2}{minute:0>2}", *(f"{what}_{_as_name(x)}" for what, x in named if x != "*")]
    )


def _as_name(field: str) -> str:
    words_of = field.replace("*", "x").replace("/", "_each_").replace("-", "_to_").replace(",", "_and_")
    return re.sub(r"[^A-Za-z0-9]+", "_", words_of).strip("_")
