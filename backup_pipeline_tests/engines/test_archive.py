"""What an archive's first bytes say, as real pg_dumps of each version here write them."""

from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.engines.postgres.archive import ArchiveHeader, parse_header
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.errors import Corrupt, ToolError
from backup_pipeline.process import Command
from backup_pipeline_tests.servers import postgres as servers


def dumped(bin_dir: str, database: Endpoint, file: Path, form: str = "custom") -> bytes:
    argv = (f"{bin_dir}/pg_dump", f"--format={form}", f"--file={file}")
    process.run(Command(argv, database.environment()), timeout_s=60)
    return file.read_bytes()


def test_the_versions_are_those_of_server_and_client(database: Endpoint, tmp_path: Path) -> None:
    data = dumped(servers.bin_dir_17(), database, tmp_path / "17.dump")
    assert parse_header(data, "x") == ArchiveHeader(database.database, 17, 17)


def test_an_older_format_is_read_too(postgres15: LocalCluster, tmp_path: Path) -> None:
    with servers.fresh_database(postgres15) as database:
        older = dumped(servers.bin_dir_15(), database, tmp_path / "15.dump")
        newer = dumped(servers.bin_dir_17(), database, tmp_path / "17.dump")
    assert parse_header(older, "x") == ArchiveHeader(database.database, 15, 15)
    assert parse_header(newer, "x") == ArchiveHeader(database.database, 15, 17)


def test_what_is_no_archive_is_refused(database: Endpoint, tmp_path: Path) -> None:
    data = dumped(servers.bin_dir_17(), database, tmp_path / "17.dump")
    tar = dumped(servers.bin_dir_17(), database, tmp_path / "17.tar", "tar")
    for other in (b"", b"PGDMP", b"--\n-- PostgreSQL", data[:40], tar, data[:5] + b"\1\1" + data[7:]):
        with pytest.raises(Corrupt, match="x: expected an archive of pg_dump's custom format"):
            parse_header(other, "x")


def test_a_format_of_the_future_is_no_damage(database: Endpoint, tmp_path: Path) -> None:
    data = dumped(servers.bin_dir_17(), database, tmp_path / "17.dump")
    future = data[:6] + b"\x63" + data[7:]
    assert parse_header(future, "x").client_major == 17  # understood as long as it looks the same
    with pytest.raises(ToolError, match=r"x: its archive format 1\.99 is newer than what is known here"):
        parse_header(future[:11] + b"\xff" + future[11:], "x")
