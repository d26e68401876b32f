"""`recover` as it is typed: the plan, the recovery, the answer for scripts, and what is refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.process import Command, Completed
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers import postgres as servers


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    """A base backup and three commits behind it."""
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    with a_recovery_box(servers.bin_dir_17(), store) as made:
        made.commit(1)
        made.take()
        made.commit(3)
        made.switch()
        yield made


def run(box: RecoveryBox, *arguments: str) -> Completed:
    """The command line, with the store alone: the configuration is lost."""
    argv = (sys.executable, "-m", "backup_pipeline.cli", "--store", f"file://{root(box)}", *arguments)
    return process.run(Command(argv), timeout_s=60, check=False)


def root(box: RecoveryBox) -> Path:
    assert isinstance(box.store, DirectoryStore)
    return box.store.root


def test_the_plan_is_shown_first_and_dry_run_stops_there(box: RecoveryBox) -> None:
    into = box.folder / "recovered"
    shown = run(box, "recover", "main", "--to", "latest", "--into", str(into), "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "target: the end of the archive" in shown.stdout
    assert f"into: {into}" in shown.stdout
    assert (
        f"newest that can be recovered: {box.ledger[-1].at.isoformat().replace('+00:00', 'Z')}"
        in shown.stdout
    )
    assert list(box.folder.iterdir()) == []


def test_the_list_says_what_can_be_recovered(box: RecoveryBox) -> None:
    listed = run(box, "list", "main")
    assert listed.returncode == 0, listed.stderr
    assert "any moment from " in listed.stdout
    assert "PROBLEM" not in listed.stdout
    *bases, windows = json.loads(run(box, "list", "--json").stdout)
    assert [each["kind"] for each in bases] == ["base backup"]
    assert (windows["kind"], windows["cluster"]) == ("recovery windows", "main")
    assert windows["windows"][0]["base_backups"] == [bases[0]["id"]]
    assert windows["windows"][0]["to"] >= box.ledger[-1].at.isoformat()


def test_with_nothing_but_the_store_a_cluster_comes_back(box: RecoveryBox) -> None:
    at, into = box.ledger[2].at.isoformat(), str(box.folder / "recovered")
    done = run(box, "recover", "main", "--to", at, "--into", into, "--exclusive", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["cluster"], answer["into"], answer["timeline"]) == ("main", into, 2)
    assert box.numbers() == [1, 2]
    shutil.rmtree(into)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--to", "2026-03-01T02:00:00"), 3, "does not say its time zone"),
        (("--to", "2000-01-01T00:00:00Z"), 6, "lies before the first moment that can be recovered"),
        (("--to", "name:never"), 4, "restore point never was not met"),
        (("--to", "latest", "--timeline", "9"), 6, "the history of timeline 9 is not in the archive"),
        (("--to", "latest", "--base", "main/20260101T000000Z-aaaa"), 9, "there is no base backup"),
        (("--to", "latest", "--tablespace", "fast=/srv"), 3, "not a tablespace's place"),
    ],
)
def test_what_cannot_be_done_says_why_and_leaves_nothing(
    box: RecoveryBox, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = run(box, "--quiet", "recover", "main", "--into", str(box.folder / "recovered"), *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert list(box.folder.iterdir()) == []


def test_an_unknown_cluster_has_no_archive(box: RecoveryBox) -> None:
    done = run(box, "recover", "other", "--to", "latest", "--into", str(box.folder / "recovered"))
    assert done.returncode == 9
    assert "there is no WAL archive of other" in done.stderr
