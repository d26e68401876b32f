"""The commands that make and run a server of our own, and the settings that it is given.

Called by cluster.py, which runs them, and for single-user servers. Who they run as, and where, is said there.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

SUPERUSER = "postgres"

OURS = {
    # A cluster of ours takes nothing from other clusters' settings and gives nothing away.
    "archive_mode": "off",
    "shared_preload_libraries": "",
    "logging_collector": "off",
    "log_destination": "stderr",
    "unix_socket_permissions": "0700",
    "max_logical_replication_workers": "0",
}
_RELAXED = {
    # Nothing here has to outlive a crash: the whole cluster is thrown away.
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "1h",
    "maintenance_work_mem": "256MB",
    "max_locks_per_transaction": "2048",  # a proof locks every table at once; 40 MB hold 200,000
    "autovacuum": "off",
    "jit": "off",
}
_SMALL_SHM_BYTES = 512 * 1024 * 1024


def initdb_argv(initdb: str, data: Path, password_file: Path, *, locale: str, sync: bool) -> tuple[str, ...]:
    """The command that makes a cluster: no password on the socket, SCRAM on TCP."""
    return (
        initdb,
        f"--pgdata={data}",
        f"--username={SUPERUSER}",
        f"--pwfile={password_file}",
        "--auth-local=trust",
        "--auth-host=scram-sha-256",
        "--encoding=UTF8",
        "--locale-provider=libc",
        f"--locale={locale}",
        "--no-instructions",
        *(() if sync else ("--no-sync",)),
    )


def resetwal_argv(pg_resetwal: str, data: Path, first_oid: int) -> tuple[str, ...]:
    """The command that has a new cluster, not started yet, number its objects from `first_oid` on."""
    return (pg_resetwal, f"--next-oid={first_oid}", f"--pgdata={data}")


def postgres_argv(postgres: str, data: Path, settings: Mapping[str, str]) -> tuple[str, ...]:
    """The command that runs a server; settings given here win over every file in the data directory."""
    return (postgres, "-D", str(data), *_given(settings))


def single_user_arguments(data: Path, settings: Mapping[str, str], database: str) -> tuple[str, ...]:
    """What has `postgres` run statements of its standard input as the bootstrap superuser, one a line.

    Source: PostgreSQL, "postgres", Options for Single-User Mode.
    """
    return ("--single", "-D", str(data), *_given(settings), database)


def relaxed_settings() -> dict[str, str]:
    """Settings for a cluster that is thrown away, on this machine."""
    settings = dict(_RELAXED)
    with contextlib.suppress(OSError):
        shm = os.statvfs("/dev/shm")  # noqa: S108 - it is measured, nothing is put there
        if shm.f_bavail * shm.f_frsize < _SMALL_SHM_BYTES:
            # A container's 64 MB: a parallel index build would fail for want of shared memory.
            settings["dynamic_shared_memory_type"] = "mmap"
    return settings


def _given(settings: Mapping[str, str]) -> tuple[str, ...]:
    """Settings as a server's command line takes them."""
    return tuple(part for name, value in settings.items() for part in ("-c", f"{name}={value}"))
