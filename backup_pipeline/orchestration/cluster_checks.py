"""The checks of a cluster's WAL, and the sensor that looks at it every few minutes, without a run.

Execute on the page looks now. What is wrong is found in actions/wal_look.py; here it becomes results that
Dagster shows. The sensor's results show on the asset as those of a run do, so that its plots go on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import dagster as dg

from backup_pipeline.actions.wal_look import WalLook, look_at
from backup_pipeline.config import ClusterConfig, Config
from backup_pipeline.errors import BackupError
from backup_pipeline.orchestration import cluster_words, words
from backup_pipeline.orchestration.assets import plain
from backup_pipeline.orchestration.cluster_assets import LOOK_EVERY_S, WAL
from backup_pipeline.orchestration.evaluations import result_of
from backup_pipeline.orchestration.failures import explained
from backup_pipeline.orchestration.resources import Backups, now
from backup_pipeline.orchestration.runs import tag_run
from backup_pipeline.units import show_count, show_seconds

NO_GAPS = "no_gaps"
ARCHIVING = "archiving"
WINDOW_MET = "window_met"
CHECKS = {
    NO_GAPS: "Each segment between the first and the last is in the archive, once.",
    ARCHIVING: "The server hands its WAL over, and the archive takes it: what `wal status` finds.",
    WINDOW_MET: "Any moment of the configured recovery window can be recovered.",
}

ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


@dataclass(frozen=True)
class Found:
    """What one check found."""

    check: str
    passed: bool
    said: str
    severity: dg.AssetCheckSeverity = ERROR
    metadata: words.Metadata = field(default_factory=dict)


def wal_checks_of(config: Config) -> list[dg.AssetChecksDefinition]:
    """The checks of all clusters' WAL."""
    return [wal_checks(cluster) for cluster in config.clusters.values()]


def wal_checks(cluster: ClusterConfig) -> dg.AssetChecksDefinition:
    """The three checks of a cluster's WAL, made by one look."""
    asset = dg.AssetKey([cluster.name, WAL])

    @dg.multi_asset_check(
        name=f"{plain(cluster.name)}__wal_checks",
        specs=[dg.AssetCheckSpec(name, asset=asset, description=what) for name, what in CHECKS.items()],
        can_subset=True,
    )
    def checks(context: dg.AssetCheckExecutionContext, backups: Backups) -> Iterator[dg.AssetCheckResult]:
        tag_run(context.op_execution_context, "look", cluster.name)
        with explained(context.op_execution_context, retry=False):
            found = look_at(backups.cluster(cluster.name), now=now())
        wanted = {key.name for key in context.selected_asset_check_keys}
        for each in findings(found):
            if each.check in wanted:
                yield result_of(_evaluation(asset, each))

    return checks


def findings(found: WalLook) -> tuple[Found, ...]:
    """What the checks say of a look."""
    return (_gaps(found), _archiving(found), _window(found))


def _gaps(found: WalLook) -> Found:
    if not found.missing:
        return Found(NO_GAPS, True, f"{show_count(found.windows.segments, 'segment')}, none missing")
    more = f", and {len(found.missing) - 1} more" if len(found.missing) > 1 else ""
    cluster = found.windows.cluster
    todo = f"no recovery leads over it; begin anew behind it: backup-pipeline base-backup {cluster}"
    return Found(
        NO_GAPS,
        False,
        f"MISSING: {found.missing[0]}{more}; {todo}",
        ERROR if found.status is not None else WARN,
        words.list_tables(missing=found.missing),
    )


def _archiving(found: WalLook) -> Found:
    if found.status is None:
        return Found(ARCHIVING, False, f"the server cannot be asked: {found.unasked}", WARN)
    problems = found.status.problems
    if problems:
        return Found(
            ARCHIVING,
            False,
            problems[0],
            metadata=words.list_tables(problems=problems),
        )
    lag = f"{show_seconds(found.lag_s)} behind the server" if found.lag_s else "nothing waits"
    return Found(ARCHIVING, True, lag)


def _window(found: WalLook) -> Found:
    windows, current = found.windows, found.windows.current
    is_short = current is None or current.from_at > windows.at - windows.wanted
    # What PostgreSQL has yet to hand over is missing only in the eyes of who does not ask it.
    if windows.is_met or not (is_short or found.missing):
        return Found(WINDOW_MET, True, cluster_words.in_words(windows))
    # The window of a cluster that is new to this still grows.
    severity = WARN if current is not None and is_short else ERROR
    said = windows.problems[0] if windows.problems else cluster_words.in_words(windows)
    return Found(WINDOW_MET, False, said, severity)


def wal_sensors_of(config: Config) -> list[dg.SensorDefinition]:
    """One sensor for each cluster: one that does not answer holds up no other."""
    return [wal_sensor(cluster) for cluster in config.clusters.values()]


def wal_sensor(cluster: ClusterConfig) -> dg.SensorDefinition:
    """Looks at a cluster's WAL, and shows it on the asset and its checks."""
    key = dg.AssetKey([cluster.name, WAL])

    @dg.sensor(
        name=f"watch_wal_of_{plain(cluster.name)}",
        minimum_interval_seconds=LOOK_EVERY_S,
        asset_selection=[key],  # so that the asset's page leads here; nothing is ever launched
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Every {LOOK_EVERY_S // 60} minutes: whether the WAL of {cluster.name} arrives, and "
        "what can be recovered. Launches nothing.",
    )
    def watch(context: dg.SensorEvaluationContext, backups: Backups) -> dg.SensorResult:
        try:
            look = look_at(backups.cluster(cluster.name), now=now())
        except BackupError as error:
            found = unseen(error)
            materialized = []
        else:
            found = findings(look)
            materialized = [dg.AssetMaterialization(key, metadata=cluster_words.wal_metadata(look))]
        for each in found:
            (context.log.info if each.passed else context.log.warning)(f"{each.check}: {each.said}")
        return dg.SensorResult(asset_events=[*materialized, *(_evaluation(key, each) for each in found)])

    return watch


def unseen(error: BackupError) -> tuple[Found, ...]:
    """What the checks say when nobody could look: neither good nor bad, and to be looked into."""
    todo = f" What to do: {error.hint}" if error.hint else ""
    return tuple(
        Found(name, False, f"could not be looked at: {error.message}.{todo}", WARN) for name in CHECKS
    )


def _evaluation(key: dg.AssetKey, found: Found) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=key,
        check_name=found.check,
        passed=found.passed,
        metadata=found.metadata,
        severity=found.severity,
        description=found.said,
    )
