"""The catalog from the command line: listed, pinned, pruned, rebuilt."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import stored
from backup_pipeline_tests.cli.place import Run, back_up_later, configure, only


def test_older_dumps_that_are_away_hide_no_backup(run: Run, place: Path) -> None:
    configure(place, "[databases.app]\n", '[databases.app]\nimport_from = "file:away"\n')
    for listed in (run("list"), run("list", "app")):
        assert (listed.code, only(place) in listed.out) == (0, True)
        assert listed.err.startswith("UNREADABLE file:")
        assert "away" in listed.err
    assert run("show", only(place)).code == 0
    assert run("prune").code == 5


def test_a_prune_goes_on_where_one_database_s_store_denies(run: Run, place: Path) -> None:
    first = only(place)
    back_up_later(run, first, times=2)
    other = "[databases.away]\ndsn = 'host=nowhere dbname=x'\nimport_from = 'file:away'\n"
    configure(place, "[databases.app]\n", f"{other}[databases.app]\n")
    done = run("prune")
    assert done.code == 5
    assert f"deleted {first}" in done.out
    assert "ERROR: " in done.err


def test_pins_and_prunes(run: Run, place: Path) -> None:
    first = only(place)
    back_up_later(run, first, times=3)
    before = stored(DirectoryStore(place / "store"))
    assert f"delete {first}" in run("prune", "--dry-run").out
    assert stored(DirectoryStore(place / "store")) == before
    pinned = run("pin", first)
    assert pinned.code == 0
    assert f"unpin {first}" in pinned.out
    kept = run("prune", "app")
    assert kept.code == 0
    assert re.search(rf"keep {first} \(daily\): pinned", kept.out)
    assert "pinned" in run("show", first).out
    assert len(json.loads(run("list", "--json").out)) == 3
    assert run("unpin", first).code == 0
    assert f"deleted {first}" in run("prune").out
    assert first not in run("list").out


def test_a_pin_without_its_manifest_is_lifted(run: Run, place: Path) -> None:
    backup = only(place)
    assert run("pin", backup).code == 0
    for manifest in [
        *(place / "store").rglob("manifest.json"),
        *(place / "store").glob("catalog/app/*Z-*.json"),
    ]:
        manifest.unlink()
    assert "unpin it" in run("prune", "--dry-run").out
    assert run("unpin", backup[:-1]).code == 9
    done = run("unpin", backup)
    assert done.code == 0, done.err
    assert "no longer pinned" in done.out
    assert "pin" not in " ".join(stored(DirectoryStore(place / "store")))
    assert run("unpin", backup).code == 9


def test_an_interrupted_prune_says_what_is_true(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = only(place)
    back_up_later(run, first, times=2)
    said = click.echo

    def interrupted(message: object = None, **options: Any) -> None:
        said(message, **options)
        if str(message).startswith("deleted "):
            raise KeyboardInterrupt

    monkeypatch.setattr(click, "echo", interrupted)
    done = run("prune")
    assert done.code == 130
    assert f"deleted {first}" in done.out
    assert "half done" not in done.err
    assert "aborted: what was finished stays" in done.err


def test_a_lost_catalog_is_rebuilt(run: Run, place: Path) -> None:
    backup = only(place)
    shown = run("show", backup, "--json").out
    shutil.rmtree(place / "store" / "catalog")
    assert "no backups" in run("list").out
    done = run("rebuild")
    assert (done.code, done.err) == (0, "")
    assert f"rebuilt {backup}" in done.out
    assert run("show", backup, "--json").out == shown
    assert "0 manifests rebuilt" in run("rebuild").out
