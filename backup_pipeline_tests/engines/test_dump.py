"""pg_dump run for real: whole, killed, stopped, starved; its files handed over only when closed."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from psycopg import sql

from backup_pipeline.config import Secret
from backup_pipeline.engines.postgres import dump_directory as directories
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.dump import (
    Hashing,
    dump_argv,
    dump_globals,
    globals_argv,
    stream_custom,
    tool_command,
)
from backup_pipeline.engines.postgres.dump_directory import dump_directory
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.snapshot import exported_snapshot
from backup_pipeline.errors import Refused, ServerError, ToolError
from backup_pipeline_tests.engines.zoo import HOSTILE_NAMES, ZOO, backup, execute, hold_against, restore, tool
from backup_pipeline_tests.servers.postgres import fresh_database
from backup_pipeline_tests.waiting import wait_until

ZSTD = "--compress=zstd:1"
PLAIN = "--compress=0"
# More than all buffers between pg_dump and us hold.
BIG = (
    "CREATE TABLE big (g int, noise text STORAGE EXTERNAL);"
    "INSERT INTO big SELECT g, repeat(md5(g::text), 600) FROM generate_series(1, {rows}) g"
)


@pytest.fixture(scope="module")
def big(postgres: LocalCluster) -> Iterator[Endpoint]:
    """40 MB, for tests that only read."""
    with fresh_database(postgres) as endpoint:
        execute(endpoint, BIG.format(rows=2000))
        yield endpoint


@pytest.fixture(scope="module")
def large_zoo(postgres: LocalCluster) -> Iterator[Endpoint]:
    """Many small tables and one of 120 MB."""
    with fresh_database(postgres) as endpoint:
        execute(endpoint, ZOO + BIG.format(rows=6000))
        yield endpoint


def test_dump_argv() -> None:
    assert dump_argv(
        "/bin/pg_dump", "keepalives=1", snapshot_id="03-1B-1", compress_option=ZSTD, lock_timeout_s=2.5
    ) == (
        "/bin/pg_dump",
        "--dbname=keepalives=1",
        "--format=custom",
        "--compress=zstd:1",
        "--snapshot=03-1B-1",
        "--lock-wait-timeout=2500",
        "--no-password",
        "--no-sync",
    )


def test_dump_argv_of_a_directory() -> None:
    assert dump_argv(
        "pg_dump",
        "",
        snapshot_id="s",
        compress_option=ZSTD,
        lock_timeout_s=60,
        directory=Path("/spool/dump"),
        jobs=3,
    ) == (
        "pg_dump",
        "--dbname=",
        "--format=directory",
        "--jobs=3",
        "--file=/spool/dump",
        "--compress=zstd:1",
        "--snapshot=s",
        "--lock-wait-timeout=60000",
        "--no-password",
        "--no-sync",
    )


def test_globals_argv() -> None:
    common = ("pg_dumpall", "--dbname=x", "--globals-only", "--encoding=UTF8", "--no-password")
    assert globals_argv("pg_dumpall", "x") == (*common, "--no-role-passwords")
    assert globals_argv("pg_dumpall", "x", with_passwords=True) == common


def test_a_tool_gets_its_secrets_and_settings_by_variables() -> None:
    endpoint = Endpoint("host=h user=u dbname=d options='-c work_mem=8MB'", Secret("hush"))
    command = tool_command(("pg_dump",), endpoint, "dump")
    assert command.environment["PGPASSWORD"] == "hush"
    assert command.environment["PGAPPNAME"] == "backup_pipeline dump"
    assert command.environment["PGTZ"] == "UTC"
    assert command.environment["LC_ALL"] == "C"
    assert command.environment["PGOPTIONS"].startswith("-c work_mem=8MB -c bytea_output=hex")
    assert "hush" not in str(command)


def test_the_stream_is_what_pg_restore_reads(big: Endpoint, tmp_path: Path) -> None:
    archive = tmp_path / "database.dump"
    seen: list[int] = []
    with (
        exported_snapshot(big) as snapshot,
        stream_custom(tool("pg_dump"), big, snapshot, compress_option=PLAIN) as chunks,
        archive.open("wb") as file,
    ):
        hashing = Hashing(chunks, progress=seen.append)
        for chunk in hashing:
            assert 0 < len(chunk) <= 1024 * 1024
            file.write(chunk)
    data = archive.read_bytes()
    assert (hashing.size_bytes, hashing.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert seen[-1] == len(data) > 20_000_000
    listed = subprocess.run([tool("pg_restore"), "--list", str(archive)], capture_output=True, check=True)
    assert b"TABLE DATA public big" in listed.stdout


def test_hashing_nothing() -> None:
    hashing = Hashing([])
    assert list(hashing) == []
    assert (hashing.size_bytes, hashing.sha256) == (0, hashlib.sha256().hexdigest())


def pg_dump_pids(parent: int) -> list[int]:
    """The pg_dump processes below a process, leaders and workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name, rest = folder.joinpath("stat").read_text().rsplit(")", 1)
            if name.endswith("(pg_dump") and int(rest.split()[1]) == parent:
                found.append(int(folder.name))
    return found


