"""A stopped cluster is entered whoever its superuser is, and its pages are compared with their checksums."""

from collections.abc import Iterator

import pytest

from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.recovered_copy import amcheck_argv, check_pages, looking_into
from backup_pipeline.engines.postgres.recovered_server import make_superuser
from backup_pipeline.errors import ToolError
from backup_pipeline_tests.actions.box import ask, execute
from backup_pipeline_tests.servers import postgres as servers


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """A cluster of the test's own, with page checksums."""
    with servers.running_cluster(servers.bin_dir_17(), fsync="off") as made:
        made.relaxed = False  # it is stopped in order
        made.stop()
        servers.enable_checksums(made)
        made.start()
        yield made


def test_the_command_looks_into_all_databases_and_each_index_against_its_table() -> None:
    assert amcheck_argv("/bin/pg_amcheck") == (
        "/bin/pg_amcheck",
        "--all",
        "--maintenance-db=template1",
        "--install-missing",
        "--heapallindexed",
        "--no-password",
    )


def test_one_is_entered_whose_superuser_may_not_log_in(cluster: LocalCluster) -> None:
    execute(cluster.endpoint(), "ALTER ROLE postgres NOLOGIN")
    cluster.stop()
    with looking_into(cluster, 17) as copy:
        assert ask(copy.endpoint("postgres"), "SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        assert set(copy.databases()) == {"postgres", "template1"}
        assert copy.amcheck(copy.databases()).differences == ()
    assert check_pages(cluster).checked == ("every page agrees with its checksum",)


def test_a_statement_that_a_single_user_server_refuses_is_an_error(cluster: LocalCluster) -> None:
    cluster.stop()
    with pytest.raises(ToolError, match=r"cannot be entered: .* ended with 0: .*no_such_role"):
        make_superuser(cluster, "ALTER ROLE no_such_role LOGIN")


def test_a_database_that_is_closed_is_looked_into_but_not_a_half_dropped_one(cluster: LocalCluster) -> None:
    for statement in (
        "CREATE DATABASE half_dropped",
        "UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'half_dropped'",
        'CREATE DATABASE "closed; ""one"""',
    ):
        execute(cluster.endpoint(), statement)
    closed = cluster.endpoint('closed; "one"')
    execute(closed, "CREATE TABLE public.thing AS SELECT i AS a FROM generate_series(1, 5000) AS i")
    execute(closed, "CREATE INDEX thing_a ON public.thing (a)")
    path = str(ask(closed, "SELECT pg_relation_filepath('public.thing_a')"))
    execute(cluster.endpoint(), 'ALTER DATABASE "closed; ""one""" ALLOW_CONNECTIONS false')
    cluster.stop()
    with (cluster.data / path).open("r+b") as file:
        file.seek(8192 + 24)
        file.write(b"\xa5" * 200)
    with looking_into(cluster, 17) as copy:
        databases = copy.databases()
        found = copy.amcheck(databases)
    assert databases == {"postgres": True, "template1": True, 'closed; "one"': True, "half_dropped": False}
    assert any('closed; "one".public.thing_a' in line for line in found.differences)
    assert found.notes == ("not checked, as an interrupted DROP DATABASE left it: half_dropped",)


def test_a_page_that_does_not_agree_is_named(cluster: LocalCluster) -> None:
    execute(
        cluster.endpoint(), "CREATE TABLE public.thing AS SELECT i AS a FROM generate_series(1, 5000) AS i"
    )
    execute(cluster.endpoint(), "CHECKPOINT")
    path = str(ask(cluster.endpoint(), "SELECT pg_relation_filepath('public.thing')"))
    cluster.stop()
    with (cluster.data / path).open("r+b") as file:
        file.seek(8192 + 4000)
        file.write(b"\xa5")
    found = check_pages(cluster)
    assert len(found.differences) == 1
    assert path in found.differences[0]


def test_what_is_no_cluster_is_an_error_and_not_sound(cluster: LocalCluster) -> None:
    cluster.stop()
    (cluster.data / "global" / "pg_control").write_bytes(b"")
    with pytest.raises(ToolError, match="pg_checksums ended with 1"):
        check_pages(cluster)
    with pytest.raises(ToolError, match="cannot be entered"), looking_into(cluster, 17):
        pass
