"""`promote`: a directory that `recover` finished becomes the new production, after its name was typed.

Called by cli.py. What it takes, and what is refused, is actions/promote.py's.
"""

import dataclasses
import sys
from pathlib import Path

import click

from backup_pipeline import terminal
from backup_pipeline.actions import promote as promoting
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.errors import Refused
from backup_pipeline.wal.setup import archive_command, refuse_unreadable


@click.command()
@click.argument("cluster")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--allow",
    multiple=True,
    metavar="NAME",
    help="Bring back this setting of the source's, though it runs a command or loads a library; or the rules "
    "of pg_hba.conf of this method: trust, ident, ldap, radius, pam, oauth.",
)
@click.option(
    "--source-is-gone", is_flag=True, help="The old server has ended for good, whatever it looks like."
)
@click.option("--confirm", default="", metavar="CLUSTER", help="The cluster's name, typed.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@json_option
@pass_context
def promote(
    context: Context,
    /,
    cluster: str,
    directory: Path,
    allow: tuple[str, ...],
    source_is_gone: bool,
    confirm: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a recovered directory the new production: configured, started, archiving, backed up."""
    context.refuse_alone()
    protected, data = context.cluster(cluster), directory.absolute()
    refuse_unreadable(data)
    command = archive_command(protected.config, context.config.path)
    request = promoting.PromoteRequest(data, command, frozenset(allow), source_is_gone, confirm)
    plan = promoting.plan(protected, request, clock=now)
    ask = not confirm and not dry_run and sys.stdin.isatty()
    if dry_run and as_json:
        terminal.print_json({"plan": list(plan.lines)})
    elif ask or not as_json:
        _echo(plan.lines, err=as_json)
    if dry_run:
        return
    if ask:
        typed = click.prompt("Type the name of the cluster to promote this for", err=as_json)
        if typed != cluster:
            raise Refused("the name that was typed is another one", hint="Nothing was touched.")
        plan = dataclasses.replace(plan, request=dataclasses.replace(request, confirm=typed))
    with terminal.reporting(quiet=context.quiet) as report:
        result = promoting.carry_out(protected, plan, clock=now, report=report)
    if as_json:
        terminal.print_json(promoting.record(plan, result))
    else:
        _echo(result.lines)


def _echo(lines: tuple[str, ...], *, err: bool = False) -> None:
    for line in lines:
        click.echo(line, err=err)
