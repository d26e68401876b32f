"""Who is asked before a promotion: the old server, which may live, and the new one, at its own address."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline.actions import promote
from backup_pipeline.actions.promotion_checks import refuse_doubt
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.config import ClusterConfig, Secret
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.recovered import RecoveredRecord
from backup_pipeline.domain.wal import Lsn
from backup_pipeline.domain.wal_archive import ArchiveListing
from backup_pipeline.engines.postgres.cluster import (
    FREE_PORT,
    LocalCluster,
    free_port,
)
from backup_pipeline.engines.postgres.daemon import Address
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.errors import ServerError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import ask, now
from backup_pipeline_tests.servers import postgres as servers


@pytest.fixture(scope="module")
def by_password() -> Iterator[LocalCluster]:
    """A server that listens by TCP, and asks for the password `known`."""
    with private_folder() as folder:
        known = Secret("known")
        server = LocalCluster(
            servers.bin_dir_17(), folder / "cluster", relaxed=True, port=FREE_PORT, password=known
        )
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()


def test_the_new_server_is_asked_at_its_own_address_by_tcp_where_its_socket_lets_nobody_in(
    by_password: LocalCluster, tmp_path: Path
) -> None:
    config = ClusterConfig("main", Secret("host=old.example user=postgres password=known"))
    cluster = ProtectedCluster(config, DirectoryStore(tmp_path))
    address = Address(by_password.port or 0, str(tmp_path), "*")
    found = promote.at_its_own_address(cluster, address)
    assert ask(found.source(), "SELECT inet_server_port()") == by_password.port
    with pytest.raises(ServerError):
        promote.at_its_own_address(cluster, replace(address, host=""))


def doubts_about(source: str, folder: Path) -> list[str]:
    """Of a directory that was recovered from a system which is no server's here."""
    cluster = ProtectedCluster(ClusterConfig("main", Secret(source)), DirectoryStore(folder))
    base = BackupId.make("main", now(), "abcdef")
    record = RecoveredRecord("main", "7", base, "latest", 1, 2, Lsn(1), now())
    listing = ArchiveListing("main", "7", 16 * 1024 * 1024)
    return refuse_doubt(cluster, record, listing, folder, gone=True, at=now())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("host=127.0.0.1 port={port} user=postgres password=wrong", "authentication failed"),
        ("host=127.0.0.1,127.0.0.1 port={free},{port} user=postgres password=wrong", "authentication failed"),
        ("host=127.0.0.1,127.0.0.1 port={port},{free} user=postgres password=wrong", "could not be asked"),
        ("host=127.0.0.1 port={port} user=postgres password=known dbname=none", "does not exist"),
    ],
)
def test_a_server_that_answers_and_cannot_be_asked_is_not_taken_for_gone(
    by_password: LocalCluster, tmp_path: Path, source: str, said: str
) -> None:
    place = source.format(port=by_password.port, free=free_port())
    doubt, *_ = doubts_about(place, tmp_path)
    assert "could not be asked whether it is the old one" in doubt
    assert said in doubt


@pytest.mark.parametrize(
    "source",
    [
        "host=127.0.0.1 port={free}",
        "host={folder} port={free}",
        "host=127.0.0.1,{folder} port={free}",
        "host=127.0.0.1 port={port} user=postgres password=known",  # of another system
    ],
)
def test_where_nobody_listens_or_another_system_does_there_is_no_doubt(
    by_password: LocalCluster, tmp_path: Path, source: str
) -> None:
    place = source.format(port=by_password.port, free=free_port(), folder=tmp_path)
    (warning,) = doubts_about(place, tmp_path)
    assert warning.startswith("the dsn of main leads to this machine alone (")


@pytest.mark.parametrize(
    ("code", "doubtful"),
    [("NONAME", False), ("NODATA", False), ("AGAIN", True), ("FAIL", True)],
)
@pytest.mark.parametrize("others", ["", "127.0.0.1,"])
def test_only_a_name_that_leads_nowhere_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, doubtful: bool, others: str
) -> None:
    """Beside another host, nobody says why the name led nowhere: that is a doubt as well."""
    asked = socket.getaddrinfo

    def fails(host: str, *given: Any, **options: Any) -> Any:
        if host != "old.example":
            return asked(host, *given, **options)
        error = getattr(socket, f"EAI_{code}")
        raise socket.gaierror(error, "as a resolver of another system says it")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    found = doubts_about(f"host={others}old.example port={free_port()}", tmp_path)
    assert ["could not be asked whether it is the old one" in each for each in found] == (
        [True] if doubtful or others else []
    )


def test_its_own_server_that_lets_nobody_in_is_no_doubt(by_password: LocalCluster, tmp_path: Path) -> None:
    """As when the promotion is gone on with, and the rules that let the role in were held back."""
    source = f"host=127.0.0.1 port={by_password.port} user=postgres password=wrong"
    (doubt, _) = doubts_about(source, tmp_path)
    assert "could not be asked" in doubt
    (warning,) = doubts_about(source, by_password.data)
    assert "leads to this machine alone" in warning


def test_where_a_service_file_knows_what_the_dsn_does_not_a_server_is_nobodys_own(
    by_password: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "services"
    file.write_text(f"[old]\nhost=127.0.0.1\nport={by_password.port}\nuser=postgres\npassword=wrong\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    monkeypatch.setenv("PGSERVICE", "old")
    (doubt,) = doubts_about("dbname=postgres", by_password.data)
    assert "could not be asked" in doubt
    file.write_text(f"[old]\nhost=127.0.0.1\nport={free_port()}\nuser=postgres\n")
    assert doubts_about("dbname=postgres", by_password.data) == []
