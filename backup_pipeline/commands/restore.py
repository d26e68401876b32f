"""`restore` and `undo`: a plan is shown, a name is typed where a live database goes, then it is done.

Called by cli.py. What a plan holds and how it is carried out is actions/restore.py's and actions/undo.py's.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import click

from backup_pipeline import terminal
from backup_pipeline.actions import restore as restoring
from backup_pipeline.actions import undo as undoing
from backup_pipeline.actions.protected import Clock, Protected
from backup_pipeline.actions.report import Report
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.engines.postgres.endpoint import given_by_hand
from backup_pipeline.errors import Refused

_TO = "Another server; else restore_dsn. Its password comes from PGPASSWORD, a passfile or a service file."


@click.command()
@click.argument("database")
@click.option("--backup", default="proven", show_default=True, help='An id, "proven" or "latest".')
@click.option("--into", default="", help="The new database's name.")
@click.option("--to", default="", metavar="DSN", help=_TO)
@click.option(
    "--create-roles",
    is_flag=True,
    help="Create the roles that the target lacks; with passwords only if the backup holds them.",
)
@click.option("--replace", is_flag=True, help="Swap with the live database; the old one is kept.")
@click.option(
    "--confirm", default="", metavar="NAME", help="With --replace: the live database's name, typed."
)
@click.option(
    "--check",
    type=click.Choice(restoring.CHECKS),
    default="content",
    show_default=True,
    help="What to compare with the source before the copy counts as restored.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Load N tables or indexes at once; else as many as the dump was taken with.",
)
@click.option("--accept-failed", is_flag=True, help="Restore even a backup whose proof failed.")
@click.option(
    "--without-owners", is_flag=True, help="Leave out owners, grants, and settings of single roles."
)
@click.option(
    "--accept-unverified", is_flag=True, help="Open an imported dump though pg_restore has a known hole."
)
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@json_option
@pass_context
def restore(
    context: Context,
    /,
    database: str,
    to: str,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Restore into a new database; with --replace, swap it with the live one."""
    protected, server = context.protected(database), given_by_hand(to, "--to") if to else None
    request = restoring.RestoreRequest(to=server, jobs=jobs or 0, program=context.program, **asked)
    how = _How(overwrites=request.replace, dry_run=dry_run, as_json=as_json)
    plan, result = _perform(context, protected, request, restoring, how)
    if as_json:
        terminal.print_json(
            {
                "backup": str(plan.backup.id),
                "database": plan.decided.target,
                "kept_as": result.kept_as or None if result else None,
                "restore_s": result.restore_s if result else None,
                "plan": plan.lines,
                "lines": result.lines if result else (),
            }
        )


@click.command()
@click.argument("database")
@click.option("--into", default="", metavar="NAME", help="The live database; else the configured one.")
@click.option("--to", default="", metavar="DSN", help=_TO)
@click.option(
    "--copy",
    default="",
    metavar="NAME",
    help="The copy to swap in; else the one that the last restore put aside.",
)
@click.option("--confirm", default="", metavar="NAME", help="The live database's name, typed.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@json_option
@pass_context
def undo(context: Context, /, database: str, to: str, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Swap back the database that the last `restore --replace` put aside, or another copy."""
    if not asked["into"]:
        context.configured(database)
    protected, server = context.protected(database), given_by_hand(to, "--to") if to else None
    request = undoing.UndoRequest(to=server, program=context.program, **asked)
    how = _How(overwrites=True, dry_run=dry_run, as_json=as_json)
    plan, result = _perform(context, protected, request, undoing, how)
    if as_json:
        terminal.print_json(
            {
                "database": plan.live,
                "copy": plan.copy.name,
                "kept_as": result.kept_as or None if result else None,
                "took_s": result.took_s if result else None,
                "plan": plan.lines,
                "lines": result.lines if result else (),
            }
        )


@dataclasses.dataclass(frozen=True)
class _How:
    """How a request is gone about, and shown."""

    overwrites: bool
    dry_run: bool
    as_json: bool


class _Lines(Protocol):
    """A plan or a result, in words."""

    @property
    def lines(self) -> Sequence[str]: ...


R = TypeVar("R", restoring.RestoreRequest, undoing.UndoRequest)
R_contra = TypeVar("R_contra", contravariant=True)
P = TypeVar("P", bound=_Lines)
T = TypeVar("T", bound=_Lines)
T_co = TypeVar("T_co", bound=_Lines, covariant=True)


class _Verb(Protocol[R_contra, P, T_co]):
    """What actions/restore.py and actions/undo.py both are."""

    def name_to_confirm(self, protected: Protected, request: R_contra, /) -> str: ...
    def plan(self, protected: Protected, request: R_contra, /, *, clock: Clock) -> P: ...
    def carry_out(self, protected: Protected, planned: P, /, *, clock: Clock, report: Report) -> T_co: ...


def _perform(
    context: Context, protected: Protected, request: R, verb: _Verb[R, P, T], how: _How
) -> tuple[P, T | None]:
    """Show the plan; have the name typed where a live database goes and a person sits there; carry it out.

    As JSON, standard output is the caller's: a plan is then shown to a person who is asked, and else not.
    Raises Refused when another name is typed.
    """
    ask = how.overwrites and not request.confirm and not how.dry_run and sys.stdin.isatty()
    if ask or (how.overwrites and how.dry_run):  # the plan is shown first, the name typed after it
        request = dataclasses.replace(request, confirm=verb.name_to_confirm(protected, request))
    plan = verb.plan(protected, request, clock=now)
    if ask or not how.as_json:
        _echo(plan, err=how.as_json)
    if how.dry_run:
        return plan, None
    if ask and click.prompt("Type the name of the database to replace", err=how.as_json) != request.confirm:
        raise Refused("the name that was typed is another one", hint="Nothing was touched.")
    with terminal.reporting(quiet=context.quiet) as report:
        result = verb.carry_out(protected, plan, clock=now, report=report)
    if not how.as_json:
        _echo(result)
    return plan, result


def _echo(said: _Lines, *, err: bool = False) -> None:
    for line in said.lines:
        click.echo(line, err=err)
