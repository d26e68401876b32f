"""`recover`: a whole cluster, to any moment that its archive holds, in a new directory.

Called by cli.py. What can be reached, and how it is done, is actions/recover.py's.
"""

from pathlib import Path
from typing import Any

import click

from backup_pipeline import terminal
from backup_pipeline.actions import recover as recovering
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovery_target import parse_target


@click.command()
@click.argument("cluster")
@click.option(
    "--to",
    "target",
    required=True,
    metavar="TARGET",
    help="A time with its zone (2026-03-01T02:00:00Z), an LSN, a transaction's number, the name of a restore "
    "point, or latest.",
)
@click.option(
    "--into",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The new data directory.",
)
@click.option("--exclusive", is_flag=True, help="Stop right before the target instead of right after it.")
@click.option(
    "--timeline", type=click.IntRange(min=1), metavar="N", help="Follow this timeline; else the newest."
)
@click.option(
    "--base", default="", metavar="ID", help="Begin with this base backup; else the newest that fits."
)
@click.option(
    "--tablespace",
    "tablespaces",
    multiple=True,
    metavar="OID=DIR",
    help="Where a tablespace goes; else to DIR.tablespaces.",
)
@click.option(
    "--also-write",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Let the replay write there too: a tablespace that was made after the base backup.",
)
@click.option(
    "--unconfined", is_flag=True, help="Let the replay write wherever the WAL says; not beside the source."
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    metavar="P",
    help="Leave the server running, on this port of 127.0.0.1 alone; else it is stopped.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@json_option
@pass_context
def recover(
    context: Context, /, cluster: str, target: str, into: Path, dry_run: bool, as_json: bool, **asked: Any
) -> None:
    """Recover a whole cluster to any moment, in a new directory; nothing that exists is touched."""
    request = recovering.RecoverRequest(
        parse_target(target, inclusive=not asked["exclusive"]),
        into.absolute(),
        timeline=asked["timeline"] or 0,
        port=asked["port"],
        base=BackupId.parse(asked["base"]) if asked["base"] else None,
        tablespaces=recovering.parse_tablespaces(asked["tablespaces"]),
        unconfined=asked["unconfined"],
        also_write=tuple(path.absolute() for path in asked["also_write"]),
    )
    protected = context.cluster(cluster)
    with terminal.reporting(quiet=context.quiet) as report:
        plan = recovering.plan(protected, request, report=report)
        if dry_run or not as_json:
            _show(plan.lines, {"plan": list(plan.lines)}, as_json=as_json)
        if dry_run:
            return
        result = recovering.carry_out(protected, plan, clock=now, report=report)
    _show(result.lines, recovering.record(plan, result), as_json=as_json)


def _show(lines: tuple[str, ...], record: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(record)
        return
    for line in lines:
        click.echo(line)
