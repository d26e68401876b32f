"""Scratch servers: of the right version, empty, and gone afterwards whatever happened."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from backup_pipeline import confinement
from backup_pipeline.engines.postgres import scratch as scratch_module
from backup_pipeline.engines.postgres.cluster import LocalCluster, runs_as, server_identity
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import (
    DATABASE_PREFIX,
    ROLE_MARK,
    collect_stale,
    create_roles,
    private_folder,
    scratch_cluster,
    scratch_server,
)
from backup_pipeline.engines.postgres.server import Connection, connect, read_server_info
from backup_pipeline.errors import NotProvable, ServerError
from backup_pipeline_tests.servers.postgres import bin_dir_17


def create(connection: Connection, database: str) -> None:
    connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(database)))


def names(server: Endpoint, query: str) -> list[str]:
    with contextlib.closing(connect(server)) as session:
        return [str(name) for (name,) in session.execute(query.encode()).fetchall()]


def scratch_databases(server: Endpoint) -> list[str]:
    return [
        name for name in names(server, "SELECT datname FROM pg_database") if name.startswith(DATABASE_PREFIX)
    ]


def roles(server: Endpoint, *wanted: str) -> list[str]:
    return sorted(set(wanted) & set(names(server, "SELECT rolname FROM pg_roles")))


# A cluster of our own


def test_a_scratch_cluster_is_of_the_version_asked_for_and_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with private_folder() as parent:
        with scratch_cluster(17, bin_dir=bin_dir_17(), folder=parent) as cluster:
            with contextlib.closing(connect(cluster.endpoint())) as session:
                assert read_server_info(session).major == 17
                pid = session.info.backend_pid
                around = Path(f"/proc/{pid}/environ").read_bytes() if sys.platform == "linux" else b""
            assert len(list(parent.glob("backup-scratch-*"))) == 1
        assert b"hunter2" not in around
        assert not list(parent.glob("backup-scratch-*"))


def test_what_runs_in_a_scratch_cluster_reaches_no_other_machine(postgres: LocalCluster) -> None:
    def hears(server: LocalCluster) -> bool:
        with socket.socket() as listener, contextlib.closing(connect(server.endpoint())) as session:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.settimeout(0.5)
            port = listener.getsockname()[1]
            connecting = f"bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port} || true' 2>/dev/null"
            session.execute(sql.SQL("COPY (SELECT 1) TO PROGRAM {}").format(sql.Literal(connecting)))
            try:
                listener.accept()[0].close()
            except TimeoutError:
                return False
            return True

    if not runs_as(Path(bin_dir_17()) / "postgres", server_identity(), network=False):
        pytest.skip("needs a kernel that lets this user make a network namespace")
    with scratch_cluster(17, bin_dir=bin_dir_17()) as cluster:
        assert cluster.cut_off
        assert not hears(cluster)
    assert hears(postgres)


@pytest.mark.skipif(not confinement.available(), reason="takes a Linux with Landlock")
def test_what_runs_in_a_scratch_cluster_reads_no_files_but_its_own(postgres: LocalCluster) -> None:
    def reads(server: LocalCluster, file: Path) -> bool:
        told = server.folder / "data" / "told"
        with contextlib.closing(connect(server.endpoint())) as session:
            with contextlib.suppress(psycopg.Error):
                session.execute(f"COPY (SELECT) TO PROGRAM 'cat {file} > {told}'".encode())
            by_program = told.read_text() if told.exists() else ""
            by_server = ""
            with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
                row = session.execute("SELECT pg_read_file(%s)", [str(file)]).fetchone()
                by_server = str(row[0]) if row else ""
        assert by_program == by_server
        return by_server == "hush"

    with private_folder() as folder:
        folder.chmod(0o711)
        secret = folder / "secret"
        secret.write_text("hush")
        secret.chmod(0o644)
        assert reads(postgres, secret)
        with scratch_server(17, bin_dir=bin_dir_17(), folder=folder) as scratch:
            assert scratch.hidden
        with scratch_cluster(17, bin_dir=bin_dir_17(), folder=folder) as cluster:
            assert not reads(cluster, secret)
            with tempfile.NamedTemporaryFile(dir="/dev/shm") as segment:
                Path(segment.name).write_text("hush")
                Path(segment.name).chmod(0o644)
                assert reads(postgres, Path(segment.name))
                assert not reads(cluster, Path(segment.name))


def test_a_failing_proof_leaves_no_cluster() -> None:
    with private_folder() as parent:
        with (
            contextlib.suppress(ZeroDivisionError),
            scratch_server(17, bin_dir=bin_dir_17(), folder=parent) as scratch,
        ):
            assert scratch.ours
            raise ZeroDivisionError
        assert not list(parent.glob("backup-scratch-*"))


def test_a_missing_version_is_not_provable_here_and_says_how_to_get_it() -> None:
    with pytest.raises(NotProvable) as missing, scratch_cluster(18, bin_dir=bin_dir_17()):
        pass
    assert "the newest found is 17." in missing.value.message
    assert "postgresql-18" in missing.value.hint
    assert "[scratch] dsn" in missing.value.hint


def test_a_cluster_that_cannot_start_is_not_provable_here() -> None:
    with (
        pytest.raises(NotProvable, match="cannot be started"),
        scratch_cluster(17, bin_dir=bin_dir_17(), settings={"shared_buffers": "nonsense"}),
    ):
        pass


MAKES_ONE = """
import sys, time
from pathlib import Path
from backup_pipeline.engines.postgres.scratch import scratch_cluster
with scratch_cluster(17, bin_dir=sys.argv[1], folder=Path(sys.argv[2])) as cluster:
    print(cluster.endpoint().conninfo["host"], flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: its kernel ends a child with its parent")
def test_what_a_killed_proof_left_is_collected_by_the_next() -> None:
    with private_folder() as parent:
        argv = [sys.executable, "-c", MAKES_ONE, bin_dir_17(), str(parent)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as proof:
            assert proof.stdout is not None
            host = Path(proof.stdout.readline().strip())
            assert host.is_dir()
            assert collect_stale(parent) == ()
            proof.send_signal(signal.SIGKILL)
        (left,) = parent.glob("backup-scratch-*")
        assert collect_stale(parent) == (left,)
        assert not left.exists()
        assert not host.exists()


def test_what_belongs_to_someone_is_not_collected() -> None:
    with private_folder() as parent, private_folder(parent) as living:
        (parent / "backup-scratch-link").symlink_to(living)
        just_made = parent / "backup-scratch-justmade"
        just_made.mkdir()
        (parent / "elsewhere").mkdir()
        assert collect_stale(parent) == ()
        hours_ago = time.time() - 7200
        os.utime(just_made, (hours_ago, hours_ago))
        assert collect_stale(parent) == (just_made,)
        assert living.exists()


# An existing server


def test_on_an_existing_server_database_and_roles_are_gone_afterwards(postgres: LocalCluster) -> None:
    server = postgres.endpoint()
    with scratch_server(17, existing=server) as scratch:
        assert not scratch.ours
        with contextlib.closing(connect(scratch.endpoint)) as session:
            create(session, scratch.database)
        create_roles(scratch, ["of the dump"])
        with contextlib.closing(connect(server.with_database(scratch.database))) as session:
            session.execute('CREATE TABLE public.t (); ALTER TABLE public.t OWNER TO "of the dump"')
        assert scratch_databases(server) == [scratch.database]
    assert scratch_databases(server) == []
    assert "of the dump" not in names(server, "SELECT rolname FROM pg_roles")


def test_a_failing_proof_leaves_nothing_on_an_existing_server(postgres: LocalCluster) -> None:
    server = postgres.endpoint()
    with contextlib.suppress(ZeroDivisionError), scratch_server(17, existing=server) as scratch:
        with contextlib.closing(connect(server)) as session:
            create(session, scratch.database)
        raise ZeroDivisionError
    assert scratch_databases(server) == []


def test_what_cannot_be_dropped_is_said(postgres: LocalCluster) -> None:
    server = postgres.endpoint()
    with scratch_server(17, existing=server) as scratch, contextlib.closing(connect(server)) as session:
        create_roles(scratch, ["in_use"])
        session.execute("CREATE DATABASE of_in_use OWNER in_use")
    (said,) = scratch.left
    assert said == "left on the scratch server: something depends on roles that proofs made: in_use"
    with contextlib.closing(connect(server)) as session:
        session.execute("DROP DATABASE of_in_use")
    with scratch_server(17, existing=server) as scratch:  # the next one tries again
        pass
    assert not scratch.left
    assert roles(server, "in_use") == []


def test_proofs_beside_each_other_share_roles_and_the_last_one_drops_them(postgres: LocalCluster) -> None:
    server = postgres.endpoint()
    with scratch_server(17, existing=server) as first:
        with scratch_server(17, existing=server) as second:
            create_roles(second, ["shared", "second's"])
            create_roles(first, ["shared"])
            with contextlib.closing(connect(server)) as session:
                create(session, first.database)
                owner = sql.SQL("ALTER DATABASE {} OWNER TO shared").format(sql.Identifier(first.database))
                session.execute(owner)
        assert second.left == []
        assert roles(server, "shared", "second's") == ["second's", "shared"]
    assert first.left == []
    assert roles(server, "shared", "second's") == []


def test_roles_of_a_killed_proof_are_dropped_but_nobody_elses(postgres: LocalCluster) -> None:
    server = postgres.endpoint()
    with contextlib.closing(connect(server)) as session:
        session.execute("CREATE ROLE of_a_dead_proof")
        session.execute(sql.SQL("COMMENT ON ROLE of_a_dead_proof IS {}").format(sql.Literal(ROLE_MARK)))
        session.execute("CREATE ROLE somebodys")
        with scratch_server(17, existing=server) as scratch:
            create_roles(scratch, ["somebodys"])
        assert roles(server, "of_a_dead_proof", "somebodys") == ["somebodys"]
        session.execute("DROP ROLE somebodys")


def test_roles_are_dropped_where_the_server_is_slow_to_end_a_session(
    postgres: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as late:

        def connect_so(endpoint: Endpoint, *, autocommit: bool = True, purpose: str) -> Connection:
            session = connect(endpoint, autocommit=autocommit, purpose=purpose)
            if not autocommit:  # what it holds is free only a while after it was closed
                late.callback(session.close)
                monkeypatch.setattr(session, "close", lambda: None)
            return session

        server = postgres.endpoint()
        monkeypatch.setattr(scratch_module, "connect", connect_so)
        with scratch_server(17, existing=server) as scratch:
            create_roles(scratch, ["of_a_slow_server"])
        assert roles(server, "of_a_slow_server") == []


def test_a_template_with_a_subscription_is_dropped_too(postgres: LocalCluster) -> None:
    server = postgres.endpoint()
    with scratch_server(17, existing=server) as scratch:
        name = sql.Identifier(scratch.database)
        with contextlib.closing(connect(server)) as session:
            create(session, scratch.database)
            session.execute(sql.SQL("ALTER DATABASE {} IS_TEMPLATE true").format(name))
        with contextlib.closing(connect(server.with_database(scratch.database))) as session:
            session.execute(
                "CREATE SUBSCRIPTION sub CONNECTION 'dbname=none' PUBLICATION p"
                " WITH (connect = false, slot_name = 'the_sources')"
            )
    assert scratch.left == []
    assert scratch_databases(server) == []


def test_what_a_killed_proof_left_on_a_server_is_dropped_but_nothing_in_use(postgres: LocalCluster) -> None:
    server = postgres.endpoint()
    with contextlib.closing(connect(server)) as session, scratch_server(17, existing=server) as living:
        create(session, living.database)
        create(session, stale := f"{DATABASE_PREFIX}0123456789abcdef")
        with scratch_server(17, existing=server):
            found = scratch_databases(server)
            assert stale not in found
            assert living.database in found


def test_another_version_or_the_source_itself_is_no_place_for_a_proof(postgres: LocalCluster) -> None:
    server = postgres.endpoint()
    with (
        pytest.raises(NotProvable, match=r"is PostgreSQL 17\.\d+, not 16"),
        scratch_server(16, existing=server),
    ):
        pass
    with contextlib.closing(connect(server)) as session:
        identifier = read_server_info(session).system_identifier
    with (
        pytest.raises(NotProvable, match="the cluster that the backup was taken from"),
        scratch_server(17, existing=server, source_identifier=identifier),
    ):
        pass


def test_an_existing_server_that_is_down_is_an_error_of_the_server() -> None:
    nowhere = Endpoint(make_conninfo("", host="/nonexistent", dbname="postgres", user="postgres"))
    with pytest.raises(ServerError, match="cannot connect"), scratch_server(17, existing=nowhere):
        pass
