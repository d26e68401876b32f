"""The commands of a server of our own, and the settings of one that is thrown away."""

from pathlib import Path

import pytest

from backup_pipeline.engines.postgres import server_argv
from backup_pipeline.engines.postgres.server_argv import (
    initdb_argv,
    postgres_argv,
    relaxed_settings,
    resetwal_argv,
    single_user_arguments,
)


def test_the_commands_hold_no_secret_and_no_shell() -> None:
    assert initdb_argv("/pg/initdb", Path("/d"), Path("/p"), locale="C", sync=False) == (
        "/pg/initdb",
        "--pgdata=/d",
        "--username=postgres",
        "--pwfile=/p",
        "--auth-local=trust",
        "--auth-host=scram-sha-256",
        "--encoding=UTF8",
        "--locale-provider=libc",
        "--locale=C",
        "--no-instructions",
        "--no-sync",
    )
    assert postgres_argv("/pg/postgres", Path("/d"), {"port": "5432", "fsync": "off"}) == (
        "/pg/postgres",
        "-D",
        "/d",
        "-c",
        "port=5432",
        "-c",
        "fsync=off",
    )


def test_resetwal_argv() -> None:
    argv = ("/pg/pg_resetwal", "--next-oid=2000000000", "--pgdata=/d")
    assert resetwal_argv("/pg/pg_resetwal", Path("/d"), 2_000_000_000) == argv


def test_a_single_user_server_is_given_its_settings_and_a_database() -> None:
    assert single_user_arguments(Path("/d"), {"fsync": "off"}, "template1") == (
        *("--single", "-D", "/d", "-c", "fsync=off"),
        "template1",
    )


def test_small_shared_memory_is_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_argv, "_SMALL_SHM_BYTES", 2**62)
    assert relaxed_settings()["dynamic_shared_memory_type"] == "mmap"
    monkeypatch.setattr(server_argv, "_SMALL_SHM_BYTES", 0)
    assert "dynamic_shared_memory_type" not in relaxed_settings()
