"""Restores to another server: its roles, owners and passwords."""

from collections.abc import Callable, Iterator

import pytest

from backup_pipeline.actions import restore
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.config import Secret
from backup_pipeline.domain.backup import ObjectRole
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.errors import (
    Corrupt,
    ProofFailed,
    Refused,
)
from backup_pipeline_tests.actions.box import (
    Box,
    Said,
    ask,
    databases,
    drop_all,
    now,
    swap_back,
)
from backup_pipeline_tests.actions.restoring import OWNER, flip, orders, publish_newer, run, untouched


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


def test_globals_that_changed_create_no_role(live: Box, elsewhere: LocalCluster) -> None:
    flip(live, ObjectRole.GLOBALS)
    with pytest.raises(Corrupt, match=r"globals\.sql"):
        run(live, to=elsewhere.endpoint(), create_roles=True)
    assert ask(elsewhere.endpoint(), f"SELECT count(*) FROM pg_roles WHERE rolname = '{live.owner}'") == 0
    assert not databases(elsewhere, live.endpoint.database)
