"""Restores on real servers: what comes back, and that whatever fails leaves all as it was."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql

from backup_pipeline.actions import prune, restore, undo
from backup_pipeline.actions.protected import Protected
from backup_pipeline.actions.restore import RestoreRequest, RestoreResult
from backup_pipeline.config import Secret, TierConfig
from backup_pipeline.domain.backup import Backup, ObjectRole
from backup_pipeline.engines.postgres import load as pg_restore
from backup_pipeline.engines.postgres import rename
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import advisory_lock
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.errors import (
    BackupError,
    BackupNotFound,
    Busy,
    ConfigError,
    Corrupt,
    ProofFailed,
    Refused,
    ServerError,
    StoreError,
)
from backup_pipeline.storage import catalog, leases
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.actions.box import (
    Box,
    Said,
    a_box,
    ask,
    copy_of,
    databases,
    drop_all,
    now,
    stored,
    swap_back,
)
from backup_pipeline_tests.storage.effects import CountingStore

OWNER = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
OIDS = "SELECT string_agg(oid::text || ' ' || datname, ',' ORDER BY oid) FROM pg_database"


@pytest.fixture(scope="module")
def shop(
    postgres: LocalCluster, other: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    """A source of which there is one backup, and which has gone on since."""
    with a_box(postgres, tmp_path_factory.mktemp("shop") / "store", scratch=other) as made:
        made.take("daily")
        made.execute("DELETE FROM public.orders WHERE id <= 400")
        yield made


@pytest.fixture
def live(shop: Box, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The same with a store of the test's own; the source has its name and contents back afterwards."""
    oid = ask(shop.endpoint, "SELECT oid FROM pg_database WHERE datname = current_database()")
    yield copy_of(shop, tmp_path_factory.mktemp("live") / "store")
    admin, name = shop.cluster.endpoint(), shop.endpoint.database
    with contextlib.closing(connect(admin)) as session:
        for extra in databases(shop.cluster, name) - {name}:
            if ask(admin, f"SELECT oid FROM pg_database WHERE datname = {sql.quote(extra)}") == oid:
                drop(session, name)
                back = sql.SQL("ALTER DATABASE {} RENAME TO {}")
                session.execute(back.format(sql.Identifier(extra), sql.Identifier(name)))
            else:
                drop(session, extra)
    assert ask(shop.endpoint, "SELECT oid FROM pg_database WHERE datname = current_database()") == oid
    assert ask(shop.endpoint, "SELECT count(*) FROM public.orders") == 600


def drop(session: Connection, name: str) -> None:
    session.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def only(box: Box) -> Backup:
    (found,) = catalog.list_backups(box.store, fresh=True).backups
    return found


def run(
    box: Box, *, protected: Protected | None = None, report: Said | None = None, **asked: Any
) -> RestoreResult:
    """Plan and carry out."""
    given = protected or box.protected
    request = RestoreRequest(**{"backup": "latest", **asked})
    plan = restore.plan(given, request, clock=now)
    return restore.carry_out(given, plan, clock=now, report=report or box.said)


def orders(endpoint: Endpoint) -> object:
    return ask(endpoint, "SELECT count(*) FROM public.orders")


def untouched(box: Box) -> "contextlib.AbstractContextManager[None]":
    """Nothing on the source's server has another name or is new, and no lease is left, afterwards."""

    @contextlib.contextmanager
    def look() -> Iterator[None]:
        admin = box.cluster.endpoint()
        before, objects = ask(admin, OIDS), stored(box.store)
        yield
        assert ask(admin, OIDS) == before
        assert stored(box.store) == objects
        assert orders(box.endpoint) == 600

    return look()


# --- into a new database -------------------------------------------------------------------


def test_a_new_database_is_equal_to_the_source_at_its_snapshot(live: Box) -> None:
    done = run(live)
    assert done.database.startswith(f"{live.endpoint.database}_restored_2")
    assert done.kept_as == ""
    assert done.restore_s > 0
    new = live.cluster.endpoint(done.database)
    assert orders(new) == 1000
    assert orders(live.endpoint) == 600
    said = "\n".join(done.lines)
    assert "2 tables, 1,100 rows equal row for row" in said
    assert ask(new, "SELECT lo_get(4242)") == b"\xde\xad\xbe\xef"
    assert ask(new, "SELECT nextval('public.tickets')") == 4712
    properties = "SELECT pg_get_userbyid(datdba) || shobj_description(oid, 'pg_database')"
    properties += (
        " || (SELECT string_agg(grants::text, ' ' ORDER BY grants::text) FROM unnest(datacl) grants)"
    )
    properties += " FROM pg_database WHERE datname = current_database()"
    assert ask(new, properties) == ask(live.endpoint, properties)
    assert ask(new, "SELECT current_setting('work_mem')") == "8MB"
    assert ask(new, f"SELECT has_table_privilege('{live.reader}', 'public.customer', 'SELECT')") is True
    assert ask(new, "SELECT reltuples::int FROM pg_class WHERE relname = 'orders'") == 1000  # it is analyzed


