"""What ops share about the run that they are in: its log, its tags, what it is to back up.

Tags are the audit: `backup/database`, `backup/action`, `backup/tier`, `backup/id` and
`backup/scheduled_for` find, in the list of runs, whatever was ever done to a database.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import dagster as dg

from backup_pipeline.actions.report import Lines, Report

DATABASE_TAG = "backup/database"
ACTION_TAG = "backup/action"
TIER_TAG = "backup/tier"
ID_TAG = "backup/id"
SCHEDULED_TAG = "backup/scheduled_for"
RETRIES_TAG = "dagster/max_retries"

PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True)
class Subject:
    """What a run is to back up: a database, as which tier, and for which tick of a schedule if any."""

    database: str
    tier: str
    scheduled_for: datetime | None = None
    prove: bool = False  # by a step of the same job; assets have their check instead


def report_to(context: dg.OpExecutionContext) -> Report:
    """A Report whose lines go to the run's log: facts at once, progress every few seconds."""
    return Lines(context.log.info, every_s=PROGRESS_EVERY_S)


def tag_run(context: dg.OpExecutionContext, action: str, database: str, **more: str) -> None:
    """Say in the run's tags what it does and to which database; what is said already stays."""
    tags = {ACTION_TAG: action, DATABASE_TAG: database}
    tags.update({f"backup/{name}": value for name, value in more.items()})
    run = context.instance.get_run_by_id(context.run_id)
    said = run.tags if run else {}
    context.instance.add_run_tags(context.run_id, {name: tags[name] for name in tags if name not in said})


def subject_of(context: dg.OpExecutionContext) -> Subject:
    """What this run is to back up, from the key of the asset that it materializes."""
    database, tier = context.assets_def.key.path
    return Subject(database, tier, scheduled_for(context))


def scheduled_for(context: dg.OpExecutionContext) -> datetime | None:
    """The tick of the schedule that this run belongs to; None for a run that a person launched."""
    text = context.run.tags.get(SCHEDULED_TAG)
    return datetime.fromisoformat(text).astimezone(UTC) if text else None


def taken_in(context: dg.OpExecutionContext, key: dg.AssetKey) -> str:
    """The id of the backup that this very run took of `key`; "" when it took none."""
    event = context.instance.get_latest_materialization_event(key)
    if event is None or event.run_id != context.run_id or event.asset_materialization is None:
        return ""
    return str(event.asset_materialization.metadata["backup_id"].value)


def shown_scheduled(moment: datetime) -> str:
    """How a tick's time is written into the tag."""
    return moment.astimezone(UTC).isoformat()
