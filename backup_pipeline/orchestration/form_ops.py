"""The steps of the jobs that a person launches from a form.

The first of each validates the form and shows the plan; the others carry it out. What they hand on
stays in the process: a plan may know where passwords are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import dagster as dg

from backup_pipeline.actions import prune, restore, undo
from backup_pipeline.actions.backups import find
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.domain.backup import MANUAL_TIER, Backup
from backup_pipeline.orchestration import words
from backup_pipeline.orchestration.assets import LISTING, listing_metadata
from backup_pipeline.orchestration.checks import (
    newest_of,
    proof_failure,
    prove_one,
    show_on_asset,
)
from backup_pipeline.orchestration.failures import explained
from backup_pipeline.orchestration.forms import BackupForm, PruneForm, RestoreForm, UndoForm, VerifyForm
from backup_pipeline.orchestration.resources import Backups, now
from backup_pipeline.orchestration.runs import Subject, report_to, tag_run
from backup_pipeline.units import show_line

P = TypeVar("P")


@dataclass(frozen=True)
class Planned(Generic[P]):
    """What was shown and is to be carried out, unless it was only to be shown; `subject` is whose it is."""

    subject: str
    plan: P
    dry_run: bool = False


@dg.op(out=dg.Out(dg.Any), description="Validates the form.")
def choose_database(context: dg.OpExecutionContext, backups: Backups, config: BackupForm) -> Subject:
    """The database that the form names, as a backup that expires by itself."""
    tag_run(context, "backup", config.database)
    with explained(context):
        backups.config().database(config.database)
    return Subject(config.database, MANUAL_TIER, prove=config.prove)


@dg.op(
    ins={"backup": dg.In(dg.Any), "subject": dg.In(dg.Any)},
    out=dg.Out(dg.Nothing),
    description="Proves the new backup, if the form wants it.",
)
def prove_if_wanted(
    context: dg.OpExecutionContext, backups: Backups, backup: Backup, subject: Subject
) -> None:
    """Restore and compare what was just taken; a failed proof fails the run."""
    if subject.prove:
        _prove(context, backups, backup)
    else:
        context.log.info(f"{backup.id} is not proven: the form said so; verify_restore does it later")
    _show_listing(context, backups, subject.database)


@dg.op(out=dg.Out(dg.Any), description="Validates the form and finds the backup.")
def choose_backup(context: dg.OpExecutionContext, backups: Backups, config: VerifyForm) -> dg.Output[Backup]:
    """The backup that the form names."""
    tag_run(context, "prove", config.database)
    with explained(context):
        protected = backups.open(config.database)
        tiers = [tier.name for tier in protected.config.tiers]
        by_tier = config.backup in tiers
        backup = newest_of(protected, config.backup) if by_tier else find(protected, config.backup)
    tag_run(context, "prove", config.database, id=str(backup.id), tier=backup.tier)
    context.log.info(f"Plan: restore {backup.id} ({backup.tier}) into an empty server and compare it")
    return dg.Output(backup, metadata=words.backup_metadata(backup, protected.store.url))


@dg.op(
    ins={"backup": dg.In(dg.Any)},
    out=dg.Out(dg.Nothing),
    description="Restores the backup into an empty server, compares, and records the verdict.",
)
def restore_and_compare(context: dg.OpExecutionContext, backups: Backups, backup: Backup) -> None:
    """Prove the backup; anything but a pass fails the run, because a person waits for the answer."""
    _prove(context, backups, backup)


def _prove(context: dg.OpExecutionContext, backups: Backups, backup: Backup) -> None:
    with explained(context):
        protected = backups.open(backup.id.database)
        result = prove_one(context, protected, backup)
        show_on_asset(context, protected, backup, result)
    if not result.passed:
        raise proof_failure(result)
    context.log.info(f"{result.description}")


def _show_listing(context: dg.OpExecutionContext, backups: Backups, database: str) -> None:
    """Let the database's list of backups show what this job left."""
    with explained(context):
        metadata = listing_metadata(backups.open(database))
    context.log_event(dg.AssetMaterialization([database, LISTING], metadata=metadata))


def say(context: dg.OpExecutionContext, lines: Sequence[str]) -> str:
    """Put the lines into the run's log; they are returned as one text, for the metadata."""
    for line in lines:
        context.log.info(line)
    return "\n".join(lines)


