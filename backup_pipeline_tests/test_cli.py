"""The command line, against real servers: exit codes, JSON, no secrets, and nothing left but a store."""

import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from backup_pipeline import cli, process
from backup_pipeline.config import Secret
from backup_pipeline.config_file import parse
from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.engines.postgres.cluster import FREE_PORT, LocalCluster
from backup_pipeline.engines.postgres.lock import advisory_lock
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import EXIT_CODES
from backup_pipeline.storage import catalog
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import Box, a_box, ask, drop_all, stored
from backup_pipeline_tests.domain.values import proof
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.servers.s3 import rclone_s3
from backup_pipeline_tests.waiting import wait_until

SECRET = "hunter2-and-more"
TEXT = """
[store]
url = "file:store"

[scratch]
dsn = "{scratch}"
bin_dir = "{bin_dir}"

[databases.app]
dsn = "{dsn}"
restore_dsn = "{server}"
bin_dir = "{bin_dir}"
critical_tables = ["public.customer"]
lock_timeout = "500ms"

[databases.app.tiers.daily]
cron = "0 2 * * *"
keep = 1
"""


@dataclass(frozen=True)
class Ran:
    """What one command came to."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs `backup-pipeline` with these arguments, in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def run_(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["backup-pipeline", *args])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        shown = capsys.readouterr()
        assert isinstance(code, int)
        assert SECRET not in shown.out + shown.err
        return Ran(code, shown.out, shown.err)

    yield run_
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def shared(
    postgres: LocalCluster, other_server: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    """A source, with the configuration that protects it beside its store."""
    folder = tmp_path_factory.mktemp("cli")
    with a_box(postgres, folder / "store", scratch=other_server) as made:
        text = TEXT.format(
            dsn=made.endpoint.dsn,
            server=postgres.endpoint().dsn,
            scratch=other_server.endpoint().dsn,
            bin_dir=postgres.bin_dir,
        )
        (folder / "backups.toml").write_text(text, encoding="utf-8")
        made.take("daily")
        yield made


@pytest.fixture(scope="module")
def other_server() -> Iterator[LocalCluster]:
    with servers.running_cluster(servers.bin_dir_17()) as cluster:
        yield cluster


@pytest.fixture
def place(shared: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the configuration and a store with one backup, which is the current one."""
    shutil.copytree(shared.store.root.parent, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.delenv("BACKUP_PIPELINE_CONFIG", raising=False)
    yield tmp_path / "place"
    name = shared.endpoint.database
    with contextlib.closing(connect(shared.cluster.endpoint())) as session:
        for extra in shared.databases() - {name}:
            session.execute(f'DROP DATABASE "{extra}" WITH (FORCE)'.encode())


def only(place: Path) -> str:
    """The id of the one backup."""
    (found,) = catalog.list_backups(DirectoryStore(place / "store"), fresh=True).backups
    return str(found.id)


def back_up_later(run: Run, first: str, *, times: int) -> None:
    """Back up again, not in the same second, where the ids' random suffixes would decide which is older."""
    next_second = BackupId.parse(first).taken_at + timedelta(seconds=1)
    wait_until(lambda: datetime.now(UTC) >= next_second)
    for _ in range(times):
        assert run("--quiet", "backup", "app", "--tier", "daily", "--no-prove").code == 0


# --- help and exit codes -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_every_command_explains_itself(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert (done.code, done.err) == (0, "")
    command = cli.cli.commands[name]
    assert command.help is not None
    assert command.help.splitlines()[0] in " ".join(done.out.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} says nothing of itself"


def test_the_help_names_every_exit_code(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    for code, meaning in EXIT_CODES:
        assert f"{code:>3}  {meaning}" in done.out
    for name in cli.cli.commands:
        assert re.search(rf"^  {name}\s", done.out, re.MULTILINE)


FAILURES: dict[str, tuple[int, tuple[str, ...], str]] = {
    "no command": (2, ("backups",), "No such command"),
    "no option": (2, ("list", "--nothing"), "No such option"),
    "no argument": (2, ("restore",), "Missing argument"),
    "no configuration": (3, ("--config", "/nonexistent.toml", "list"), "backup-pipeline init"),
    "no such database": (3, ("backup", "apq"), "app"),
    "no such tier": (3, ("backup", "app", "--tier", "hourly"), "daily"),
    "no id": (3, ("show", "nothing"), "agentweave/20260301T02"),
    "no DSN": (3, ("restore", "app", "--backup", "latest", "--to", f"x y {SECRET}"), "a DSN cannot be read"),
    "no server": (
        4,
        ("restore", "app", "--backup", "latest", "--to", f"postgresql://x:{SECRET}@127.0.0.1:1/y"),
        "127.0.0.1:1",
    ),
    "no store": (5, ("--store", "file:///nonexistent", "list"), "/nonexistent"),
    "the database exists": (
        6,
        ("restore", "app", "--backup", "latest", "--into", "template1"),
        "exists|into",
    ),
    "not confirmed": (6, ("restore", "app", "--backup", "latest", "--replace"), "nothing was typed"),
    "wrongly confirmed": (
        6,
        ("restore", "app", "--backup", "latest", "--replace", "--confirm", "app"),
        "found 'app'",
    ),
    "nothing proven": (9, ("restore", "app"), "proven"),
    "no such backup": (9, ("show", "app/20200101T000000Z-aaaaaa"), "20200101T000000Z"),
    "nothing to undo": (9, ("undo", "app"), "no kept copy"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_has_its_exit_code_and_says_what_to_do(run: Run, place: Path, what: str) -> None:
    code, args, said = FAILURES[what]
    before = stored(DirectoryStore(place / "store"))
    done = run(*args)
    assert done.code == code
    assert re.search(said, done.err)
    if code != 2:
        assert done.err.splitlines()[0].startswith(("ERROR: ", "swapping "))
        assert "ERROR: " in done.err
        assert "HINT: " in done.err
    assert "Traceback" not in done.err
    assert stored(DirectoryStore(place / "store")) == before


def test_a_failed_backup_is_exit_code_7(run: Run, place: Path) -> None:
    store, backup = DirectoryStore(place / "store"), only(place)
    catalog.record_proof(store, catalog.list_backups(store).backups[0].id, proof(Verdict.FAILED))
    assert run("show", backup).code == 7
    assert run("--quiet", "restore", "app", "--backup", "latest").code == 6


def test_a_damaged_backup_is_exit_code_7(run: Run, place: Path) -> None:
    (dump,) = (place / "store").glob("databases/**/database.dump")
    data = bytearray(dump.read_bytes())
    data[100] ^= 1
    dump.write_bytes(bytes(data))
    done = run("restore", "app", "--backup", "latest")
    assert done.code == 7
    assert "not those that were written" in done.err
    assert run("prove", "app").code == 7


@pytest.mark.parametrize("args", [("prove", "app"), ("backup", "app")])
def test_not_provable_is_exit_code_8(run: Run, place: Path, shared: Box, args: tuple[str, ...]) -> None:
    text = (place / "backups.toml").read_text()
    itself = re.sub(r"(\[scratch\]\ndsn = ).*", rf'\1"{shared.cluster.endpoint().dsn}"', text)
    (place / "backups.toml").write_text(itself)
    done = run(*args)
    assert done.code == 8
    assert "is the cluster that the backup was taken from" in done.out


def test_busy_is_exit_code_10(run: Run, place: Path, shared: Box) -> None:
    with advisory_lock(shared.endpoint, shared.endpoint.database, purpose="dump of app", wait_s=0):
        done = run("backup", "app")
    assert done.code == 10
    assert "held by another dump" in done.err


def test_every_exit_code_is_tested() -> None:
    by_hand = {0, 7, 8, 10, 130, 143}
    assert {code for code, _ in EXIT_CODES} - {1} == by_hand | {code for code, _, _ in FAILURES.values()}


def test_a_terminated_backup_leaves_nothing(place: Path, shared: Box) -> None:
    store = DirectoryStore(place / "store")
    before = stored(store)
    text = (place / "backups.toml").read_text().replace('lock_timeout = "500ms"', 'lock_timeout = "600s"')
    (place / "backups.toml").write_text(text)
    command = process.Command((sys.executable, "-m", "backup_pipeline.cli", "backup", "app"), cwd=str(place))
    waiting = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted"
    waiting += f" AND a.datname = '{shared.endpoint.database}'"
    with (
        contextlib.closing(connect(shared.endpoint, autocommit=False)) as holder,
        contextlib.closing(connect(shared.endpoint)) as session,
    ):
        holder.execute("LOCK TABLE public.orders IN ACCESS EXCLUSIVE MODE")
        child = process.start(command, stderr=subprocess.PIPE)
        with child:
            try:
                while session.execute(waiting.encode()).fetchone() == (0,):
                    assert child.poll() is None, child.communicate()
                child.send_signal(signal.SIGTERM)
                assert child.wait(60) == 143
            finally:
                child.kill()
    assert stored(store) == before


# --- results -------------------------------------------------------------------------------


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


def configure(place: Path, before: str, after: str) -> None:
    """Change the configuration's text."""
    path = place / "backups.toml"
    path.write_text(path.read_text().replace(before, after))


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


@pytest.mark.parametrize("command", ["check", "prune"])
def test_nothing_configured_is_an_error(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "backups.toml").write_text("[store]\nurl = 'file:store'\n")
    done = run("--config", str(tmp_path / "backups.toml"), command)
    assert done.code == 3
    assert "no database is configured" in done.err


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


def test_check_looks_at_everything(run: Run, place: Path) -> None:
    done = run("check")
    assert done.code == 0, done.out
    for part in ("app:", "store: ", "proof: ", "restore: "):
        assert part in done.out
    text = (place / "backups.toml").read_text().replace("public.customer", "public.nothing")
    (place / "backups.toml").write_text(text)
    failed = run("check", "app")
    assert failed.code == 4
    assert "public.nothing" in failed.out
    assert "restore: restores go to" in failed.out  # after a failure the rest is still looked at


def test_check_says_what_a_swap_needs(run: Run, place: Path, shared: Box) -> None:
    name, role = shared.endpoint.database, f"{shared.endpoint.database}_plain"
    path = place / "backups.toml"
    path.write_text(path.read_text().replace(shared.cluster.endpoint().dsn, plain_dsn(shared, role)))
    shared.execute(f'CREATE ROLE "{role}" LOGIN CREATEDB', "postgres")
    try:
        done = run("check", "app")
        assert done.code == 0, done.out
        assert f"{name} could not be swapped: role {role} may not rename {name}" in done.out
        assert f'GRANT "{shared.owner}" TO "{role}";' in done.out
        shared.execute(f'GRANT "{shared.owner}" TO "{role}"', "postgres")
        assert f'As a superuser: GRANT pg_signal_backend TO "{role}";' in run("check", "app").out
        shared.execute(f'GRANT pg_signal_backend TO "{role}"', "postgres")
        assert "ok       restore: restores go to" in run("check", "app").out
    finally:
        shared.execute(f'DROP ROLE "{role}"', "postgres")


def plain_dsn(box: Box, role: str) -> str:
    return make_conninfo(box.cluster.endpoint().dsn, user=role)


def test_probe_tells_what_the_store_does(run: Run, place: Path) -> None:
    before = stored(DirectoryStore(place / "store"))
    done = run("probe")
    assert done.code == 0, done.out
    assert len(done.out.splitlines()) > 3
    assert stored(DirectoryStore(place / "store")) == before


# --- the configuration lost ----------------------------------------------------------------


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


# --- the first steps, and secrets ----------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[LocalCluster]:
    """A server that listens on TCP and asks for a password, with one database."""
    with private_folder() as folder:
        cluster = LocalCluster(
            servers.bin_dir_17(), folder / "cluster", relaxed=True, port=FREE_PORT, password=Secret(SECRET)
        )
        try:
            cluster.create()
            cluster.start()
            with contextlib.closing(connect(cluster.endpoint())) as session:
                session.execute('CREATE DATABASE "My Shop"')
            with contextlib.closing(connect(cluster.endpoint("My Shop"))) as session:
                session.execute("CREATE TABLE public.orders AS SELECT n FROM generate_series(1, 10) n")
            yield cluster
        finally:
            cluster.stop()


def test_init_writes_what_check_and_backup_accept(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_SHOP_PASSWORD", raising=False)
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}"
    done = run("init", "--dsn", dsn)
    assert done.code == 0, done.out + done.err
    assert "next: backup-pipeline backup my-shop" in done.out
    text = (tmp_path / "backups.toml").read_text()
    assert SECRET not in text
    assert list(tomllib.loads(text)["databases"]) == ["my-shop"]
    assert parse(text, tmp_path / "backups.toml").database("my-shop").tiers
    again = run("init", "--dsn", dsn)
    assert again.code == 6
    assert "not overwritten" in again.err
    monkeypatch.setenv("MY_SHOP_PASSWORD", SECRET)
    assert run("check").code == 0
    taken = run("backup", "my-shop", "--no-prove")
    assert taken.code == 0, taken.err
    assert "'My Shop'" in taken.out
    uncommented = re.sub(r"^# (restore_dsn|restore_password|critical)", r"\1", text, flags=re.MULTILINE)
    (tmp_path / "backups.toml").write_text(uncommented)
    checked = run("check", "my-shop")
    assert checked.code == 0, checked.out
    assert "restores go to" in checked.out
    monkeypatch.delenv("MY_SHOP_PASSWORD")
    unset = run("backup", "my-shop")
    assert unset.code == 3
    assert "MY_SHOP_PASSWORD" in unset.err


def test_init_takes_the_server_from_libpq_s_variables(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_SHOP_PASSWORD", raising=False)
    said = {"PGHOST": "127.0.0.1", "PGPORT": str(guarded.port), "PGUSER": "postgres", "PGPASSWORD": SECRET}
    for name, value in {**said, "PGDATABASE": "My Shop"}.items():
        monkeypatch.setenv(name, value)
    done = run("init")
    assert done.code == 0, done.out + done.err
    assert f"on postgres@127.0.0.1:{guarded.port}/My Shop: My Shop" in done.out
    text = (tmp_path / "backups.toml").read_text()
    assert SECRET not in text
    (database,) = tomllib.loads(text)["databases"].values()
    assert conninfo_to_dict(database["dsn"]) == {
        "host": "127.0.0.1",
        "port": str(guarded.port),
        "user": "postgres",
        "dbname": "My Shop",
    }


def test_init_takes_the_password_of_its_dsn_from_pgpassword(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_SHOP_PASSWORD", raising=False)
    monkeypatch.setenv("PGPASSWORD", SECRET)
    done = run("init", "--dsn", f"postgresql://postgres@127.0.0.1:{guarded.port}/My%20Shop")
    assert done.code == 0, done.out + done.err
    text = (tmp_path / "backups.toml").read_text()
    assert tomllib.loads(text)["databases"]["my-shop"]["password"] == {"env": "MY_SHOP_PASSWORD"}
    assert SECRET not in text


def test_init_writes_no_secret_of_any_kind_and_only_for_its_owner(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_SHOP_PASSWORD", raising=False)
    server = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    done = run("init", "--dsn", f"{server}?sslpassword={SECRET}")
    assert done.code == 0, done.out + done.err
    assert "sslpassword" in done.out
    path = tmp_path / "backups.toml"
    assert SECRET not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--store", "/srv/backups"), r"nothing was written: .*store\.url: expected"),
        (("--output", "nowhere/b.toml"), "there is no folder"),
        (("--output", "nowhere/b.toml", "--store", "s3://bucket"), "there is no folder"),
        (("--output", "file/b.toml", "--store", "s3://bucket"), "there is no folder"),
    ],
)
def test_init_that_cannot_write_leaves_nothing(
    run: Run,
    guarded: LocalCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    done = run("init", "--dsn", dsn, *args)
    assert done.code == 3, done.err
    assert re.search(said, done.err)
    assert "HINT: " in done.err
    assert "wrote" not in done.out
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("folder", ["pc%20x", "sp ace", "h#sh", "qu?ry"])
def test_init_and_check_mean_the_same_folder(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    done = run("init", "--dsn", dsn)
    assert done.code == 0, done.out + done.err
    assert {item.name for item in (tmp_path / folder).iterdir()} == {"backups", "backups.toml"}
    assert run("--store", "file:backups", "list").code == 0


def test_init_reads_a_store_s_url_as_all_others_do(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    done = run("init", "--dsn", dsn, "--store", f"file://{tmp_path}/u%20v")
    assert done.code == 0, done.out + done.err
    assert (tmp_path / "u v").is_dir()


def test_init_tells_a_command_that_finds_its_file(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    output = tmp_path / "else where.toml"
    done = run("init", "--dsn", dsn, "--output", str(output))
    assert done.code == 0, done.out + done.err
    (line,) = (line for line in done.out.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    assert words == ["backup-pipeline", "--config", str(output), "backup", "my-shop"]


def test_init_where_no_server_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("init", "--dsn", f"postgresql://x:{SECRET}@127.0.0.1:1")
    assert done.code == 4
    assert not list(tmp_path.iterdir())


def test_a_wrong_password_is_not_shown(run: Run, place: Path, guarded: LocalCluster) -> None:
    dsn = f"postgresql://postgres:wrong-{SECRET}@127.0.0.1:{guarded.port}/postgres"
    done = run("restore", "app", "--backup", "latest", "--to", dsn)
    assert done.code == 4
    assert "password" in done.err


def test_a_server_given_with_to_takes_its_password_from_pgpassword(
    run: Run, place: Path, guarded: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("--to", f"postgresql://postgres@127.0.0.1:{guarded.port}/postgres")
    asked = ("restore", "app", "--backup", "latest", "--check", "none", "--without-owners", *to)
    monkeypatch.delenv("PGPASSWORD", raising=False)
    without = run(*asked)
    assert without.code == 4
    assert "PGPASSWORD" in without.err.partition("HINT: ")[2]
    monkeypatch.setenv("PGPASSWORD", SECRET)
    replaced = ("--into", "replaced")
    try:
        assert run(*asked, *replaced).code == 0
        done = run(*asked, *replaced, "--replace", "--confirm", "replaced")
        assert done.code == 0, done.err
        (line,) = (line for line in done.out.splitlines() if "swaps it back" in line)
        assert "PGPASSWORD" in line
        _, command, _ = line.split("`")
        undone = run(*shlex.split(command)[1:], "--confirm", "replaced")
        assert undone.code == 0, undone.err
        assert f"127.0.0.1:{guarded.port}" in command
    finally:
        with contextlib.closing(connect(guarded.endpoint())) as session:
            query = "SELECT datname FROM pg_database WHERE datname LIKE 'replaced%'"
            for (name,) in session.execute(query).fetchall():
                session.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


def test_wrong_keys_to_a_store_are_not_shown(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rclone_s3(tmp_path / "s3") as server:
        text = (place / "backups.toml").read_text()
        store = f'url = "s3://{server.bucket}"\nendpoint = "{server.endpoint}"\n'
        store += 'access_key_id = { env = "S3_KEY" }\nsecret_access_key = { env = "S3_SECRET" }'
        (place / "backups.toml").write_text(text.replace('url = "file:store"', store))
        monkeypatch.setenv("S3_KEY", server.access_key_id)
        monkeypatch.setenv("S3_SECRET", SECRET)
        done = run("list")
        assert done.code == 5
        assert "HINT: " in done.err
        monkeypatch.setenv("S3_SECRET", server.secret_access_key)
        assert "no backups" in run("list").out
        monkeypatch.delenv("S3_SECRET")
        assert run("list").code == 3


def test_a_configuration_without_what_it_needs(run: Run, place: Path) -> None:
    (place / "backups.toml").write_text(
        f'[store]\nurl = "file:store"\n[databases.app]\npassword = "{SECRET}"\n'
    )
    done = run("list")
    assert done.code == 3
    assert "databases.app.dsn" in done.err


def test_the_installed_program_is_the_same(place: Path) -> None:
    program = Path(sys.executable).parent / "backup-pipeline"
    done = process.run(process.Command((str(program), "list", "--json"), cwd=str(place)), timeout_s=60)
    assert [item["id"] for item in json.loads(done.stdout)] == [only(place)]