def test_the_same_restored_twice_gets_another_name(live: Box) -> None:
    first, second = run(live), run(live)
    assert first.database != second.database
    assert {first.database, second.database} <= live.databases()


@pytest.mark.parametrize(("check", "said"), [("counts", "not compared"), ("none", "were not compared")])
def test_a_check_may_be_less_than_all(live: Box, check: str, said: str) -> None:
    done = run(live, into=f"{live.endpoint.database}_new", check=check)
    assert done.database == f"{live.endpoint.database}_new"
    assert said in "\n".join(done.lines)
    assert orders(live.cluster.endpoint(done.database)) == 1000


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"into": "{live}"}, Refused, "{live} exists on"),
        ({"replace": True}, Refused, "replacing {live} is not confirmed: nothing was typed"),
        ({"replace": True, "confirm": "{live}x"}, Refused, "is not confirmed: found '{live}x'"),
        ({"replace": True, "confirm": "app"}, Refused, "is not confirmed: found 'app'"),
        ({"into": "postgres", "replace": True, "confirm": "postgres"}, Refused, "cannot be restored into"),
        ({"into": "x" * 64}, Refused, "has 64 bytes"),
        ({"check": "some"}, ConfigError, 'check is "some"'),
        ({"backup": "proven"}, BackupNotFound, "proven"),
        ({"backup": "2020-01-01"}, BackupNotFound, "2020-01-01"),
        ({"to": Endpoint("host=/nonexistent user=x")}, ServerError, "/nonexistent"),
    ],
)
def test_what_cannot_be_is_refused_with_nothing_touched(
    live: Box, asked: dict[str, Any], error: type[BackupError], said: str
) -> None:
    name = live.endpoint.database
    given: dict[str, Any] = {"backup": "latest"}
    given |= {
        key: value.format(live=name) if isinstance(value, str) else value for key, value in asked.items()
    }
    with untouched(live), pytest.raises(error) as failure:
        restore.plan(live.protected, RestoreRequest(**given), clock=now)
    assert said.format(live=name) in str(failure.value)
    assert failure.value.hint


# --- the swap, and back --------------------------------------------------------------------


def test_a_live_database_is_replaced_kept_and_swapped_back(live: Box) -> None:
    name = live.endpoint.database
    with contextlib.closing(connect(live.endpoint)) as application:
        done = run(live, replace=True, confirm=name)
        with pytest.raises(Exception, match=r"terminat|closed"):
            application.execute("SELECT 1")
    assert (done.database, orders(live.endpoint)) == (name, 1000)
    assert live.databases() == {name, done.kept_as}
    assert orders(live.cluster.endpoint(done.kept_as)) == 600
    said = "\n".join(done.lines)
    assert f"the database that was live is kept as {done.kept_as}" in said
    assert "1 session ended; new ones waited" in said
    undone = swap_back(live.protected)
    assert (undone.database, orders(live.endpoint)) == (name, 600)
    assert live.databases() == {name, undone.kept_as}
    assert orders(live.cluster.endpoint(undone.kept_as)) == 1000
    with pytest.raises(BackupNotFound, match="no kept copy"):
        swap_back(live.protected)


@pytest.mark.parametrize("proof", ["content", "counts"])
def test_the_plan_promises_no_closer_look_than_there_will_be(live: Box, proof: str) -> None:
    backup = live.take("daily", protected=live.configured(proof=proof))
    for check in ("content", "counts", "none"):
        request = RestoreRequest(str(backup.id), check=check)
        (line,) = (
            line
            for line in restore.plan(live.protected, request, clock=now).lines
            if line.startswith("check: ")
        )
        assert ("every row is compared" in line) is (proof == check == "content"), line
        assert ("rows are counted, not compared" in line) is (
            check == "counts" or (check == "content" and proof == "counts")
        )


