"""`backup-pipeline base-backup`, and `list` and `show` of what it took, as an operator runs them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.layout import catalog_key
from backup_pipeline.storage import base_backups
from backup_pipeline_tests.actions.box import execute
from backup_pipeline_tests.actions.cluster_box import ClusterBox, a_cluster
from backup_pipeline_tests.domain.values import manifest
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.storage.backups import put_backup

WINDOWS = "recovery windows"
TEXT = """
[store]
url = "file:store"

[databases.app]
dsn = "postgresql://nobody@127.0.0.1:1/app"

[clusters.main]
dsn = "{dsn}"
stall_timeout = "60s"
"""


@dataclass(frozen=True)
class Place:
    """A folder with a configuration, its store, and the cluster that it names."""

    folder: Path
    box: ClusterBox

    def run(self, *args: str, code: int = 0) -> tuple[str, str]:
        """(standard output, standard error) of `backup-pipeline`."""
        argv = [sys.executable, "-m", "backup_pipeline.cli", *args]
        done = subprocess.run(argv, cwd=self.folder, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("cli")
    with a_cluster(servers.bin_dir_17(), folder / "store") as box:
        (folder / "backups.toml").write_text(TEXT.format(dsn=box.cluster.endpoint().dsn), encoding="utf-8")
        put_backup(box.store, manifest())
        yield Place(folder, box)


def test_a_base_backup_is_taken_listed_and_shown(place: Place) -> None:
    assert "no backups of main" in place.run("list", "main")[0]
    with place.box.shipping():
        out, err = place.run("base-backup", "main", "--fast", "--json")
    taken = json.loads(out)
    assert "asked for a fast checkpoint" in err
    assert "published main/" in err
    assert taken["cluster"] == "main"
    assert taken["system_identifier"] == place.box.system
    shown = place.run("list", "main")[0]
    assert shown.splitlines()[0].startswith("BASE BACKUP")
    assert taken["id"] in shown
    listed, windows = json.loads(place.run("list", "main", "--json")[0])
    assert listed == taken
    assert "there is no WAL archive of main" in windows["problems"][0]  # nothing is set up here
    everything, warned = place.run("list")
    assert taken["id"] in everything
    assert "app/20260301T020000Z-3f9a1c" in everything
    assert not warned
    assert taken["id"] not in place.run("list", "app")[0]
    for name in (taken["id"], taken["id"][:-3], "main/latest"):
        details = place.run("show", name)[0]
        assert "in the archive" in details
        assert "base.tar.zst" in details
    assert json.loads(place.run("show", taken["id"], "--json")[0]) == taken
    assert "no base backup is named main/2020" in place.run("show", "main/2020", code=9)[1]
    assert "app/20260301T020000Z-3f9a1c" in place.run("show", "app/20260301T02")[0]
    alone = ("--store", (place.folder / "store").as_uri())
    assert taken["id"] in place.run(*alone, "list", "main")[0]
    assert taken["id"] in place.run(*alone, "show", taken["id"])[0]
    key = catalog_key(base_backups.list_base_backups(place.box.store, "main").backups[0].id)
    data = (place.folder / "store" / key).read_bytes()
    (place.folder / "store" / key).write_bytes(data[:-5])
    assert f"UNREADABLE {key}" in place.run("list", "main")[1]
    assert place.run("list")[1].count("UNREADABLE") == 1
    (place.folder / "store" / key).unlink()
    assert f"rebuilt {taken['id']}" in place.run("rebuild")[0]
    assert taken["id"] in place.run("list", "main")[0]


def test_check_looks_at_a_cluster_by_its_name_and_at_all(place: Place) -> None:
    out, err = place.run("check", "main", code=6)
    assert out.splitlines()[0] == "main:"
    assert "ok       server: PostgreSQL 17" in out
    assert "failed   archive: there is no WAL archive of main" in out
    assert "ERROR" not in err
    (checked,) = json.loads(place.run("check", "main", "--json", code=6)[0])
    assert checked["cluster"] == "main"
    assert [item["name"] for item in checked["checks"]] == ["server", "store", "archive", "newest", "window"]
    assert "there is no WAL archive" in checked["error"]
    everything = json.loads(place.run("check", "--json", code=6)[0])
    assert [each.get("database") or each["cluster"] for each in everything] == ["app", "main"]
    assert "no database or cluster maim" in place.run("check", "maim", code=3)[1]


def test_what_is_not_configured_or_not_reachable_is_said(place: Place) -> None:
    assert "no cluster maim is configured" in place.run("base-backup", "maim", code=3)[1]
    assert "app is a database, and this wants a cluster" in place.run("base-backup", "app", code=3)[1]
    alone = ("--store", (place.folder / "store").as_uri())
    assert "needs the configuration" in place.run(*alone, "base-backup", "main", code=3)[1]


def test_a_base_backup_is_pinned_and_the_prune_covers_clusters(place: Place) -> None:
    (taken,) = [
        each for each in json.loads(place.run("list", "main", "--json")[0]) if each["kind"] != WINDOWS
    ]
    assert "no prune deletes it, nor the WAL since" in place.run("pin", taken["id"])[0]
    assert json.loads(place.run("show", taken["id"], "--json")[0])["pinned"]
    (planned,) = json.loads(place.run("prune", "main", "--dry-run", "--json")[0])
    assert (planned["cluster"], planned["decisions"][0]["keep"]) == ("main", True)
    assert "pinned" in planned["decisions"][0]["reasons"]
    assert "is no longer pinned" in place.run("unpin", taken["id"])[0]
    shown, _ = place.run("prune")
    assert f"keep {taken['id']}: " in shown
    assert "keep app/20260301T020000Z-3f9a1c" in shown
    assert "prune of main: 0 backups deleted" in shown
    assert "no database or cluster nothing is configured" in place.run("prune", "nothing", code=3)[1]
    assert "main is a cluster, and this wants a database" in place.run("backup", "main", code=3)[1]
    assert "app is a database, and this wants a cluster" in place.run("base-backup", "app", code=3)[1]


def test_an_incremental_one_says_what_it_builds_on(place: Place) -> None:
    assert (
        "summarize_wal is off in cluster main" in place.run("base-backup", "main", "--incremental", code=6)[1]
    )
    execute(place.box.cluster.endpoint(), "ALTER SYSTEM SET summarize_wal = on")
    execute(place.box.cluster.endpoint(), "SELECT pg_reload_conf()")
    with place.box.shipping():
        whole = json.loads(place.run("base-backup", "main", "--fast", "--json")[0])
        first, err = place.run("base-backup", "main", "--fast", "--incremental", "--json")
        named = place.run("base-backup", "main", "--fast", "--parent", whole["id"], "--json")[0]
    assert (whole["parent"], json.loads(first)["parent"]) == (None, whole["id"])
    assert f"what has changed since {whole['id']}, link 2 of its chain" in err
    taken = json.loads(named)
    assert taken["parent"] == whole["id"]
    assert taken["source_bytes"] < 0.3 * taken["cluster_bytes"]
    stamp = whole["id"].partition("/")[2]
    assert place.run("list", "main")[0].count(f"what changed since {stamp}") == 2
    assert f"what changed since {whole['id']}; a recovery needs both" in place.run("show", taken["id"])[0]
    key = place.folder / "store" / catalog_key(BackupId.parse(whole["id"]))
    data = key.read_bytes()
    key.unlink()
    assert place.run("list", "main")[0].count("OF NO USE: ") == 2
    key.write_bytes(data)
    assert "names" in place.run("base-backup", "main", "--parent", "main/2", code=9)[1]
