"""Clusters of our own: made, reached, stopped, removed, and never left behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline import confinement
from backup_pipeline.config import Secret
from backup_pipeline.engines.postgres.cluster import FREE_PORT, LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect, read_server_info
from backup_pipeline.errors import ConfigError, ServerError, ToolError
from backup_pipeline_tests.engines.zoo import execute
from backup_pipeline_tests.servers.postgres import bin_dir_17
from backup_pipeline_tests.waiting import is_gone, wait_until

AS_ROOT = os.getuid() == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server's user may enter, whoever runs the tests."""
    with private_folder() as own:
        yield own


@contextlib.contextmanager
def started(cluster: LocalCluster) -> Iterator[LocalCluster]:
    try:
        cluster.create()
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


def value(endpoint: Endpoint, query: str) -> object:
    with contextlib.closing(connect(endpoint)) as session:
        row = session.execute(query.encode()).fetchone()
        return row[0] if row else None


def test_a_cluster_numbers_its_objects_from_where_it_is_told(folder: Path) -> None:
    with started(LocalCluster(bin_dir_17(), folder / "c", relaxed=True, first_oid=2_000_000_000)) as cluster:
        execute(cluster.endpoint(), "CREATE TABLE public.t ()")
        number = value(cluster.endpoint(), "SELECT 'public.t'::regclass::oid::bigint")
        assert 2_000_000_000 <= int(str(number)) < 2_000_100_000


def test_a_relaxed_cluster_has_room_for_locks_on_many_tables(postgres: LocalCluster) -> None:
    assert value(postgres.endpoint(), "SELECT current_setting('max_locks_per_transaction')::int") == 2048


def test_a_running_cluster_answers_and_says_what_it_is(postgres: LocalCluster) -> None:
    with contextlib.closing(connect(postgres.endpoint())) as session:
        info = read_server_info(session)
    assert (info.major, info.in_recovery, info.is_superuser) == (17, False, True)
    assert info.system_identifier.isdigit()


def test_a_fresh_database_is_empty(database: Endpoint) -> None:
    query = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert value(database, query) == 0


def test_the_relaxed_cluster_listens_nowhere_and_writes_lazily(postgres: LocalCluster) -> None:
    for name, wanted in (
        ("listen_addresses", ""),
        ("fsync", "off"),
        ("archive_mode", "off"),
        ("autovacuum", "off"),
    ):
        assert value(postgres.endpoint(), f"SELECT current_setting('{name}')") == wanted
    with pytest.raises(ServerError, match="no TCP port"):
        postgres.endpoint(tcp=True)


@pytest.mark.skipif(not AS_ROOT, reason="needs root: the server runs as another user only then")
def test_run_as_root_the_server_is_nobody_in_a_group_of_its_own(postgres: LocalCluster) -> None:
    status = postgres.data.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (65534, 0o700)
    assert status.st_gid not in {0, 65534}
    assert (postgres.folder.stat().st_uid, postgres.folder.stat().st_mode & 0o777) == (0, 0o710)
    looking = subprocess.run(
        ["/bin/ls", postgres.folder], user=65534, group=65534, extra_groups=[], check=False
    )
    assert looking.returncode != 0


def test_a_lasting_cluster_keeps_its_data_and_asks_for_a_password_by_tcp(folder: Path) -> None:
    cluster = LocalCluster(
        bin_dir_17(), folder / 'a cluster\'s "own" folder', port=FREE_PORT, password=Secret("s3cret")
    )
    with started(cluster):
        assert value(cluster.endpoint(), "SELECT current_setting('fsync')") == "on"
        with contextlib.closing(connect(cluster.endpoint(tcp=True))) as session:
            session.execute("CREATE DATABASE kept")
        without = Endpoint(cluster.endpoint(tcp=True).dsn, Secret("wrong"))
        with pytest.raises(ServerError, match="password authentication failed"):
            connect(without)
        cluster.stop()
        assert not list(cluster.folder.glob("backup-*"))
        cluster.create()
        cluster.start()
        assert value(cluster.endpoint("kept"), "SELECT 1") == 1
        assert not (cluster.folder / "data.password").exists()


