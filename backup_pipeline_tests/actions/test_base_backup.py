"""Base backups of real clusters: whole or not listed, with the WAL that they need, and said when damaged."""

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from backup_pipeline.actions import base_backup
from backup_pipeline.actions.waiting_base_backup import finish_waiting
from backup_pipeline.config import Secret
from backup_pipeline.domain.backup import ObjectRole
from backup_pipeline.domain.file_list import parse_file_list
from backup_pipeline.domain.layout import base_prefix, wal_system_prefix
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.errors import Refused, ServerError, StoreError
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.s3 import S3Store
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline_tests.actions.box import Meddling, Said, ask, execute, now
from backup_pipeline_tests.actions.cluster_box import ClusterBox, a_cluster
from backup_pipeline_tests.actions.protected_box import NAME
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.servers.s3 import rclone_s3
from backup_pipeline_tests.storage.effects import CountingStore, DatedStore, Died, DyingStore


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterBox]:
    with a_cluster(servers.bin_dir_17(), tmp_path_factory.mktemp("base") / "store") as made:
        yield made


def listed(store: Store) -> set[str]:
    """The base backups that are listed; each has all its objects."""
    found = base_backups.list_base_backups(store, NAME, fresh=True)
    assert not found.unreadable
    for backup in found.backups:
        sizes = {info.key: info.size_bytes for info in store.list(base_prefix(backup.id))}
        assert {item.key: item.size_bytes for item in backup.manifest.objects}.items() <= sizes.items()
    return {str(backup.id) for backup in found.backups}


def test_it_is_whole_and_its_wal_is_there(box: ClusterBox) -> None:
    before = now()
    taken = box.take().manifest
    assert before - timedelta(seconds=5) < taken.started_at <= taken.stopped_at
    assert base_backups.load(box.store, taken.id).manifest == taken
    assert taken.system_identifier == box.system
    assert taken.server_version // 10000 == 17
    assert not taken.from_standby
    assert dict(taken.settings)["max_locks_per_transaction"] == 128
    archived = [info.key for info in box.store.list(wal_system_prefix(NAME, box.system))]
    for segment in (taken.start.lsn, taken.end.lsn):
        name = f"00000001{segment.value >> 32:08X}{(segment.value & 0xFFFFFFFF) // taken.segment_bytes:08X}"
        assert any(f"/{name}-" in key for key in archived)
    (listed_files,) = taken.of_role(ObjectRole.FILE_LIST)
    (files,) = [parse_file_list(read_all(box.store, listed_files.key))]
    assert [(item.start, item.end) for item in files.wal_ranges] == [(taken.start, taken.end.lsn)]
    assert files.system_identifier == taken.system_identifier
    assert not taken.notes or all("checksum" in note for note in taken.notes)
    document = json.loads(b"".join(box.store.read(f"catalog/{NAME}/{taken.id.stamp}.json")))
    assert document["requires"] == []


def test_in_an_s3_store_at_a_limited_rate_after_a_spread_checkpoint(box: ClusterBox, tmp_path: Path) -> None:
    with rclone_s3(tmp_path) as server:
        store = S3Store(server.store("prefix"))
        with contextlib.ExitStack() as stack:
            was, box.store, box.shipped = box.store, store, set()
            stack.callback(setattr, box, "store", was)
            execute(box.cluster.endpoint(), "CHECKPOINT")
            taken = box.take(checkpoint="spread", max_rate_bytes_s=32 * 1024 * 1024).manifest
            assert listed(store) == {str(taken.id)}
            assert taken.duration_s > 0.5  # of 25 MB
    box.shipped = set()


