"""`base-backup`: a copy of a whole cluster, taken and shown; and how `list` and `show` see such copies.

Called by cli.py. How one is taken is actions/base_backup.py's.
"""

import click

from backup_pipeline import terminal
from backup_pipeline.actions import base_backup as taking
from backup_pipeline.actions.protected_cluster import open_cluster
from backup_pipeline.actions.windows import ClusterWindows, windows_of
from backup_pipeline.commands import cluster_tables
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.domain.base_backup import BaseBackup, BaseListing
from backup_pipeline.storage import base_backups


@click.command("base-backup")
@click.argument("cluster")
@click.option(
    "--fast/--spread",
    "fast",
    default=None,
    help="Begin with a checkpoint at once, or a slow one; else as set.",
)
@click.option(
    "--incremental", is_flag=True, help="Only what has changed since the last one (PostgreSQL 17 or newer)."
)
@click.option(
    "--parent", default="", metavar="ID", help="Only what has changed since this one; else it fails."
)
@json_option
@pass_context
def base_backup(
    context: Context, cluster: str, fast: bool | None, incremental: bool, parent: str, as_json: bool
) -> None:
    """Copy a whole cluster, or what has changed in it; it is listed once its WAL is archived."""
    context.refuse_alone()
    protected = open_cluster(context.config, cluster)
    named = taking.choose(listing(context, cluster), parent).id if parent else None
    with terminal.reporting(quiet=context.quiet) as report:
        taken = taking.take(
            protected, clock=now, report=report, fast=fast, incremental=incremental, parent=named
        )
    show(context, taken, as_json=as_json)


def listing(context: Context, name: str) -> BaseListing:
    """The base backups of a configured cluster, of all, or, with a store alone, of whatever has this name."""
    if name and not context.alone and name not in context.config.clusters:
        return BaseListing(())
    return base_backups.list_base_backups(context.store(), name)


def windows(context: Context, name: str, bases: BaseListing) -> list[ClusterWindows]:
    """What can be recovered of each cluster that `listing` was asked for: configured, or with a backup."""
    known = {each.id.database for each in bases.backups}
    if not context.alone:
        known |= {each for each in context.config.clusters if name in ("", each)}
    return [
        windows_of(context.cluster(each), now=now())
        for each in sorted(known)
        if context.alone or each in context.config.clusters
    ]


def find(context: Context, text: str) -> BaseBackup | None:
    """The base backup that an id, or its beginning, names; None where the name is no cluster's.

    Raises BackupNotFound when there is none.
    """
    name, slash, _ = text.partition("/")
    found = listing(context, name) if slash else BaseListing(())
    if not found.backups and name not in context.config.clusters:
        return None
    return taking.choose(found, text)


def show(context: Context, backup: BaseBackup, *, as_json: bool) -> None:
    """Everything that is known of one base backup."""
    if as_json:
        terminal.print_json(cluster_tables.base_record(backup))
    else:
        terminal.print_table(cluster_tables.base_details(backup, context.config.store.url, now()))
