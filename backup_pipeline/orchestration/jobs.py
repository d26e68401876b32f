"""The jobs: those that a person launches from a form, and those that schedules launch.

The first step of each form's job validates everything and shows the plan, before anything is
touched. None of them starts again by itself, but backups.
"""

from collections.abc import Callable
from typing import Any

import dagster as dg

from backup_pipeline.config import Config, DatabaseConfig
from backup_pipeline.orchestration import cluster_drills, cluster_ops, form_ops, forms, ops
from backup_pipeline.orchestration.assets import LISTING, plain
from backup_pipeline.orchestration.cluster_assets import BASE_BACKUP
from backup_pipeline.orchestration.runs import ACTION_TAG, RETRIES_TAG, STRATEGY_TAG

TAKE_BASE_BACKUP = "take_base_backup"

Job = Any  # dagster has no public type for both a job and an asset job that is not resolved yet


def tier_names(database: DatabaseConfig) -> list[str]:
    """The names of a database's tiers."""
    return [tier.name for tier in database.tiers]


def tier_job_name(tier: str) -> str:
    """The job that takes one tier's backups."""
    return f"{plain(tier)}_backups"


def tier_jobs_of(config: Config) -> dict[str, Job]:
    """The jobs that take each tier's backups, by name."""
    tiers = sorted({name for database in config.databases.values() for name in tier_names(database)})
    return {tier_job_name(tier): _tier_job(config, tier) for tier in tiers}


def _tier_job(config: Config, tier: str) -> Job:
    names = [
        name for name, database in config.databases.items() if any(t.name == tier for t in database.tiers)
    ]
    keys = [[name, last] for name in names for last in (tier, LISTING)]
    return dg.define_asset_job(
        tier_job_name(tier),
        selection=dg.AssetSelection.assets(*keys),
        description=f"Takes {tier} backups, proves them, then prunes; scheduled as one run per database.",
        # All steps: what the first ones found was in the process that died.
        tags={ACTION_TAG: "backup", RETRIES_TAG: "2", STRATEGY_TAG: "ALL_STEPS"},
    )


def form_jobs_of(config: Config) -> dict[str, dg.JobDefinition]:
    """The jobs with a form in the Launchpad, by name; some are launched by schedules too."""
    databases = (backup_database, restore_database, undo_restore, verify_restore, prune_backups)
    made = [
        *(databases if config.databases else ()),
        *((recover_cluster, drill_recovery, prune_cluster) if config.clusters else ()),
    ]
    return {make.__name__: make(config) for make in made}


def cluster_jobs_of(config: Config) -> dict[str, Job]:
    """The job that takes base backups, if there are clusters, by name."""
    if not config.clusters:
        return {}
    keys = [[name, last] for name in config.clusters for last in (BASE_BACKUP, LISTING)]
    job = dg.define_asset_job(
        TAKE_BASE_BACKUP,
        selection=dg.AssetSelection.assets(*keys).without_checks(),  # a drill has a time of its own
        description="Takes base backups of clusters, then lists them; scheduled as one run per cluster.",
        tags={ACTION_TAG: "backup", RETRIES_TAG: "2", STRATEGY_TAG: "ALL_STEPS"},
    )
    return {TAKE_BASE_BACKUP: job}


def backup_database(config: Config) -> dg.JobDefinition:
    """A backup by hand, before a migration."""
    prove = forms.flag(True, "Prove it right after the dump.")

    @_job(
        "Takes a backup now, and proves it: before a migration, say. It expires by itself.",
        config=forms.form(config, "choose_database", {"prove": prove}),
        action="backup",
    )
    def backup_database() -> None:
        subject = form_ops.choose_database()
        backup = ops.publish(ops.dump_and_upload(ops.preflight(subject)))
        form_ops.prove_if_wanted(backup, subject)

    return backup_database


