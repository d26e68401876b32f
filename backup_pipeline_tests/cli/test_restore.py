"""Restores from the command line, and the undoing of those that replaced a database."""

import shlex
from pathlib import Path

import pytest

from backup_pipeline_tests.actions.box import Box, ask
from backup_pipeline_tests.cli.place import Run


def test_a_backup_is_taken_proven_and_restored(run: Run, place: Path, shared: Box) -> None:
    done = run("backup", "app", "--tier", "daily")
    assert done.code == 0, done.err
    assert "proven" in done.out
    assert "equal row for row" in done.out
    dry = run("restore", "app", "--dry-run")
    assert dry.code == 0
    assert shared.databases() == {shared.endpoint.database}
    done = run("restore", "app", "--into", f"{shared.endpoint.database}_new")
    assert done.code == 0, done.err
    assert set(dry.out.splitlines()[2:3]) <= set(done.out.splitlines())
    new = shared.cluster.endpoint(f"{shared.endpoint.database}_new")
    assert ask(new, "SELECT count(*) FROM public.orders") == 1000


def test_replaced_and_undone(run: Run, place: Path, shared: Box) -> None:
    name = shared.endpoint.database
    oid = "SELECT oid FROM pg_database WHERE datname = current_database()"
    before = ask(shared.endpoint, oid)
    asked = ("restore", "app", "--backup", "latest", "--check", "counts", "--replace")
    dry = run(*asked, "--dry-run")
    assert dry.code == 0
    assert f"{name} becomes {name}_before_" in dry.out
    assert ask(shared.endpoint, oid) == before
    assert run(*asked, "--confirm", name).code == 0
    assert ask(shared.endpoint, oid) != before
    after, to = ask(shared.endpoint, oid), ("--to", shared.cluster.endpoint().dsn)
    refused = run("undo", "app", *to)
    assert refused.code == 6
    assert "is not confirmed: nothing was typed" in refused.err
    dry = run("undo", "app", *to, "--dry-run")
    assert dry.code == 0, dry.err
    assert f"{name} becomes {name}_undone_<time>" in dry.out
    assert ask(shared.endpoint, oid) == after
    undone = run("undo", "app", *to, "--confirm", name)
    assert undone.code == 0, undone.err
    assert ask(shared.endpoint, oid) == before
    again = run("undo", "app", "--confirm", name)
    assert again.code == 9


@pytest.mark.parametrize("given", ["configuration", "store"])
def test_a_swap_tells_the_command_that_undoes_it(run: Run, place: Path, shared: Box, given: str) -> None:
    name = shared.endpoint.database
    known = {
        "configuration": ("--config", str(place / "backups.toml")),
        "store": ("--store", f"file://{place}/store"),
    }[given]
    to = () if given == "configuration" else ("--to", shared.cluster.endpoint().dsn)
    oid = "SELECT oid FROM pg_database WHERE datname = current_database()"
    before = ask(shared.endpoint, oid)
    asked = ("restore", "app", "--backup", "latest", "--check", "none", "--replace", "--confirm", name)
    done = run(*known, *asked, *to)
    assert done.code == 0, done.err
    (line,) = (line for line in done.out.splitlines() if line.endswith("swaps it back"))
    program, *words = shlex.split(line.split("`")[1])
    assert program == "backup-pipeline"
    undone = run(*words, "--confirm", name)
    assert undone.code == 0, undone.err
    assert ask(shared.endpoint, oid) == before
