"""`recover`: a whole cluster, to any moment that its archive holds, in a new directory.

Called by cli.py. What can be reached, and how it is done, is actions/recover.py's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from backup_pipeline import terminal
from backup_pipeline.actions import recover as recovering
from backup_pipeline.actions import recover_database as one_database
from backup_pipeline.actions.recovery_plan import RecoverRequest, parse_tablespaces
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovery_target import parse_target
from backup_pipeline.engines.postgres.endpoint import given_by_hand
from backup_pipeline.errors import ConfigError


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
    metavar="DIR|NAME",
    help="The new data directory; with --one-database, the new database.",
)
@click.option(
    "--one-database",
    default="",
    metavar="NAME",
    help="Only this database: recovered in scratch, and restored beside the live ones.",
)
@click.option(
    "--server",
    default="",
    metavar="DSN",
    help="With --one-database: the server that it goes to; else restore_dsn. Its password comes from "
    "PGPASSWORD, a passfile or a service file.",
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With --one-database: where the cluster is recovered meanwhile; else $TMPDIR.",
)
@click.option(
    "--create-roles", is_flag=True, help="With --one-database: create the roles that the server lacks."
)
@click.option(
    "--without-owners",
    is_flag=True,
    help="With --one-database: leave out owners, grants, and settings of single roles.",
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
    context: Context, /, cluster: str, target: str, into: str, dry_run: bool, as_json: bool, **asked: Any
) -> None:
    """Recover a whole cluster to any moment, in a new directory; nothing that exists is touched."""
    _refuse_mixed(asked)
    request = RecoverRequest(
        parse_target(target, inclusive=not asked["exclusive"]),
        Path(into).absolute(),
        timeline=asked["timeline"] or 0,
        port=asked["port"],
        base=BackupId.parse(asked["base"]) if asked["base"] else None,
        tablespaces=parse_tablespaces(asked["tablespaces"]),
        unconfined=asked["unconfined"],
        also_write=tuple(path.absolute() for path in asked["also_write"]),
    )
    protected = context.cluster(cluster)
    with terminal.reporting(quiet=context.quiet) as report:
        if asked["one_database"]:
            wanted = _database_request(context, cluster, into, asked)
            plan_one = one_database.plan(protected, wanted, request, report=report)
            if _shown(plan_one.lines, dry_run=dry_run, as_json=as_json):
                return
            done = one_database.carry_out(protected, plan_one, clock=now, report=report)
            lines, record = done.lines, one_database.record(plan_one, done)
        else:
            plan = recovering.plan(protected, request, report=report)
            if _shown(plan.lines, dry_run=dry_run, as_json=as_json):
                return
            result = recovering.carry_out(protected, plan, clock=now, report=report)
            lines, record = result.lines, recovering.record(plan, result)
    _show(lines, record, as_json=as_json)


def _refuse_mixed(asked: Mapping[str, Any]) -> None:
    """Some options make sense for one database only, others for a whole cluster."""
    of_one = ("server", "scratch", "create_roles", "without_owners")
    wrong = ("port", "tablespaces") if asked["one_database"] else of_one
    for name in wrong:
        if asked[name]:
            option = "--" + name.rstrip("s" if name == "tablespaces" else "").replace("_", "-")
            without = "is not for" if asked["one_database"] else "is only read with"
            raise click.UsageError(f"{option} {without} --one-database")


def _database_request(
    context: Context, cluster: str, into: str, asked: Mapping[str, Any]
) -> one_database.DatabaseRequest:
    jobs = 1
    if asked["server"]:
        server = given_by_hand(asked["server"], "--server")
    elif context.alone:
        raise ConfigError(
            "with --store nobody knows which server the database is to go to",
            hint="Name it with --server DSN.",
        )
    else:
        server, database = one_database.choose_server(context.config, cluster, asked["one_database"])
        jobs = database.jobs
    return one_database.DatabaseRequest(
        asked["one_database"],
        into,
        server,
        scratch=asked["scratch"] and asked["scratch"].absolute(),
        create_roles=asked["create_roles"],
        without_owners=asked["without_owners"],
        jobs=jobs,
        program=context.program,
    )


def _shown(lines: tuple[str, ...], *, dry_run: bool, as_json: bool) -> bool:
    """Show a plan, unless standard output waits for a result; whether that was all."""
    if dry_run or not as_json:
        _show(lines, {"plan": list(lines)}, as_json=as_json)
    return dry_run


def _show(lines: tuple[str, ...], record: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(record)
        return
    for line in lines:
        click.echo(line)
