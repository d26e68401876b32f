"""A real PostgreSQL that is set up, archives under load while its agent comes and goes, and is looked at."""

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.config import StoreConfig
from backup_pipeline.domain.wal import WalKind, parse_wal_name
from backup_pipeline.engines.postgres.archiving import find_missing, read_archiver, read_archiving
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import Refused
from backup_pipeline.process import Command, Completed
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.identity import System, claim, read_identity
from backup_pipeline.wal.listing import read_archive
from backup_pipeline.wal.setup import (
    archive_command,
    is_ours,
    refuse_elsewhere,
    refuse_unreadable,
    refuse_unseen,
)
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.archives import AT
from backup_pipeline_tests.wal.box import WalBox, python_for


@dataclass
class Archiving:
    """A server, and the configuration that its WAL is archived by; both of the server's user."""

    cluster: LocalCluster
    box: WalBox

    def command(self, *args: str) -> Completed:
        command = self.box.program(*args)
        return process.run(command, timeout_s=60, check=False)

    def execute(self, *statements: str) -> None:
        with contextlib.closing(connect(self.cluster.endpoint())) as session:
            for statement in statements:
                session.execute(statement.encode())


@contextlib.contextmanager
def archiving_cluster(bin_dir: str) -> Iterator[Archiving]:
    """A server with archiving on, and no archive_command yet; it keeps all WAL, to be compared."""
    identity = server_identity()
    settings = {
        "archive_mode": "on",
        "wal_level": "replica",
        "wal_keep_size": "2GB",
        "checkpoint_timeout": "30s",
    }
    with private_folder() as folder:
        cluster = LocalCluster(bin_dir, folder / "cluster", relaxed=True, settings=settings)
        try:
            cluster.create()
            cluster.start()
            place = folder / "box"
            (place / "store").mkdir(parents=True)
            box = WalBox(
                place,
                StoreConfig((place / "store").as_uri()),
                dsn=cluster.endpoint().dsn.replace('"', '\\"'),
                data_directory=str(cluster.data),
                identity=identity,
                python=python_for(identity, folder),
            )
            if identity is not None:
                for path in (place, *place.rglob("*")):
                    os.chown(path, identity.uid, identity.gid)
            yield Archiving(cluster, box)
        finally:
            cluster.stop()


@pytest.fixture(params=servers.OLDEST_AND_NEWEST)
def archiving(request: pytest.FixtureRequest) -> Iterator[Archiving]:
    """A server of more than one version."""
    with archiving_cluster(request.param()) as made:
        yield made


def segments_of(data: Path) -> dict[str, str]:
    """The digest of each finished segment in pg_wal, by name."""
    done = (path.name.removesuffix(".done") for path in (data / "pg_wal" / "archive_status").glob("*.done"))
    names = [name for name in done if parse_wal_name(name).kind is WalKind.SEGMENT]
    return {name: hashlib.sha256((data / "pg_wal" / name).read_bytes()).hexdigest() for name in names}


def waiting(data: Path) -> list[str]:
    return [path.name for path in (data / "pg_wal" / "archive_status").glob("*.ready")]


def write(archiving: Archiving, rounds: int) -> None:
    """Make so many segments, each with rows in it."""
    for _ in range(rounds):
        archiving.execute(
            "INSERT INTO public.load SELECT i, md5(random()::text) FROM generate_series(1, 20000) AS i",
            "SELECT pg_switch_wal()",
        )


def test_all_wal_is_archived_while_the_agent_comes_and_goes(archiving: Archiving, tmp_path: Path) -> None:
    box, data = archiving.box, archiving.cluster.data
    applied = archiving.command("wal", "setup", "main", "--apply")
    assert applied.returncode == 0, applied.stderr
    archiving.execute("CREATE TABLE public.load (i int, text text)")
    with box.agent_process() as agent:
        writer = threading.Thread(target=write, args=(archiving, 8))
        writer.start()
        wait_until(lambda: len(segments_of(data)) >= 3)
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        seen = len(segments_of(data))
        wait_until(lambda: len(segments_of(data)) > seen)  # by the full program
    with box.agent_process() as again:
        writer.join()
        write(archiving, 2)
        wait_until(lambda: not waiting(data))
        status = archiving.command("wal", "status", "main", "--json")
        again.terminate()
        assert again.wait(30) == 0
    there = segments_of(data)
    assert len(there) >= 10
    listed = read_archive(box.store, "main")
    archived = {each.segment.name(listed.segment_bytes): each.sha256 for each in listed.segments[1]}
    assert archived == there
    assert listed.gaps() == ()

    told = json.loads(status.stdout)
    assert (status.returncode, told["problems"], told["failed_count"]) == (0, [], 0)
    assert (told["ready"], told["newest"], told["agent"]["answers"]) == (0, max(there), True)
    assert told["archived_count"] == len(there)
    assert told["lag_bytes"] < listed.segment_bytes

    last = sorted(there)[-2]
    fetch(box.store, "main", last, tmp_path / last)
    waldump = Path(archiving.cluster.bin_dir) / "pg_waldump"
    dumped = process.run(Command((str(waldump), str(tmp_path / last))), timeout_s=60, check=False)
    assert "INSERT" in dumped.stdout


