"""`check` of a cluster: what it says of a server, its archive and its window, and what it finds missing."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from backup_pipeline.actions.check_cluster import check
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.config import Secret
from backup_pipeline.domain.layout import SCRATCH, wal_identity_key
from backup_pipeline.domain.wal_archive import ArchiveIdentity, identity_to_json
from backup_pipeline.engines.postgres.preflight import Check, CheckStatus
from backup_pipeline.errors import BackupError, Refused, ServerError
from backup_pipeline.wal.identity import System, claim
from backup_pipeline_tests.actions.box import execute, now
from backup_pipeline_tests.actions.cluster_box import ClusterBox, a_cluster
from backup_pipeline_tests.servers import postgres as servers

SEGMENT_BYTES = 16 * 1024 * 1024


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterBox]:
    """A cluster whose archive was begun, with one base backup."""
    folder: Path = tmp_path_factory.mktemp("check")
    with a_cluster(servers.bin_dir_17(), folder / "store") as made:
        claim(made.store, "main", System(made.system, SEGMENT_BYTES), at=now())
        made.take()
        yield made


def looked(cluster: ProtectedCluster) -> tuple[dict[str, Check], BackupError | None]:
    """What was found, by name, and the failure at the end."""
    found: dict[str, Check] = {}
    try:
        for item in check(cluster, now=now()):
            found[item.name] = item
    except BackupError as error:
        return found, error
    return found, None


def test_a_cluster_in_order_is_found_so_and_nothing_is_left_in_the_store(box: ClusterBox) -> None:
    before = {info.key for info in box.store.list("")}
    found, failed = looked(box.protected(recovery_window=timedelta(0)))
    assert failed is None
    assert list(found) == ["server", "store", "archive", "newest", "window"]
    assert {item.status for item in found.values()} == {CheckStatus.OK}
    assert box.system in found["server"].found
    assert f"takes the WAL of PostgreSQL system {box.system}, the server's" in found["archive"].found
    assert found["newest"].found.startswith("the newest base backup, main/")
    assert found["window"].found.startswith("any moment from ")
    assert {info.key for info in box.store.list("")} == before
    assert not list(box.store.list(SCRATCH))


def test_a_window_that_is_not_reached_yet_is_a_warning(box: ClusterBox) -> None:
    found, failed = looked(box.protected(recovery_window=timedelta(days=3)))
    assert failed is None
    assert found["window"].status is CheckStatus.WARNING
    assert "the recovery window is to be 3 d" in found["window"].found


def test_a_role_that_may_not_replicate_fails_and_the_rest_is_looked_at(box: ClusterBox) -> None:
    execute(box.cluster.endpoint(), "CREATE ROLE plain LOGIN")
    dsn = Secret(box.cluster.endpoint().dsn + " user=plain")
    found, failed = looked(box.protected(dsn=dsn))
    assert isinstance(failed, ServerError)
    assert found["server"].status is CheckStatus.FAILED
    assert 'ALTER ROLE "plain" REPLICATION' in found["server"].hint
    assert found["archive"].status is CheckStatus.WARNING
    assert found["newest"].status is CheckStatus.OK


def test_a_server_that_is_away_and_an_archive_of_another_or_of_none(box: ClusterBox) -> None:
    found, failed = looked(box.protected(dsn=Secret("postgresql://nobody@127.0.0.1:1/postgres")))
    assert isinstance(failed, ServerError)
    assert found["newest"].status is CheckStatus.OK
    key = wal_identity_key("main")
    record = b"".join(box.store.read(key))
    box.store.delete([key])
    try:
        found, failed = looked(box.protected())
        assert isinstance(failed, Refused)
        assert found["server"].status is CheckStatus.OK  # its archive_mode is on
        assert "there is no WAL archive of main" in found["archive"].found
        assert "wal setup main --apply" in found["archive"].hint
    finally:
        box.store.put(key, [record])


def test_an_archive_that_belongs_to_another_system_is_a_failure(box: ClusterBox) -> None:
    key = wal_identity_key("main")
    record = b"".join(box.store.read(key))
    another = ArchiveIdentity("main", "7301234567890123456", SEGMENT_BYTES, now())
    box.store.put(key, [identity_to_json(another)])
    try:
        found, failed = looked(box.protected())
        assert isinstance(failed, Refused)
        assert f"7301234567890123456, and the server is system {box.system}" in found["archive"].found
        assert "--adopt" in found["archive"].hint
    finally:
        box.store.put(key, [record])


def test_a_record_that_cannot_be_read_is_named_with_what_it_stops(box: ClusterBox) -> None:
    (info,) = (each for each in box.store.list("catalog/main/") if each.key.endswith(".json"))
    record = b"".join(box.store.read(info.key))
    box.store.put(info.key, [record[:-5]])
    try:
        found, failed = looked(box.protected(recovery_window=timedelta(0)))
        assert failed is None
        assert found["newest"].status is CheckStatus.WARNING
        assert f"{info.key} cannot be read" in found["newest"].found
        assert "no prune deletes anything" in found["newest"].hint
    finally:
        box.store.put(info.key, [record])
