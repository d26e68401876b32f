"""Errors of this software as Dagster shows them: the message first, then what to do, then the facts.

Every op's body runs inside `explained`. Anything that is not a BackupError is a fault of the
program and keeps its trace.
"""

import contextlib
from collections.abc import Iterator

import dagster as dg

from backup_pipeline.errors import BackupError
from backup_pipeline.units import show_line

RETRIES = 2
RETRY_AFTER_S = 30


def failure_of(error: BackupError) -> dg.Failure:
    """The failure whose first red line is the message, and whose second says what to do."""
    todo = f"\nWhat to do: {error.hint}" if error.hint else ""
    facts = {show_line(name): dg.MetadataValue.text(str(value)) for name, value in error.detail.items()}
    return dg.Failure(f"{error.message}{todo}", metadata=facts, allow_retries=False)


@contextlib.contextmanager
def explained(context: dg.OpExecutionContext, *, retry: bool = True) -> Iterator[None]:
    """Turn a BackupError into a Failure; what may pass by itself is tried again first, `retry` permitting."""
    try:
        yield
    except BackupError as error:
        failure = failure_of(error)
        if not (retry and error.retryable) or context.retry_number >= RETRIES:
            raise failure from None
        wait_s = RETRY_AFTER_S * 2**context.retry_number
        context.log.warning(f"{error.message}; trying again in {wait_s} s")
        raise dg.RetryRequested(max_retries=RETRIES, seconds_to_wait=wait_s) from failure
