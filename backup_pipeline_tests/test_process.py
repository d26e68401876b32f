"""Child processes: a clean environment, a deadline, no truncated stream, and death with the parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command, Identity
from backup_pipeline_tests.waiting import is_gone, wait_until

AS_ROOT = os.getuid() == 0
ON_LINUX = sys.platform == "linux"


def shell(script: str, **options: object) -> Command:
    return Command(("/bin/sh", "-c", script), **options)  # type: ignore[arg-type]


def test_nothing_of_our_environment_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c row_security=on")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    seen = process.run(shell("env", environment={"PGHOST": "here"}), timeout_s=10).stdout
    assert "PGHOST=here" in seen
    assert "PATH=" in seen
    assert "PGOPTIONS" not in seen
    assert "hunter2" not in seen


def test_a_failure_shows_command_code_and_last_words_but_no_secret() -> None:
    command = shell("echo first >&2; echo 'last words' >&2; exit 3", environment={"PGPASSWORD": "hunter2"})
    with pytest.raises(ToolError) as failed:
        process.run(command, timeout_s=10)
    assert failed.value.message == "sh ended with exit code 3: last words"
    assert "first" in str(failed.value.detail["stderr"])
    assert "hunter2" not in str(failed.value) + repr(command)
    with pytest.raises(ToolError, match="was killed by SIGKILL"):
        process.run(shell("kill -9 $$"), timeout_s=10)
    with pytest.raises(ToolError, match="cannot start /nonexistent: No such file"):
        process.run(Command(("/nonexistent",)), timeout_s=10)


def test_a_child_that_hangs_is_ended() -> None:
    with pytest.raises(ToolError, match=r"did not answer within 0\.2 s"):
        process.run(Command(("/bin/sleep", "60")), timeout_s=0.2)


def read(command: Command, stall_s: float = 10.0) -> Iterator[bytes]:
    with process.stream(command, stall_s=stall_s) as chunks:
        yield from chunks


def test_a_stream_ends_only_after_a_good_end() -> None:
    assert b"".join(read(shell("echo one; echo two"))) == b"one\ntwo\n"
    chunks = read(shell("echo one; echo broken >&2; exit 1"))
    assert next(chunks) == b"one\n"
    with pytest.raises(ToolError, match="exit code 1: broken"):
        next(chunks)


def test_a_stream_that_stalls_is_ended() -> None:
    chunks = read(shell("echo one; exec sleep 60"), stall_s=0.2)
    assert next(chunks) == b"one\n"
    with pytest.raises(ToolError, match=r"did not answer within 0\.2 s"):
        next(chunks)


def test_leaving_a_stream_ends_its_child(tmp_path: Path) -> None:
    with process.stream(shell(f"echo $$ > {tmp_path}/pid; echo one; exec sleep 60"), stall_s=10) as chunks:
        assert next(chunks) == b"one\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.skipif(not AS_ROOT, reason="needs root: only it may run a child as another user")
def test_a_child_of_another_user_has_no_group_of_ours() -> None:
    child = shell("id -u; id -g; id -G", identity=Identity(65534, 59817))
    assert process.run(child, timeout_s=10).stdout.split() == ["65534", "59817", "59817"]


STARTS_ONE = """
import sys, time
from backup_pipeline.process import Command, Identity, start
identity = Identity(65534, 59817) if sys.argv[1] == "nobody" else None
child = start(Command(("/bin/sleep", "600"), identity=identity, network=sys.argv[2] == "network"))
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not ON_LINUX, reason="needs Linux: its kernel ends a child with its parent")
@pytest.mark.parametrize("network", ["network", "none"])
@pytest.mark.parametrize("user", ["ourselves", "nobody"])
def test_a_child_dies_with_a_parent_that_is_killed(user: str, network: str) -> None:
    if user == "nobody" and not AS_ROOT:
        pytest.skip("needs root: only it may run a child as another user")
    if network == "none":
        needs_namespaces()
    argv = [sys.executable, "-c", STARTS_ONE, user, network]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: is_gone(pid), within_s=10)


INTERRUPTED_IN_A_FORK = """
import os, signal, sys
from pathlib import Path
from backup_pipeline.process import Command, start
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(int(sys.argv[1])))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
try:
    start(Command(("/bin/sleep", "600")))
except KeyboardInterrupt:
    sys.exit(130)
finally:
    print(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
"""


@pytest.mark.skipif(not ON_LINUX, reason="needs Linux: /proc tells what children there are")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_is_heard_while_a_child_is_forked(signum: int, code: int) -> None:
    argv = [sys.executable, "-c", INTERRUPTED_IN_A_FORK, str(int(signum))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    assert done.returncode == code
    assert done.stdout.split() == []


def needs_namespaces() -> None:
    try:
        process.run(shell("exit 0", network=False), timeout_s=10)
    except ToolError as error:
        pytest.skip(f"needs a kernel that lets this user make a network namespace: {error.message}")


def test_without_network_a_child_keeps_its_user_and_loses_every_interface() -> None:
    needs_namespaces()
    identity = Identity(65534, 59817) if AS_ROOT else None
    looking = shell("id -u; cat /proc/net/dev; cat /proc/net/route", identity=identity, network=False)
    user, *lines = process.run(looking, timeout_s=10).stdout.splitlines()
    assert user == ("65534" if AS_ROOT else str(os.getuid()))
    interfaces = [line.split(":")[0].strip() for line in lines if ":" in line]
    assert interfaces == ["lo"]