def test_without_its_wal_it_is_not_listed_and_waits_for_it(box: ClusterBox) -> None:
    before = listed(box.store)
    box.shipped |= {f"{number:024X}" for number in range(1 << 64, (1 << 64) + 300)}  # none of them is shipped
    protected = box.protected(stall_timeout=timedelta(seconds=3))
    with pytest.raises(
        ServerError, match="needs WAL that is not in the archive: 0000000100000000000000"
    ) as caught:
        base_backup.take(protected, clock=now, report=box.said)
    assert "pg_stat_archiver" in caught.value.hint
    assert listed(box.store) == before
    (waiting,) = base_backups.unlisted(box.store, NAME)
    assert f"{waiting}, not listed" in str(caught.value.detail["kept"])
    assert finish_waiting(protected, clock=now, report=box.said) == ()
    assert f"{waiting} still waits for" in box.said.lines[-1]
    assert listed(box.store) == before
    box.shipped = set()
    taken = box.take()
    assert listed(box.store) == before | {str(waiting), str(taken.id)}
    assert not base_backups.unlisted(box.store, NAME)
    assert not [info.key for info in box.store.list(base_prefix(waiting)) if "waiting" in info.key]


@pytest.mark.parametrize("late", [False, True])
def test_one_that_is_refused_in_the_end_is_neither_listed_nor_waits(box: ClusterBox, late: bool) -> None:
    before, shipped = listed(box.store), set(box.shipped)

    def refuse() -> None:
        raise Refused("the archive is another server's")

    if late:
        box.shipped |= {f"{number:024X}" for number in range(1 << 64, (1 << 64) + 300)}
    protected = box.protected(stall_timeout=timedelta(seconds=3 if late else 60))
    with box.shipping(), pytest.raises(Refused, match="the archive is another server's"):
        base_backup.take(protected, clock=now, report=box.said, refuse=refuse)
    assert listed(box.store) == before
    assert not base_backups.unlisted(box.store, NAME)
    box.shipped = shipped
    box.ship()


def test_while_the_archiver_works_off_what_is_older_it_is_waited_for(box: ClusterBox) -> None:
    """Nothing is archived at first, then one old segment, and the rest only after the first deadline."""
    endpoint, shipped = box.cluster.endpoint(), set(box.shipped)
    for number in range(3):
        execute(endpoint, f"CREATE TABLE public.backlog{number} (a int)")
        execute(endpoint, "SELECT pg_switch_wal()")
    oldest: list[str] = []

    def hear(line: str) -> None:
        if "not archived yet" in line:
            old = sorted(path.name for path in box.archived.iterdir() if path.name not in shipped)
            oldest.append(old[0])
            box.shipped = {path.name for path in box.archived.iterdir()} - {old[0]}
            box.ship()
        elif "works off what is older" in line:
            box.shipped = shipped | set(oldest)
            box.ship()

    taken = base_backup.take(box.protected(stall_timeout=timedelta(seconds=4)), clock=now, report=Said(hear))
    assert len(oldest) == 1
    assert str(taken.id) in listed(box.store)


def tomorrow() -> datetime:
    return now() + timedelta(days=1)


def test_dying_before_any_effect_lists_nothing_that_is_not_whole(box: ClusterBox) -> None:
    counting = CountingStore(box.store)
    box.take(counting)
    for number in range(1, len(counting.effects) + 1):
        before = listed(box.store)
        dying = DyingStore(box.store, before=number)
        with contextlib.suppress(Died):
            box.take(dying)
        assert dying.dead
        now_listed = listed(box.store)
        # The record is put last: then come only leases and what the preflight wrote.
        done = any(effect.startswith("put_if_absent catalog/") for effect in dying.effects)
        assert len(now_listed - before) == int(done)
    assert len(base_backups.rebuild(box.store, NAME)[0]) == 1  # the one whose record's copy was there
    listed(box.store)
    for each in base_backups.unlisted(box.store, NAME):
        assert not base_backups.collect(DatedStore(box.store, at=tomorrow()), each, clock=tomorrow).kept


