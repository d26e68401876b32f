"""A cluster's agent and client: in this process for speed, or as the processes that an operator starts."""

import contextlib
import os
import site
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.config import ClusterConfig, Config, StoreConfig
from backup_pipeline.config_file import parse
from backup_pipeline.engines.postgres.cluster import runs_as
from backup_pipeline.process import Command, Completed, Identity
from backup_pipeline.storage.store import Store, open_store
from backup_pipeline.wal import client
from backup_pipeline.wal.agent import Agent, AgentConfig
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.identity import System, claim
from backup_pipeline.wal.status import ask_agent
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.segments import SEGMENT_BYTES, SYSTEM

CLIENT = str(Path(client.__file__).absolute())
NOWHERE = "postgresql://nobody@127.0.0.1:1/postgres"


def now() -> datetime:
    return datetime.now(UTC)


def begin(store: Store) -> None:
    """Begin the archive of `main` for the data directories of segments.py, as `wal setup` does."""
    claim(store, "main", System(SYSTEM, SEGMENT_BYTES), at=now())


@dataclass
class WalBox:
    """A configuration with cluster `main`, below `folder`, as one user sees it."""

    folder: Path
    place: StoreConfig
    dsn: str = NOWHERE
    data_directory: str = ""
    push_timeout: str = "20s"
    receive: str = ""  # an inline table
    identity: Identity | None = None
    python: str = sys.executable
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        lines = ["[store]", f'url = "{self.place.url}"', f'timeout = "{self.place.timeout_s:g}s"']
        if self.place.endpoint:
            lines += [f'endpoint = "{self.place.endpoint}"', f'region = "{self.place.region}"']
        for name, secret in (
            ("access_key_id", self.place.access_key_id),
            ("secret_access_key", self.place.secret_access_key),
        ):
            if secret is not None:
                file = self.path.parent / name
                file.write_text(secret.reveal(), encoding="utf-8")
                lines.append(f'{name} = {{ file = "{file}" }}')
        lines += ["[clusters.main]", f'dsn = "{self.dsn}"', f'push_timeout = "{self.push_timeout}"']
        lines += [f'socket = "{self.socket}"', f'data_directory = "{self.data_directory}"']
        lines += [f"receive = {self.receive}"] if self.receive else []
        return "\n".join(lines)

    @property
    def path(self) -> Path:
        return self.folder / "etc" / "backups.toml"

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "main.sock"

    @property
    def config(self) -> Config:
        return parse(self.path.read_text(encoding="utf-8"), self.path)

    @property
    def cluster(self) -> ClusterConfig:
        return self.config.cluster("main")

    @property
    def store(self) -> Store:
        return open_store(self.place)

    # Commands

    def client_argv(self, path: str, *, timeout_s: float = 30.0) -> tuple[str, ...]:
        options = ("--socket", str(self.socket), "--config", str(self.path), "--cluster", "main")
        return (self.python, "-I", "-S", CLIENT, "push", *options, "--timeout", f"{timeout_s:g}", path)

    def push(self, path: Path, *, timeout_s: float = 30.0) -> Completed:
        """Run the client as PostgreSQL does: in the data directory, with a relative path."""
        data = path.parent.parent
        argv = self.client_argv(f"pg_wal/{path.name}", timeout_s=timeout_s)
        return process.run(Command(argv, cwd=str(data), identity=self.identity), timeout_s=100.0, check=False)

    def program(self, *args: str) -> Command:
        argv = (self.python, "-I", "-m", "backup_pipeline.cli", "--config", str(self.path), *args)
        return Command(argv, identity=self.identity, cwd="/")

    @contextlib.contextmanager
    def agent_process(self) -> Iterator["subprocess.Popen[bytes]"]:
        """`backup-pipeline wal agent main`, ended at the end."""
        with (self.folder / "agent.log").open("ab") as log:
            child = process.start(self.program("wal", "agent", "main"), stderr=log)
        try:
            self.await_agent(child)
            yield child
        finally:
            process.terminate(child, grace_s=10.0)

    def await_agent(self, child: "subprocess.Popen[bytes]") -> None:
        def answers() -> bool:
            assert child.poll() is None, (self.folder / "agent.log").read_text()
            return ask_agent(self.cluster).answers

        wait_until(answers)

    def listens(self) -> bool:
        """Whether somebody takes connections at the socket: its file is there a moment earlier."""
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.socket))
            except OSError:
                return False
        return True

    @contextlib.contextmanager
    def agent(self, archive: WalArchive | None = None, *, push_timeout_s: float = 20.0) -> Iterator[Agent]:
        """An agent that is a thread of ours."""
        archive = archive or WalArchive(self.store, "main")
        served = Agent(AgentConfig(self.socket, "main", push_timeout_s, "1.2"), archive, log=self.said.append)
        with meanwhile(served.serve, begun=self.listens, ends_within_s=30.0):
            yield served


def python_for(identity: Identity | None, folder: Path) -> str:
    """A Python with all of ours that a server's user can run; where none is to be had, the test is skipped.

    When that of the tests lies in root's home: the system's, with the same packages.
    """
    if runs_as(Path(sys.executable), identity):
        return sys.executable
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    system = Path("/usr/bin") / version
    if not system.exists() or not os.access(Path(CLIENT), os.R_OK):
        pytest.skip(f"needs a {version} that user nobody may run")
    packages = folder / "python" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (folder / "python" / "bin").mkdir()
    (folder / "python" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "python" / "bin" / "python").symlink_to(system)
    places = [str(Path(CLIENT).parents[2]), *site.getsitepackages()]
    (packages / "ours.pth").write_text("\n".join(places))
    return str(folder / "python" / "bin" / "python")
