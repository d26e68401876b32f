"""`make demo` from beginning to end, small; and what stays of it when it is ended."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline.demo.place import Place, held
from backup_pipeline.demo.stage import DemoFailed, Stage

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
            if str(folder) in line and ("postgres" in line or "rclone" in line):
                found.append(line)
    return found


@pytest.mark.timeout(300)
def test_the_whole_demo_tells_what_was_lost_and_that_it_is_back(folder: Path) -> None:
    with demo(folder) as child:
        said, _ = child.communicate(timeout=280)
    assert child.returncode == 0, said
    steps = re.split(r"\n\d\. ", said)[1:]
    assert len(steps) == 8
    for step in steps[2:4] + steps[5:]:
        command, *lines = [line for line in step.splitlines() if line.startswith("     ") or "   $ " in line]
        assert "$ backup-pipeline" in command
        assert lines, step  # of each command something is shown
    assert " is proven" in steps[3]
    assert re.search(r"table +workflow_versions +live: missing +restored: there", steps[5])
    assert "each equal to what it was before the accident" in steps[5]
    assert re.search(r"proof +proven", said)
    assert "Traceback" not in said
    assert servers_of(folder) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_when_the_demo_is_ended(folder: Path, how: signal.Signals) -> None:
    with demo(folder) as child:
        read_until(child, "3. ")
        assert len(servers_of(folder)) >= 2
        child.send_signal(how)
        code = child.wait(timeout=30)
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
        deadline = time.monotonic() + 20
        while servers_of(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert servers_of(folder) == []


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
