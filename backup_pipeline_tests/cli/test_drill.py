"""`drill` and `heartbeat` as they are typed, what `list` and `show` then say, and a drill that is killed."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.engines.postgres.cluster import server_in
from backup_pipeline.process import Command
from backup_pipeline.storage import drills
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import ask
from backup_pipeline_tests.actions.damage import flip
from backup_pipeline_tests.actions.drill_box import a_drill_box
from backup_pipeline_tests.actions.recovery_box import RecoveryBox
from backup_pipeline_tests.servers import postgres as servers

TEXT = """
[store]
url = "file:store"

[clusters.main]
dsn = "{dsn}"
heartbeat = true
socket = "{socket}"
"""


@dataclass(frozen=True)
class Place:
    """A folder with a configuration, its store, and the cluster that it names."""

    folder: Path
    box: RecoveryBox

    @property
    def temporary(self) -> Path:
        """Where drills work."""
        return self.box.folder.parent / "temporary"

    def command(self, *args: str) -> Command:
        """`backup-pipeline`, with this place's configuration."""
        config = ("--config", str(self.folder / "backups.toml")) if "--store" not in args else ()
        argv = (sys.executable, "-m", "backup_pipeline.cli", *config, *args)
        return Command(argv, {"TMPDIR": str(self.temporary)})

    def run(self, *args: str, code: int = 0) -> tuple[str, str]:
        """(standard output, standard error)."""
        done = process.run(self.command(*args), timeout_s=100, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "store").mkdir()
    with a_drill_box(servers.bin_dir_17(), DirectoryStore(folder / "store")) as box:
        (folder / "backups.toml").write_text(
            TEXT.format(dsn=box.cluster.endpoint().dsn, socket=box.folder.parent / "agent" / "s"),
            encoding="utf-8",
        )
        made = Place(folder, box)
        made.temporary.mkdir()
        made.temporary.chmod(0o755)
        yield made


def test_a_drill_is_made_listed_and_shown_with_its_base_backup(place: Place) -> None:
    at = place.box.ledger[4].at.isoformat()
    out, err = place.run("drill", "main", "--to", at, "--json")
    done = json.loads(out)
    assert (done["kind"], done["verdict"], done["differences"]) == ("drill", "proven", [])
    assert "looking into every table and index" in err
    shown = place.run("list", "main")[0]
    assert done["id"] in shown
    assert shown.count("proven") == 2  # of the base backup, and of the drill
    listed = {each["kind"]: each for each in json.loads(place.run("list", "main", "--json")[0])}
    assert listed["drill"] == done
    base = listed["base backup"]
    assert (base["id"], base["verdict"]) == (done["base_backup"], "proven")
    assert "proven, by a drill" in place.run("show", done["base_backup"])[0]
    plan = place.run("recover", "main", "--to", at, "--into", str(place.folder / "x"), "--dry-run")[0]
    assert "takes: about" in plan


def test_with_a_store_alone_it_proves_less_and_damage_is_an_error(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.folder / "store", tmp_path / "store")
    alone = ("--store", (tmp_path / "store").as_uri())
    at = place.box.ledger[4].at.isoformat()
    assert "restored" in place.run(*alone, "drill", "main", "--to", at)[0]
    flip(DirectoryStore(tmp_path / "store"))
    out = place.run(*alone, "drill", "main", "--to", place.box.ledger[-1].at.isoformat(), code=7)[0]
    assert "WRONG" in out
    assert "is not what was archived" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("main", "--to", "latest"), 3, "a drill is of a time"),
        (("main", "--to", "2000-01-01T00:00:00Z"), 6, "lies before the first moment"),
        (("maim",), 3, "no cluster maim is configured"),
    ],
)
def test_what_cannot_be_drilled_says_why(
    place: Place, arguments: tuple[str, ...], code: int, said: str
) -> None:
    assert said in place.run("drill", *arguments, code=code)[1]


@pytest.mark.parametrize("moment", [b"fetched", b"looking into"])
def test_a_killed_drill_leaves_nothing_that_the_next_one_does_not_collect(
    place: Place, moment: bytes
) -> None:
    known = drills.drills(place.box.store, "main").drills
    to = place.box.ledger[-1].at.isoformat()
    child = process.start(place.command("drill", "main", "--to", to), stderr=subprocess.PIPE)
    with child:
        assert child.stderr is not None
        for line in child.stderr:
            if moment in line:
                break
        child.kill()
    (left,) = place.temporary.glob("backup-drill-*")
    assert drills.drills(place.box.store, "main").drills == known
    data = list(left.rglob("postmaster.pid"))
    place.run("--quiet", "drill", "main", "--to", to)
    assert list(place.temporary.iterdir()) == []
    assert not [pid for path in data if (pid := server_in(path.parent))]


def test_the_agent_beside_postgresql_writes_it(place: Place) -> None:
    def count() -> int:
        return int(str(ask(place.box.cluster.endpoint(), "SELECT count(*) FROM backup_pipeline.heartbeat")))

    before, deadline = count(), time.monotonic() + 60
    child = process.start(place.command("wal", "agent", "main"))
    try:
        while count() == before:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.05)
    finally:
        process.terminate(child, grace_s=30.0)
    assert child.returncode == 0


def test_heartbeats_are_set_up_and_written(place: Place) -> None:
    endpoint = place.box.cluster.endpoint()
    shown = place.run("heartbeat", "main", "--setup", "--role", "o'neil; --")[0]
    assert 'TO "o\'neil; --"' in shown
    assert "--apply makes it" in shown
    assert "-- made in" in place.run("heartbeat", "main", "--setup", "--apply")[0]
    before = ask(endpoint, "SELECT count(*) FROM backup_pipeline.heartbeat")
    assert "heartbeat of" in place.run("heartbeat", "main")[1]
    assert ask(endpoint, "SELECT count(*) FROM backup_pipeline.heartbeat") == int(str(before)) + 1
    assert "go with --setup" in place.run("heartbeat", "main", "--apply", code=2)[1]
