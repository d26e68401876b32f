"""The runbook's commands for a whole cluster, run as they stand, by the user that will run the server."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.engines.postgres import daemon
from backup_pipeline.engines.postgres.cluster import free_port, server_identity, server_in
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.s3 import S3Store
from backup_pipeline.storage.store import Store
from backup_pipeline_tests.actions.box import ask, execute
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.actions.recovery_box import NAME, RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.servers.s3 import rclone_s3
from backup_pipeline_tests.wal.box import python_for

RESTORE = (Path(__file__).parents[1] / "docs" / "restore.md").read_text(encoding="utf-8")
CHAIN = "## 10. An incremental base backup, without this software"
ONE, WHOLE = "## 5. One database, to the second", "## 6. The whole cluster, to the second"
PROMOTED, BY_HAND = (
    "## 7. A recovered cluster as the new production",
    "## 9. A cluster, without this software",
)
PATIENCE_S = 120
PLACED = "2026-02-28"


@dataclass(frozen=True)
class Place:
    """A store, as the runbook's reader reaches it."""

    store: Store
    url: str
    options: str  # of backup-pipeline, without a configuration
    environment: dict[str, str]
    by_hand: dict[str, str]  # what to write for an example of the runbook: one of its two ways to fetch


@contextlib.contextmanager
def a_place(kind: str, folder: Path) -> Iterator[Place]:
    if kind == "folder":
        store = folder / "store"
        store.mkdir()
        by_hand = {"aws s3 cp": ": aws s3 cp", "/srv/backups": str(store)}
        url = store.as_uri()
        yield Place(DirectoryStore(store), url, f"--store {url}", {}, by_hand)
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
        yield Place(S3Store(config), config.url, options, environment, by_hand)


@dataclass
class Night:
    """A store, and a folder of the one who reads the runbook."""

    box: RecoveryBox
    place: Place
    folder: Path
    python: str

    def run(self, section: str, changes: Mapping[str, str], *, live: bool = False) -> str:
        """The commands of a section, with its example's names and times replaced by what is there.

        `live`: the reader's client speaks to the live server where it is told no other.
        """
        told = RESTORE.partition(section)[2].partition("\n## ")[0]
        script = "\n".join(re.findall(r"^    (.*)$", told, re.MULTILINE))
        for example, real in changes.items():
            assert example in script, f"{section} has no {example}"
            script = script.replace(example, real)
        if isinstance(self.box.store, DirectoryStore):
            for path in (self.box.store.root, *self.box.store.root.rglob("*")):
                give(path)
        environment = {
            "PATH": f"{self.folder}:{self.box.cluster.bin_dir}:{os.environ['PATH']}",
            "PGUSER": "postgres",
            "HOME": str(self.folder),
            "PGPORT": str(free_port()),
            "TMPDIR": str(self.folder),
            **self.place.environment,
            **(self.box.cluster.endpoint().environment() if live else {}),
        }
        command = Command(
            ("bash", "-euo", "pipefail", "-c", script), environment, server_identity(), cwd=str(self.folder)
        )
        return process.run(command, timeout_s=PATIENCE_S).stdout

    def install(self, name: str, module: str) -> None:
        """A program on the reader's PATH: a module, and what it is called with."""
        program = self.folder / name
        program.write_text(f'#!/bin/sh\nexec {self.python} -I -m {module} "$@"\n')
        program.chmod(0o755)
        give(program)


@contextlib.contextmanager
def a_night(kind: str, **settings: str) -> Iterator[Night]:
    with private_folder() as folder, a_place(kind, folder) as place:
        own = folder / "own"
        own.mkdir()
        give(own)
        with a_recovery_box(servers.bin_dir_17(), place.store, **settings) as box:
            night = Night(box, place, own, python_for(server_identity(), folder))
            night.install("backup-pipeline", f"backup_pipeline.cli {place.options}")
            night.install("aws", "awscli")
            yield night


@pytest.fixture(scope="module", params=["folder", "s3"])
def night(request: pytest.FixtureRequest) -> Iterator[Night]:
    with a_night(request.param) as made:
        live_through(made.box)
        yield made


def live_through(box: RecoveryBox) -> None:
    """Three rows in the ledger, two of them after the base backup, then the orders lost; all archived.."""
    execute(box.cluster.endpoint(), "CREATE DATABASE agentweave")
    agentweave = box.cluster.endpoint("agentweave")
    execute(agentweave, f"CREATE TABLE public.orders AS SELECT timestamptz '{PLACED}' AS placed_at")
    box.commit(1)
    box.take()
    box.commit(2)
    execute(agentweave, "DROP TABLE public.orders")
    box.switch()


