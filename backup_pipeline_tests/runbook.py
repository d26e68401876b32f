"""The runbook's sections as scripts: what docs/restore.md tells, run by its reader."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.engines.postgres.cluster import free_port, server_identity
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.process import Command
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.s3 import S3Store
from backup_pipeline.storage.store import Store
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.servers.s3 import rclone_s3
from backup_pipeline_tests.wal.box import python_for

RESTORE = (Path(__file__).parents[1] / "docs" / "restore.md").read_text(encoding="utf-8")
PATIENCE_S = 120


@dataclass(frozen=True)
class Place:
    """A store, as the runbook's reader reaches it."""

    store: Store
    url: str
    options: str  # of backup-pipeline, without a configuration
    lines: str  # of a configuration's [store], below its url
    environment: dict[str, str]
    by_hand: dict[str, str]  # what to write for an example of the runbook: one of its two ways to fetch


@contextlib.contextmanager
def a_place(kind: str, folder: Path) -> Iterator[Place]:
    if kind == "folder":
        store = folder / "store"
        store.mkdir()
        by_hand = {"aws s3 cp": ": aws s3 cp", "/srv/backups": str(store)}
        url = store.as_uri()
        yield Place(DirectoryStore(store), url, f"--store {url}", "", {}, by_hand)
        return
    with rclone_s3(folder / "s3") as server:
        config = server.store("prod")
        environment = {
            "AWS_ACCESS_KEY_ID": server.access_key_id,
            "AWS_SECRET_ACCESS_KEY": server.secret_access_key,
            "AWS_DEFAULT_REGION": server.region,
        }
        by_hand = {
            "cp -r /srv/backups": ": cp -r",
            "s3://agentweave-backups/prod": config.url,
            "https://s3.example.net": server.endpoint,
        }
        options = f"--store {config.url} --endpoint {server.endpoint}"
        yield Place(
            S3Store(config), config.url, options, f"endpoint = '{server.endpoint}'\n", environment, by_hand
        )


@dataclass(frozen=True)
class Reader:
    """Who reads the runbook: the user that runs the servers, in a folder of their own."""

    place: Place
    folder: Path
    python: str
    bin_dir: str

    def run(self, section: str, changes: Mapping[str, str], server: Endpoint | None = None) -> str:
        """The commands of a section, with its example's names and times replaced by what is there.

        `server` is the one that the reader's clients speak to where they are told no other.
        """
        told = RESTORE.partition(f"\n## {section}. ")[2].partition("\n## ")[0]
        script = "\n".join(re.findall(r"^    (.*)$", told, re.MULTILINE))
        for example, real in changes.items():
            assert example in script, f"section {section} has no {example}"
            script = script.replace(example, real)
        return self.do(script, server)

    def do(self, script: str, server: Endpoint | None = None) -> str:
        if isinstance(self.place.store, DirectoryStore):
            for path in (self.place.store.root, *self.place.store.root.rglob("*")):
                give(path)
        environment = {
            "PATH": f"{self.folder}:{self.bin_dir}:{os.environ['PATH']}",
            "PGUSER": "postgres",
            "HOME": str(self.folder),
            "PGPORT": str(free_port()),
            "TMPDIR": str(self.folder),
            **self.place.environment,
            **(server.environment() if server else {}),
        }
        command = Command(
            ("bash", "-euo", "pipefail", "-c", script), environment, server_identity(), cwd=str(self.folder)
        )
        return process.run(command, timeout_s=PATIENCE_S).stdout

    def install(self, name: str, module: str) -> None:
        """A program on the reader's PATH: a module, and what it is called with."""
        self.write(name, f'#!/bin/sh\nexec {self.python} -I -m {module} "$@"\n')

    def write(self, name: str, text: str) -> Path:
        """A file of the reader's, that may be run."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        give(path)
        return path


@contextlib.contextmanager
def a_reader(kind: str, folder: Path, bin_dir: str) -> Iterator[Reader]:
    """With a store below `folder`, in a directory or on a server, and no configuration."""
    with a_place(kind, folder) as place:
        own = folder / "own"
        own.mkdir()
        give(own)
        reader = Reader(place, own, python_for(server_identity(), folder), bin_dir)
        reader.install("backup-pipeline", f"backup_pipeline.cli {place.options}")
        reader.install("aws", "awscli")
        yield reader
