"""Who archives and fetches WAL here: what manuals and cron scripts say, pgBackRest, and ours.

Each is entered once for each turn, with a place of its own in the store, and gives the command that
PostgreSQL is to run. What it needs beside that, an agent or a server of fetches, runs while it is entered.
"""

import contextlib
import json
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.config_file import parse
from backup_pipeline.demo.place import BUCKET
from backup_pipeline.demo.servers import ACCESS_KEY
from backup_pipeline.process import Command
from backup_pipeline.wal import client
from backup_pipeline.wal.setup import archive_command
from backup_pipeline.wal.status import ask_agent
from benchmarks import pgbackrest
from benchmarks.as_server import CLUSTER
from benchmarks.wal_ground import Ground, aws, installed_pgbackrest

_CONFIG = """
[store]
url = "{url}"
{endpoint}

[clusters.main]
dsn = "{dsn}"
data_directory = "{data}"
socket = "{socket}"
bin_dir = "{bin_dir}"
"""
_ENDPOINT = """
endpoint = "{endpoint}"
region = "us-east-1"
access_key_id = {{ file = "{key}" }}
secret_access_key = {{ file = "{secret}" }}
"""
_WITHIN_S = 60.0
_LOOKED = "takes WAL of PostgreSQL"  # said when the agent has opened its store's clients

Turn = Callable[[Ground, str], AbstractContextManager[str]]
"""Entered with a name that no turn had before; gives archive_command or restore_command."""


@dataclass(frozen=True)
class Contender:
    """One line of a table; `few` where so slow that a few segments have to do."""

    key: str
    title: str
    push: Turn
    fetch: Turn | None = None
    few: bool = False


def wal_contenders() -> list[Contender]:
    """All that can be measured here; what cannot is told on standard error."""
    found = [
        Contender("nothing", "/bin/true", _nothing),
        Contender("cp", "cp, nothing synced", push_by_cp, fetch_by_cp),
        Contender("synced", "cp, and sync of the file and its folder", _push_by_cp_and_sync),
        Contender("directory", "ours, to a directory, synced", _push_to_directory, _fetch_from_directory),
        Contender("ours", "ours, to S3", push_by_ours, fetch_by_ours),
    ]
    if installed_pgbackrest():
        found.append(
            Contender("pgbackrest", "pgBackRest async, to S3", push_by_pgbackrest, fetch_by_pgbackrest)
        )
    else:
        print("pgBackRest is not measured: apt-get install pgbackrest", file=sys.stderr)
    found.append(Contender("aws", "aws s3 cp", _push_by_aws, _fetch_by_aws, few=True))
    return found


@contextlib.contextmanager
def _nothing(_ground: Ground, _turn: str) -> Iterator[str]:
    yield "/bin/true"


@contextlib.contextmanager
def push_by_cp(ground: Ground, turn: str) -> Iterator[str]:
    """As PostgreSQL's manual has it."""
    target = f"{shlex.quote(str(ground.made(turn)))}/%f"
    yield f'test ! -f {target} && cp "%p" {target}'


@contextlib.contextmanager
def _push_by_cp_and_sync(ground: Ground, turn: str) -> Iterator[str]:
    """The same, and durable."""
    folder = shlex.quote(str(ground.made(turn)))
    yield f'test ! -f {folder}/%f && cp "%p" {folder}/%f && sync {folder}/%f {folder}'


@contextlib.contextmanager
def fetch_by_cp(ground: Ground, turn: str) -> Iterator[str]:
    """As PostgreSQL's manual has it."""
    yield f'cp {shlex.quote(str(ground.folder / turn))}/%f "%p"'


def _aws_words(ground: Ground) -> str:
    lines = f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {ground.secret}\n"
    credentials = ground.write("aws.credentials", lines)
    config = ground.write("aws.config", "[default]\nrequest_checksum_calculation = when_required\n")
    variables = {
        **ground.environment(),
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "AWS_CONFIG_FILE": str(config),
        "AWS_REGION": "us-east-1",
    }
    program = [aws()] if ground.python == sys.executable else [ground.python, aws()]
    words = ("env", *(f"{name}={value}" for name, value in variables.items()), *program)
    return shlex.join((*words, "--endpoint-url", ground.endpoint, "s3", "cp", "--only-show-errors"))


@contextlib.contextmanager
def _push_by_aws(ground: Ground, turn: str) -> Iterator[str]:
    yield f'{_aws_words(ground)} "%p" s3://{BUCKET}/{turn}/%f'


@contextlib.contextmanager
def _fetch_by_aws(ground: Ground, turn: str) -> Iterator[str]:
    yield f'{_aws_words(ground)} s3://{BUCKET}/{turn}/%f "%p"'


