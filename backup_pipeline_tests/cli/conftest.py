"""A protected database, the place that an operator works in, and the program itself."""

import contextlib
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline import cli
from backup_pipeline.config import Secret
from backup_pipeline.engines.postgres.cluster import FREE_PORT, LocalCluster
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline_tests.actions.box import Box, a_box
from backup_pipeline_tests.cli.place import SECRET, TEXT, Ran, Run
from backup_pipeline_tests.servers import postgres as servers


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs `backup-pipeline` with these arguments, in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def run_(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["backup-pipeline", *args])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        shown = capsys.readouterr()
        assert isinstance(code, int)
        assert SECRET not in shown.out + shown.err
        return Ran(code, shown.out, shown.err)

    yield run_
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def shared(
    postgres: LocalCluster, other_server: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    """A source, with the configuration that protects it beside its store."""
    folder = tmp_path_factory.mktemp("cli")
    with a_box(postgres, folder / "store", scratch=other_server) as made:
        text = TEXT.format(
            dsn=made.endpoint.dsn,
            server=postgres.endpoint().dsn,
            scratch=other_server.endpoint().dsn,
            bin_dir=postgres.bin_dir,
        )
        (folder / "backups.toml").write_text(text, encoding="utf-8")
        made.take("daily")
        yield made


@pytest.fixture(scope="session")
def other_server() -> Iterator[LocalCluster]:
    with servers.running_cluster(servers.bin_dir_17()) as cluster:
        yield cluster


@pytest.fixture
def place(shared: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the configuration and a store with one backup, which is the current one."""
    shutil.copytree(shared.store.root.parent, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.delenv("BACKUP_PIPELINE_CONFIG", raising=False)
    yield tmp_path / "place"
    name = shared.endpoint.database
    with contextlib.closing(connect(shared.cluster.endpoint())) as session:
        for extra in shared.databases() - {name}:
            session.execute(f'DROP DATABASE "{extra}" WITH (FORCE)'.encode())


@pytest.fixture(scope="session")
def guarded() -> Iterator[LocalCluster]:
    """A server that listens on TCP and asks for a password, with one database."""
    with private_folder() as folder:
        cluster = LocalCluster(
            servers.bin_dir_17(), folder / "cluster", relaxed=True, port=FREE_PORT, password=Secret(SECRET)
        )
        try:
            cluster.create()
            cluster.start()
            with contextlib.closing(connect(cluster.endpoint())) as session:
                session.execute('CREATE DATABASE "My Shop"')
            with contextlib.closing(connect(cluster.endpoint("My Shop"))) as session:
                session.execute("CREATE TABLE public.orders AS SELECT n FROM generate_series(1, 10) n")
            yield cluster
        finally:
            cluster.stop()