def test_an_upload_that_fails_is_taken_away(box: ClusterBox) -> None:
    before = listed(box.store)

    def fail() -> None:
        raise StoreError("the store is full")

    with pytest.raises(StoreError, match="full"):
        box.take(Meddling(box.store, "base.tar.zst", fail))
    assert listed(box.store) == before
    assert not base_backups.unlisted(box.store, NAME)


def test_a_server_that_dies_in_the_middle_leaves_nothing(box: ClusterBox) -> None:
    before = listed(box.store)
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'walsender'"
    store = Meddling(box.store, "base.tar.zst", lambda: execute(box.cluster.endpoint(), kill))
    with pytest.raises(ServerError):
        box.take(store, max_rate_bytes_s=8 * 1024 * 1024)
    assert listed(box.store) == before
    assert not base_backups.unlisted(box.store, NAME)


def test_a_role_that_may_only_replicate_is_enough_and_what_it_cannot_carry_is_said(box: ClusterBox) -> None:
    execute(box.cluster.endpoint(), "CREATE ROLE replicator LOGIN REPLICATION; CREATE ROLE plain LOGIN")
    taken = box.take(dsn=Secret(box.cluster.endpoint(user="replicator").dsn)).manifest
    assert any("pg_read_all_settings" in note for note in taken.notes)
    with pytest.raises(ServerError, match="the role plain may not take base backups") as caught:
        box.take(dsn=Secret(box.cluster.endpoint(user="plain").dsn))
    assert 'ALTER ROLE "plain" REPLICATION' in caught.value.hint


def test_configuration_beside_the_data_directory_is_carried_along(tmp_path: Path) -> None:
    with private_folder() as folder:
        rules = folder / "pg_hba.conf"
        rules.write_text("local all all trust\nlocal replication all trust\n")
        rules.chmod(0o644)
        with a_cluster(servers.bin_dir_17(), tmp_path / "store", hba_file=str(rules)) as box:
            taken = box.take().manifest
            (item,) = taken.of_role(ObjectRole.CONFIGURATION)
            assert item.name == f"configuration{rules}"
            assert read_all(box.store, item.key) == rules.read_bytes()
            assert not [note for note in taken.notes if "carried along" in note]


def test_a_cluster_that_archives_nothing_is_refused(tmp_path: Path) -> None:
    with a_cluster(servers.bin_dir_17(), tmp_path / "store", archive_mode="off") as box:
        with pytest.raises(Refused, match="nothing archives the WAL of cluster main") as caught:
            box.take()
        assert "wal setup" in caught.value.hint
        assert not listed(box.store)


def flip_a_byte(box: ClusterBox, table: str) -> None:
    """Damage a table's file under a stopped server."""
    endpoint = box.cluster.endpoint()
    execute(endpoint, f"CREATE TABLE public.{table} AS SELECT g FROM generate_series(1, 5000) g; CHECKPOINT")
    path = box.cluster.data / str(ask(endpoint, f"SELECT pg_relation_filepath('public.{table}')"))
    box.cluster.stop()
    with path.open("r+b") as file:
        file.seek(9000)
        byte = file.read(1)
        file.seek(9000)
        file.write(bytes([byte[0] ^ 1]))
    box.cluster.start()


@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_page_of_the_source_is_said_and_the_backup_there(tmp_path: Path, checksums: bool) -> None:
    with a_cluster(servers.bin_dir_17(), tmp_path / "store") as box:
        if checksums:
            box.cluster.stop()
            servers.enable_checksums(box.cluster)
            box.cluster.start()
        flip_a_byte(box, "damaged")
        taken = box.take().manifest
        assert listed(box.store) == {str(taken.id)}
        assert taken.page_checksums is checksums
        assert taken.page_checksums_wrong is checksums
        if checksums:
            assert "PAGES THAT DO NOT AGREE WITH THEIR CHECKSUMS" in taken.notes[0]
            assert any("checksum verification failed in file" in note for note in taken.notes)
            assert any(line.startswith("warning: PAGES") for line in box.said.lines)
        else:
            assert any("no page checksums" in note for note in taken.notes)
