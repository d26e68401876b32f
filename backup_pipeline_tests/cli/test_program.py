"""The program: its help, its exit codes, and what is left when it is ended."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from backup_pipeline import cli, process
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.engines.postgres.lock import advisory_lock
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import EXIT_CODES
from backup_pipeline.storage import catalog
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import Box, stored
from backup_pipeline_tests.cli.place import SECRET, Run, only
from backup_pipeline_tests.domain.values import proof


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


def test_the_installed_program_is_the_same(place: Path) -> None:
    program = Path(sys.executable).parent / "backup-pipeline"
    done = process.run(process.Command((str(program), "list", "--json"), cwd=str(place)), timeout_s=60)
    assert [item["id"] for item in json.loads(done.stdout)] == [only(place)]
