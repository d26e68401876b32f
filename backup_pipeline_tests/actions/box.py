"""One database under protection, its store, and ways to look into both: what the tests of actions share."""

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from psycopg import sql

from backup_pipeline.actions import backups, dump, undo
from backup_pipeline.actions.protected import Protected
from backup_pipeline.actions.report import Progress
from backup_pipeline.config import DatabaseConfig, ScratchConfig, Secret
from backup_pipeline.domain.backup import MANUAL_TIER, Backup
from backup_pipeline.domain.layout import SCRATCH
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline_tests.storage.effects import CountingStore

NAME = "app"
DUE = datetime(2026, 3, 1, 2, tzinfo=UTC)
CRITICAL = "public.customer"

CONTENT = """
CREATE TABLE public.customer (
    id serial PRIMARY KEY,
    name text NOT NULL CONSTRAINT named CHECK (name <> ''),
    added timestamptz NOT NULL);
CREATE TABLE public.orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer int NOT NULL CONSTRAINT of_customer REFERENCES public.customer, item text, price numeric(10, 2));
CREATE INDEX orders_item ON public.orders (item);
CREATE VIEW public.dear AS SELECT id FROM public.orders WHERE price > 5 AND item IN ('a', 'b');
CREATE FUNCTION public.twice(n int) RETURNS int LANGUAGE sql IMMUTABLE RETURN n * 2;
CREATE SEQUENCE public.tickets;
INSERT INTO public.customer (name, added)
  SELECT 'customer ' || n, '2026-01-01Z'::timestamptz + n * interval '1 hour' FROM generate_series(1, 100) n;
INSERT INTO public.orders (customer, item, price)
  SELECT n %% 100 + 1, md5(n::text), n / 7.0 FROM generate_series(1, 1000) n;
SELECT setval('public.tickets', 4711);
SELECT lo_from_bytea(4242, '\\xdeadbeef');
GRANT SELECT ON public.customer TO {reader};
ALTER TABLE public.customer OWNER TO {owner};
ALTER DATABASE {database} OWNER TO {owner};
ALTER DATABASE {database} SET work_mem = '8MB';
COMMENT ON DATABASE {database} IS 'what the shop lives on';
GRANT TEMPORARY ON DATABASE {database} TO {reader}
""".replace("%%", "%")


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


class Said:
    """A Report that keeps what was said, and calls `heard` with each line."""

    def __init__(self, heard: Callable[[str], object] = lambda _line: None) -> None:
        self.lines: list[str] = []
        self._heard = heard

    def say(self, line: str) -> None:
        """Keep the line."""
        self.lines.append(line)
        self._heard(line)

    def progress(self, progress: Progress) -> None:
        """Not kept; shown, as a door would."""
        str(progress)


@dataclass
class Box:
    """A source database with CONTENT, of which `protected` takes backups into `store`."""

    cluster: LocalCluster
    endpoint: Endpoint
    owner: str
    reader: str
    store: DirectoryStore
    protected: Protected
    said: Said = field(default_factory=Said)

    def take(
        self,
        tier: str = MANUAL_TIER,
        *,
        scheduled_for: datetime | None = None,
        protected: Protected | None = None,
    ) -> Backup:
        """One whole backup."""
        return dump.take(
            protected or self.protected, tier=tier, scheduled_for=scheduled_for, clock=now, report=self.said
        )

    def on(self, store: Store) -> Protected:
        """The same database with another store, or another view of this one."""
        return replace(self.protected, store=store)

    def configured(self, **changes: Any) -> Protected:
        """The same database, configured otherwise."""
        config = replace(self.protected.config, **changes)
        return replace(self.protected, config=config)

    def execute(self, statements: str, database: str = "") -> None:
        """Run SQL in the source, or in another database of its server."""
        execute(self.cluster.endpoint(database or self.endpoint.database), statements)

    def databases(self) -> set[str]:
        """Of this box's server, those whose name begins as the source's does."""
        return databases(self.cluster, self.endpoint.database)


def execute(endpoint: Endpoint, statements: str) -> None:
    """Run SQL as it is."""
    with contextlib.closing(connect(endpoint)) as session:
        session.execute(statements.encode())


