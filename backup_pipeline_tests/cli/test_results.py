"""What the commands answer: JSON for scripts, and lines for people."""

import json
import re
import shutil
from pathlib import Path

from backup_pipeline_tests.actions.box import Box
from backup_pipeline_tests.cli.place import Run, back_up_later, only


def test_json_can_be_read_by_scripts(run: Run, place: Path) -> None:
    taken = run("backup", "app", "--no-prove", "--json")
    assert taken.code == 0
    record = json.loads(taken.out)
    assert (record["database"], record["tier"], record["verdict"]) == ("app", "manual", "unproven")
    assert record["expires_at"] is not None
    proven = run("prove", "app", "--backup", record["id"], "--json")
    assert json.loads(proven.out)["verdict"] == "proven"
    assert "is proven" in proven.err
    listed = json.loads(run("list", "--json").out)
    assert listed == json.loads(run("list", "app", "--json").out)
    assert len(listed) == 2
    assert listed[0]["id"] == record["id"]
    assert json.loads(run("show", record["id"], "--json").out) == listed[0]
    assert listed[0]["proven_at"] is not None


def test_a_proof_that_could_not_be_made_does_not_show_the_old_one(run: Run, place: Path) -> None:
    backup = only(place)
    assert run("--quiet", "prove", "app").code == 0
    text = (place / "backups.toml").read_text()
    (place / "backups.toml").write_text(re.sub(r'bin_dir = ".*"', 'bin_dir = "/nowhere"', text))
    failed = run("--quiet", "prove", "app")
    assert failed.code == 8
    assert re.search(r"^verdict +not provable$", failed.out, re.MULTILINE)
    assert "/nowhere" in failed.out
    assert re.search(r"^stands +proven, ", failed.out, re.MULTILINE)
    again = run("--quiet", "prove", "app", "--json")
    assert again.code == 8
    record = json.loads(again.out)
    assert (record["id"], record["verdict"], record["standing"]) == (backup, "not provable", "proven")
    assert "/nowhere" in " ".join(record["differences"])
    assert {"checked", "notes", "at", "by"} <= record.keys()
    shown = run("show", backup)
    assert re.search(r"^verdict +proven$", shown.out, re.MULTILINE)
    assert re.search(r"^last attempt +not provable, ", shown.out, re.MULTILINE)
    assert "/nowhere" in shown.out
    shown_record = json.loads(run("show", backup, "--json").out)
    assert shown_record["verdict"] == shown_record["proof"]["verdict"] == "proven"
    assert shown_record["last_attempt"]["differences"] == record["differences"]


def test_a_restore_and_its_undo_as_json(run: Run, place: Path, shared: Box) -> None:
    backup, name = only(place), shared.endpoint.database
    asked = ("--quiet", "restore", "app", "--backup", "latest", "--check", "counts", "--json")
    planned = json.loads(run(*asked, "--dry-run").out)
    assert (planned["backup"], planned["kept_as"]) == (backup, None)
    done = json.loads(run(*asked).out)
    assert done["backup"] == backup
    assert done["kept_as"] is None
    assert {name, done["database"]} == shared.databases()
    assert done["restore_s"] > 0
    assert any("restored" in line for line in done["lines"])
    replaced = json.loads(run(*asked, "--replace", "--confirm", name).out)
    assert (replaced["database"], replaced["kept_as"]) == (name, replaced["kept_as"])
    assert replaced["kept_as"] in shared.databases()
    undo = ("--quiet", "undo", "app", "--into", name, "--json")
    planned = json.loads(run(*undo, "--dry-run").out)
    assert (planned["database"], planned["copy"]) == (name, replaced["kept_as"])
    undone = json.loads(run(*undo, "--confirm", name).out)
    assert undone["database"] == name
    assert undone["kept_as"] in shared.databases()


def test_a_prune_as_json(run: Run, place: Path) -> None:
    first = only(place)
    back_up_later(run, first, times=2)
    (planned,) = json.loads(run("prune", "--dry-run", "--json").out)
    assert planned["database"] == "app"
    assert [(item["id"], item["keep"]) for item in planned["decisions"]][-1] == (first, False)
    assert all(item["reasons"] for item in planned["decisions"])
    (done,) = json.loads(run("prune", "--json").out)
    assert done["deleted"] == [first]
    assert done["freed_bytes"] > 0
    assert (done["kept_after_all"], done["locked"]) == ([], {})


def test_check_probe_and_rebuild_as_json(run: Run, place: Path) -> None:
    (checked,) = json.loads(run("check", "--json").out)
    assert checked["database"] == "app"
    assert {item["name"] for item in checked["checks"]} >= {"store", "proof", "restore"}
    assert {item["status"] for item in checked["checks"]} <= {"ok", "warning"}
    text = (place / "backups.toml").read_text().replace("public.customer", "public.nothing")
    (place / "backups.toml").write_text(text)
    failed = run("check", "--json")
    assert failed.code == 4
    (checked,) = json.loads(failed.out)
    assert "failed" in {item["status"] for item in checked["checks"]}
    probed = json.loads(run("probe", "--json").out)
    assert {"name", "status", "found", "consequence"} == probed[0].keys()
    shutil.rmtree(place / "store" / "catalog")
    assert json.loads(run("rebuild", "--json").out) == {"rebuilt": [only(place)], "refused": []}


def test_what_a_person_reads(run: Run, place: Path) -> None:
    backup = only(place)
    assert backup in run("list").out
    assert backup in run("list", "app").out
    shown = run("show", backup[: len("app/20260101T")]).out
    for part in (
        backup,
        "daily",
        "unproven",
        "database.dump",
        "sha256",
        f"{place}/store/databases",
    ):
        assert part in shown
    assert run("--quiet", "list", "nothing").code == 3
    assert "preflight" not in run("check").err
