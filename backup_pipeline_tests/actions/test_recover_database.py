"""One database as it was, beside the live one: equal, or not there; and nothing of scratch is left."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from backup_pipeline import process
from backup_pipeline.actions import recover_database
from backup_pipeline.actions.recover_database import DatabaseRequest
from backup_pipeline.actions.recovery_plan import RecoverRequest
from backup_pipeline.config_file import parse
from backup_pipeline.domain.recovery_target import RecoveryTarget, TargetKind
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_in
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.errors import ConfigError, Refused, ServerError
from backup_pipeline.process import Command, Completed
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import ask, execute, now, our_children
from backup_pipeline_tests.actions.protected_box import NAME
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.waiting import wait_until

ROWS = "SELECT sum(hashtextextended(t::text, 0)) FROM public.orders t"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    """A database `shop` of a role's own, whose table is lost after the first row of the ledger."""
    with a_recovery_box(servers.bin_dir_17(), DirectoryStore(tmp_path_factory.mktemp("store"))) as made:
        execute(made.cluster.endpoint(), "CREATE ROLE keeper")
        execute(made.cluster.endpoint(), "CREATE DATABASE shop OWNER keeper")
        shop = made.cluster.endpoint("shop")
        made.take()
        execute(shop, "CREATE TABLE public.orders AS SELECT i, md5(i::text) FROM generate_series(1, 1000) i")
        execute(shop, "ALTER TABLE public.orders OWNER TO keeper")
        made.commit(1)
        execute(shop, "DROP TABLE public.orders")
        made.commit(1)
        made.switch()
        yield made


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A server that has none of the roles."""
    with servers.running_cluster(servers.bin_dir_17()) as cluster:
        yield cluster


@pytest.fixture
def scratch(box: RecoveryBox, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where clusters are recovered meanwhile; nothing of them is left."""
    folder = box.folder.parent / f"scratch-{abs(hash(request.node.name))}"
    folder.mkdir(mode=0o711)
    before = our_children("postgres")
    yield folder
    assert list(folder.iterdir()) == []
    assert our_children("postgres") == before


def target(box: RecoveryBox) -> RecoveryTarget:
    return RecoveryTarget(TargetKind.TIME, at=box.ledger[0].at)


def perform(
    box: RecoveryBox, scratch: Path, server: Endpoint, database: str = "shop", *, create_roles: bool = False
) -> recover_database.Result:
    request = DatabaseRequest(database, "shop_back", server, scratch=scratch, create_roles=create_roles)
    cluster = box.protected()
    planned = recover_database.plan(
        cluster, request, RecoverRequest(target(box), Path("unused")), report=box.said
    )
    return recover_database.carry_out(cluster, planned, clock=now, report=box.said)


def run(box: RecoveryBox, *arguments: str) -> Completed:
    assert isinstance(box.store, DirectoryStore)
    store = ("--store", f"file://{box.store.root}")
    argv = (sys.executable, "-m", "backup_pipeline.cli", *store, "recover", NAME, *arguments)
    return process.run(Command(argv), timeout_s=120, check=False)


def test_a_database_comes_back_beside_the_live_one(box: RecoveryBox, scratch: Path) -> None:
    live = box.cluster.endpoint("shop")
    words = ("--to", box.ledger[0].at.isoformat(), "--into", "shop_back")
    where = ("--server", box.cluster.endpoint().dsn, "--scratch", str(scratch))
    shown = run(box, *words, "--one-database", "shop", *where, "--dry-run")
    assert "restored as shop_back, a new database on" in shown.stdout, shown.stderr
    done = run(box, *words, "--one-database", "shop", *where, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["from"], answer["database"]) == ("shop", "shop_back")
    assert any("equal" in line or "compared" in line for line in answer["lines"])
    back = box.cluster.endpoint("shop_back")
    expected = ask(
        live, "SELECT sum(hashtextextended((i, md5(i::text))::text, 0)) FROM generate_series(1, 1000) i"
    )
    assert ask(back, ROWS) == expected
    owner = "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = 'public.orders'::regclass"
    assert ask(back, owner) == "keeper"
    assert ask(live, "SELECT to_regclass('public.orders') IS NULL")
    again = run(box, *words, "--one-database", "shop", *where)
    assert (again.returncode, "shop_back exists on" in again.stderr) == (6, True), again.stderr
    execute(box.cluster.endpoint(), "DROP DATABASE shop_back")


