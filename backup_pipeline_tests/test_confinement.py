"""A confined child touches what it was given, and nothing else, whoever runs it."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline import confinement, process
from backup_pipeline.confinement import DEVICES, SYSTEM, Confinement
from backup_pipeline.engines.postgres.cluster import server_identity
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command
from backup_pipeline.spool import private_folder

pytestmark = pytest.mark.skipif(
    not confinement.available(), reason="takes a Linux of 5.19 or newer with Landlock in its lsm= list"
)


@pytest.fixture
def own() -> Iterator[Path]:
    """A folder that the child may write, beside one that it may not; both are open to every user."""
    with private_folder("confinement") as folder:
        folder.chmod(0o711)
        for name in ("own", "other"):
            (folder / name).mkdir()
            (folder / name).chmod(0o777)
        (folder / "other" / "secret").write_text("hush")
        (folder / "other" / "secret").chmod(0o666)
        yield folder / "own"


def shell(own: Path, script: str, *, network: bool = True) -> process.Completed:
    command = Command(
        ("/bin/sh", "-c", script),
        identity=server_identity(),
        cwd="/",
        confinement=Confinement(SYSTEM, (*DEVICES, str(own)), network=network),
    )
    return process.run(command, timeout_s=20, check=False)


def test_its_own_folder_is_all_that_it_writes(own: Path) -> None:
    done = shell(
        own, f"cd {own} && mkdir a b && echo x > a/f && mv a/f b/g && cat b/g && rm b/g && rmdir a b"
    )
    assert (done.returncode, done.stdout) == (0, "x\n"), done.stderr
    for script in (
        "cat secret",
        "echo x > secret",
        "echo x >> secret",
        "rm secret",
        "mkdir d",
        "ls",
        "> new",
    ):
        done = shell(own, f"cd /; cd {own.parent / 'other'} && {script}")
        assert done.returncode != 0, script
        assert "ermission denied" in done.stderr, script
    assert (own.parent / "other" / "secret").read_text() == "hush"
    assert [path.name for path in (own.parent / "other").iterdir()] == ["secret"]


def test_what_it_starts_is_confined_like_it(own: Path) -> None:
    done = shell(own, f"/bin/sh -c 'cat {own.parent / 'other' / 'secret'}'")
    assert "hush" not in done.stdout
    assert "ermission denied" in done.stderr


@pytest.mark.skipif(confinement.version() < 6, reason="takes a Linux of 6.12 or newer")
def test_it_neither_reads_nor_ends_other_processes(own: Path) -> None:
    child = subprocess.Popen(["/bin/sleep", "60"], env={"SECRET": "hush"})
    try:
        done = shell(own, f"cat /proc/{child.pid}/environ; kill {child.pid}")
        assert "hush" not in done.stdout
        assert done.returncode != 0
        assert child.poll() is None
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_a_kernel_that_cannot_is_no_reason_to_go_on(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "version", lambda: 1)
    with pytest.raises(ToolError, match="cannot keep a child from files"):
        shell(own, "true")


def test_handles_are_given_back(own: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        shell(own, "true")
    assert len(os.listdir("/proc/self/fd")) <= before
