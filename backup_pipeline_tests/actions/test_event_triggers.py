"""What a database does when somebody logs in, it must not do to its own copy."""

from dataclasses import replace

import pytest

from backup_pipeline.actions import prove, restore
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.config import ScratchConfig, Secret
from backup_pipeline.domain.backup import Verdict
from backup_pipeline_tests.actions.box import Box, ask, execute, now

# After the manual's example, with a trigger of every DDL statement beside it.
LOGS = """
CREATE TABLE public.log (said text);
CREATE FUNCTION public.note() RETURNS event_trigger SECURITY DEFINER LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO public.log VALUES (tg_event); END $$;
CREATE EVENT TRIGGER logins ON login EXECUTE FUNCTION public.note();
CREATE EVENT TRIGGER statements ON ddl_command_end EXECUTE FUNCTION public.note();
ALTER EVENT TRIGGER logins ENABLE ALWAYS
"""


@pytest.mark.parametrize("ours", [True, False], ids=["a cluster of ours", "a server that was named"])
def test_a_login_trigger_changes_no_copy_that_is_proven(box: Box, ours: bool) -> None:
    box.execute(LOGS)
    backup = box.take()
    scratch = ScratchConfig(bin_dir=box.cluster.bin_dir) if ours else box.protected.scratch
    proof = prove.prove(replace(box.protected, scratch=scratch), backup.id, clock=now, report=box.said)
    assert (proof.verdict, proof.differences) == (Verdict.PROVEN, ())


def test_a_login_trigger_changes_no_copy_that_is_restored(box: Box) -> None:
    box.execute(LOGS)
    box.take()
    name = f"{box.endpoint.database}_new"
    plan = restore.plan(box.protected, RestoreRequest("latest", into=name), clock=now)
    assert not any("event_triggers" in line for line in plan.lines)
    restore.carry_out(box.protected, plan, clock=now, report=box.said)
    new = box.cluster.endpoint(name)
    assert ask(new, "SELECT count(*) FROM public.log WHERE said = 'login'")
    assert ask(new, "SELECT string_agg(evtenabled, '' ORDER BY evtname) FROM pg_event_trigger") == "AO"


def test_a_role_that_cannot_switch_them_off_is_told(box: Box) -> None:
    box.execute(LOGS)
    box.take()
    restorer = f"{box.owner}_restorer"[:63]
    execute(box.cluster.endpoint(), f"CREATE ROLE {restorer} LOGIN CREATEDB; GRANT {box.owner} TO {restorer}")
    try:
        to = box.cluster.endpoint(user=restorer)
        protected = box.configured(restore_dsn=Secret(to.dsn))
        request = RestoreRequest("latest", into=f"{box.endpoint.database}_new")
        told = [
            line for line in restore.plan(protected, request, clock=now).lines if "event_triggers" in line
        ]
        (line,) = told
        assert f'GRANT SET ON PARAMETER event_triggers TO "{restorer}";' in line
    finally:
        execute(box.cluster.endpoint(), f"DROP OWNED BY {restorer}; DROP ROLE {restorer}")