def test_a_second_server_in_the_same_folder_is_refused(folder: Path) -> None:
    with started(LocalCluster(bin_dir_17(), folder / "c", relaxed=True)) as cluster:
        second = LocalCluster(bin_dir_17(), folder / "c", relaxed=True)
        with pytest.raises(ToolError, match=r"a server runs in .* already"):
            second.start(timeout_s=0.1)
        assert value(cluster.endpoint(), "SELECT 1") == 1


def test_a_port_without_a_password_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="accept anyone"):
        LocalCluster(bin_dir_17(), folder / "c", port=FREE_PORT).create()


def test_a_half_made_cluster_is_made_anew(folder: Path) -> None:
    (folder / "c" / "data.new" / "base").mkdir(parents=True)
    with started(LocalCluster(bin_dir_17(), folder / "c", relaxed=True)) as cluster:
        assert value(cluster.endpoint(), "SELECT 1") == 1


def test_a_long_path_gets_its_socket_elsewhere_and_loses_it_again(folder: Path) -> None:
    cluster = LocalCluster(bin_dir_17(), folder / ("long" * 25), relaxed=True)
    with started(cluster):
        elsewhere = Path(cluster.endpoint().conninfo["host"])
        assert value(cluster.endpoint(), "SELECT 1") == 1
        assert not elsewhere.is_relative_to(folder)
    assert not elsewhere.exists()


def test_a_server_that_cannot_start_says_why(folder: Path) -> None:
    cluster = LocalCluster(bin_dir_17(), folder / "c", relaxed=True, settings={"shared_buffers": "nonsense"})
    cluster.create()
    with pytest.raises(ToolError, match="postgres ended with exit code 1") as failed:
        cluster.start()
    assert "shared_buffers" in str(failed.value.detail["stderr"])


@pytest.mark.skipif(not AS_ROOT, reason="needs root: a plain user runs the programs it can read")
def test_programs_that_the_servers_user_cannot_read_are_copied(folder: Path) -> None:
    closed = Path(tempfile.mkdtemp())  # 0700
    try:
        shutil.copytree(Path(bin_dir_17()).parent, closed / "pg", symlinks=True)
        with started(LocalCluster(str(closed / "pg" / "bin"), folder / "c", relaxed=True)) as cluster:
            assert value(cluster.endpoint(), "SELECT 1") == 1
            assert (cluster.folder / "postgresql" / "bin" / "postgres").exists()
    finally:
        shutil.rmtree(closed)


@pytest.mark.skipif(not confinement.available(), reason="takes a Linux with Landlock")
def test_a_server_that_cannot_run_confined_runs_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where its libraries lie neither beside it nor in the system's folders.
    monkeypatch.setattr(confinement, "SYSTEM", ())
    cluster = LocalCluster(bin_dir_17(), folder / "c", relaxed=True, confined=True)
    with started(cluster):
        assert value(cluster.endpoint(), "SELECT 1") == 1
        assert not cluster.hidden


@pytest.mark.skipif(not AS_ROOT, reason="needs root: the server runs as another user only then")
def test_a_folder_that_the_servers_user_may_not_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(ToolError, match=f"may not enter {tmp_path}") as refused:
        LocalCluster(bin_dir_17(), tmp_path / "c").create()
    assert "TMPDIR" in refused.value.hint


MAKES_ONE = """
import sys, time
from pathlib import Path
from backup_pipeline.engines.postgres.cluster import LocalCluster
cluster = LocalCluster(sys.argv[1], Path(sys.argv[2]), relaxed=sys.argv[3] == "relaxed")
cluster.create()
cluster.start()
print((cluster.data / "postmaster.pid").read_text().split()[0], flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: its kernel ends a child with its parent")
@pytest.mark.parametrize("kind", ["relaxed", "lasting"])
def test_a_server_ends_with_a_parent_that_is_killed(folder: Path, kind: str) -> None:
    argv = [sys.executable, "-c", MAKES_ONE, bin_dir_17(), str(folder / "c"), kind]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: is_gone(pid), within_s=10)
    log = (folder / "c" / "server.log").read_text()
    assert ("immediate" if kind == "relaxed" else "database system is shut down") in log