def test_setup_shows_sets_and_refuses(archiving: Archiving) -> None:
    box = archiving.box
    shown = archiving.command("wal", "setup", "main")
    assert (shown.returncode, "archive_command = '" in shown.stdout) == (0, True), shown.stderr
    assert f"# there is no WAL archive of main in {box.store.url} yet; --apply begins it" in shown.stdout
    assert "RESTART" not in shown.stdout  # archive_mode and wal_level are right already
    assert list(box.store.list("")) == []
    applied = archiving.command("wal", "setup", "main", "--apply")
    assert (applied.returncode, "set by ALTER SYSTEM" in applied.stdout) == (0, True)
    identity = read_identity(box.store, "main")
    assert identity is not None
    assert f"archive of main belongs to PostgreSQL system {identity.system_identifier}" in applied.stdout
    with contextlib.closing(connect(archiving.cluster.endpoint())) as session:
        found = read_archiving(session)
    assert found.settings["archive_command"] == archive_command(box.cluster, box.path, python=box.python)
    assert found.settings["archive_timeout"] == "60"
    again = archiving.command("wal", "setup", "main", "--apply")
    assert "# the server of main is set up" in again.stdout

    archiving.execute("ALTER SYSTEM SET archive_command = 'cp %p /elsewhere/%f'", "SELECT pg_reload_conf()")
    wait_until(lambda: "cp" in archiving.command("wal", "setup", "main").stderr)
    foreign = archiving.command("wal", "setup", "main", "--apply")
    assert (foreign.returncode, "cp %p /elsewhere/%f" in foreign.stderr) == (6, True)
    replaced = archiving.command("wal", "setup", "main", "--apply", "--replace-command")
    assert replaced.returncode == 0
    with contextlib.closing(connect(archiving.cluster.endpoint())) as session:
        wait_until(lambda: is_ours(read_archiving(session).settings["archive_command"]))


@pytest.fixture(scope="module")
def one() -> Iterator[Archiving]:
    """PostgreSQL 17, for several tests."""
    with archiving_cluster(servers.bin_dir_17()) as made:
        yield made


def test_setup_hands_the_archive_over_only_when_told(one: Archiving) -> None:
    """Of a cluster that was made anew: its archive belongs to the one before."""
    store = one.box.store
    claim(store, "main", System("7000000000000000001", 16 * 1024 * 1024), at=AT)
    if one.box.identity is not None:
        for path in Path(one.box.folder / "store").rglob("*"):
            os.chown(path, one.box.identity.uid, one.box.identity.gid)
    refused = one.command("wal", "setup", "main", "--apply")
    assert (refused.returncode, "--adopt" in refused.stderr) == (6, True)
    with contextlib.closing(connect(one.cluster.endpoint())) as session:
        assert read_archiving(session).settings["archive_command"] == ""
    adopted = one.command("wal", "setup", "main", "--adopt", "--apply")
    assert (adopted.returncode, "belongs to PostgreSQL system" in adopted.stdout) == (0, True)


