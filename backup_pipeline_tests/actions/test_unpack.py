"""A base backup taken under a writer, unpacked and started: it recovers, and holds what was committed."""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.actions.unpack import unpack
from backup_pipeline.domain.backup import ObjectRole
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.engines.postgres.cluster import server_identity
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.unpack import plan_places
from backup_pipeline.errors import BackupNotFound, Corrupt, Refused
from backup_pipeline.process import Command
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.actions.box import Said, ask, execute, now
from backup_pipeline_tests.actions.cluster_box import (
    ClusterBox,
    a_cluster,
    make_tablespace,
    started,
)
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.waiting import wait_until

TABLES = """
CREATE TABLE public.ledger (n bigint PRIMARY KEY, at timestamptz DEFAULT clock_timestamp());
CREATE TABLE public.fast (n bigint) TABLESPACE fast;
CREATE TABLE public.filler TABLESPACE fast AS SELECT g, repeat('x', 500) AS t FROM generate_series(1, 20000) g
"""


@contextlib.contextmanager
def writing(box: ClusterBox) -> Iterator[list[int]]:
    """A client that commits numbers, in both tables, one after the other; yields those that it committed."""
    committed = [0]

    def write(ended: threading.Event) -> None:
        with contextlib.closing(connect(box.cluster.endpoint(), autocommit=False)) as session:
            while not ended.is_set():
                number = committed[-1] + 1
                session.execute("INSERT INTO public.ledger VALUES (%s)", (number,))
                session.execute("INSERT INTO public.fast VALUES (%s)", (number,))
                session.commit()
                committed.append(number)

    with meanwhile(write):
        yield committed


def unpacked(box: ClusterBox, manifest: BaseManifest, folder: Path) -> None:
    """Unpack into `folder`/data, for the server's user."""
    places = plan_places(folder / "data", manifest.tablespaces)
    unpack(box.store, manifest, places, clock=now, report=Said(), owner=server_identity())


@pytest.mark.parametrize("bin_dir", servers.OLDEST_AND_NEWEST)
def test_it_recovers_to_what_was_committed(tmp_path: Path, bin_dir: Callable[[], str]) -> None:
    with a_cluster(bin_dir(), tmp_path / "store") as box, private_folder() as elsewhere:
        space = make_tablespace(box, "fast", elsewhere / "fast")
        execute(box.cluster.endpoint(), TABLES)
        with writing(box) as committed:
            before = committed[-1]
            taken = box.take().manifest
            during = committed[-1]
            wait_until(lambda: committed[-1] >= during + 20)  # what comes after the backup comes by WAL alone
        assert during > before
        (tablespace,) = taken.tablespaces
        assert tablespace.location == str(space)
        assert tablespace.size_bytes > 5_000_000
        last = ask(box.cluster.endpoint(), "SELECT pg_walfile_name(pg_switch_wal())")
        done = f"SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver"
        wait_until(lambda: bool(ask(box.cluster.endpoint(), done)))
        box.cluster.stop()
        os.rename(space, space.with_name("gone"))  # production's tablespace must not be found, nor used
        folder = elsewhere / "recovered"
        folder.mkdir(mode=0o711)
        unpacked(box, taken, folder)
        assert (folder / "data" / "backup_label").exists()
        with started(box, folder) as cluster:
            for table in ("ledger", "fast"):
                rows = ask(cluster.endpoint(), f"SELECT array_agg(n ORDER BY n) FROM public.{table}")
                assert rows == committed[1:]
            assert ask(cluster.endpoint(), "SELECT count(*) FROM public.filler") == 20000
            assert ask(cluster.endpoint(), "SELECT pg_is_in_recovery()") is False
            where = "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'fast'"
            assert ask(cluster.endpoint(), where) == str(folder / "data.tablespaces" / str(tablespace.oid))


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterBox]:
    with a_cluster(servers.bin_dir_17(), tmp_path_factory.mktemp("unpack") / "store") as made:
        made.take()
        yield made


@pytest.fixture
def manifest(box: ClusterBox) -> BaseManifest:
    return base_backups.list_base_backups(box.store, "main").backups[-1].manifest


@pytest.mark.parametrize("role", [ObjectRole.BASE, ObjectRole.FILE_LIST])
@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "gone"])
def test_a_damaged_object_makes_no_directory(
    box: ClusterBox, manifest: BaseManifest, tmp_path: Path, role: ObjectRole, how: str
) -> None:
    (item,) = manifest.of_role(role)
    whole = read_all(box.store, item.key)
    middle = len(whole) // 2
    changed = {
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "cut": whole[:-1],
        "longer": whole + b"\n",
    }
    try:
        box.store.delete([item.key]) if how == "gone" else box.store.put(item.key, [changed[how]])
        with pytest.raises((Corrupt, FileNotFoundError)):
            unpack(box.store, manifest, plan_places(tmp_path / "new", ()), clock=now, report=Said())
    finally:
        box.store.put(item.key, [whole])
    assert not list(tmp_path.iterdir())


