"""Restores into a new database, and in place of a live one, which is kept."""

import contextlib
from datetime import timedelta
from typing import Any

import pytest

from backup_pipeline.actions import restore
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.engines.postgres import load as pg_restore
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.lock import advisory_lock
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import (
    BackupError,
    BackupNotFound,
    Busy,
    ConfigError,
    Refused,
    ServerError,
)
from backup_pipeline_tests.actions.box import (
    Box,
    ask,
    now,
    swap_back,
)
from backup_pipeline_tests.actions.restoring import finished, orders, run, untouched


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