def one_chunk_then(endpoint: Endpoint, act: Callable[[int], None], *, stall_s: float = 60) -> Iterator[bytes]:
    with (
        exported_snapshot(endpoint) as snapshot,
        stream_custom(
            tool("pg_dump"), endpoint, snapshot, compress_option="--compress=0", stall_s=stall_s
        ) as chunks,
    ):
        yield next(chunks)
        act(pg_dump_pids(os.getpid())[0])
        yield from chunks


def test_a_killed_pg_dump_is_an_error_and_no_end(big: Endpoint) -> None:
    with pytest.raises(ToolError, match="pg_dump was killed by SIGKILL"):
        list(one_chunk_then(big, lambda pid: os.kill(pid, signal.SIGKILL)))


def test_a_stopped_pg_dump_is_ended(big: Endpoint) -> None:
    began = time.monotonic()
    with pytest.raises(ToolError, match="pg_dump did not answer within"):
        list(one_chunk_then(big, lambda pid: os.kill(pid, signal.SIGSTOP), stall_s=1.0))
    assert time.monotonic() - began < 20
    assert pg_dump_pids(os.getpid()) == []


def test_a_silent_server_at_work_is_waited_for(database: Endpoint) -> None:
    execute(
        database,
        "CREATE TABLE slow (id int); INSERT INTO slow VALUES (1);ALTER TABLE slow ENABLE ROW LEVEL SECURITY",
    )
    with exported_snapshot(database) as snapshot, closing(connect(database)) as session:
        working = threading.Thread(target=session.execute, args=["SELECT pg_sleep(3)"])
        session.execute("SET application_name = 'backup_pipeline dump'")
        assert snapshot.dump_is_working(within_s=60)  # it began something just now
        working.start()
        wait_until(lambda: snapshot.dump_is_working(within_s=0))
        working.join()
        wait_until(lambda: not snapshot.dump_is_working(within_s=0.1))
        session.execute("SET application_name = 'other'")
        assert not snapshot.dump_is_working(within_s=60)


class Patient:
    """A snapshot that says how the server is, for the watch alone."""

    id = "00000003-0000001B-1"

    def __init__(self, *, working: bool) -> None:
        self.working, self.asked = working, 0

    def check(self) -> None:
        pass

    def dump_is_working(self, *, within_s: float) -> bool:
        self.asked += 1
        return self.working and within_s > 0

    def contention(self) -> None:
        return None


def program(folder: Path, script: str) -> str:
    path = folder / "pg_dump"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("working", "asked"), [(True, 7), (False, 1)])
def test_patience_with_silence_has_an_end(
    tmp_path: Path, database: Endpoint, working: bool, asked: int
) -> None:
    silent = program(tmp_path, "printf begin; exec sleep 60")
    snapshot = Patient(working=working)
    with stream_custom(silent, database, snapshot, compress_option=ZSTD, stall_s=0.1) as chunks:
        assert next(chunks) == b"begin"
        with pytest.raises(ToolError, match="pg_dump did not answer within 0"):
            next(chunks)
    assert snapshot.asked == asked


def test_a_late_failure_is_no_end(tmp_path: Path, database: Endpoint) -> None:
    failing = program(tmp_path, "printf all; exec >&-; sleep 0.3; echo broken >&2; exit 3")
    with stream_custom(failing, database, Patient(working=True), compress_option=ZSTD) as chunks:
        assert next(chunks) == b"all"
        with pytest.raises(ToolError, match="pg_dump ended with exit code 3: broken"):
            next(chunks)


@pytest.mark.parametrize(
    "said",
    [
        'pg_dump: error: could not obtain lock on relation "public.big"',
        "pg_dump: error: query failed: ERROR:  canceling statement due to lock timeout",
    ],
)
def test_a_lock_that_somebody_else_had_is_worth_another_try(
    tmp_path: Path, database: Endpoint, said: str
) -> None:
    failing = program(tmp_path, f"echo '{said}' >&2; exit 1")
    with (
        stream_custom(failing, database, Patient(working=True), compress_option=ZSTD) as chunks,
        pytest.raises(ServerError, match="kept from a table") as raised,
    ):
        next(chunks)
    assert said.partition("error: ")[2] in str(raised.value.detail["pg_dump"])


def test_a_lost_snapshot_ends_the_dump(big: Endpoint) -> None:
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%snapshot'"
    with pytest.raises(ServerError, match="lost"):
        list(one_chunk_then(big, lambda _: execute(big, end)))


