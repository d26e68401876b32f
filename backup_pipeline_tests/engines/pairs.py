"""A live database and a new one that takes its place, for the tests of swaps."""

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg import sql

from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.engines.postgres.swap import (
    CopyKind,
    copy_name,
)

AT = datetime(2026, 3, 1, 2, 0, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Pair:
    """A live database whose only row is 'old', and a new one whose only row is 'new'."""

    admin: Endpoint
    session: Connection
    live: str
    new: str

    @property
    def kept(self) -> str:
        return copy_name(self.live, CopyKind.BEFORE, AT)

    def content(self, name: str) -> str:
        return content(self.admin.with_database(name))

    def names(self) -> set[str]:
        stem = self.live[:12]
        rows = self.session.execute(
            "SELECT datname FROM pg_database WHERE datallowconn AND datconnlimit = -1"
        )
        return {str(name) for (name,) in rows if str(name).startswith(stem)}


def enter(endpoint: Endpoint) -> Connection:
    """A session as an application has it."""
    return psycopg.connect(psycopg.conninfo.make_conninfo("", **endpoint.conninfo), autocommit=True)


def content(endpoint: Endpoint) -> str:
    with contextlib.closing(connect(endpoint)) as session:
        return str(session.execute("SELECT which FROM public.marker").fetchall())


def make(session: Connection, admin: Endpoint, name: str, which: str) -> None:
    session.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    with contextlib.closing(connect(admin.with_database(name))) as inside:
        inside.execute("CREATE TABLE public.marker (which text)")
        inside.execute("INSERT INTO public.marker VALUES (%s)", [which])


ONE_NAME = pytest.mark.parametrize("pair", ["plain"], indirect=True)