def restore_database(config: Config) -> dg.JobDefinition:
    """A restore, with its plan first."""

    @_job(
        "Restores a backup. As it stands, the form restores the newest proven backup into a new database "
        "and touches nothing else; the plan is the first thing in the run's log. Another server is for the "
        "command line, because its address may hold a password: backup-pipeline restore --to.",
        config=forms.form(config, "plan_restore", forms.restore_fields()),
        action="restore",
    )
    def restore_database() -> None:
        form_ops.carry_out_restore(form_ops.plan_restore())

    return restore_database


def undo_restore(config: Config) -> dg.JobDefinition:
    """The swap of the last replacing restore, taken back."""

    @_job(
        "Takes back the last restore with replace: the database that it put aside is live again. Another "
        "server is for the command line: backup-pipeline undo --to.",
        config=forms.form(config, "plan_undo", forms.undo_fields()),
        action="undo",
    )
    def undo_restore() -> None:
        form_ops.swap_back(form_ops.plan_undo())

    return undo_restore


def verify_restore(config: Config) -> dg.JobDefinition:
    """A proof of any backup."""
    which = 'Which: "latest", "proven" (once more), a tier (its newest), or an id from the table.'
    backup = forms.text("latest", which)

    @_job(
        "Restores a backup into an empty server, compares it with its source and records the verdict. "
        "Touches no live database.",
        config=forms.form(config, "choose_backup", {"backup": backup}),
        action="prove",
    )
    def verify_restore() -> None:
        form_ops.restore_and_compare(form_ops.choose_backup())

    return verify_restore


def prune_backups(config: Config) -> dg.JobDefinition:
    """A look at what a prune would delete, or a prune."""
    dry_run = forms.flag(True, "Only show what would be deleted, and why. Set to false to delete.")

    @_job(
        "Shows what the retention gives up, each with its reason; deletes it only with dry_run: false.",
        config=forms.form(config, "plan_prune", {"dry_run": dry_run}),
        action="prune",
    )
    def prune_backups() -> None:
        form_ops.carry_out_prune(form_ops.plan_prune())

    return prune_backups


def recover_cluster(config: Config) -> dg.JobDefinition:
    """A recovery of a whole cluster, with its plan first."""

    @_job(
        "Recovers a whole cluster to any moment, into a new directory on the machine where the run executes; "
        "nothing that exists is touched. As it stands, the form only shows the plan. From when to when: the "
        "page of the cluster's wal, and the first lines of the run's log. Tablespaces with a place of their "
        "own are for the command line: backup-pipeline recover.",
        config=forms.recover_form(config, "plan_recovery"),
        action="recover",
    )
    def recover_cluster() -> None:
        cluster_ops.carry_out_recovery(cluster_ops.plan_recovery())

    return recover_cluster


def drill_recovery(config: Config) -> dg.JobDefinition:
    """A recovery that nobody needs, to know that it works and how long it takes."""

    @_job(
        "Recovers a random second of a cluster's window into scratch, looks into it, and records the "
        "verdict, what would have been lost and how long it took. Touches no live cluster.",
        config=forms.drill_form(config, "drill"),
        action="drill",
    )
    def drill_recovery() -> None:
        cluster_drills.drill()

    return drill_recovery


def prune_cluster(config: Config) -> dg.JobDefinition:
    """A look at what a cluster's prune would delete, or a prune."""

    @_job(
        "Shows which base backups and WAL of a cluster no moment of its recovery window needs, each with its "
        "reason; deletes them only with dry_run: false.",
        config=forms.prune_cluster_form(config, "plan_cluster_prune"),
        action="prune",
    )
    def prune_cluster() -> None:
        cluster_ops.carry_out_cluster_prune(cluster_ops.plan_cluster_prune())

    return prune_cluster


def _job(
    description: str, *, config: dg.ConfigMapping, action: str
) -> Callable[[Callable[[], None]], dg.JobDefinition]:
    tags = {ACTION_TAG: action, RETRIES_TAG: "0"}
    return dg.job(description=description, config=config, tags=tags, executor_def=dg.in_process_executor)
