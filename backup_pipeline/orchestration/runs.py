"""What ops share about the run that they are in: its log, its tags, what it is to back up.

Tags are the audit: `backup/database`, `backup/action`, `backup/tier`, `backup/id` and
`backup/scheduled_for` find, in the list of runs, whatever was ever done to a database, or to a cluster:
no two of them share a name. What waits for what is another matter: only backups carry `backup/queue`, which
dagster.yaml limits to one of each value.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import dagster as dg

from backup_pipeline.actions.report import Lines, Report

DATABASE_TAG = "backup/database"
ACTION_TAG = "backup/action"
TIER_TAG = "backup/tier"
INCREMENTAL_TAG = "backup/incremental"  # of a base backup: what has changed since the last
SCHEDULED_TAG = "backup/scheduled_for"
QUEUE_TAG = "backup/queue"
RETRIES_TAG = "dagster/max_retries"
STRATEGY_TAG = "dagster/retry_strategy"
PARENT_TAG = "dagster/parent_run_id"
RETRY_NUMBER_TAG = "dagster/retry_number"  # only a run that Dagster itself started again has it

PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True)
class Subject:
    """What a run is to back up: a database, as which tier, and for which tick of a schedule if any."""

    database: str
    tier: str
    scheduled_for: datetime | None = None
    prove: bool | None = None  # by a step of the same job; None for assets, which have their check instead


def report_to(context: dg.OpExecutionContext) -> Report:
    """A Report whose lines go to the run's log: facts at once, progress every few seconds."""
    return Lines(context.log.info, every_s=PROGRESS_EVERY_S)


def tag_run(context: dg.OpExecutionContext, action: str, database: str, **more: str) -> None:
    """Say in the run's tags what it does, to which database, and `more`.

    The action stays what it was first: a backup that then proves and prunes is a backup. All else is
    said anew, because a run that is started again inherits the tags of the one before it.
    """
    run = context.instance.get_run_by_id(context.run_id)
    first = run.tags.get(ACTION_TAG, action) if run else action
    tags = {ACTION_TAG: first, DATABASE_TAG: database, **queue_tag(first, database)}
    if run and SCHEDULED_TAG in run.tags and scheduled_for(run) is None:
        tags[SCHEDULED_TAG] = ""
    tags.update({f"backup/{name}": value for name, value in more.items()})
    context.instance.add_run_tags(context.run_id, tags)


def queue_tag(action: str, database: str) -> dict[str, str]:
    """What a run waits by: a backup for others of its database; nothing else waits for a database."""
    return {QUEUE_TAG: database} if action == "backup" else {}


def subject_of(context: dg.OpExecutionContext) -> Subject:
    """What this run is to back up, from the key of the asset that it materializes."""
    database, tier = context.assets_def.key.path
    return Subject(database, tier, scheduled_for(context.run))


def scheduled_for(run: dg.DagsterRun) -> datetime | None:
    """The tick of the schedule that this run belongs to; None for a run that a person launched.

    A person who starts a scheduled run again inherits its tags, and wants a backup of now.
    """
    text = run.tags.get(SCHEDULED_TAG)
    by_a_person = PARENT_TAG in run.tags and RETRY_NUMBER_TAG not in run.tags
    return datetime.fromisoformat(text).astimezone(UTC) if text and not by_a_person else None


def taken_in(context: dg.OpExecutionContext, key: dg.AssetKey) -> str:
    """The id of the backup that this very run took of `key`; "" when it took none."""
    event = context.instance.get_latest_materialization_event(key)
    if event is None or event.run_id != context.run_id or event.asset_materialization is None:
        return ""
    return str(event.asset_materialization.metadata["backup_id"].value)


def shown_scheduled(moment: datetime) -> str:
    """How a tick's time is written into the tag."""
    return moment.astimezone(UTC).isoformat()
