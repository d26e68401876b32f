"""BASE_BACKUP over real connections: what comes, what is said when it does not, and what is left."""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from backup_pipeline.config import Secret
from backup_pipeline.engines.postgres.base_backup import (
    BaseBackup,
    Options,
    base_backup,
    base_backup_command,
    identify_system,
)
from backup_pipeline.engines.postgres.cluster import FREE_PORT, LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.replication import replication_session
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import ServerError
from backup_pipeline_tests.actions.box import ask, execute
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.waiting import wait_until

STALL_S = 20.0
REPLICATING = {"wal_level": "replica", "max_wal_senders": "3", "full_page_writes": "on"}
SENDERS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender'"


@pytest.fixture(scope="module")
def source() -> Iterator[LocalCluster]:
    """A cluster that lets base backups be taken."""
    with servers.running_cluster(servers.bin_dir_17(), **REPLICATING) as cluster:
        yield cluster


def take(endpoint: Endpoint, options: Options) -> tuple[dict[str, bytes], BaseBackup]:
    with base_backup(endpoint, options, stall_s=STALL_S) as backup:
        return {archive.name: b"".join(archive.chunks) for archive in backup.archives()}, backup


def await_no_sender(cluster: LocalCluster) -> None:
    wait_until(lambda: ask(cluster.endpoint(), SENDERS) == 0, within_s=20)


def test_the_command_asks_for_everything_by_name() -> None:
    assert base_backup_command(Options("o'clock", fast=True)) == (
        "BASE_BACKUP (LABEL 'o''clock', PROGRESS true, CHECKPOINT 'fast', WAL false, WAIT false, "
        "TABLESPACE_MAP true, VERIFY_CHECKSUMS true, MANIFEST 'yes', MANIFEST_CHECKSUMS 'SHA256', "
        "TARGET 'client')"
    )


@pytest.mark.parametrize(("asked", "kilobytes"), [(1, 32), (65536, 64), (1 << 40, 1 << 20)])
def test_a_rate_stays_within_what_the_server_takes(asked: int, kilobytes: int) -> None:
    assert f"MAX_RATE {kilobytes})" in base_backup_command(Options("x", max_rate_bytes_s=asked))
    assert "'spread'" in base_backup_command(Options("x"))


@pytest.mark.parametrize("bin_dir", servers.EACH_VERSION)
def test_what_comes_is_what_the_servers_own_manifest_lists(bin_dir: Callable[[], str]) -> None:
    with servers.running_cluster(bin_dir(), **REPLICATING) as cluster:
        found, backup = take(cluster.endpoint(), Options("a label", fast=True))
        listed = {item["Path"]: item for item in json.loads(found["backup_manifest"])["Files"]}
        with tarfile.open(fileobj=io.BytesIO(found["base.tar"])) as tar:
            for member in tar:
                if member.isfile():
                    file = tar.extractfile(member)
                    assert file is not None
                    digest = hashlib.sha256(file.read()).hexdigest()
                    assert listed.pop(member.name)["Checksum"] == digest
        assert not listed
        assert backup.end is not None
        assert backup.start.lsn < backup.end.lsn
        assert backup.size_bytes > len(found["base.tar"]) / 2
        assert backup.read_bytes == sum(map(len, found.values()))
        assert identify_system(cluster.endpoint(), stall_s=STALL_S) == (
            ask(cluster.endpoint(), "SELECT system_identifier::text FROM pg_control_system()"),
            1,
        )
        await_no_sender(cluster)


def test_leaving_it_in_the_middle_leaves_nothing_on_the_server(source: LocalCluster) -> None:
    with base_backup(source.endpoint(), Options("x", fast=True), stall_s=STALL_S) as backup:
        assert next(next(backup.archives()).chunks)
    await_no_sender(source)
    with pytest.raises(ServerError, match="is closed"):
        backup.ask("IDENTIFY_SYSTEM")


def test_an_archive_that_nobody_read_is_not_passed_over(source: LocalCluster) -> None:
    with base_backup(source.endpoint(), Options("x", fast=True), stall_s=STALL_S) as backup:
        archives = backup.archives()
        next(archives)
        with pytest.raises(ServerError, match=r"base\.tar was not read to its end"):
            next(archives)


def test_a_server_that_goes_away_ends_the_archive_with_an_error(source: LocalCluster) -> None:
    options = Options("x", fast=True, max_rate_bytes_s=1024 * 1024)
    with base_backup(source.endpoint(), options, stall_s=STALL_S) as backup:
        chunks = next(backup.archives()).chunks
        next(chunks)
        kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'walsender'"
        execute(source.endpoint(), kill)
        with pytest.raises(ServerError, match=r"terminating connection|closed the connection"):
            list(chunks)


def test_a_silent_server_is_not_waited_for_longer_than_asked(source: LocalCluster) -> None:
    options = Options("x", fast=True, max_rate_bytes_s=32 * 1024)  # then it sends eight times a second
    with (
        pytest.raises(ServerError, match=r"sent nothing for 0\.05 s") as caught,
        base_backup(source.endpoint(), options, stall_s=0.05, checkpoint_s=STALL_S) as backup,
    ):
        list(next(backup.archives()).chunks)
    assert "stall_timeout" in caught.value.hint


def test_a_role_that_may_not_replicate_is_told_what_it_lacks(source: LocalCluster) -> None:
    execute(source.endpoint(), "CREATE ROLE plain LOGIN")
    with pytest.raises(ServerError, match=r"ermission denied|must be superuser") as caught:
        take(source.endpoint(user="plain"), Options("x"))
    assert "ALTER ROLE … REPLICATION" in caught.value.hint


def test_no_sender_is_free(source: LocalCluster) -> None:
    await_no_sender(source)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(replication_session(source.endpoint(), purpose="test", stall_s=STALL_S))
        with pytest.raises(ServerError, match="standby connections exceeds") as caught:
            take(source.endpoint(), Options("x"))
    assert "max_wal_senders" in caught.value.hint
    await_no_sender(source)


def test_a_minimal_log_is_told(postgres: LocalCluster) -> None:
    with pytest.raises(ServerError) as caught:
        take(postgres.endpoint(), Options("x", fast=True))
    assert "max_wal_senders" in caught.value.hint or "wal_level = replica" in caught.value.hint


def test_an_address_file_without_a_line_for_replication_is_told_and_no_password_shown() -> None:
    password = Secret("hunter2-and-more")
    with private_folder() as folder:
        cluster = LocalCluster(
            servers.bin_dir_17(),
            folder / "cluster",
            relaxed=True,
            port=FREE_PORT,
            password=password,
            settings=REPLICATING,
        )
        try:
            cluster.create()
            rules = cluster.data / "pg_hba.conf"
            rules.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
            cluster.start()
            found = cluster.endpoint(tcp=True)
            connect(found).close()
            with pytest.raises(ServerError, match=r"no pg_hba\.conf entry for replication") as caught:
                take(found, Options("x"))
            assert "`replication`" in caught.value.hint
            assert "hunter2" not in str(caught.value)
            rules.write_text("local all all trust\nhost replication all 127.0.0.1/32 scram-sha-256\n")
            execute(cluster.endpoint(), "SELECT pg_reload_conf()")
            assert identify_system(found, stall_s=STALL_S)[1] == 1
            with pytest.raises(ServerError, match="password authentication failed"):
                identify_system(replace(found, password=Secret("another")), stall_s=STALL_S)
        finally:
            cluster.stop()


def test_nobody_listens() -> None:
    with pytest.raises(ServerError, match="onnection refused"):
        identify_system(Endpoint("host=127.0.0.1 port=1 user=x"), stall_s=1.0)
