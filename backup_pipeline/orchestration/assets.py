"""The assets: `[database, tier]` for each tier, and `[database, "backups"]`, which follows them.

One group per database. How a backup is taken is in ops.py; what the pages say is in words.py.
"""

import re
from datetime import timedelta

import dagster as dg

from backup_pipeline.actions import prune
from backup_pipeline.actions.backups import listing
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import ClusterConfig, Config, DatabaseConfig, StoreConfig, TierConfig
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.orchestration import ops, words
from backup_pipeline.orchestration.failures import explained
from backup_pipeline.orchestration.resources import Backups, now
from backup_pipeline.orchestration.runs import report_to, tag_run
from backup_pipeline.units import show_bytes

LISTING = "backups"
"""The last part of the key of a database's list of backups; no tier may have this name."""


def assets_of(config: Config) -> list[dg.AssetsDefinition]:
    """All assets of all configured databases."""
    assets = []
    for database in config.databases.values():
        assets += [tier_asset(database, tier, config.store) for tier in database.tiers]
        assets.append(listing_asset(database, config.store))
    return assets


def tier_asset(database: DatabaseConfig, tier: TierConfig, store: StoreConfig) -> dg.AssetsDefinition:
    """One tier of one database: a dump in three steps, with a badge that says when it is overdue."""

    @dg.graph_asset(
        key=[database.name, tier.name],
        group_name=plain(database.name),
        description=words.tier_description(database, tier, store),
        kinds={"postgres", store_kind(store)},
        owners=owners(database),
        tags={"backup/tier": tier.name},
    )
    def dump() -> object:
        return ops.publish(ops.dump_and_upload(ops.preflight()))

    policy = freshness(tier.cron)
    return dump.map_asset_specs(lambda spec: dg.apply_freshness_policy(spec, policy))


def listing_asset(database: DatabaseConfig, store: StoreConfig) -> dg.AssetsDefinition:
    """What exists of one database; made anew, after a prune, whenever a backup was taken and proven."""

    @dg.asset(
        key=[database.name, LISTING],
        deps=[[database.name, tier.name] for tier in database.tiers],
        group_name=plain(database.name),
        description=words.backups_description(database, store),
        kinds={"table", store_kind(store)},
        owners=owners(database),
    )
    def backups_of_database(
        context: dg.AssetExecutionContext, backups: Backups
    ) -> dg.MaterializeResult[None]:
        return prune_and_list(context.op_execution_context, backups, database.name)

    return backups_of_database


def prune_and_list(
    context: dg.OpExecutionContext, backups: Backups, database: str
) -> dg.MaterializeResult[None]:
    """Prune by the policy, then show what is left."""
    tag_run(context, "prune", database)
    with explained(context):
        protected, log = backups.open(database), report_to(context).say
        planned = prune.plan(protected.store, protected.config, imports=protected.imports, now=now())
        prune.carry_out(protected.store, planned, imports=protected.imports, clock=now, log=log)
        return dg.MaterializeResult(metadata=listing_metadata(protected))


def listing_metadata(protected: Protected) -> words.Metadata:
    """The backups that exist in the store, as a table and in numbers."""
    existing = listing(protected)
    found = existing.backups
    return {
        "backups": words.backups_table(found, protected.config, now()),
        "count": len(found),
        "proven": sum(backup.verdict is Verdict.PROVEN for backup in found),
        "total_bytes": sum(backup.size_bytes for backup in found),
        "total_size": show_bytes(sum(backup.size_bytes for backup in found)),
        "stored_in": protected.store.url,
        "unreadable": "\n".join(f"{key}: {why}" for key, why in existing.unreadable) or words.NOTHING,
    }


def store_kind(store: StoreConfig) -> str:
    """The icon for where the bytes are."""
    return "s3" if store.url.startswith("s3://") else "file"


def owners(subject: DatabaseConfig | ClusterConfig) -> list[str]:
    """Who is asked about this database or cluster: an address, or a team."""
    if not subject.owner:
        return []
    return [subject.owner if "@" in subject.owner else f"team:{subject.owner.removeprefix('team:')}"]


def freshness(cron: str) -> dg.FreshnessPolicy:
    """Overdue: a warning after the cron's longest gap and a twelfth of it, a failure after a quarter more."""
    gap = max(words.longest_gap(cron), timedelta(minutes=5))
    return dg.FreshnessPolicy.time_window(warn_window=gap * 13 / 12, fail_window=gap * 5 / 4)


def plain(name: str) -> str:
    """A name as Dagster takes it for groups, ops and jobs; the configuration keeps them apart."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)
