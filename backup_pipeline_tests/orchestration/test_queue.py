"""What waits for what: the runs' own tags in Dagster's real run queue, under dagster.yaml's limits."""

import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

from backup_pipeline.orchestration.build import definitions_of
from backup_pipeline.orchestration.runs import tag_run
from backup_pipeline_tests.orchestration.configurations import configuration

CONFIGURED = Path(__file__).parents[2] / "dagster.yaml"

Tags = Mapping[str, str]


class Queue:
    """Dagster's run queue with runs that were never launched."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance

    def running(self, tags: Tags) -> str:
        """A run that is under way."""
        return self._run(tags, dg.DagsterRunStatus.STARTED)

    def queued(self, tags: Tags) -> str:
        """A run that would like to begin."""
        return self._run(tags, dg.DagsterRunStatus.QUEUED)

    def admitted(self) -> list[str]:
        """The runs that the queue would launch now."""
        daemon = QueuedRunCoordinatorDaemon(interval_seconds=1)
        config = self.instance.get_concurrency_config()
        found = daemon._get_runs_to_dequeue(self.instance, config, fixed_iteration_time=None)
        return [run.run_id for run in found]

    def _run(self, tags: Tags, status: dg.DagsterRunStatus) -> str:
        location = RegisteredCodeLocationOrigin("backup_pipeline")
        origin = RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), "job")
        run = dg.DagsterRun(job_name="job", tags=dict(tags), status=status, remote_job_origin=origin)
        return self.instance.add_run(run).run_id


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    shutil.copy(CONFIGURED, tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield Queue(instance)


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return definitions_of(configuration())


def scheduled(definitions: dg.Definitions, schedule: str) -> dict[str, Tags]:
    """The tags of the runs that a tick asks for, by database."""
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_schedule_context(
            instance=instance,
            scheduled_execution_time=datetime(2026, 3, 1, 2, tzinfo=UTC),
            repository_def=definitions.get_repository_def(),
        )
        found = definitions.resolve_schedule_def(schedule)
        job = definitions.resolve_job_def(found.job_name).run_tags
        requests = found.evaluate_tick(context).run_requests or ()
    return {str(request.run_key): {**job, **request.tags} for request in requests}


def by_hand(definitions: dg.Definitions, job: str) -> Tags:
    """The tags with which the Launchpad queues a run."""
    return definitions.resolve_job_def(job).run_tags


def said(action: str, tags: Tags, **more: str) -> Tags:
    """The tags of a run of agentweave once its first step has said what it does."""

    @dg.op
    def step(context: dg.OpExecutionContext) -> None:
        tag_run(context, action, "agentweave", **more)

    @dg.job
    def job() -> None:
        step()

    with dg.DagsterInstance.ephemeral() as instance:
        run_id = job.execute_in_process(instance=instance, tags=dict(tags)).run_id
        run = instance.get_run_by_id(run_id)
        assert run is not None
        return run.tags


@pytest.mark.parametrize(
    ("action", "job"),
    [
        ("restore", "restore_database"),
        ("undo", "undo_restore"),
        ("prove", "verify_restore"),
        ("prune", "prune_backups"),
    ],
)
def test_nothing_holds_back_a_scheduled_backup(
    queue: Queue, definitions: dg.Definitions, action: str, job: str
) -> None:
    queue.running(said(action, by_hand(definitions, job)))
    waiting = queue.queued(scheduled(definitions, "daily_at_0200")["agentweave"])
    assert queue.admitted() == [waiting]


def test_a_scheduled_proof_holds_back_no_backup(queue: Queue, definitions: dg.Definitions) -> None:
    queue.running(said("prove", scheduled(definitions, "prove_longest_kept")["agentweave"]))
    waiting = queue.queued(scheduled(definitions, "daily_at_0200")["agentweave"])
    assert queue.admitted() == [waiting]


@pytest.mark.parametrize("again", [False, True])
def test_a_restore_waits_for_nothing(queue: Queue, definitions: dg.Definitions, again: bool) -> None:
    for schedule in ("daily_at_0200", "prove_longest_kept", "prune_every_day"):
        for tags in list(scheduled(definitions, schedule).values())[:2]:
            queue.running(tags)
    tags = by_hand(definitions, "restore_database")
    restore = queue.queued(said("restore", tags) if again else tags)
    assert queue.admitted() == [restore]


def test_backups_of_one_database_wait_for_each_other(queue: Queue, definitions: dg.Definitions) -> None:
    queue.running(said("backup", by_hand(definitions, "backup_database")))
    queue.queued(scheduled(definitions, "daily_at_0200")["agentweave"])
    other = queue.queued(scheduled(definitions, "daily_at_0200")["archive"])
    queue.queued(scheduled(definitions, "monthly_at_0200_day_1")["archive"])
    assert queue.admitted() == [other]


def test_proofs_are_few_at_a_time(queue: Queue, definitions: dg.Definitions) -> None:
    proofs = [queue.queued(tags) for tags in scheduled(definitions, "prove_longest_kept").values()]
    assert len(proofs) == 3
    assert queue.admitted() == proofs[:2]


def test_a_run_that_is_started_again_says_its_own_facts() -> None:
    before = said("backup", {}, id="agentweave/20260301T020000Z-aaaaaa", tier="daily")
    after = said("backup", before, id="agentweave/20260302T020000Z-bbbbbb")
    assert after["backup/id"] == "agentweave/20260302T020000Z-bbbbbb"
    assert said("prove", after)["backup/action"] == "backup"
