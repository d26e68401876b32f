"""The steps of a base backup, and of a recovery that a person launches from its form.

Each opens the cluster, calls one action and shows what came of it. What is handed on stays in the process.
"""

from pathlib import Path

import dagster as dg

from backup_pipeline.actions import base_backup, base_preflight, prune_cluster, recover
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.recovery_plan import Plan, RecoverRequest
from backup_pipeline.actions.windows import windows_of
from backup_pipeline.config import ClusterConfig
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import BaseBackup
from backup_pipeline.domain.recovery_target import parse_target
from backup_pipeline.errors import ConfigError
from backup_pipeline.orchestration import cluster_words, words
from backup_pipeline.orchestration.assets import LISTING, plain
from backup_pipeline.orchestration.failures import explained
from backup_pipeline.orchestration.form_ops import Planned, only_shown, say
from backup_pipeline.orchestration.forms import PruneClusterForm, RecoverForm
from backup_pipeline.orchestration.resources import Backups, now
from backup_pipeline.orchestration.runs import INCREMENTAL_TAG, report_to, tag_run
from backup_pipeline.storage.base_backups import list_base_backups
from backup_pipeline.units import show_bytes


@dg.op(
    description="Tries everything that the base backup will need: server, role, archive, store.",
    out=dg.Out(dg.Any),
)
def preflight_cluster(context: dg.OpExecutionContext, backups: Backups) -> dg.Output[str]:
    """Check what the base backup needs; hands on the cluster's name."""
    name = context.assets_def.key.path[0]
    tag_run(context, "backup", name)
    with explained(context):
        ready = base_preflight.preflight(backups.cluster(name), report=report_to(context))
    shown = {
        "server": f"PostgreSQL {ready.server.version_text}",
        "system_identifier": ready.system_identifier,
    }
    return dg.Output(name, metadata=shown)


def take_of(cluster: ClusterConfig) -> dg.OpDefinition:
    """The step that takes a base backup of this cluster, in a pool of its own: one is taken at a time."""

    @dg.op(
        name=f"base_backup_of_{plain(cluster.name)}",
        description="Reads the cluster straight into the store, waits for its WAL, then lists it.",
        ins={"name": dg.In(dg.Any)},
        out=dg.Out(dg.Any),
        pool=f"base_backup_{plain(cluster.name)}",
    )
    def take(context: dg.OpExecutionContext, backups: Backups, name: str) -> dg.Output[BaseBackup]:
        with explained(context):
            protected = backups.cluster(name)
            incremental = INCREMENTAL_TAG in context.run.tags
            taken = base_backup.take(protected, clock=now, report=report_to(context), incremental=incremental)
        tag_run(context, "backup", name, id=str(taken.id))
        for note in taken.manifest.notes:
            context.log.warning(note)
        return dg.Output(taken, metadata=cluster_words.base_metadata(taken, protected.store.url))

    return take


@dg.op(
    out=dg.Out(dg.Any),
    description="Validates the form, shows what can be recovered and the plan; touches nothing.",
)
def plan_recovery(
    context: dg.OpExecutionContext, backups: Backups, config: RecoverForm
) -> dg.Output[Planned[Plan]]:
    """Plan the recovery that the form asks for."""
    tag_run(context, "recover", config.cluster)
    with explained(context):
        request, cluster = request_of(config), backups.cluster(config.cluster)
        windows = windows_of(cluster, now=now())
        say(context, windows.lines)
        planned = recover.plan(cluster, request, report=report_to(context))
    tag_run(context, "recover", config.cluster, id=str(planned.manifest.id))
    shown: words.Metadata = {
        "plan": say(context, planned.lines),
        "windows": cluster_words.windows_table(windows),
        "restored_size": show_bytes(planned.manifest.source_bytes),
        "segments": len(planned.judged.needed),
    }
    return dg.Output(Planned(config.cluster, planned, dry_run=config.dry_run), metadata=shown)


def request_of(form: RecoverForm) -> RecoverRequest:
    """What the form asks for. Raises ConfigError naming the field."""
    into = Path(form.into)
    if not into.is_absolute():
        found = f"found {form.into!r}" if form.into else "it is empty"
        raise ConfigError(
            f"into has to be a new directory's whole path, and {found}",
            hint="Name one on the machine where this run executes, such as /var/lib/postgresql/17/recovered.",
        )
    if form.timeline < 0:
        raise ConfigError(f"timeline {form.timeline} is none", hint="0 follows the newest.")
    return RecoverRequest(
        parse_target(form.target, inclusive=not form.exclusive),
        into,
        timeline=form.timeline,
        base=BackupId.parse(form.base) if form.base else None,
    )


@dg.op(
    ins={"planned": dg.In(dg.Any)},
    out=dg.Out(dg.Nothing),
    description="Unpacks and replays into the new directory, unless the form asked for the plan alone.",
)
def carry_out_recovery(context: dg.OpExecutionContext, backups: Backups, planned: Planned[Plan]) -> None:
    """Do what the plan says; what fails, or is terminated, leaves no directory."""
    if only_shown(context, planned, "recovered"):
        return
    with explained(context, retry=False):
        cluster = backups.cluster(planned.subject)
        result = recover.carry_out(cluster, planned.plan, clock=now, report=report_to(context))
    said = say(context, result.lines)
    context.add_output_metadata(cluster_words.recovered_metadata(result, said))


@dg.op(out=dg.Out(dg.Any), description="Validates the form and shows the plan; deletes nothing.")
def plan_cluster_prune(
    context: dg.OpExecutionContext, backups: Backups, config: PruneClusterForm
) -> dg.Output[Planned[prune_cluster.ClusterPrune]]:
    """What the recovery window gives up, and why."""
    tag_run(context, "prune", config.cluster)
    with explained(context):
        planned = prune_cluster.plan(backups.cluster(config.cluster), now=now())
    shown = {"plan": say(context, planned.lines)}
    return dg.Output(Planned(config.cluster, planned, dry_run=config.dry_run), metadata=shown)


@dg.op(
    ins={"planned": dg.In(dg.Any)},
    out=dg.Out(dg.Nothing),
    description="Deletes what the plan gives up, unless the form asked for the plan alone.",
)
def carry_out_cluster_prune(
    context: dg.OpExecutionContext, backups: Backups, planned: Planned[prune_cluster.ClusterPrune]
) -> None:
    """Do what the plan says."""
    if only_shown(context, planned, "deleted"):
        return
    with explained(context):
        cluster, report = backups.cluster(planned.subject), report_to(context)
        prune_cluster.carry_out(cluster, planned.plan, clock=now, log=report.say)
        metadata = list_metadata(cluster)
    context.log_event(dg.AssetMaterialization([planned.subject, LISTING], metadata=metadata))


def list_metadata(cluster: ProtectedCluster) -> words.Metadata:
    """The base backups that exist in the store, as a table and in numbers."""
    existing = list_base_backups(cluster.store, cluster.name)
    total_bytes = sum(backup.manifest.size_bytes for backup in existing.backups)
    return {
        "backups": cluster_words.bases_table(existing.backups, now()),
        "count": len(existing.backups),
        "total_bytes": total_bytes,
        "total_size": show_bytes(total_bytes),
        "stored_in": cluster.store.url,
        "unreadable": "\n".join(f"{key}: {why}" for key, why in existing.unreadable) or words.NOTHING,
    }
