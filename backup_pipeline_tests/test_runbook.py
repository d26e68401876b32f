"""The runbook's commands for a whole cluster, run as they stand, by the user that will run the server."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.engines.postgres.cluster import free_port, server_identity, server_in
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.process import Command
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import ask, execute
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.actions.recovery_box import NAME, RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.wal.box import python_for

RESTORE = (Path(__file__).parents[1] / "docs" / "restore.md").read_text(encoding="utf-8")
CHAIN = "## 10. An incremental base backup, without this software"
WHOLE, BY_HAND = "## 6. The whole cluster, to the second", "## 9. A cluster, without this software"
PATIENCE_S = 120


@dataclass
class Night:
    """A store, and a folder of the one who reads the runbook."""

    box: RecoveryBox
    store: Path
    folder: Path

    def run(self, section: str, **changes: str) -> str:
        """The commands of a section, with its example's names and times replaced by what is there."""
        told = RESTORE.partition(section)[2].partition("\n## ")[0]
        script = "\n".join(re.findall(r"^    (.*)$", told, re.MULTILINE))
        for example, real in changes.items():
            assert example in script, f"{section} has no {example}"
            script = script.replace(example, real)
        environment = {
            "PATH": f"{self.folder}:{self.box.cluster.bin_dir}:{os.environ['PATH']}",
            "PGUSER": "postgres",
            "HOME": str(self.folder),
            "PGPORT": str(free_port()),
        }
        command = Command(
            ("bash", "-euo", "pipefail", "-c", script), environment, server_identity(), cwd=str(self.folder)
        )
        return process.run(command, timeout_s=PATIENCE_S).stdout


@pytest.fixture(scope="module")
def night() -> Iterator[Night]:
    """Three rows, the last two after the base backup; all archived."""
    with private_folder() as folder:
        store, own = folder / "store", folder / "own"
        store.mkdir()
        own.mkdir()
        with a_recovery_box(servers.bin_dir_17(), DirectoryStore(store)) as box:
            box.commit(1)
            box.take()
            box.commit(2)
            box.switch()
            python = python_for(server_identity(), folder)
            program = own / "backup-pipeline"
            program.write_text(
                f'#!/bin/sh\nexec {python} -I -m backup_pipeline.cli --store file://{store} "$@"\n'
            )
            program.chmod(0o755)
            for path in (own, program, store, *store.rglob("*")):
                give(path)
            yield Night(box, store, own)


def test_the_whole_cluster_comes_back_by_the_commands_that_are_told(night: Night) -> None:
    into = night.folder / "recovered"
    changes = {
        "2026-03-01T01:59:59Z": night.box.ledger[1].at.isoformat(),
        "/var/lib/postgresql/17/recovered": str(into),
        "/tmp/recovered.log": str(night.folder / "log"),
        "/usr/lib/postgresql/17/bin/": "",
        "'SELECT max(placed_at) FROM orders' agentweave": "'SELECT max(number) FROM ledger' -At postgres",
    }
    said = night.run(WHOLE, **changes)
    assert "consistent at" in said
    assert "\n2\n" in said
    assert server_in(into) is None


def test_a_cluster_comes_back_without_this_software(night: Night) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd: apt-get install zstd")
    (backup,) = base_backups.list_base_backups(DirectoryStore(night.store), NAME).backups
    script = {
        "aws s3 cp": ": aws s3 cp",  # the store is in a folder
        "/srv/backups": str(night.store),
        "<stamp>": backup.id.stamp,
        "<system>": backup.manifest.system_identifier,
        "2026-03-01 01:59:59+00": str(night.box.ledger[1].at),
        "-c 'SELECT pg_is_in_recovery()' postgres": "-At -c "
        "'SELECT pg_is_in_recovery(), max(number) FROM ledger' postgres; pg_ctl -D recovered -w stop",
    }
    shutil.rmtree(night.folder / "recovered", ignore_errors=True)
    said = night.run(BY_HAND, **script)
    assert "base.tar.zst: OK" in said
    assert "f|2" in said
    assert server_in(night.folder / "recovered") is None


def test_a_chain_is_combined_without_this_software() -> None:
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd: apt-get install zstd")
    with private_folder() as folder:
        store, own = folder / "store", folder / "own"
        store.mkdir()
        own.mkdir()
        give(own)
        with a_recovery_box(servers.bin_dir_17(), DirectoryStore(store), summarize_wal="on") as box:
            fast = box.folder.parent / "fast"
            fast.mkdir(mode=0o700)
            execute(box.cluster.endpoint(), f"CREATE TABLESPACE fast LOCATION '{give(fast)}'")
            execute(box.cluster.endpoint(), "CREATE TABLE public.there TABLESPACE fast AS SELECT 1 AS a")
            stamps = [box.take().stamp, box.take(incremental=True).stamp, box.take(incremental=True).stamp]
            oid = ask(box.cluster.endpoint(), "SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")
            for path in store.rglob("*"):
                give(path)
            changes = dict(zip(("<oldest>", "<next>", "<newest>"), stamps, strict=True))
            moved = f'-T "$PWD/links/{stamps[2]}.{oid}={own}/fast"'
            changes |= {
                "aws s3 cp": ": aws s3 cp",
                "/srv/backups": str(store),
                "-o recovered": f"-o recovered {moved}",
            }
            said = Night(box, store, own).run(CHAIN, **changes)
    assert said.count("base.tar.zst: OK") == 3
    assert said.count("backup successfully verified") == 4
