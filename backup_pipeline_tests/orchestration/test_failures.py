"""What an operator reads when something failed, and what is tried again by itself."""

import dagster as dg
import pytest

from backup_pipeline.errors import BackupError, Busy, Refused, ServerError
from backup_pipeline.orchestration import failures
from backup_pipeline.orchestration.failures import explained, failure_of


def test_the_message_comes_first_then_what_to_do_then_the_facts() -> None:
    error = Refused("target exists", detail={"server": "db1", "rows": 3}, hint="Choose another name.")
    failure = failure_of(error)
    assert failure.description == "target exists\nWhat to do: Choose another name."
    assert failure.metadata == {"server": dg.MetadataValue.text("db1"), "rows": dg.MetadataValue.text("3")}
    assert not failure.allow_retries


def test_without_a_hint_the_message_stands_alone() -> None:
    assert failure_of(Refused("no")).description == "no"


def run(error: Exception, *, retry: bool = True) -> tuple[dg.ExecuteInProcessResult, list[int]]:
    attempts = []

    @dg.op
    def step(context: dg.OpExecutionContext) -> None:
        with explained(context, retry=retry):
            attempts.append(context.retry_number)
            raise error

    @dg.job
    def job() -> None:
        step()

    return job.execute_in_process(raise_on_error=False), attempts


def shown(result: dg.ExecuteInProcessResult) -> str | None:
    data = result.failure_data_for_node("step")
    assert data is not None
    assert data.user_failure_data is not None
    return data.user_failure_data.description


@pytest.mark.parametrize("error", [ServerError("db1 is away", hint="Start it."), Busy("db1 is held")])
def test_what_may_pass_by_itself_is_tried_again(error: BackupError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "RETRY_AFTER_S", 0)
    result, attempts = run(error)
    assert attempts == [0, 1, 2]
    assert (shown(result) or "").startswith(error.message)


def test_what_will_not_pass_is_not_tried_again() -> None:
    result, attempts = run(Refused("no such database", hint="Look at the list."))
    assert attempts == [0]
    assert shown(result) == "no such database\nWhat to do: Look at the list."


def test_a_restore_is_never_tried_again() -> None:
    _, attempts = run(ServerError("db1 is away"), retry=False)
    assert attempts == [0]


def test_a_fault_of_the_program_keeps_its_trace() -> None:
    result, attempts = run(ZeroDivisionError("division by zero"))
    data = result.failure_data_for_node("step")
    assert attempts == [0]
    assert data is not None
    assert data.user_failure_data is None
