"""A server whose WAL is received: by receivers in this process, or by those that an operator starts."""

import contextlib
import hashlib
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.actions import base_backup
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.config import ClusterConfig, Secret, StoreConfig
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.wal import Lsn, parse_wal_name
from backup_pipeline.domain.wal_archive import ArchiveListing
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.slots import SlotStatus, look_at
from backup_pipeline.process import Completed
from backup_pipeline.storage.store import Store, open_store
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.fetch import Fetched, fetch
from backup_pipeline.wal.identity import System, claim, read_system_identifier
from backup_pipeline.wal.listing import read_archive
from backup_pipeline.wal.receive import ReceiveOptions, Receiver
from backup_pipeline_tests.actions.box import Said, ask, execute, now
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.box import WalBox

SLOT = "backup_pipeline_main"
SEGMENT_BYTES = 16 * 1024 * 1024
SETTINGS = {
    "wal_level": "replica",
    "max_wal_senders": "5",
    "archive_mode": "off",
    "wal_keep_size": "1GB",  # to be compared with what is archived
    "autovacuum": "off",
    "fsync": "off",
}


@dataclass
class ReceiveBox:
    """A running server without an archive_command, and the configuration that it is received by."""

    cluster: LocalCluster
    box: WalBox
    folder: Path
    said: list[str] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return self.box.store

    def listing(self) -> ArchiveListing:
        """What is archived."""
        return read_archive(self.store, "main")

    def command(self, *args: str, timeout_s: float = 60.0) -> Completed:
        """Run the program to its end."""
        return process.run(self.box.program(*args), timeout_s=timeout_s, check=False)

    @contextlib.contextmanager
    def receiving(self, *args: str) -> Iterator["subprocess.Popen[bytes]"]:
        """`backup-pipeline wal receive main`, and SIGTERM at the end unless it ended before."""
        with (self.folder / "receive.log").open("ab") as log:
            child = process.start(self.box.program("wal", "receive", "main", *args), stderr=log)
        try:
            yield child
        finally:
            process.terminate(child, grace_s=60.0)

    @property
    def log(self) -> str:
        return (self.folder / "receive.log").read_text()

    @contextlib.contextmanager
    def receiver(
        self,
        *,
        store: Store | None = None,
        endpoint: Endpoint | None = None,
        silent_s: float = 60.0,
        ship_every_s: float = 0.2,
    ) -> Iterator[threading.Event]:
        """One that is a thread of ours, and has to end without an error; the event stops it."""
        receiver = Receiver(
            WalArchive(store or self.store, "main"),
            lambda: endpoint or self.cluster.endpoint(),
            ReceiveOptions(SLOT, ship_every_s, silent_s=silent_s),
            now,
            self.said.append,
        )
        before = len(self.said)

        def receives() -> bool:
            return any("receiving" in line for line in self.said[before:])

        with meanwhile(receiver.run, begun=receives) as stop:
            yield stop

    def execute(self, *statements: str) -> None:
        """Let the superuser do something, a transaction each."""
        for statement in statements:
            execute(self.cluster.endpoint(), statement)

    def ask(self, query: str) -> object:
        return ask(self.cluster.endpoint(), query)

    def slot(self) -> SlotStatus | None:
        with contextlib.closing(connect(self.cluster.endpoint())) as session:
            return look_at(session, SLOT).status

    def drop_slot(self) -> None:
        """Once the server has let go of it: its sender outlives a receiver by a moment."""
        wait_until(lambda: (found := self.slot()) is not None and not found.active)
        self.execute(f"SELECT pg_drop_replication_slot('{SLOT}')")

    def confirmed(self) -> Lsn:
        """Up to where the server was told that WAL is archived."""
        found = self.slot()
        return found.confirmed if found and found.confirmed else Lsn(0)

    def position(self) -> Lsn:
        return Lsn.parse(str(self.ask("SELECT pg_current_wal_flush_lsn()")))

    def await_archived(self, lsn: Lsn | None = None) -> None:
        """Wait until what was written by now is acknowledged."""
        wanted = lsn or self.position()
        wait_until(lambda: self.confirmed() >= wanted)

    def write(self, rounds: int = 1) -> None:
        """Make so many segments, each with rows in it."""
        for _ in range(rounds):
            self.execute(
                "CREATE TABLE IF NOT EXISTS public.load (i int, text text)",
                "INSERT INTO public.load SELECT i, md5(random()::text) FROM generate_series(1, 20000) AS i",
                "SELECT pg_switch_wal()",
            )

    def load(self) -> AbstractContextManager[object]:
        """Somebody writes meanwhile, all the time."""

        def write(ended: threading.Event) -> None:
            with contextlib.closing(connect(self.cluster.endpoint())) as session:
                session.execute("CREATE TABLE IF NOT EXISTS public.noise (i int, text text)")
                while not ended.wait(0.01):
                    session.execute(
                        "INSERT INTO public.noise SELECT i, md5(i::text) FROM generate_series(1, 5000) i"
                    )

        return meanwhile(write)

    def fetch(self, name: str) -> tuple[Fetched, bytes]:
        """A segment as a recovery gets it."""
        path = self.folder / "fetched"
        found = fetch(self.store, "main", name, path)
        return found, path.read_bytes()

    def assert_acknowledged_is_there(self) -> None:
        """All that the server may forget is in the archive, from the archive's beginning on, with the bytes
        that it has.
        """
        confirmed, listing = self.confirmed(), self.listing()
        if confirmed == Lsn(0):
            return
        wal = self.cluster.data / "pg_wal"
        (timeline,) = listing.segments.keys() or {1}
        numbers = listing.numbers(timeline)
        last = confirmed.value // SEGMENT_BYTES
        assert listing.conflicts == ()
        missing = [number for number in range(min(numbers, default=last), last) if number not in numbers]
        assert not missing
        for each in listing.segments.get(timeline, ()):
            plain = (wal / each.segment.name(SEGMENT_BYTES)).read_bytes()
            assert hashlib.sha256(plain).hexdigest() == each.sha256
        inside = confirmed.value % SEGMENT_BYTES
        if inside and last not in numbers:
            name = parse_wal_name(f"{timeline:08X}{last * SEGMENT_BYTES >> 32:08X}{last % 256:08X}")
            found, plain = self.fetch(name.text)
            assert found.partial
            assert plain[:inside] == (wal / name.text).read_bytes()[:inside]

    def protected(self) -> ProtectedCluster:
        config = ClusterConfig(
            "main",
            Secret(self.cluster.endpoint().dsn),
            stall_timeout=timedelta(seconds=60),
            checkpoint="fast",
        )
        return ProtectedCluster(config, self.store)

    def take(self) -> BackupId:
        """A base backup, whose WAL somebody receives."""
        return base_backup.take(self.protected(), clock=now, report=Said()).id

    def kill(self, child: "subprocess.Popen[bytes]") -> None:
        child.send_signal(signal.SIGKILL)
        child.wait()


@contextlib.contextmanager
def a_receive_box(
    bin_dir: str, place: StoreConfig | None = None, *, begun: bool = True, **settings: str
) -> Iterator[ReceiveBox]:
    """A server, and a store that takes its WAL: a folder unless it is `place`."""
    with private_folder() as folder:
        cluster = LocalCluster(bin_dir, folder / "cluster", settings={**SETTINGS, **settings})
        try:
            cluster.create()
            cluster.start()
            (folder / "box" / "store").mkdir(parents=True)
            place = place or StoreConfig((folder / "box" / "store").as_uri())
            dsn = cluster.endpoint().dsn.replace('"', '\\"')
            receive = f'{{ slot = "{SLOT}", ship_every = "200ms" }}'
            box = WalBox(folder / "box", place, dsn=dsn, receive=receive)
            if begun:
                system = System(read_system_identifier(cluster.data), SEGMENT_BYTES)
                claim(open_store(place), "main", system, at=now())
            yield ReceiveBox(cluster, box, folder / "box")
        finally:
            cluster.stop()
