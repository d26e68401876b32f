"""A cluster under continuous protection, a ledger of its commits, and clusters recovered from it."""

import contextlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backup_pipeline.actions import recover
from backup_pipeline.actions.recover import RecoverResult
from backup_pipeline.actions.recovery_plan import RecoverRequest
from backup_pipeline.domain.recovery_target import RecoveryTarget
from backup_pipeline.domain.wal import Lsn, parse_wal_name
from backup_pipeline.engines.postgres.archiving import read_archiving
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.errors import ConfigError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.identity import System, claim, read_system_identifier
from backup_pipeline_tests.actions.box import ask, now
from backup_pipeline_tests.actions.protected_box import ARCHIVING, NAME, WITHIN_S, ProtectedBox
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.waiting import wait_until

SETTINGS = {
    **ARCHIVING,
    "archive_command": "true",  # `ship` archives what it says yes to; nothing is removed from pg_wal
    "wal_keep_size": "4GB",
    "track_commit_timestamp": "on",
}


@dataclass(frozen=True)
class Committed:
    """One row of the ledger: the transaction that made it, when it was committed, and where it ends."""

    number: int
    xid: int
    at: datetime
    end: Lsn


@dataclass
class RecoveryBox(ProtectedBox):
    """One that keeps all its WAL; `ledger` is what its client knows, and `folder` has what is recovered."""

    folder: Path
    ledger: list[Committed] = field(default_factory=list)
    first: int = 0  # how many were committed when the first base backup was finished
    last: int = 0  # and the last

    def load(self) -> AbstractContextManager[object]:
        """Others write meanwhile, all the time, to tables of their own."""

        def write(ended: threading.Event) -> None:
            with self.session() as session:
                session.execute("CREATE TABLE public.noise (a int, b text)")
                while not ended.wait(0.01):
                    session.execute(
                        "INSERT INTO public.noise SELECT i, md5(i::text) FROM generate_series(1, 50) AS i"
                    )

        return meanwhile(write)

    @contextlib.contextmanager
    def session(self) -> Iterator[Connection]:
        """A client of the cluster."""
        with contextlib.closing(connect(self.cluster.endpoint())) as session:
            yield session

    def commit(self, count: int = 1, *, switch: bool = False) -> None:
        """Add rows to the ledger, each in a transaction of its own; then, if so, begin a new segment."""
        with self.session() as session:
            session.execute("CREATE TABLE IF NOT EXISTS public.ledger (number int PRIMARY KEY)")
            for _ in range(count):
                number = len(self.ledger) + 1
                query = "INSERT INTO public.ledger VALUES (%s) RETURNING txid_current()"
                (xid,) = session.execute(query, [number]).fetchone() or (0,)
                row = session.execute(
                    "SELECT pg_xact_commit_timestamp(%s::text::xid), pg_current_wal_insert_lsn()::text", [xid]
                ).fetchone()
                assert row is not None
                assert isinstance(row[0], datetime)
                at = row[0].astimezone(UTC)
                self.ledger.append(Committed(number, int(str(xid)), at, Lsn.parse(str(row[1]))))
            if switch:
                session.execute("SELECT pg_switch_wal()")

    def name_point(self, name: str) -> None:
        """A restore point here."""
        with self.session() as session:
            session.execute("SELECT pg_create_restore_point(%s)", [name])

    def ship(self) -> None:
        """Archive whatever PostgreSQL has handed over by now."""
        archive = WalArchive(self.store, NAME)
        wal = self.cluster.data / "pg_wal"
        for done in sorted((wal / "archive_status").glob("*.done")):
            name = done.name.removesuffix(".done")
            with contextlib.suppress(ConfigError):
                parse_wal_name(name)
                if name not in self.shipped and (wal / name).exists():
                    archive.push(wal / name)
                    self.shipped.add(name)

    def switch(self) -> None:
        """Begin a new segment, and archive all before it."""
        self.name_point("a record, so that there is something to switch from")
        name = str(ask(self.cluster.endpoint(), "SELECT pg_walfile_name(pg_switch_wal())"))
        done = self.cluster.data / "pg_wal" / "archive_status" / f"{name}.done"
        wait_until(done.exists, within_s=WITHIN_S)
        self.ship()

    def recover(
        self, target: RecoveryTarget, into: str = "recovered", *, store: Store | None = None, **asked: Any
    ) -> RecoverResult:
        """Recover below the box's folder."""
        cluster = self.protected(store)
        request = RecoverRequest(target, self.folder / into, **asked)
        return recover.carry_out(
            cluster, recover.plan(cluster, request, report=self.said), clock=now, report=self.said
        )

    def go_on_with(self, into: str) -> None:
        """What was recovered there is the cluster from now on, and archives on a timeline of its own."""
        self.cluster.stop()
        settings = self.cluster.settings
        successor = LocalCluster(self.cluster.bin_dir, self.folder.parent / into, settings=settings)
        successor.folder.mkdir(mode=0o711)
        (self.folder / into).rename(successor.data)
        successor.create()
        successor.start(timeout_s=WITHIN_S)
        self.cluster = successor

    def copy_of_store(self, folder: Path) -> DirectoryStore:
        """The store once more, at a `folder` that is not there yet: to be damaged, or recorded in."""
        assert isinstance(self.store, DirectoryStore)
        shutil.copytree(self.store.root, folder)
        return DirectoryStore(folder)

    def numbers(self, into: str = "recovered") -> list[int]:
        """The ledger of a recovered cluster, by a server that is started on it as an operator would."""
        with started(self.cluster.bin_dir, self.folder / into) as endpoint:
            rows = ask(endpoint, "SELECT array_agg(number ORDER BY number) FROM public.ledger")
        return list(rows) if isinstance(rows, list) else []


@contextlib.contextmanager
def started(bin_dir: str, data: Path) -> Iterator[Endpoint]:
    """A server on a recovered directory, with the settings that the recovery left there."""
    with private_folder() as folder:
        server = LocalCluster(bin_dir, folder / "cluster")
        server.folder.mkdir(mode=0o711)
        data.rename(server.data)
        try:
            server.create()
            server.start(timeout_s=WITHIN_S)
            yield server.endpoint()
        finally:
            server.stop()
            server.data.rename(data)


@contextlib.contextmanager
def a_recovery_box(bin_dir: str, store: Store, **settings: str) -> Iterator[RecoveryBox]:
    """A cluster with SETTINGS, its archive empty."""
    with private_folder() as folder:
        cluster = LocalCluster(bin_dir, folder / "cluster", settings={**SETTINGS, **settings})
        box = RecoveryBox(cluster, store, folder / "places")
        try:
            cluster.create()
            cluster.start()
            box.folder.mkdir()
            with box.session() as session:
                segment_bytes = read_archiving(session).segment_bytes
            claim(store, NAME, System(read_system_identifier(cluster.data), segment_bytes), at=now())
            yield box
        finally:
            box.cluster.stop()
