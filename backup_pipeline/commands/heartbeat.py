"""`heartbeat`: one row into a cluster, by which drills tell how far a recovery came; or what makes its table.

Called by cli.py. The agent beside PostgreSQL writes it by itself; this is for cron, and for looking.
"""

import click

from backup_pipeline.actions import heartbeat as beating
from backup_pipeline.commands.context import Context, pass_context
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.engines.postgres.heartbeat import setup_sql


@click.command()
@click.argument("cluster")
@click.option("--setup", "setup_", is_flag=True, help="Show what makes the table, instead of writing a row.")
@click.option("--role", default="", help="With --setup: a role that is to write and read it, and no more.")
@click.option("--apply", "apply_", is_flag=True, help="With --setup: make it.")
@pass_context
def heartbeat(context: Context, cluster: str, setup_: bool, role: str, apply_: bool) -> None:
    """Write a heartbeat; drills prove by it that a recovery holds what it should. Once a minute."""
    config = context.config.cluster(cluster)
    if not setup_:
        if role or apply_:
            raise click.UsageError("--role and --apply go with --setup")
        at = beating.beat(config)
        if not context.quiet:
            click.echo(f"{cluster}: heartbeat of {show_moment(at)}", err=True)
        return
    if apply_:
        beating.set_up(config, role)
    click.echo(setup_sql(role), nl=False)
    where = beating.beats_at(config).shown
    click.echo(f"-- made in {where}" if apply_ else f"-- for {where}; --apply makes it")
    if not config.heartbeat:
        click.echo(f"-- NOTE: set `heartbeat = true` in [clusters.{cluster}], so that it is written and read")
