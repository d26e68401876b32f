"""Statistics that cannot be gathered anew cost no backup its proof, and no restore its copy."""

from backup_pipeline.actions import prove, restore
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.domain.backup import Verdict
from backup_pipeline_tests.actions.box import Box, ask, now

# Statistics call a function that calls another one without its schema: fine wherever public is searched.
COMPUTED = """
CREATE FUNCTION public.inner_f(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1';
CREATE FUNCTION public.f(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN inner_f($1); END';
CREATE STATISTICS public.s ON (public.f(customer)) FROM public.orders
"""
FAILED = "ANALYZE of public.orders failed: function inner_f(integer) does not exist"


def test_what_cannot_be_analyzed_is_told_by_proof_and_restore(box: Box) -> None:
    box.execute(COMPUTED)
    backup = box.take()
    proof = prove.prove(box.protected, backup.id, clock=now, report=box.said)
    assert proof.verdict is Verdict.PROVEN
    assert FAILED in proof.notes
    name = f"{box.endpoint.database}_new"
    plan = restore.plan(box.protected, RestoreRequest("latest", into=name), clock=now)
    done = restore.carry_out(box.protected, plan, clock=now, report=box.said)
    assert f"warning: {FAILED}" in done.lines
    assert f"warning: {FAILED}" in box.said.lines
    assert ask(box.cluster.endpoint(name), "SELECT reltuples FROM pg_class WHERE relname = 'customer'") == 100
