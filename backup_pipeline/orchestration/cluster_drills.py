"""Drills in Dagster: the check on a cluster's base backups, and the steps of the job drill_recovery.

What a drill is, and its verdict, is actions/drill_recovery.py's; here it becomes a result that Dagster shows,
and the measured loss and duration become the asset's plots.
"""

from collections.abc import Iterator

import dagster as dg

from backup_pipeline.actions import drill_recovery
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.config import ClusterConfig, Config
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.drill import Drill
from backup_pipeline.orchestration import cluster_words, words
from backup_pipeline.orchestration.assets import plain
from backup_pipeline.orchestration.cluster_assets import BASE_BACKUP
from backup_pipeline.orchestration.evaluations import log_evaluation, result_of
from backup_pipeline.orchestration.failures import explained
from backup_pipeline.orchestration.forms import DrillForm
from backup_pipeline.orchestration.resources import Backups, now
from backup_pipeline.orchestration.runs import report_to, tag_run
from backup_pipeline.storage import base_backups

DRILLED_CHECK = "drilled"


def drill_checks_of(config: Config) -> list[dg.AssetChecksDefinition]:
    """The checks of all clusters: one each."""
    return [drill_check(cluster) for cluster in config.clusters.values()]


def drill_check(cluster: ClusterConfig) -> dg.AssetChecksDefinition:
    """Whether the newest drill of a cluster recovered what it should; Execute drills now."""

    @dg.multi_asset_check(
        name=f"{plain(cluster.name)}__{DRILLED_CHECK}",
        specs=[
            dg.AssetCheckSpec(
                DRILLED_CHECK,
                asset=[cluster.name, BASE_BACKUP],
                description="Recovers a random second of the window into scratch, and looks into it.",
            )
        ],
    )
    def drilled(context: dg.AssetCheckExecutionContext, backups: Backups) -> Iterator[dg.AssetCheckResult]:
        done, evaluation = _drill(context.op_execution_context, backups, cluster.name, drill_recovery.RANDOM)
        yield result_of(evaluation)
        if done.verdict is Verdict.FAILED:
            raise drill_failure(done)

    return drilled


@dg.op(
    out=dg.Out(dg.Nothing),
    description="Recovers into scratch, looks into it, and records what it came to. Touches nothing else.",
)
def drill(context: dg.OpExecutionContext, backups: Backups, config: DrillForm) -> None:
    """Drill; anything but what was to be shown fails the run, because somebody has to look."""
    done, evaluation = _drill(context, backups, config.cluster, config.target)
    log_evaluation(context, evaluation)
    context.add_output_metadata(cluster_words.drill_metadata(done))
    if not evaluation.passed:
        raise drill_failure(done)


def _drill(
    context: dg.OpExecutionContext, backups: Backups, name: str, target: str
) -> tuple[Drill, dg.AssetCheckEvaluation]:
    """Drill, let the asset's plots show the numbers, and say what the check shows."""
    tag_run(context, "drill", name)
    with explained(context, retry=False):
        cluster = backups.cluster(name)
        at = drill_recovery.parse_moment(target)
        done = drill_recovery.drill(cluster, clock=now, report=report_to(context), target_at=at)
        tag_run(context, "drill", name, id=str(done.id))
        context.log_event(dg.AssetObservation([name, BASE_BACKUP], metadata=_plotted(cluster, done)))
    evaluation = dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey([name, BASE_BACKUP]),
        check_name=DRILLED_CHECK,
        passed=drill_recovery.as_asked(done, cluster.config),
        metadata=cluster_words.drill_metadata(done),
        severity=dg.AssetCheckSeverity.ERROR
        if done.verdict is Verdict.FAILED
        else dg.AssetCheckSeverity.WARN,
        description=cluster_words.drill_sentence(done),
    )
    return done, evaluation


def _plotted(cluster: ProtectedCluster, done: Drill) -> words.Metadata:
    """The drill's numbers, beside the newest base backup's: plots show the labels of the newest event."""
    newest = base_backups.list_base_backups(cluster.store, cluster.name).backups[:1]
    numbers = cluster_words.base_numbers(newest[0].manifest) if newest else {}
    return {**numbers, **cluster_words.drill_numbers(done)}


def drill_failure(done: Drill) -> dg.Failure:
    """What the run's page says when a drill did not show what it should."""
    todo = "Look at what is wrong below, and take a base backup now: materialize base_backup."
    if done.verdict is not Verdict.FAILED:
        todo = "See below what is missing here, and drill where it is not."
    return dg.Failure(
        f"{cluster_words.drill_sentence(done)}\nWhat to do: {todo}",
        metadata=cluster_words.drill_metadata(done),
        allow_retries=False,
    )
