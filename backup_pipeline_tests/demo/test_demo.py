"""`make demo` from beginning to end, small; and what stays of it when it is ended."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline.demo import dev
from backup_pipeline.demo.place import Place, held
from backup_pipeline.demo.stage import DemoFailed, Stage
from backup_pipeline_tests.waiting import wait_until

ROWS = "3000"


@contextlib.contextmanager
def demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo as `make` starts it, in a process group of its own, which is ended at the end."""
    argv = [sys.executable, "-m", "backup_pipeline.demo", *arguments, "--folder", str(folder), "--rows", ROWS]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as child:
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def read_until(child: subprocess.Popen[str], text: str) -> None:
    assert child.stdout
    for line in child.stdout:
        if text in line:
            return
    raise AssertionError(f"the demo ended before it said {text!r}")


def servers_of(folder: Path) -> list[str]:
    """The command lines of the processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line and any(name in line for name in ("postgres", "rclone", "receive")):
                found.append(line)
    return found


@pytest.mark.timeout(300)
def test_the_whole_demo_tells_what_was_lost_and_that_it_is_back(folder: Path) -> None:
    with demo(folder) as child:
        said, _ = child.communicate(timeout=280)
    assert child.returncode == 0, said
    steps = re.split(r"\n\d+\. ", said)[1:]
    assert len(steps) == 11
    for step in steps[2:5] + steps[6:]:
        command, *lines = [line for line in step.splitlines() if line.startswith("     ") or "   $ " in line]
        assert "$ backup-pipeline" in command
        assert lines, step  # of each command something is shown
    assert " is proven" in steps[4]
    assert re.search(r"table +workflow_versions +live: missing +restored: there", steps[6])
    assert "each equal to what it was before the accident" in steps[6]
    assert re.search(r"recovered main into .*\n", steps[8])
    assert re.search(
        r"rows equal to what it was; the newest\n +row of the application is \d+ ms older", steps[8]
    )
    assert re.search(r"drill main/\S+: proven, to ", steps[9])
    assert "any moment from " in steps[9]
    assert re.search(r"proof +proven", said)
    assert "Traceback" not in said
    assert servers_of(folder) == []


def test_somebody_else_s_server_is_not_the_one_that_was_started() -> None:
    listen = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1]); input()"
    argv = [sys.executable, "-uc", listen]
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
    ):
        assert child.stdout is not None
        assert dev._serves(child.pid, int(child.stdout.readline()))
        assert not dev._serves(child.pid, other.getsockname()[1])
        child.communicate("\n")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_when_the_demo_is_ended(folder: Path, how: signal.Signals) -> None:
    with demo(folder) as child:
        read_until(child, "3. ")
        assert len(servers_of(folder)) >= 2
        child.send_signal(how)
        code = child.wait(timeout=30)
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
        wait_until(lambda: servers_of(folder) == [], within_s=20)


def test_what_dg_started_is_ended_with_it() -> None:
    stubborn = "trap '' INT TERM; sleep 300 & echo started; wait; sleep 300"
    with subprocess.Popen(["bash", "-c", stubborn], stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        below = dev._descendants(child.pid)
        assert len(below) == 1
        dev._end(child, grace_s=0.1, left_behind_s=0.1)
        assert child.poll() is not None
        deadline = time.monotonic() + 10
        while any(dev._since(pid) == since for pid, since in below.items()):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_second_demo_in_the_same_folder_says_that_there_is_one(folder: Path) -> None:
    with held(folder, "make dev"), demo(folder) as child:
        said, _ = child.communicate(timeout=30)
    assert child.returncode == 10
    assert "is in use: `make dev`, process" in said


def test_a_command_that_fails_is_shown_with_all_that_it_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    stage = Stage(Place(folder).log)
    with pytest.raises(DemoFailed, match=r"list` ended with exit code 3"):
        stage.command("--config", "/nowhere/backups.toml", "list", show="^nothing$")
    assert "no configuration at /nowhere/backups.toml" in capsys.readouterr().out


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_dev_serves_the_ui_and_takes_everything_with_it(folder: Path, how: signal.Signals) -> None:
    """Somebody takes the port that it chose, before it listens there."""
    with demo(folder, "dev") as child, socket.socket() as other:
        assert child.stdout
        found: dict[str, list[str]] = {"will be at": [], "Ready: ": []}
        for line in child.stdout:
            for text, ports in found.items():
                if text in line and (port := re.search(r"http://127\.0\.0\.1:(\d+)", line)):
                    ports.append(port[1])
                    if len(found["will be at"]) == 1:
                        other.bind(("127.0.0.1", int(port[1])))
                        other.listen()
            if found["Ready: "]:
                break
        (taken, chosen), (ready,) = found.values()
        assert taken != chosen == ready
        with urllib.request.urlopen(f"http://127.0.0.1:{ready}/server_info", timeout=60) as answer:
            assert answer.status == 200
        below = dev._descendants(child.pid)
        assert len(below) >= 5
        child.send_signal(how)
        child.wait(timeout=120)
    deadline = time.monotonic() + 60
    while left := [pid for pid, since in below.items() if since and dev._since(pid) == since]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
