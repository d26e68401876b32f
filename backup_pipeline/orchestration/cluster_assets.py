"""A cluster's assets: `[cluster, "base_backup"]`, `[cluster, "wal"]`, and the list `[cluster, "backups"]`.

One group per cluster. What the pages say is in cluster_words.py; the steps are in cluster_ops.py.
"""

from datetime import timedelta

import dagster as dg

from backup_pipeline.actions import prune_cluster
from backup_pipeline.actions.wal_look import look_at
from backup_pipeline.config import ClusterConfig, Config, StoreConfig
from backup_pipeline.orchestration import cluster_ops, cluster_words
from backup_pipeline.orchestration.assets import LISTING, freshness, owners, plain, store_kind
from backup_pipeline.orchestration.failures import explained
from backup_pipeline.orchestration.resources import Backups, now
from backup_pipeline.orchestration.runs import report_to, tag_run

BASE_BACKUP = "base_backup"
WAL = "wal"
LOOK_EVERY_S = 300
"""A listing of the archive costs a request for each thousand segments."""


def cluster_assets_of(config: Config) -> list[dg.AssetsDefinition]:
    """All assets of all configured clusters."""
    make = (base_backup_asset, wal_asset, list_asset)
    return [each(cluster, config.store) for cluster in config.clusters.values() for each in make]


def base_backup_asset(cluster: ClusterConfig, store: StoreConfig) -> dg.AssetsDefinition:
    """The base backups of a cluster, one at a time, with a badge that says when one is overdue."""
    take = cluster_ops.take_of(cluster)

    @dg.graph_asset(
        key=[cluster.name, BASE_BACKUP],
        group_name=plain(cluster.name),
        description=cluster_words.base_description(cluster, store),
        kinds={"postgres", store_kind(store)},
        owners=owners(cluster),
    )
    def base_backup() -> object:
        return take.alias("take")(cluster_ops.preflight_cluster.alias("preflight")())

    policy = freshness(cluster.base_backup_cron)
    return base_backup.map_asset_specs(lambda spec: dg.apply_freshness_policy(spec, policy))


def wal_asset(cluster: ClusterConfig, store: StoreConfig) -> dg.AssetsDefinition:
    """How a cluster's WAL archive stands; overdue when nobody looked for a while."""
    every = timedelta(seconds=LOOK_EVERY_S)

    @dg.asset(
        key=[cluster.name, WAL],
        group_name=plain(cluster.name),
        description=cluster_words.wal_description(cluster, store, LOOK_EVERY_S),
        kinds={"postgres", store_kind(store)},
        owners=owners(cluster),
        freshness_policy=dg.FreshnessPolicy.time_window(warn_window=3 * every, fail_window=6 * every),
    )
    def wal(context: dg.AssetExecutionContext, backups: Backups) -> dg.MaterializeResult[None]:
        tag_run(context.op_execution_context, "look", cluster.name)
        with explained(context.op_execution_context, retry=False):
            found = look_at(backups.cluster(cluster.name), now=now())
        return dg.MaterializeResult(metadata=cluster_words.wal_metadata(found))

    return wal


def list_asset(cluster: ClusterConfig, store: StoreConfig) -> dg.AssetsDefinition:
    """What exists of a cluster; made anew, after a prune, whenever a base backup was taken."""

    @dg.asset(
        key=[cluster.name, LISTING],
        deps=[
            [cluster.name, BASE_BACKUP]
        ],  # not the WAL: it is looked at all the time, and this would be stale
        group_name=plain(cluster.name),
        description=cluster_words.list_description(cluster, store),
        kinds={"table", store_kind(store)},
        owners=owners(cluster),
    )
    def backups_of_cluster(context: dg.AssetExecutionContext, backups: Backups) -> dg.MaterializeResult[None]:
        tag_run(context.op_execution_context, "prune", cluster.name)
        with explained(context.op_execution_context):
            protected = backups.cluster(cluster.name)
            log = report_to(context.op_execution_context).say
            planned = prune_cluster.plan(protected, now=now())
            prune_cluster.carry_out(protected, planned, clock=now, log=log)
            return dg.MaterializeResult(metadata=cluster_ops.list_metadata(protected))

    return backups_of_cluster