def ask(endpoint: Endpoint, query: str) -> object:
    """The one value that a query gives."""
    with contextlib.closing(connect(endpoint)) as session:
        row = session.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def databases(cluster: LocalCluster, stem: str) -> set[str]:
    """The databases of a server whose name begins like this, whatever is being made or dropped included."""
    with contextlib.closing(connect(cluster.endpoint())) as session:
        rows = session.execute("SELECT datname FROM pg_database").fetchall()
    return {str(name) for (name,) in rows if str(name).startswith(stem[:12])}


def drop_all(cluster: LocalCluster, stem: str, roles: Iterable[str]) -> None:
    """Drop what a box and its restores left on a server."""
    with contextlib.closing(connect(cluster.endpoint())) as session:
        for name in databases(cluster, stem):
            drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
            session.execute(drop.format(sql.Identifier(name)))
        for role in roles:
            session.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


@contextlib.contextmanager
def a_box(
    cluster: LocalCluster, folder: Path, *, scratch: LocalCluster, name: str = "", content: str = CONTENT
) -> Iterator[Box]:
    """A source database on `cluster`, a store in `folder`; proofs go to `scratch`."""
    stem = f"box{secrets.token_hex(4)}"
    database = f"{stem}{name}"
    owner, reader = f"{stem}{name}_owner"[:63], f"{stem}{name}_reader"[:63]
    try:
        with contextlib.closing(connect(cluster.endpoint())) as session:
            for role in (owner, reader):
                session.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
            create = sql.SQL("CREATE DATABASE {} TEMPLATE template0")
            session.execute(create.format(sql.Identifier(database)))
        endpoint = cluster.endpoint(database)
        names = {"owner": owner, "reader": reader, "database": database}
        quoted = {key: sql.Identifier(value).as_string() for key, value in names.items()}
        execute(endpoint, content.format(**quoted))
        folder.mkdir(exist_ok=True)
        config = DatabaseConfig(
            NAME,
            dsn=Secret(endpoint.dsn),
            restore_dsn=Secret(cluster.endpoint().dsn),
            critical_tables=(CRITICAL,) if content is CONTENT else (),
            bin_dir=cluster.bin_dir,
            lock_timeout=timedelta(seconds=20),
        )
        store = DirectoryStore(folder)
        place = ScratchConfig(dsn=Secret(scratch.endpoint().dsn), bin_dir=cluster.bin_dir)
        yield Box(cluster, endpoint, owner, reader, store, Protected(config, store, scratch=place))
    finally:
        drop_all(cluster, stem, (owner, reader))
        drop_all(scratch, stem, (owner, reader))


def copy_of(box: Box, folder: Path) -> Box:
    """The same source with a copy of its store, to be damaged freely."""
    shutil.copytree(box.store.root, folder)
    store = DirectoryStore(folder)
    return replace(box, store=store, protected=replace(box.protected, store=store), said=Said())


def stored(store: Store) -> dict[str, bytes]:
    """Everything in the store but what the preflight tries; no lease of ours may be left there."""
    return {
        item.key: read_all(store, item.key) for item in store.list("") if not item.key.startswith(SCRATCH)
    }


def names(protected: Protected) -> list[str]:
    """The ids of the backups that are listed; the catalog must be readable."""
    found = backups.listing(protected, fresh=True)
    assert not found.unreadable
    return [str(backup.id) for backup in found.backups]


def swap_back(protected: Protected, **asked: Any) -> undo.UndoResult:
    """Plan an undo and carry it out, with the live name typed."""
    request = undo.UndoRequest(**asked)
    confirm = asked.get("confirm", undo.name_to_confirm(protected, request))
    plan = undo.plan(protected, replace(request, confirm=confirm), clock=now)
    return undo.carry_out(protected, plan, clock=now, report=Said())


class Meddling(CountingStore):
    """A Store that calls `meddle` once, after the first chunk of the first object whose key ends so."""

    def __init__(self, store: Store, ending: str, meddle: Callable[[], object]) -> None:
        super().__init__(store)
        self.meddled = threading.Event()
        self._ending = ending
        self._meddle = meddle

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        """See Store."""

        def meddling() -> Iterator[bytes]:
            for chunk in chunks:
                yield chunk
                if not self.meddled.is_set():
                    self.meddled.set()
                    self._meddle()

        given = meddling() if key.endswith(self._ending) else chunks
        super().put(key, given, size_hint_bytes=size_hint_bytes, storage_class=storage_class)


def our_children(program: str) -> list[int]:
    """The processes of `program` that this one started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            if parent == os.getpid() and argv[0].endswith(b"/" + program.encode()):
                found.append(int(entry.name))
    return found