def only_shown(context: dg.OpExecutionContext, planned: Planned[P], done: str) -> bool:
    """Whether the form asked for the plan alone; then the run's log says that nothing was `done`."""
    if planned.dry_run:
        context.log.info(f"Nothing was {done}: dry_run is true. Launch again with dry_run: false.")
    return planned.dry_run


@dg.op(out=dg.Out(dg.Any), description="Validates the form and shows the plan; touches nothing.")
def plan_restore(
    context: dg.OpExecutionContext, backups: Backups, config: RestoreForm
) -> dg.Output[Planned[restore.Plan]]:
    """Plan the restore that the form asks for."""
    tag_run(context, "restore", config.database)
    request = RestoreRequest(**config.model_dump(exclude={"database"}))
    with explained(context):
        plan = restore.plan(backups.open(config.database), request, clock=now)
    tag_run(context, "restore", config.database, id=str(plan.backup.id), tier=plan.backup.tier)
    return dg.Output(Planned(config.database, plan), metadata={"plan": say(context, plan.lines)})


@dg.op(
    ins={"planned": dg.In(dg.Any)},
    out=dg.Out(dg.Nothing),
    description="Restores into a new database, checks it, and swaps it if the form asked for that.",
)
def carry_out_restore(
    context: dg.OpExecutionContext, backups: Backups, planned: Planned[restore.Plan]
) -> None:
    """Do what the plan says."""
    with explained(context, retry=False):
        protected = backups.open(planned.subject)
        result = restore.carry_out(protected, planned.plan, clock=now, report=report_to(context))
    said = say(context, result.lines)
    if result.kept_as:
        form = f"database {planned.subject}, into {result.database}, copy_name {result.kept_as}"
        context.log.info(show_line(f"or launch undo_restore with {form}"))
    context.add_output_metadata({"result": said, "restore_s": round(result.restore_s, 3)})


@dg.op(out=dg.Out(dg.Any), description="Validates the form and shows the plan; touches nothing.")
def plan_undo(
    context: dg.OpExecutionContext, backups: Backups, config: UndoForm
) -> dg.Output[Planned[undo.Plan]]:
    """Plan the swap back; the name has to be typed, because a live database goes."""
    tag_run(context, "undo", config.database)
    request = undo.UndoRequest(into=config.into, copy=config.copy_name, confirm=config.confirm)
    with explained(context):
        plan = undo.plan(backups.open(config.database), request, clock=now)
    return dg.Output(Planned(config.database, plan), metadata={"plan": say(context, plan.lines)})


@dg.op(
    ins={"planned": dg.In(dg.Any)},
    out=dg.Out(dg.Nothing),
    description="Swaps the copy with the live database, which is kept.",
)
def swap_back(context: dg.OpExecutionContext, backups: Backups, planned: Planned[undo.Plan]) -> None:
    """Do what the plan says."""
    with explained(context, retry=False):
        protected = backups.open(planned.subject)
        result = undo.carry_out(protected, planned.plan, clock=now, report=report_to(context))
    context.add_output_metadata({"result": say(context, result.lines)})


@dg.op(out=dg.Out(dg.Any), description="Validates the form and shows the plan; deletes nothing.")
def plan_prune(
    context: dg.OpExecutionContext, backups: Backups, config: PruneForm
) -> dg.Output[Planned[prune.Prune]]:
    """What the policy gives up, and why."""
    tag_run(context, "prune", config.database)
    with explained(context):
        protected = backups.open(config.database)
        plan = prune.plan(protected.store, protected.config, imports=protected.imports, now=now())
    planned = Planned(config.database, plan, dry_run=config.dry_run)
    return dg.Output(planned, metadata={"plan": say(context, plan.lines)})


@dg.op(
    ins={"planned": dg.In(dg.Any)},
    out=dg.Out(dg.Nothing),
    description="Deletes what the plan gives up, unless the form asked for the plan alone.",
)
def carry_out_prune(context: dg.OpExecutionContext, backups: Backups, planned: Planned[prune.Prune]) -> None:
    """Do what the plan says."""
    if only_shown(context, planned, "deleted"):
        return
    with explained(context):
        protected, report = backups.open(planned.subject), report_to(context)
        prune.carry_out(protected.store, planned.plan, imports=protected.imports, clock=now, log=report.say)
    _show_listing(context, backups, planned.subject)