def test_a_failure_is_counted_and_shown(one: Archiving) -> None:
    """Python cannot be started: the shell ends with 1, which PostgreSQL counts; nothing is lost."""
    command = archive_command(one.box.cluster, one.box.path, python="/nowhere/python")
    one.execute(f"ALTER SYSTEM SET archive_command = '{command}'", "SELECT pg_reload_conf()")
    one.execute("CREATE TABLE IF NOT EXISTS public.load (i int, text text)")
    write(one, 1)

    def failures() -> int:
        with contextlib.closing(connect(one.cluster.endpoint())) as session:
            return read_archiver(session).failed

    wait_until(lambda: failures() > 0)
    status = one.command("wal", "status", "main")
    assert status.returncode == 5
    assert "the archiver fails at 0000000100000000" in status.stdout
    assert "no agent" in status.stdout
    assert re.search(r"waiting +[1-9]\d* files", status.stdout)
    assert waiting(one.cluster.data)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("archive_command", "", "archive_command is empty"),
        ("archive_command", "/bin/true", "archive_command is /bin/true"),
        ("archive_mode", "off", "archive_mode waits for a restart"),
    ],
)
def test_a_server_that_does_not_archive_here_is_told(
    one: Archiving, name: str, value: str, said: str
) -> None:
    """PostgreSQL counts no failure of any of these."""
    command = archive_command(one.box.cluster, one.box.path, python=one.box.python)
    one.execute(f"ALTER SYSTEM SET archive_command = '{command}'", "SELECT pg_reload_conf()")
    one.execute(f"ALTER SYSTEM SET {name} = '{value}'", "SELECT pg_reload_conf()")

    def problems() -> list[str]:
        with one.box.agent_process():
            status = one.command("wal", "status", "main", "--json")
        assert status.returncode == 5, status.stdout
        found: list[str] = json.loads(status.stdout)["problems"]
        return [line for line in found if line.startswith(name)]

    try:
        (problem,) = problems()
        assert problem.startswith(said)
    finally:
        one.execute("ALTER SYSTEM RESET archive_mode", "SELECT pg_reload_conf()")


def test_a_command_is_quoted_for_the_shell_and_for_postgresql(tmp_path: Path) -> None:
    folder = tmp_path / "it's 100% $HOME"
    box = WalBox(folder, StoreConfig("file:///nowhere"))
    command = archive_command(box.cluster, box.path, python="/bin/echo")
    shell = command.replace("%p", "pg_wal/X").replace("%%", "%")  # as PostgreSQL does
    said = process.run(Command(("/bin/sh", "-c", shell)), timeout_s=10).stdout.split(" --")
    assert f"socket {box.socket}" in said
    assert f"config {box.path}" in said
    assert said[-1] == "timeout 20 pg_wal/X\n"
    assert is_ours(command)
    assert not is_ours("cp %p /elsewhere/%f")
    assert not is_ours("unbalanced 'quote")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to try what another user may run")
def test_a_python_that_postgresql_may_not_run_is_told_before(
    one: Archiving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(0o700)
    (hidden / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(hidden / "python"))
    with pytest.raises(Refused, match=r"cannot run .*hidden/python"):
        refuse_unreadable(one.cluster.data)
    refuse_unreadable(tmp_path)  # root's own


def test_a_server_that_is_elsewhere_is_not_set_up(one: Archiving, tmp_path: Path) -> None:
    """It would call a Python that it does not have, and fill its disk."""
    here, there = str(one.cluster.data), "/on/another/machine"
    with contextlib.closing(connect(one.cluster.endpoint())) as session:
        assert find_missing(session, [one.box.python, str(one.box.path)]) == ()
        assert find_missing(session, [one.box.python, there]) == (there,)
        hidden = tmp_path / "hidden"
        hidden.mkdir(0o000)
        assert find_missing(session, [f"{hidden}/x"]) == (f"{hidden}/x",)
        session.execute("CREATE ROLE nobody_much")
        session.execute("SET ROLE nobody_much")
        assert find_missing(session, [there]) is None
        assert read_archiving(session).data_directory == ""
        session.execute("RESET ROLE")
        session.execute("DROP ROLE nobody_much")
    refuse_elsewhere("main", here)
    for directory in (there, ""):
        with pytest.raises(Refused, match="is not found on this machine"):
            refuse_elsewhere("main", directory)
    for missing in ((), None):
        refuse_unseen("main", missing)
    with pytest.raises(Refused, match=f"does not see {there}, which"):
        refuse_unseen("main", (there,))


def test_a_configuration_that_the_server_does_not_see_is_told_before(one: Archiving) -> None:
    """The server has a file system of its own where it looks."""
    config = Path("/proc/self/cwd") / "backups.toml"  # of whoever asks
    command = one.box.program("wal", "setup", "main", "--apply", "--replace-command")
    cwd = str(one.box.path.parent)
    argv = tuple(str(config) if word == str(one.box.path) else word for word in command.argv)
    done = process.run(Command(argv, identity=command.identity, cwd=cwd), timeout_s=60, check=False)
    assert (done.returncode, f"does not see {config}" in done.stderr) == (6, True), done.stderr
