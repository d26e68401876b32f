"""`prune`, `pin` and `unpin`: what is deleted, and what never is; of databases and of clusters.

Called by cli.py. What goes, and why, is decided in domain/; actions/prune.py and prune_cluster.py delete.
"""

from functools import partial

import click

from backup_pipeline import terminal
from backup_pipeline.actions import backups, prune_cluster
from backup_pipeline.actions import prune as pruning
from backup_pipeline.actions.protected import Protected
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.commands import base_backup as base_commands
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.errors import BackupError
from backup_pipeline.storage import base_backups, catalog


@click.command()
@click.argument("database", metavar="[DATABASE|CLUSTER]", required=False)
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@json_option
@pass_context
def prune(context: Context, database: str | None, dry_run: bool, as_json: bool) -> None:
    """Delete what the retention of databases and the recovery window of clusters no longer keep."""
    records: list[dict[str, object]] = []
    failed: dict[str, BackupError] = {}
    for name in context.subjects(database):
        try:
            if name in context.config.clusters:
                _prune_cluster(context.cluster(name), records, dry_run=dry_run, as_json=as_json)
            else:
                _prune_database(context.protected(name), records, dry_run=dry_run, as_json=as_json)
        except BackupError as error:
            failed[str(error)] = error
    if as_json:
        terminal.print_json(records)
    errors = list(failed.values())
    for other in errors[:-1]:
        click.echo(f"ERROR: {other}", err=True)
    if errors:
        raise errors[-1]


def _prune_database(
    protected: Protected, records: list[dict[str, object]], *, dry_run: bool, as_json: bool
) -> None:
    plan = pruning.plan(protected.store, protected.config, imports=protected.imports, now=now())
    records.append(terminal.prune_record(plan))
    if not dry_run:
        log = partial(click.echo, err=as_json)
        done = pruning.carry_out(protected.store, plan, imports=protected.imports, clock=now, log=log)
        records[-1] |= terminal.pruned_record(done)
    elif not as_json:
        for line in plan.lines:
            click.echo(line)


def _prune_cluster(
    cluster: ProtectedCluster, records: list[dict[str, object]], *, dry_run: bool, as_json: bool
) -> None:
    plan = prune_cluster.plan(cluster, now=now())
    records.append(prune_cluster.record(plan))
    if not dry_run:
        log = partial(click.echo, err=as_json)
        done = prune_cluster.carry_out(cluster, plan, clock=now, log=log)
        records[-1] |= {**terminal.pruned_record(done), "wal_files": done.wal_files}
    elif not as_json:
        for line in plan.lines or (
            f"nothing of {cluster.name} is in {cluster.store.url}: nothing to delete",
        ):
            click.echo(line)


@click.command()
@click.argument("backup_id", metavar="ID")
@pass_context
def pin(context: Context, backup_id: str) -> None:
    """Keep a backup for ever, whatever the retention says."""
    if (base := base_commands.find(context, backup_id)) is not None:
        base_backups.pin(context.store(), base.id, at=now())
        what = f"{base.id} is pinned: no prune deletes it, nor the WAL since."
        click.echo(f"{what} `backup-pipeline unpin {base.id}` lifts it.")
        return
    protected = context.owner_of(backup_id)
    found = backups.find(protected, backup_id)
    catalog.pin(protected.store, found.id, at=now())
    click.echo(f"{found.id} is pinned: no prune deletes it. `backup-pipeline unpin {found.id}` lifts it.")


@click.command()
@click.argument("backup_id", metavar="ID")
@pass_context
def unpin(context: Context, backup_id: str) -> None:
    """Leave a backup to the retention again."""
    if (base := base_commands.find(context, backup_id)) is not None:
        base_backups.unpin(context.store(), base.id)
        click.echo(f"{base.id} is no longer pinned.")
        return
    protected = context.owner_of(backup_id)
    pinned = backups.find_pinned(protected, backup_id)
    catalog.unpin(protected.store, pinned)
    click.echo(f"{pinned} is no longer pinned.")
