"""Without a configuration, or with one that lacks something: what works, and what is said."""

import json
from pathlib import Path

import pytest

from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import Box, ask, drop_all, stored
from backup_pipeline_tests.cli.place import SECRET, Run, only


@pytest.mark.parametrize("command", ["check", "prune"])
def test_nothing_configured_is_an_error(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "backups.toml").write_text("[store]\nurl = 'file:store'\n")
    done = run("--config", str(tmp_path / "backups.toml"), command)
    assert done.code == 3
    assert "no database is configured" in done.err


def test_with_nothing_left_but_the_store(
    run: Run, place: Path, shared: Box, other_server: LocalCluster
) -> None:
    backup, name = only(place), shared.endpoint.database
    (place / "backups.toml").unlink()
    store = ("--store", f"file://{place}/store")
    assert [item["id"] for item in json.loads(run(*store, "list", "--json").out)] == [backup]
    assert backup in run(*store, "list", "app").out
    assert run("--store", "file:store", "show", backup).code == 0
    asked = ("restore", "app", "--backup", "latest")
    nowhere = run(*store, *asked)
    assert nowhere.code == 3
    assert "--to" in nowhere.err
    to = (*store, *asked, "--to", other_server.endpoint().dsn)
    try:
        lacking = run(*to)
        assert lacking.code == 6
        assert "--create-roles" in lacking.err
        done = run(*to, "--create-roles", "--into", name)
        assert done.code == 0, done.err
        assert ask(other_server.endpoint(name), "SELECT count(*) FROM public.orders") == 1000
    finally:
        drop_all(other_server, name, (shared.owner, shared.reader))
    assert run(*store, "pin", backup).code == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--endpoint", "https://s3.example.net"), "--endpoint"),
        (("--region", "eu-central-1"), "--region"),
        (("--store", "file:store", "--config", "backups.toml"), "--config"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    run: Run, place: Path, given: tuple[str, ...], said: str
) -> None:
    done = run(*given, "list")
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    "args",
    [
        ("prune",),
        ("prune", "app"),
        ("prune", "app", "--dry-run"),
        ("backup", "app"),
        ("check",),
        ("undo", "app"),
    ],
)
def test_what_needs_the_configuration_says_so(run: Run, place: Path, args: tuple[str, ...]) -> None:
    before = stored(DirectoryStore(place / "store"))
    done = run("--store", "file:store", *args)
    assert done.code == 3
    assert "configuration" in done.err
    assert stored(DirectoryStore(place / "store")) == before


def test_a_configuration_without_what_it_needs(run: Run, place: Path) -> None:
    (place / "backups.toml").write_text(
        f'[store]\nurl = "file:store"\n[databases.app]\npassword = "{SECRET}"\n'
    )
    done = run("list")
    assert done.code == 3
    assert "databases.app.dsn" in done.err