def test_roles_that_the_server_lacks_are_refused_or_created(
    box: RecoveryBox, another: LocalCluster, scratch: Path
) -> None:
    with pytest.raises(Refused, match="roles are missing") as caught:
        perform(box, scratch, another.endpoint())
    assert "recovered to" in caught.value.detail
    assert list(scratch.iterdir()) == []
    perform(box, scratch, another.endpoint(), create_roles=True)
    assert ask(another.endpoint("shop_back"), "SELECT count(*) FROM public.orders") == 1000
    assert not ask(another.endpoint(), "SELECT rolsuper FROM pg_roles WHERE rolname = 'keeper'")
    roles = "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'backup_pipeline%'"
    assert ask(another.endpoint(), roles) == 0
    execute(another.endpoint(), "DROP DATABASE shop_back")


def test_a_database_that_the_cluster_did_not_have_leaves_nothing(box: RecoveryBox, scratch: Path) -> None:
    with pytest.raises(ServerError, match='database "never" does not exist'):
        perform(box, scratch, box.cluster.endpoint(), database="never")


def test_what_the_restore_would_refuse_is_refused_before_the_recovery(
    box: RecoveryBox, another: LocalCluster, scratch: Path
) -> None:
    execute(another.endpoint(), "CREATE ROLE poor LOGIN")
    said = len(box.said.lines)
    with pytest.raises(Refused, match="poor may not create databases"):
        perform(box, scratch, another.endpoint(user="poor"))
    assert not any("unpack" in line for line in box.said.lines[said:])


@pytest.mark.parametrize("moment", [b"fetched", b"dumping shop"])
def test_killed_in_the_middle_it_leaves_no_database_and_the_next_one_collects_it(
    box: RecoveryBox, scratch: Path, moment: bytes
) -> None:
    assert isinstance(box.store, DirectoryStore)
    words = ("--to", box.ledger[0].at.isoformat(), "--into", "shop_back", "--one-database", "shop")
    where = ("--server", box.cluster.endpoint().dsn, "--scratch", str(scratch))
    program = (sys.executable, "-m", "backup_pipeline.cli", "--store", f"file://{box.store.root}")
    command = Command((*program, "recover", NAME, *words, *where))
    with tempfile.TemporaryFile() as errors:
        child = process.start(command, stderr=errors)
        try:
            wait_until(lambda: moment in contents(errors))
        finally:
            child.kill()
            child.wait()
    (left,) = scratch.iterdir()
    data = [path.parent for path in left.rglob("PG_VERSION") if path.parent.name == "data"]
    assert data
    (socket,) = [path.resolve() for path in left.rglob("socket") if path.is_symlink()]
    exists = "SELECT count(*) FROM pg_database WHERE datname LIKE 'shop_back%'"
    assert ask(box.cluster.endpoint(), exists) == 0
    with private_folder(scratch) as next_one:  # as the next recovery makes
        assert list(scratch.iterdir()) == [next_one]
    assert not [path for path in data if server_in(path)]
    assert not socket.exists()


def contents(file: IO[bytes]) -> bytes:
    """All that was written to a file of which the child has a descriptor, whose place is left alone."""
    return os.pread(file.fileno(), 1024 * 1024, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--one-database", "shop", "--port", "5999"), "--port is not for --one-database"),
        (("--server", "host=/tmp"), "--server is only read with --one-database"),
        (("--one-database", "shop"), "nobody knows which server"),
    ],
)
def test_options_that_do_not_go_together_are_told(
    box: RecoveryBox, words: tuple[str, ...], said: str
) -> None:
    done = run(box, "--to", "latest", "--into", "x", *words)
    assert done.returncode in (2, 3)
    assert said in done.stderr


CONFIGURED = """
[store]
url = "file:///srv/backups"
[clusters.main]
dsn = "host=db port=5433 user=replicator dbname=postgres"
[databases.shop]
dsn = "host=db port=5433 user=backup dbname=shop"
restore_dsn = "host=db port=5433 user=restorer dbname=postgres"
jobs = 2
[databases.elsewhere]
dsn = "host=another port=5433 user=backup dbname=shop"
restore_dsn = "host=another port=5433 user=restorer dbname=postgres"
[databases.unrestorable]
dsn = "host=db port=5433 user=backup dbname=blog"
"""


def test_the_server_is_the_configured_one_of_that_database_in_that_cluster() -> None:
    config = parse(CONFIGURED, Path("backups.toml"))
    server, database = recover_database.choose_server(config, NAME, "shop")
    assert (server.shown, database.jobs) == ("restorer@db:5433/postgres", 2)
    for name in ("blog", "other"):
        with pytest.raises(ConfigError, match=f"none is {name} of main") as caught:
            recover_database.choose_server(config, NAME, name)
        assert "--server" in caught.value.hint