def test_a_restore_loads_with_as_many_jobs_as_asked_for(live: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def watched(*args: Any, **options: Any) -> None:
        used.append(args[3].jobs)
        load(*args, **options)

    load = pg_restore.load
    monkeypatch.setattr(pg_restore, "load", watched)
    plan = restore.plan(live.protected, RestoreRequest("latest", jobs=3), clock=now)
    assert "load: 3 jobs at once" in plan.lines
    done = restore.carry_out(live.protected, plan, clock=now, report=live.said)
    assert orders(live.cluster.endpoint(done.database)) == 1000
    run(live, check="none")
    assert used == [3, 1]


def test_a_plan_names_what_the_restore_then_makes(live: Box) -> None:
    name = live.endpoint.database
    request = RestoreRequest("latest", replace=True, confirm=name)
    plan = restore.plan(live.protected, request, clock=now)
    done = restore.carry_out(live.protected, plan, clock=now, report=live.said)
    assert plan.decided.target == done.database == name
    assert f"{name} becomes {name}_before_<time>, which stays" in "\n".join(plan.lines)
    assert done.kept_as.startswith(f"{name}_before_2")


def test_replacing_what_does_not_exist_is_making_it(live: Box) -> None:
    name = f"{live.endpoint.database}_gone"
    done = run(live, into=name, replace=True, confirm=name)
    assert (done.database, done.kept_as) == (name, "")
    assert orders(live.cluster.endpoint(name)) == 1000


def test_a_swap_that_a_dump_keeps_waiting_does_not_cost_the_restore(live: Box) -> None:
    protected = live.configured(lock_timeout=timedelta(seconds=0.2))
    name = live.endpoint.database
    with (
        advisory_lock(live.endpoint, name, purpose="dump of app", wait_s=0),
        pytest.raises(Busy, match="held by another dump") as failure,
    ):
        run(live, protected=protected, replace=True, confirm=name)
    copy = finished(live)
    assert (live.databases(), orders(live.endpoint)) == ({name, copy}, 600)
    assert failure.value.detail["the restored copy"] == f"is complete, and kept as {copy}"
    swapped = swap_back(protected, copy=copy)
    assert swapped.kept_as.startswith(f"{name}_before_2")
    assert orders(live.endpoint) == 1000
    swap_back(protected)
    assert orders(live.endpoint) == 600


def test_two_swaps_of_one_second_keep_both(live: Box) -> None:
    name, at_once = live.endpoint.database, now()
    kept = []
    for _ in range(2):
        request = RestoreRequest("latest", replace=True, confirm=name, check="none")
        plan = restore.plan(live.protected, request, clock=now)
        done = restore.carry_out(live.protected, plan, clock=lambda: at_once, report=live.said)
        kept.append(done.kept_as)
    assert kept[1] == f"{kept[0]}_2"
    assert live.databases() == {name, *kept}


# --- undo ----------------------------------------------------------------------------------


def test_what_a_swap_says_undoes_that_swap_and_no_other(live: Box) -> None:
    name, staging = live.endpoint.database, f"{live.endpoint.database}_staging"
    live.execute(f'CREATE DATABASE "{staging}"', "postgres")
    before = ask(live.endpoint, OIDS)
    program = ("backup-pipeline", "--config", "/etc/some place/backups.toml")
    done = run(live, into=staging, replace=True, confirm=staging, check="none", program=program)
    command = "backup-pipeline --config '/etc/some place/backups.toml' undo app"
    assert f"`{command} --into {staging} --copy {done.kept_as}` swaps it back" in done.lines
    with pytest.raises(BackupNotFound, match=f"no kept copy of database {name} is left"):
        swap_back(live.protected)
    undone = swap_back(live.protected, into=staging, copy=done.kept_as)
    live.execute(f'DROP DATABASE "{undone.kept_as}"', "postgres")
    assert ask(live.endpoint, OIDS) == before


@pytest.mark.parametrize("given", ["host={host} user=postgres", "host={host} user=postgres password=geheim"])
def test_the_command_that_undoes_names_the_server_without_a_password(live: Box, given: str) -> None:
    host = live.cluster.endpoint().conninfo["host"]
    name, to = live.endpoint.database, Endpoint(given.format(host=host))
    said = "\n".join(run(live, to=to, replace=True, confirm=name, check="none").lines)
    assert f"--to 'host={host} user=postgres" in said.replace(
        "user=postgres host=" + host, f"host={host} user=postgres"
    )
    assert "geheim" not in said
    assert ("its password is not shown" in said) is ("geheim" in to.dsn)


def test_an_undo_shows_what_it_would_do_and_wants_the_name_typed(live: Box) -> None:
    name = live.endpoint.database
    kept = run(live, replace=True, confirm=name, check="none").kept_as
    before = ask(live.cluster.endpoint(), OIDS)
    with contextlib.closing(connect(live.endpoint)):
        plan = undo.plan(live.protected, undo.UndoRequest(confirm=name), clock=now)
    assert plan.lines[0] == f"server: {live.cluster.endpoint('postgres').shown}"
    assert plan.lines[1].startswith(f"copy: {kept}, put aside by a restore at 2")
    assert plan.lines[1].endswith("MiB")
    assert f"{name} becomes {name}_undone_<time>" in plan.lines[2]
    assert "1 session to be ended" in plan.lines[2]
    for typed in ("", "app", f"{name} "):
        with pytest.raises(Refused, match="is not confirmed"):
            swap_back(live.protected, confirm=typed)
    assert ask(live.cluster.endpoint(), OIDS) == before


def test_an_undo_is_not_made_twice_by_itself(live: Box) -> None:
    name = live.endpoint.database
    kept = [run(live, replace=True, confirm=name, check="none").kept_as for _ in range(2)]
    undone = swap_back(live.protected)
    before = ask(live.cluster.endpoint(), OIDS)
    with pytest.raises(Refused, match=f"the last swap of {name} was undone already") as failure:
        swap_back(live.protected)
    assert kept[0] in failure.value.hint
    assert ask(live.cluster.endpoint(), OIDS) == before
    assert swap_back(live.protected, copy=undone.kept_as).kept_as.startswith(f"{name}_before_2")
    assert swap_back(live.protected).kept_as.startswith(f"{name}_undone_2")
    swap_back(live.protected, copy=kept[0])
    assert orders(live.endpoint) == 600


# --- what a swap needs is looked at before anything is loaded ------------------------------


@pytest.fixture
def plain(live: Box) -> Iterator[Endpoint]:
    """A role that may create databases, and nothing else."""
    role = f"{live.endpoint.database}_plain"
    live.execute(f'CREATE ROLE "{role}" LOGIN CREATEDB', "postgres")
    given = {name: live.cluster.endpoint().conninfo[name] for name in ("host", "port", "dbname")}
    yield Endpoint(psycopg.conninfo.make_conninfo("", **given, user=role))
    live.execute(f'DROP OWNED BY "{role}"', "postgres")
    live.execute(f'DROP ROLE "{role}"', "postgres")


def test_a_role_that_may_not_swap_is_refused_in_the_plan(live: Box, plain: Endpoint) -> None:
    name = live.endpoint.database
    with untouched(live), pytest.raises(Refused) as failure:
        run(live, to=plain, replace=True, confirm=name)
    assert f"may not rename {name}" in str(failure.value)
    assert f'GRANT "{live.owner}" TO "{plain.user}";' in failure.value.hint
    live.execute(f'GRANT "{live.owner}" TO "{plain.user}"', "postgres")
    request = RestoreRequest("latest", to=plain, replace=True, confirm=name)
    told = "\n".join(restore.plan(live.protected, request, clock=now).lines)
    assert (
        f'sessions of other roles cannot be ended; as a superuser: GRANT pg_signal_backend TO "{plain.user}";'
        in told
    )
    with contextlib.closing(connect(live.endpoint)), pytest.raises(Refused, match="sessions of superusers"):
        restore.plan(live.protected, request, clock=now)


def test_a_role_that_may_not_be_the_owner_is_refused_in_the_plan(live: Box, plain: Endpoint) -> None:
    with untouched(live), pytest.raises(Refused, match=f"no member of {live.owner}"):
        run(live, to=plain)
    done = run(live, to=plain, without_owners=True, check="none")
    assert ask(live.cluster.endpoint(done.database), OWNER) == plain.user
    live.execute(f'DROP DATABASE "{done.database}"', "postgres")


def test_a_property_that_may_not_be_set_is_found_before_the_load(live: Box, plain: Endpoint) -> None:
    live.execute(f"ALTER DATABASE \"{live.endpoint.database}\" SET log_statement = 'ddl'")
    try:
        live.take("daily")
    finally:
        live.execute(f'ALTER DATABASE "{live.endpoint.database}" RESET log_statement')
    said = Said()
    with pytest.raises(Refused, match="cannot be made like its source"):
        run(live, to=plain, without_owners=True, report=said)
    assert not [line for line in said.lines if line.startswith("gathering")]
    assert live.databases() == {live.endpoint.database}


def test_a_library_that_no_session_could_load_is_found_before_the_load(
    live: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_newer(live, 1, settings=(("", 'session_preload_libraries="no_such_library"'),))

    def loaded(*_args: object, **_options: object) -> None:
        raise AssertionError("the load was begun")

    monkeypatch.setattr(pg_restore, "load", loaded)
    with untouched(live), pytest.raises(Refused, match="no_such_library") as failure:
        run(live)
    assert "another server" in failure.value.hint


# --- to another server ---------------------------------------------------------------------


@pytest.fixture
def elsewhere(live: Box, other: LocalCluster) -> Iterator[LocalCluster]:
    """A server that knows none of the source's roles."""
    yield other
    drop_all(other, live.endpoint.database, (live.owner, live.reader))


@pytest.mark.parametrize("gone", [False, True], ids=["source there", "source gone"])
def test_missing_roles_are_refused_then_created(live: Box, elsewhere: LocalCluster, gone: bool) -> None:
    protected = live.protected
    if gone:  # nothing but the store is left of the server that was backed up
        nowhere = Secret("host=/nonexistent dbname=lost user=nobody")
        protected = live.configured(dsn=nowhere, restore_dsn=None)
    to = elsewhere.endpoint()
    with pytest.raises(Refused) as failure:
        run(live, protected=protected, to=to, into=live.endpoint.database)
    assert f"roles are missing on {to.shown}: {live.owner}, {live.reader}" in str(failure.value)
    assert not databases(elsewhere, live.endpoint.database)
    done = run(live, protected=protected, to=to, into=live.endpoint.database, create_roles=True)
    new = elsewhere.endpoint(done.database)
    assert orders(new) == 1000
    assert ask(new, f"SELECT has_table_privilege('{live.reader}', 'public.customer', 'SELECT')") is True
    roles = f"SELECT count(*) FROM pg_authid WHERE rolname IN ('{live.owner}', '{live.reader}')"
    assert ask(new, f"{roles} AND rolpassword IS NULL AND NOT rolsuper") == 2
    assert {f"created role {name}, without a password" for name in (live.owner, live.reader)} <= set(
        live.said.lines
    )


def test_a_restore_that_fails_tells_of_the_roles_that_it_made(
    live: Box, elsewhere: LocalCluster, tampered: Callable[[str], None]
) -> None:
    live.execute(f'ALTER ROLE "{live.owner}" CREATEDB; ALTER ROLE "{live.owner}" SET my.key TO \'geheim\'')
    try:
        backup = live.take("daily")
    finally:
        live.execute(f'ALTER ROLE "{live.owner}" NOCREATEDB; ALTER ROLE "{live.owner}" RESET ALL')
    tampered("DELETE FROM public.orders")
    said = Said()
    with pytest.raises(ProofFailed) as failure:
        run(live, backup=str(backup.id), to=elsewhere.endpoint(), create_roles=True, report=said)
    assert failure.value.detail["roles that were created and stay"] == f"{live.owner}, {live.reader}"
    left = f'ALTER ROLE "{live.owner}" WITH CREATEDB;'
    assert failure.value.detail["left to you"] == left
    assert f"left to you: {left}" in said.lines
    assert "geheim" not in "\n".join(said.lines)


def test_roles_that_the_backup_does_not_describe_are_refused(live: Box, elsewhere: LocalCluster) -> None:
    publish_newer(live, 1, owner="role_of_nowhere")
    with pytest.raises(Refused, match="the backup's globals do not have: role_of_nowhere") as failure:
        run(live, to=elsewhere.endpoint(), create_roles=True)
    assert "--without-owners" in failure.value.hint


def test_roles_get_the_passwords_that_the_backup_holds(live: Box, elsewhere: LocalCluster) -> None:
    live.execute(f"ALTER ROLE \"{live.owner}\" PASSWORD 'geheim'")
    backup = live.take("daily", protected=live.configured(role_passwords=True))
    said = Said()
    request = RestoreRequest(str(backup.id), to=elsewhere.endpoint(), create_roles=True)
    told = restore.plan(live.protected, request, clock=now).lines
    assert f"role: {live.owner}, with the password that it had" in told
    assert f"role: {live.reader}, without a password" in told
    run(live, backup=str(backup.id), to=elsewhere.endpoint(), create_roles=True, check="none", report=said)
    assert f"created role {live.owner}, with the password that it had" in said.lines
    hashes = f"SELECT rolpassword FROM pg_authid WHERE rolname = '{live.owner}'"
    assert ask(elsewhere.endpoint(), hashes) == ask(live.endpoint, hashes)
    live.execute(f'ALTER ROLE "{live.owner}" PASSWORD NULL')


def test_owners_may_be_left_out(live: Box, elsewhere: LocalCluster) -> None:
    name = live.endpoint.database
    done = run(live, to=elsewhere.endpoint(), into=name, without_owners=True, check="none")
    assert orders(elsewhere.endpoint(done.database)) == 1000
    assert ask(elsewhere.endpoint(), f"SELECT count(*) FROM pg_roles WHERE rolname = '{live.owner}'") == 0


def test_what_is_left_without_owners_can_still_be_compared(live: Box, elsewhere: LocalCluster) -> None:
    done = run(live, to=elsewhere.endpoint(), into=live.endpoint.database, without_owners=True)
    assert "2 tables, 1,100 rows equal row for row" in "\n".join(done.lines)
    assert "owners and grants were not compared" in "\n".join(done.lines)
    assert "the database's encoding, locale, comment, connection limit, 1 setting equal" in done.lines
    new = elsewhere.endpoint(done.database)
    assert ask(new, "SELECT current_setting('work_mem')") == "8MB"
    assert ask(new, OWNER) == "postgres"
    comment = (
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()"
    )
    assert ask(new, comment) == "what the shop lives on"


def test_without_owners_none_is_set_where_the_roles_exist(live: Box) -> None:
    done = run(live, without_owners=True)
    assert ask(live.cluster.endpoint(done.database), OWNER) == "postgres"
    grants = "SELECT datacl IS NULL FROM pg_database WHERE datname = current_database()"
    assert ask(live.cluster.endpoint(done.database), grants) is True


def test_a_setting_is_compared_without_owners_too(live: Box, tampered: Callable[[str], None]) -> None:
    tampered("ALTER DATABASE {database} SET work_mem = '9MB'")
    with untouched(live), pytest.raises(ProofFailed, match="setting work_mem"):
        run(live, without_owners=True)


def test_without_owners_all_else_is_still_compared(
    live: Box, elsewhere: LocalCluster, tampered: Callable[[str], None]
) -> None:
    tampered("ALTER TABLE public.orders ALTER item SET DEFAULT ''; UPDATE public.customer SET name = 'x'")
    with pytest.raises(ProofFailed) as failure:
        run(live, to=elsewhere.endpoint(), into=live.endpoint.database, without_owners=True)
    assert "public.orders: expected" in str(failure.value)
    assert "table public.customer: 100 rows as expected, but their content differs" in str(failure.value)
    assert not databases(elsewhere, live.endpoint.database)


def test_a_replacement_on_another_server_leaves_the_source_alone(live: Box, elsewhere: LocalCluster) -> None:
    name, to = live.endpoint.database, elsewhere.endpoint()
    run(live, to=to, into=name, create_roles=True, check="none")
    with untouched(live):
        done = run(live, to=to, replace=True, confirm=name, check="none")
        swap_back(live.protected, into=name, to=to)
    assert done.kept_as
    assert len(databases(elsewhere, name)) == 2


# --- what fails leaves all as it was -------------------------------------------------------


def flip(box: Box, role: ObjectRole) -> None:
    record = only(box).manifest
    assert record is not None
    (item,) = record.of_role(role)
    data = bytearray(read_all(box.store, item.key))
    data[len(data) // 2] ^= 4
    box.store.put(item.key, [bytes(data)])


@pytest.mark.parametrize("role", [ObjectRole.DUMP, ObjectRole.FINGERPRINT])
def test_stored_bytes_that_changed_touch_nothing(live: Box, role: ObjectRole) -> None:
    flip(live, role)
    name = live.endpoint.database
    with untouched(live), pytest.raises(Corrupt, match="not those that were written"):
        run(live, replace=True, confirm=name)


def test_globals_that_changed_create_no_role(live: Box, elsewhere: LocalCluster) -> None:
    flip(live, ObjectRole.GLOBALS)
    with pytest.raises(Corrupt, match=r"globals\.sql"):
        run(live, to=elsewhere.endpoint(), create_roles=True)
    assert ask(elsewhere.endpoint(), f"SELECT count(*) FROM pg_roles WHERE rolname = '{live.owner}'") == 0
    assert not databases(elsewhere, live.endpoint.database)


def test_a_copy_that_is_not_equal_is_dropped(live: Box, tampered: Callable[[str], None]) -> None:
    tampered("UPDATE public.orders SET item = 'x' WHERE id = 7")
    name = live.endpoint.database
    with untouched(live), pytest.raises(ProofFailed, match="it was dropped") as failure:
        run(live, replace=True, confirm=name)
    assert "table public.orders: 1,000 rows as expected, but their content differs" in str(failure.value)


class Outage(CountingStore):
    """A Store that cannot be reached from some moment on."""

    down = False

    def _look(self) -> None:
        if self.down:
            raise StoreError("the store cannot be reached")


def test_a_store_that_is_lost_after_the_download_does_not_cost_the_restore(live: Box) -> None:
    store = Outage(live.store)
    late = [timedelta(0)]

    def lose() -> None:
        store.down, late[0] = True, timedelta(hours=1)

    name, protected = live.endpoint.database, live.on(store)
    request = RestoreRequest("latest", replace=True, confirm=name)
    plan = restore.plan(protected, request, clock=now)
    done = restore.carry_out(protected, plan, clock=lambda: now() + late[0], report=at("gathering", lose))
    assert "2 tables, 1,100 rows equal row for row" in "\n".join(done.lines)
    assert orders(live.endpoint) == 1000


class Halt(BaseException):
    """As KeyboardInterrupt or SystemExit, which end a run at any point."""


def at(line: str, act: Callable[[], object]) -> Said:
    def heard(said: str) -> None:
        if said.startswith(line):
            act()

    return Said(heard)


def halt() -> None:
    raise Halt


@pytest.mark.parametrize("line", ["gathering the planner's statistics", "swapping"])
def test_an_interrupted_restore_leaves_nothing(live: Box, line: str) -> None:
    name = live.endpoint.database
    with untouched(live), pytest.raises(Halt):
        run(live, replace=True, confirm=name, report=at(line, halt))
    assert run(live, replace=True, confirm=name, check="none").kept_as


def test_a_server_that_ends_our_sessions_is_told_of(live: Box) -> None:
    def end_all() -> None:
        with contextlib.closing(connect(live.cluster.endpoint(), purpose="the end")) as session:
            session.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name LIKE 'backup_pipeline restore%' AND pid <> pg_backend_pid()"
            )

    name = live.endpoint.database
    with untouched(live), contextlib.suppress(ServerError):  # what needs none of them may go on
        report = at("gathering the planner's statistics", end_all)
        done = run(live, into=f"{name}_new", check="none", report=report)
        live.execute(f'DROP DATABASE "{done.database}"', "postgres")
    assert live.databases() == {name}


def finished(box: Box) -> str:
    """The name of the one copy that was kept because it could not be swapped in."""
    (name,) = (
        name for name in box.databases() if f"{box.endpoint.database[:12]}" in name and "_finished_" in name
    )
    assert orders(box.cluster.endpoint(name)) == 1000
    return name


def test_a_live_database_that_vanishes_meanwhile_is_not_recreated_in_silence(live: Box) -> None:
    name, aside = live.endpoint.database, f"{live.endpoint.database}_aside"
    move = 'ALTER DATABASE "{}" RENAME TO "{}"'
    report = at("swapping", lambda: live.execute(move.format(name, aside), "postgres"))
    with pytest.raises(Refused, match=f"database {name} does not exist") as failure:
        run(live, replace=True, confirm=name, check="none", report=report)
    copy = finished(live)
    assert live.databases() == {aside, copy}
    assert f"`backup-pipeline undo app --into {name} --copy {copy}` swaps the copy in" in failure.value.hint
    assert swap_back(live.protected, copy=copy).kept_as == ""
    assert (live.databases(), orders(live.endpoint)) == ({aside, name}, 1000)


def test_a_name_that_is_taken_meanwhile_is_not_taken_over(live: Box) -> None:
    name = f"{live.endpoint.database}_new"
    report = at("gathering", lambda: live.execute(f'CREATE DATABASE "{name}"', "postgres"))
    with pytest.raises(Refused, match="exists already") as failure:
        run(live, into=name, check="none", report=report)
    copy = finished(live)
    assert live.databases() == {live.endpoint.database, name, copy}
    assert ask(live.cluster.endpoint(name), "SELECT to_regclass('public.orders')") is None
    assert f'`DROP DATABASE "{copy}";` drops it' in failure.value.hint


class AnswerLost:
    """Makes a rename's commit lose its answer, and the server refuse `away` connections after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, away: int) -> None:
        self.lost, self.away = False, away
        end, self._connect = psycopg.Transaction.__exit__, connect

        def ending(transaction: Any, *failure: Any) -> Any:
            ended = end(transaction, *failure)
            name = transaction.connection.info.parameter_status("application_name")
            if name == "backup_pipeline rename" and not self.lost and failure[0] is None:
                self.lost = True
                raise psycopg.OperationalError("server closed the connection unexpectedly")
            return ended

        monkeypatch.setattr(psycopg.Transaction, "__exit__", ending)
        monkeypatch.setattr(rename, "connect", self.connect)

    def connect(self, *args: Any, **options: Any) -> Connection:
        """As server.connect."""
        if self.lost and self.away:
            self.away -= 1
            raise ServerError("cannot connect: the database system is starting up")
        return self._connect(*args, **options)


def test_a_swap_whose_answer_is_lost_is_asked_about_until_the_server_answers(
    live: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = live.endpoint.database
    lost = AnswerLost(monkeypatch, away=3)
    done = run(live, replace=True, confirm=name, check="none")
    assert (lost.lost, lost.away) == (True, 0)
    assert (orders(live.endpoint), orders(live.cluster.endpoint(done.kept_as))) == (1000, 600)


@pytest.mark.parametrize("back", [False, True], ids=["server still away", "server back at once"])
def test_a_swap_that_may_have_been_made_is_told_as_such(
    live: Box, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    name = live.endpoint.database
    monkeypatch.setattr(rename, "_ANSWER_TIMEOUT_S", 0.5)
    lost = AnswerLost(monkeypatch, away=10**6)
    if not back:
        monkeypatch.setattr(undo, "connect", lost.connect)
    with pytest.raises(ServerError, match=f"whether {name} and .* were renamed is not known") as failure:
        run(live, replace=True, confirm=name, check="none")
    assert lost.lost
    monkeypatch.undo()
    (kept,) = live.databases() - {name}
    assert orders(live.endpoint) == 1000
    told = str(failure.value)
    assert f": {name} or {kept}" in told
    assert "could not be kept" not in told
    assert (f"the restored copy: is complete, and called {name}; " in told) is back
    assert f"`backup-pipeline undo app --into {name} --copy {kept}` swaps it back" in failure.value.hint
    swap_back(live.protected)
    assert orders(live.endpoint) == 600


# --- beside a prune ------------------------------------------------------------------------


def pruned_away(box: Box) -> prune.Pruned:
    """A prune that would give up everything, if nothing else spoke for it."""
    old = box.configured(tiers=(TierConfig("daily", "0 2 * * *", 1),)).config
    later = now() + timedelta(minutes=1)
    plan = prune.plan(box.store, old, now=later)
    return prune.carry_out(box.store, plan, clock=lambda: later, log=box.said.say)


def test_what_is_being_restored_is_not_pruned(live: Box) -> None:
    backup = only(live)
    for minutes in (1, 2):
        publish_newer(live, minutes)
    seen: list[prune.Pruned] = []
    report = at("gathering", lambda: seen.append(pruned_away(live)))
    done = run(live, backup=str(backup.id), report=report)
    assert orders(live.cluster.endpoint(done.database)) == 1000
    assert not seen[0].deleted
    assert backup.id in pruned_away(live).deleted  # as soon as nobody uses it


def publish_newer(box: Box, minutes: int, **properties: Any) -> None:
    """A copy of the backup, which says that it was taken later, of a database of these properties."""
    record = only_oldest(box).manifest
    assert record is not None
    taken_at = record.snapshot_at + timedelta(minutes=minutes)
    new = replace(record.id, stamp=f"{taken_at:%Y%m%dT%H%M%SZ}-{minutes:06}")
    objects = tuple(
        replace(item, key=item.key.replace(record.id.stamp, new.stamp)) for item in record.objects
    )
    for old, item in zip(record.objects, objects, strict=True):
        box.store.copy(old.key, item.key)
    source = replace(record.source, database=replace(record.source.database, **properties))
    moved = replace(record, id=new, objects=objects, snapshot_at=taken_at, scheduled_for=None, source=source)
    catalog.publish(box.store, moved)


def only_oldest(box: Box) -> Backup:
    return catalog.list_backups(box.store, fresh=True).backups[-1]


def test_what_was_pruned_between_plan_and_restore_touches_nothing(live: Box) -> None:
    name = live.endpoint.database
    request = RestoreRequest("latest", replace=True, confirm=name)
    plan = restore.plan(live.protected, request, clock=now)
    live.store.delete(list(stored(live.store)))
    with untouched(live), pytest.raises(BackupNotFound, match="pruned a moment ago"):
        restore.carry_out(live.protected, plan, clock=now, report=live.said)


def test_a_lease_is_held_while_a_restore_runs(live: Box) -> None:
    held: list[str] = []
    report = at(
        "gathering",
        lambda: held.extend(item.purpose for item in leases.live_leases(live.store, "app", now())),
    )
    run(live, check="none", report=report)
    assert held == ["restore"]
    assert not leases.live_leases(live.store, "app", now())
