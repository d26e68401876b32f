"""Unfinished databases: how they are told from others, and that each of them is dropped."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from backup_pipeline.domain.unfinished import is_marked, is_temporary
from backup_pipeline.engines.postgres import restore
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.load import (
    load,
)
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.swap import publish, swap
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline_tests.engines.restoring import database_names, dump, execute, fetch, plain
from backup_pipeline_tests.waiting import wait_until


def test_what_only_bears_such_a_name_is_never_dropped(admin: Endpoint, database: Endpoint) -> None:
    execute(admin, 'CREATE DATABASE "x.restoring-0badcafe"')
    execute(admin.with_database("x.restoring-0badcafe"), "CREATE TABLE public.precious ()")
    said: list[str] = []
    with restore.temporary_database(admin, "x", plain(database), tell=said.append):
        pass
    assert "x.restoring-0badcafe" in database_names(admin)
    (line,) = said
    assert line.startswith("database x.restoring-0badcafe is left alone: it bears no mark of ours")


@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_dead_restore_was_making_is_dropped_and_told(
    admin: Endpoint, database: Endpoint, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Also what died right after CREATE DATABASE."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    name = restore.temporary_name("x", "0123abcd")
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        if at_once:
            patch.setattr(restore, "_mark", interrupt)
        restore.create_database(admin, name, plain(database))
    assert name in database_names(admin)
    said: list[str] = []
    with contextlib.closing(connect(admin.with_database(name))):
        assert restore.drop_stale(admin, said.append) == ()  # somebody is in it
    wait_until(lambda: restore.drop_stale(admin, said.append) == (name,), within_s=20)
    assert said[-1] == f"dropped database {name}, which a killed restore left unfinished"


@pytest.mark.parametrize("comment", [None, "it's\na \\ comment"])
def test_no_finished_database_bears_the_mark(
    admin: Endpoint, database: Endpoint, comment: str | None
) -> None:
    properties = replace(plain(database), comment=comment)
    said = "SELECT shobj_description(oid, 'pg_database'), datconnlimit FROM pg_database WHERE datname = '{}'"
    for again in (False, True):
        with restore.temporary_database(admin, "target", properties) as name:
            ((mark, limit),) = fetch(admin, said.format(name))
            assert is_marked(str(mark))
            assert limit == -1
            restore.apply_properties(admin, name, properties)
            ((mark, _),) = fetch(admin, said.format(name))
            assert is_marked(str(mark))
            assert replace(plain(admin.with_database(name)), name=database.database) == properties
            if again:
                swap(admin, "target", name, "target_before")
            else:
                publish(admin, name, "target")
        assert fetch(admin, said.format("target")) == [(comment, -1)]


def test_subscriptions_do_not_keep_an_unfinished_database(
    admin: Endpoint, database: Endpoint, tools: Tools, tmp_path: Path
) -> None:
    subscription = "CREATE SUBSCRIPTION feed CONNECTION 'host=nowhere' PUBLICATION p WITH (connect = false)"
    execute(database, subscription)
    archive = dump(database, tmp_path / "dump", tools)
    execute(database, "ALTER SUBSCRIPTION feed SET (slot_name = NONE)", "DROP SUBSCRIPTION feed")
    seen = []

    def fill_and_fail() -> None:
        with restore.temporary_database(admin, "target", plain(database)) as name:
            load(admin, name, archive, tools=tools)
            seen.extend(fetch(admin, "SELECT subname, subenabled FROM pg_subscription"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_and_fail()
    assert seen == [("feed", False)]
    assert not {each for each in database_names(admin) if each.startswith("target")}
    assert fetch(admin, "SELECT subname FROM pg_subscription") == []


def test_an_unfinished_template_is_dropped_too(admin: Endpoint, database: Endpoint) -> None:
    properties = replace(plain(database), is_template=True)
    with restore.temporary_database(admin, "target", properties) as name:
        restore.apply_properties(admin, name, properties)
    assert name not in database_names(admin)


def test_temporary_names_fit_and_are_told_from_others() -> None:
    for target in ("app", "a" * 63, "é" * 31, "a\nb"):
        name = restore.temporary_name(target, "0123abcd")
        assert len(name.encode()) <= 63
        assert is_temporary(name)
    for name in (
        "app",
        "app.restoring-",
        "app.restoring-0123abc",
        "app.restoring-0123ABCD",
        ".restoring-0123abcd",
    ):
        assert not is_temporary(name)
