"""What the tests of restores share: a restore planned and carried out, and looks at what is there."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

from psycopg import sql

from backup_pipeline.actions import restore
from backup_pipeline.actions.protected import Protected
from backup_pipeline.actions.restore import RestoreRequest, RestoreResult
from backup_pipeline.domain.backup import Backup, ObjectRole
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection
from backup_pipeline.storage import catalog
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.actions.box import (
    Box,
    Said,
    ask,
    now,
    stored,
)

OWNER = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
OIDS = "SELECT string_agg(oid::text || ' ' || datname, ',' ORDER BY oid) FROM pg_database"


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


def flip(box: Box, role: ObjectRole) -> None:
    record = only(box).manifest
    assert record is not None
    (item,) = record.of_role(role)
    data = bytearray(read_all(box.store, item.key))
    data[len(data) // 2] ^= 4
    box.store.put(item.key, [bytes(data)])


def at(line: str, act: Callable[[], object]) -> Said:
    def heard(said: str) -> None:
        if said.startswith(line):
            act()

    return Said(heard)


def finished(box: Box) -> str:
    """The name of the one copy that was kept because it could not be swapped in."""
    (name,) = (
        name for name in box.databases() if f"{box.endpoint.database[:12]}" in name and "_finished_" in name
    )
    assert orders(box.cluster.endpoint(name)) == 1000
    return name


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
