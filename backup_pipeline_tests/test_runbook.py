"""The runbook's commands for a whole cluster, run as they stand, by the user that will run the server."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from backup_pipeline.engines.postgres import daemon
from backup_pipeline.engines.postgres.cluster import free_port, server_identity, server_in
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.errors import ToolError
from backup_pipeline.storage import base_backups
from backup_pipeline_tests.actions.box import ask, execute
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.actions.protected_box import NAME
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.runbook import Reader, a_reader
from backup_pipeline_tests.servers import postgres as servers

ONE, WHOLE, PROMOTED, BY_HAND, CHAIN = "5", "6", "7", "9", "10"
PLACED = "2026-02-28"


@dataclass(frozen=True)
class Night:
    """A cluster under continuous protection, and who reads the runbook."""

    box: RecoveryBox
    reader: Reader


@contextlib.contextmanager
def a_night(kind: str, **settings: str) -> Iterator[Night]:
    with (
        private_folder() as folder,
        a_reader(kind, folder, servers.bin_dir_17()) as reader,
        a_recovery_box(servers.bin_dir_17(), reader.place.store, **settings) as box,
    ):
        yield Night(box, reader)


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
    said = night.reader.run(ONE, changes, live)
    assert "equal" in said
    placed = "SELECT to_char(placed_at, 'YYYY-MM-DD') FROM public.orders"
    assert ask(night.box.cluster.endpoint("agentweave"), placed) == PLACED
    wrong = night.box.cluster.endpoint("agentweave_wrong")
    assert ask(wrong, "SELECT to_regclass('public.orders') IS NULL") is True
    execute(live, "DROP DATABASE agentweave")
    execute(live, "ALTER DATABASE agentweave_wrong RENAME TO agentweave")


def test_the_whole_cluster_comes_back_by_the_commands_that_are_told(night: Night) -> None:
    into = night.reader.folder / "recovered"
    changes = {
        "2026-03-01T01:59:59Z": night.box.ledger[1].at.isoformat(),
        "/var/lib/postgresql/17/recovered": str(into),
        "/tmp/recovered.log": str(night.reader.folder / "log"),
        "/usr/lib/postgresql/17/bin/": "",
    }
    said = night.reader.run(WHOLE, changes)
    assert "consistent at" in said
    assert PLACED in said
    assert server_in(into) is None


def test_a_recovered_cluster_becomes_production_by_the_commands_that_are_told() -> None:
    with a_night("folder") as night:
        box, into, sockets = night.box, night.reader.folder / "recovered", night.reader.folder / "sockets"
        sockets.mkdir()
        give(sockets)
        new = Endpoint(f"host={sockets} port={free_port()} user=postgres dbname=postgres")
        with (box.cluster.data / "postgresql.conf").open("a") as conf:
            conf.write(
                f"listen_addresses = ''\nport = {new.address[1]}\nunix_socket_directories = '{sockets}'\n"
            )
        live_through(box)
        dsn, config = box.cluster.endpoint().dsn, night.reader.folder / "backups.toml"
        config.write_text(
            f"[store]\nurl = '{night.reader.place.url}'\n"
            f"[clusters.main]\ndsn = \"{dsn}\"\ndata_directory = '{into}'\n"
            f"socket = '{night.reader.folder}/main.sock'\n"
        )
        night.reader.install("backup-pipeline", f"backup_pipeline.cli --config {config}")
        target = {"--to 2026-03-01T01:59:59Z": f"--to {box.ledger[1].at.isoformat()}"}
        there = {"/var/lib/postgresql/17/recovered": str(into)}
        look = {"/tmp/recovered.log": f"{night.reader.folder}/log", "/usr/lib/postgresql/17/bin/": ""}
        night.reader.run(WHOLE, target | there | look)
        with pytest.raises(ToolError, match="may be alive"):
            night.reader.run(PROMOTED, there)
        box.cluster.stop()
        seen = {"promote main": "promote main --source-is-gone --confirm main"}  # by us, with our own eyes
        try:
            said = night.reader.run(PROMOTED, seen | there)
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
        **night.reader.place.by_hand,
        "<stamp>": backup.id.stamp,
        "<system>": backup.manifest.system_identifier,
        "2026-03-01 01:59:59+00": str(night.box.ledger[1].at),
        "-c 'SELECT pg_is_in_recovery()' postgres": "-At -c "
        "'SELECT pg_is_in_recovery(), max(number) FROM ledger' postgres; pg_ctl -D recovered -w stop",
    }
    shutil.rmtree(night.reader.folder / "recovered", ignore_errors=True)
    said = night.reader.run(BY_HAND, script)
    assert "base.tar.zst: OK" in said
    assert "f|2" in said
    assert server_in(night.reader.folder / "recovered") is None


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
        stamps = [box.take(incremental=number > 0).id.stamp for number in range(3)]
        oid = ask(box.cluster.endpoint(), "SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")
        changes = dict(zip(("<oldest>", "<next>", "<newest>"), stamps, strict=True))
        moved = f'-T "$PWD/links/{stamps[2]}.{oid}={night.reader.folder}/fast"'
        changes |= {**night.reader.place.by_hand, "-o recovered": f"-o recovered {moved}"}
        said = night.reader.run(CHAIN, changes)
    assert said.count("base.tar.zst: OK") == 3
    assert said.count("backup successfully verified") == 4