@contextlib.contextmanager
def push_by_pgbackrest(ground: Ground, turn: str) -> Iterator[str]:
    program, config = installed_pgbackrest(), pgbackrest.configure(ground, turn)
    ground.run(pgbackrest.argv(program, config, "--no-online", "stanza-create"))
    words = pgbackrest.argv(program, config, "archive-push")
    yield f'{shlex.join(words)} "%p"'


@contextlib.contextmanager
def fetch_by_pgbackrest(ground: Ground, turn: str) -> Iterator[str]:
    config = pgbackrest.configure(ground, turn)
    words = pgbackrest.argv(installed_pgbackrest(), config, f"--pg1-path={ground.folder / 'replay' / 'data'}")
    yield f'{shlex.join((*words, "archive-get"))} %f "%p"'


@contextlib.contextmanager
def push_by_ours(ground: Ground, turn: str) -> Iterator[str]:
    with _agent(ground, ours_config(ground, f"s3://{BUCKET}/{turn}")) as command:
        yield command


@contextlib.contextmanager
def _push_to_directory(ground: Ground, turn: str) -> Iterator[str]:
    with _agent(ground, ours_config(ground, ground.made(turn).as_uri())) as command:
        yield command


@contextlib.contextmanager
def fetch_by_ours(ground: Ground, turn: str) -> Iterator[str]:
    with _fetches(ground, ours_config(ground, f"s3://{BUCKET}/{turn}")) as command:
        yield command


@contextlib.contextmanager
def _fetch_from_directory(ground: Ground, turn: str) -> Iterator[str]:
    with _fetches(ground, ours_config(ground, (ground.folder / turn).as_uri())) as command:
        yield command


def ours_config(ground: Ground, url: str) -> Path:
    """Our configuration for a store; the server, and the agent's place, are the same for all."""
    endpoint = ""
    if url.startswith("s3://"):
        endpoint = _ENDPOINT.format(
            endpoint=ground.endpoint,
            key=ground.write("ours.key", ACCESS_KEY),
            secret=ground.write("ours.secret", ground.secret),
        )
    values = {
        "url": url,
        "endpoint": endpoint,
        "dsn": ground.cluster.endpoint().dsn,
        "data": ground.cluster.data,
        "bin_dir": ground.cluster.bin_dir,
    }
    (ground.folder / "run").exists() or ground.made("run")
    return ground.write("backups.toml", _CONFIG.format(socket=ground.folder / "run" / "main.sock", **values))


@contextlib.contextmanager
def _agent(ground: Ground, path: Path) -> Iterator[str]:
    """An archive that was begun, and an agent that answers."""
    cluster = parse(path.read_text(encoding="utf-8"), path).cluster(CLUSTER)
    begin = (ground.python, "-m", "benchmarks.as_server", "begin", str(path), ground.system_identifier)
    ground.run(begin, ground.environment())
    with _serving(
        ground, ["-m", "backup_pipeline.cli", "--config", str(path), "wal", "agent", CLUSTER]
    ) as until:
        log = ground.folder / "ours.log"
        until(lambda: ask_agent(cluster).answers and _LOOKED in log.read_text(encoding="utf-8"))
        yield archive_command(cluster, path, python=ground.python)


@contextlib.contextmanager
def _fetches(ground: Ground, path: Path) -> Iterator[str]:
    """What answers restore_command during a recovery of ours."""
    spool, listens = (
        ground.folder / "replay" / "data" / "pg_wal" / "backup_pipeline",
        ground.folder / "run" / "fetch",
    )
    order = ground.write("order.json", json.dumps(ground.segments))
    arguments = ["fetch", str(path), ground.system_identifier, str(order), str(spool), str(listens)]
    with _serving(ground, ["-m", "benchmarks.as_server", *arguments]) as until:
        until(lambda: _listens(listens))
        yield (
            shlex.join((ground.python, "-I", "-S", client.__file__, "fetch", "--socket", str(listens)))
            + " %f %p"
        )


@contextlib.contextmanager
def _serving(ground: Ground, arguments: Sequence[str]) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """A process of ours that runs meanwhile; gives what waits until something is so."""
    command = Command(
        (ground.python, *arguments), ground.environment(), identity=ground.identity, cwd=str(ground.folder)
    )
    with (ground.folder / "ours.log").open("w+b") as log:
        child = process.start(command, stderr=log)

        def until(reached: Callable[[], bool]) -> None:
            deadline = time.monotonic() + _WITHIN_S
            while not reached():
                if child.poll() is not None or time.monotonic() > deadline:
                    raise process.failure(command, child.poll(), process.tail(log))
                time.sleep(0.02)

        try:
            yield until
        finally:
            process.terminate(child, grace_s=10.0)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return True
    return False
