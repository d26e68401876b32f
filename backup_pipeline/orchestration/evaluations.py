"""What a check says, as Dagster takes it: a result of the check's own step, or an event of anything else.

Used by the checks, and by the jobs and sensors whose findings a check's page shows too. What is found, and
how it is said, is theirs.
"""

import dagster as dg


def result_of(evaluation: dg.AssetCheckEvaluation) -> dg.AssetCheckResult:
    """The same as a result of the check's own step."""
    return dg.AssetCheckResult(
        asset_key=evaluation.asset_key,
        check_name=evaluation.check_name,
        passed=evaluation.passed,
        metadata=evaluation.metadata,
        severity=evaluation.severity,
        description=evaluation.description,
    )


def log_evaluation(context: dg.OpExecutionContext, evaluation: dg.AssetCheckEvaluation) -> None:
    """Let the check's page show it, from a step of any job."""
    context.log_event(evaluation)  # type: ignore[arg-type]  # taken at run time, missing from the hint