def test_one_database_comes_back_by_the_commands_that_are_told(night: Night) -> None:
    live = night.box.cluster.endpoint()
    changes = {
        "2026-03-01T01:59:59Z": night.box.ledger[1].at.isoformat(),
        "--one-database": f"--server '{live.dsn}' --one-database",
    }
    said = night.run(ONE, changes, live=True)
    assert "equal" in said
    placed = "SELECT to_char(placed_at, 'YYYY-MM-DD') FROM public.orders"
    assert ask(night.box.cluster.endpoint("agentweave"), placed) == PLACED
    wrong = night.box.cluster.endpoint("agentweave_wrong")
    assert ask(wrong, "SELECT to_regclass('public.orders') IS NULL") is True
    execute(live, "DROP DATABASE agentweave")
    execute(live, "ALTER DATABASE agentweave_wrong RENAME TO agentweave")


def test_the_whole_cluster_comes_back_by_the_commands_that_are_told(night: Night) -> None:
    into = night.folder / "recovered"
    changes = {
        "2026-03-01T01:59:59Z": night.box.ledger[1].at.isoformat(),
        "/var/lib/postgresql/17/recovered": str(into),
        "/tmp/recovered.log": str(night.folder / "log"),
        "/usr/lib/postgresql/17/bin/": "",
    }
    said = night.run(WHOLE, changes)
    assert "consistent at" in said
    assert PLACED in said
    assert server_in(into) is None


def test_a_recovered_cluster_becomes_production_by_the_commands_that_are_told() -> None:
    with a_night("folder") as night:
        box, into, sockets = night.box, night.folder / "recovered", night.folder / "sockets"
        sockets.mkdir()
        give(sockets)
        new = Endpoint(f"host={sockets} port={free_port()} user=postgres dbname=postgres")
        with (box.cluster.data / "postgresql.conf").open("a") as conf:
            conf.write(
                f"listen_addresses = ''\nport = {new.address[1]}\nunix_socket_directories = '{sockets}'\n"
            )
        live_through(box)
        dsn, config = box.cluster.endpoint().dsn, night.folder / "backups.toml"
        config.write_text(
            f"[store]\nurl = '{night.place.url}'\n"
            f"[clusters.main]\ndsn = \"{dsn}\"\ndata_directory = '{into}'\n"
            f"socket = '{night.folder}/main.sock'\n"
        )
        night.install("backup-pipeline", f"backup_pipeline.cli --config {config}")
        target = {"--to 2026-03-01T01:59:59Z": f"--to {box.ledger[1].at.isoformat()}"}
        there = {"/var/lib/postgresql/17/recovered": str(into)}
        look = {"/tmp/recovered.log": f"{night.folder}/log", "/usr/lib/postgresql/17/bin/": ""}
        night.run(WHOLE, target | there | look)
        with pytest.raises(ToolError, match="may be alive"):
            night.run(PROMOTED, there)
        box.cluster.stop()
        seen = {"promote main": "promote main --source-is-gone --confirm main"}  # by us, with our own eyes
        try:
            said = night.run(PROMOTED, seen | there)
            assert f"new production of main: {into}" in said
            assert ask(new, "SELECT max(number) FROM public.ledger") == 2
            assert ask(new, "SHOW archive_mode") == "on"
        finally:
            daemon.stop(f"{box.cluster.bin_dir}/pg_ctl", into, owner=server_identity())
        assert len(base_backups.list_base_backups(box.store, NAME, fresh=True).backups) == 2


def test_a_cluster_comes_back_without_this_software(night: Night) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd: apt-get install zstd")
    (backup,) = base_backups.list_base_backups(night.box.store, NAME).backups
    script = {
        **night.place.by_hand,
        "<stamp>": backup.id.stamp,
        "<system>": backup.manifest.system_identifier,
        "2026-03-01 01:59:59+00": str(night.box.ledger[1].at),
        "-c 'SELECT pg_is_in_recovery()' postgres": "-At -c "
        "'SELECT pg_is_in_recovery(), max(number) FROM ledger' postgres; pg_ctl -D recovered -w stop",
    }
    shutil.rmtree(night.folder / "recovered", ignore_errors=True)
    said = night.run(BY_HAND, script)
    assert "base.tar.zst: OK" in said
    assert "f|2" in said
    assert server_in(night.folder / "recovered") is None


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_chain_is_combined_without_this_software(kind: str) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd: apt-get install zstd")
    with a_night(kind, summarize_wal="on") as night:
        box = night.box
        fast = box.folder.parent / "fast"
        fast.mkdir(mode=0o700)
        execute(box.cluster.endpoint(), f"CREATE TABLESPACE fast LOCATION '{give(fast)}'")
        execute(box.cluster.endpoint(), "CREATE TABLE public.there TABLESPACE fast AS SELECT 1 AS a")
        stamps = [box.take().stamp, box.take(incremental=True).stamp, box.take(incremental=True).stamp]
        oid = ask(box.cluster.endpoint(), "SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")
        changes = dict(zip(("<oldest>", "<next>", "<newest>"), stamps, strict=True))
        moved = f'-T "$PWD/links/{stamps[2]}.{oid}={night.folder}/fast"'
        changes |= {**night.place.by_hand, "-o recovered": f"-o recovered {moved}"}
        said = night.run(CHAIN, changes)
    assert said.count("base.tar.zst: OK") == 3
    assert said.count("backup successfully verified") == 4