def test_the_list_of_another_backup_is_not_taken(
    box: ClusterBox, manifest: BaseManifest, tmp_path: Path
) -> None:
    other = box.take().manifest
    (listed,) = other.of_role(ObjectRole.FILE_LIST)
    mixed = replace(
        manifest, objects=tuple(listed if item.role is listed.role else item for item in manifest.objects)
    )
    with pytest.raises(Corrupt, match="list of another backup"):
        unpack(box.store, mixed, plan_places(tmp_path / "new", ()), clock=now, report=Said())
    with pytest.raises(Corrupt, match="list of another cluster"):
        unpack(
            box.store,
            replace(manifest, system_identifier="7"),
            plan_places(tmp_path / "new", ()),
            clock=now,
            report=Said(),
        )
    assert not list(tmp_path.iterdir())


def test_one_that_was_deleted_or_has_no_room_is_refused(
    box: ClusterBox, manifest: BaseManifest, tmp_path: Path
) -> None:
    places = plan_places(tmp_path / "new", ())
    with pytest.raises(Refused, match="too little space"):
        unpack(box.store, replace(manifest, source_bytes=1 << 60), places, clock=now, report=Said())
    store = DirectoryStore(tmp_path)
    with pytest.raises(BackupNotFound):
        unpack(store, manifest, places, clock=now, report=Said())
    assert not (tmp_path / "new").exists()


def test_from_a_standby_that_came_from_a_base_backup(box: ClusterBox, manifest: BaseManifest) -> None:
    with private_folder() as folder:
        unpacked(box, manifest, folder)
        (folder / "data" / "standby.signal").touch()
        settings = {"primary_conninfo": box.cluster.endpoint().dsn.replace("dbname=postgres", "")}
        execute(box.cluster.endpoint(), "CREATE TABLE IF NOT EXISTS public.seen AS SELECT 1 AS n")
        with started(box, folder, **settings) as standby:
            assert ask(standby.endpoint(), "SELECT pg_is_in_recovery()") is True
            there = "SELECT to_regclass('public.seen') IS NOT NULL"
            wait_until(lambda: bool(ask(standby.endpoint(), there)))
            execute(box.cluster.endpoint(), "CHECKPOINT")
            from_standby = replace(box, cluster=standby)
            switch = threading.Timer(1.0, execute, (box.cluster.endpoint(), "SELECT pg_switch_wal()"))
            switch.start()
            taken = from_standby.take().manifest
            switch.join()
            assert taken.from_standby
            assert taken.system_identifier == manifest.system_identifier
            assert taken.start.lsn > manifest.start.lsn
        with private_folder() as again:
            unpacked(box, taken, again)
            with started(box, again) as cluster:
                assert ask(cluster.endpoint(), "SELECT n FROM public.seen") == 1


@pytest.mark.parametrize("by", ["us", "tar and zstd"])
def test_postgresqls_own_check_finds_it_whole(
    box: ClusterBox, manifest: BaseManifest, tmp_path: Path, by: str
) -> None:
    """Also when it was unpacked without this software, as the record says."""
    (base,), (listed,) = manifest.of_role(ObjectRole.BASE), manifest.of_role(ObjectRole.FILE_LIST)
    folder, names = tmp_path / "data", tmp_path / "names"
    names.write_bytes(read_all(box.store, listed.key))
    if by == "us":
        unpack(box.store, manifest, plan_places(folder, ()), clock=now, report=Said())
    else:
        if shutil.which("zstd") is None:
            pytest.skip("needs zstd: apt-get install zstd")
        folder.mkdir()
        (tmp_path / "base.tar.zst").write_bytes(read_all(box.store, base.key))
        taking_apart = ("tar", "--zstd", "-xf", str(tmp_path / "base.tar.zst"), "-C", str(folder))
        process.run(Command(taking_apart), timeout_s=60)
    verify = f"{servers.bin_dir_17()}/pg_verifybackup"
    argv = (verify, "--no-parse-wal", "--exit-on-error", f"--manifest-path={names}", str(folder))
    assert "successfully verified" in process.run(Command(argv), timeout_s=60).stdout
    (folder / "PG_VERSION").write_text("18\n")
    assert process.run(Command(argv), timeout_s=60, check=False).returncode == 1
