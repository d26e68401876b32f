"""Swaps undone: which one, by which command, and not twice."""

import contextlib

import pytest

from backup_pipeline.actions import undo
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import (
    BackupNotFound,
    Refused,
)
from backup_pipeline_tests.actions.box import (
    Box,
    ask,
    now,
    swap_back,
)
from backup_pipeline_tests.actions.restoring import OIDS, orders, run


def test_what_a_swap_says_undoes_that_swap_and_no_other(live: Box) -> None:
    name, staging = live.endpoint.database, f"{live.endpoint.database}_staging"
    live.execute(f'CREATE DATABASE "{staging}"', "postgres")
    before = ask(live.endpoint, OIDS)
    program = ("backup-pipeline", "--config", "/etc/some place/backups.toml")
    done = run(live, into=staging, replace=True, confirm=staging, check="none", program=program)
    command = "backup-pipeline --config '/etc/some place/backups.toml' undo app"
    assert f"`{command} --into {staging} --copy {done.kept_as}` swaps it back" in done.lines
    with pytest.raises(BackupNotFound, match=f"no kept copy of database {name} is left"):
        swap_back(live.protected)
    undone = swap_back(live.protected, into=staging, copy=done.kept_as)
    live.execute(f'DROP DATABASE "{undone.kept_as}"', "postgres")
    assert ask(live.endpoint, OIDS) == before


@pytest.mark.parametrize("given", ["host={host} user=postgres", "host={host} user=postgres password=geheim"])
def test_the_command_that_undoes_names_the_server_without_a_password(live: Box, given: str) -> None:
    host = live.cluster.endpoint().conninfo["host"]
    name, to = live.endpoint.database, Endpoint(given.format(host=host))
    said = "\n".join(run(live, to=to, replace=True, confirm=name, check="none").lines)
    assert f"--to 'host={host} user=postgres" in said.replace(
        "user=postgres host=" + host, f"host={host} user=postgres"
    )
    assert "geheim" not in said
    assert ("its password is not shown" in said) is ("geheim" in to.dsn)


def test_an_undo_shows_what_it_would_do_and_wants_the_name_typed(live: Box) -> None:
    name = live.endpoint.database
    kept = run(live, replace=True, confirm=name, check="none").kept_as
    before = ask(live.cluster.endpoint(), OIDS)
    with contextlib.closing(connect(live.endpoint)):
        plan = undo.plan(live.protected, undo.UndoRequest(confirm=name), clock=now)
    assert plan.lines[0] == f"server: {live.cluster.endpoint('postgres').shown}"
    assert plan.lines[1].startswith(f"copy: {kept}, put aside by a restore at 2")
    assert plan.lines[1].endswith("MiB")
    assert f"{name} becomes {name}_undone_<time>" in plan.lines[2]
    assert "1 session to be ended" in plan.lines[2]
    for typed in ("", "app", f"{name} "):
        with pytest.raises(Refused, match="is not confirmed"):
            swap_back(live.protected, confirm=typed)
    assert ask(live.cluster.endpoint(), OIDS) == before


def test_an_undo_is_not_made_twice_by_itself(live: Box) -> None:
    name = live.endpoint.database
    kept = [run(live, replace=True, confirm=name, check="none").kept_as for _ in range(2)]
    undone = swap_back(live.protected)
    before = ask(live.cluster.endpoint(), OIDS)
    with pytest.raises(Refused, match=f"the last swap of {name} was undone already") as failure:
        swap_back(live.protected)
    assert kept[0] in failure.value.hint
    assert ask(live.cluster.endpoint(), OIDS) == before
    assert swap_back(live.protected, copy=undone.kept_as).kept_as.startswith(f"{name}_before_2")
    assert swap_back(live.protected).kept_as.startswith(f"{name}_undone_2")
    swap_back(live.protected, copy=kept[0])
    assert orders(live.endpoint) == 600