def test_an_ended_backend_is_an_error(big: Endpoint) -> None:
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%dump'"
    with pytest.raises(ToolError, match="pg_dump ended with exit code 1"):
        list(one_chunk_then(big, lambda _: execute(big, end)))


def test_leaving_early_ends_pg_dump(big: Endpoint) -> None:
    with (
        exported_snapshot(big) as snapshot,
        stream_custom(tool("pg_dump"), big, snapshot, compress_option=PLAIN) as chunks,
    ):
        next(chunks)
    assert pg_dump_pids(os.getpid()) == []


def test_a_directory_dump_hands_over_closed_files(
    postgres: LocalCluster, large_zoo: Endpoint, tmp_path: Path
) -> None:
    source = backup(large_zoo, tmp_path / "custom.dump")
    spool, target = tmp_path / "spool", tmp_path / "target"
    spool.mkdir(mode=0o700)
    target.mkdir()
    names, early = [], []
    with (
        exported_snapshot(large_zoo) as snapshot,
        dump_directory(
            tool("pg_dump"), large_zoo, snapshot, spool=spool, jobs=2, compress_option=ZSTD
        ) as files,
    ):
        for file in files:
            (target / file.name).write_bytes(b"".join(file.chunks()))
            assert (target / file.name).stat().st_size == file.size_bytes
            names.append(file.name)
            early.append(bool(pg_dump_pids(os.getpid())))
    assert names[-1] == "toc.dat"
    assert early[0]  # while the big table was still being written
    assert not early[-1]
    assert list(spool.iterdir()) == []
    with fresh_database(postgres) as copy:
        restore(target, copy)
        assert hold_against(source, target, copy, postgres).differences == ()


@pytest.mark.parametrize("victim", ["leader", "worker"])
def test_a_killed_directory_dump_never_hands_over_its_contents(
    large_zoo: Endpoint, tmp_path: Path, victim: str
) -> None:
    names: list[str] = []

    def kill() -> None:
        leader = pg_dump_pids(os.getpid())[0]
        os.kill(leader if victim == "leader" else pg_dump_pids(leader)[0], signal.SIGKILL)

    def read() -> None:
        with (
            exported_snapshot(large_zoo) as snapshot,
            dump_directory(
                tool("pg_dump"), large_zoo, snapshot, spool=tmp_path, jobs=2, compress_option=PLAIN
            ) as files,
        ):
            for file in files:
                if not names:
                    kill()
                names.append(file.name)

    with pytest.raises(ToolError, match="pg_dump"):
        read()
    assert names
    assert "toc.dat" not in names
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline  # the workers of a killed leader too
        time.sleep(0.05)


def test_a_full_spool_is_refused(database: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "SPOOL_RESERVE_BYTES", 1 << 60)
    with (
        exported_snapshot(database) as snapshot,
        pytest.raises(Refused, match="and needs"),
        dump_directory(tool("pg_dump"), database, snapshot, spool=tmp_path, jobs=2, compress_option=ZSTD),
    ):
        pass


def test_files_wait_where_there_are_no_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "1.dat"
    with path.open("wb"):
        assert not directories._is_closed(path)
    assert directories._is_closed(path)
    monkeypatch.delattr("fcntl.F_SETLEASE")
    assert not directories._is_closed(path)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_database_names(postgres: LocalCluster, name: str) -> None:
    with fresh_database(postgres, name) as database:
        with (
            exported_snapshot(database) as snapshot,
            stream_custom(tool("pg_dump"), database, snapshot, compress_option=ZSTD) as chunks,
        ):
            assert b"".join(chunks).startswith(b"PGDMP")
        assert b"CREATE ROLE postgres" in dump_globals(tool("pg_dumpall"), database)


def test_globals_hold_passwords_only_when_asked(postgres: LocalCluster, database: Endpoint) -> None:
    role = sql.Identifier('ro"le; $(x)')
    execute(database, sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'hush'").format(role).as_string())
    execute(database, "CREATE ROLE plain LOGIN")
    try:
        without = dump_globals(tool("pg_dumpall"), database)
        assert b'CREATE ROLE "ro""le; $(x)";' in without
        assert b"SCRAM" not in without
        assert b"SCRAM" in dump_globals(tool("pg_dumpall"), database, with_passwords=True)
        # A role that may not read pg_authid gets all but the hashes.
        plain = postgres.endpoint(database.database, user="plain")
        assert b'CREATE ROLE "ro""le; $(x)";' in dump_globals(tool("pg_dumpall"), plain)
        with pytest.raises(ToolError, match="pg_dumpall ended with exit code 1"):
            dump_globals(tool("pg_dumpall"), plain, with_passwords=True)
    finally:
        execute(database, sql.SQL("DROP ROLE {}, plain").format(role).as_string())
