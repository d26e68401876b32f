"""What a restore and its swap need is looked at before anything is loaded."""

import contextlib
from collections.abc import Iterator

import psycopg
import pytest

from backup_pipeline.actions import restore
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.engines.postgres import load as pg_restore
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import (
    Refused,
)
from backup_pipeline_tests.actions.box import (
    Box,
    Said,
    ask,
    now,
)
from backup_pipeline_tests.actions.restoring import OWNER, publish_newer, run, untouched


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
