"""How long a commit waits until it is durable in the store: by archive_command, and by `wal receive`.

    python -m benchmarks.lag [--seconds 300] [--rate 20MB] [--ways archive_command receive]

A PostgreSQL server and an S3 server on loopback, and the programs that an operator runs. A writer commits at
a steady rate; of each commit it is known when it was done, and where in the log it ends. From aside, it is
asked again and again how far the log is durable: the end of the last segment that PostgreSQL was told is
archived, or where the slot was confirmed. For users other than root: PostgreSQL refuses root, and its
archive_command has to reach the program.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.demo.servers import MAJOR, s3_server
from backup_pipeline.domain.wal import Lsn, WalSegment, parse_wal_name
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.engines.postgres.tools import SERVER, find_tools
from backup_pipeline.errors import BackupError
from backup_pipeline.process import Command
from backup_pipeline.units import parse_size_bytes, show_bytes
from benchmarks.table import markdown

WAYS = ("archive_command", "receive")
SETTINGS = {
    "wal_level": "replica",
    "archive_mode": "on",
    "archive_timeout": "60s",
    "max_wal_size": "4GB",
    "autovacuum": "off",
    "log_min_messages": "warning",
}
KEYS = ("lag-bench", "lag-bench-secret")
SLOT = "backup_pipeline_main"
_POLL_S = 0.02
_DRAIN_S = 180.0
_ROWS = 600  # some 80 kB of WAL a commit


@dataclass
class Lags:
    """What one way came to. `commits` are (when, where it ends); `durable` is (when seen, up to where)."""

    way: str
    commits: list[tuple[float, int]] = field(default_factory=list)
    durable: list[tuple[float, int]] = field(default_factory=list)
    written_bytes: int = 0
    took_s: float = 0.0

    def seconds(self) -> list[float]:
        """Of each commit, how long it waited, in order; those that never were durable are an error."""
        found, place = [], 0
        for at_s, end in self.commits:
            while place < len(self.durable) and self.durable[place][1] < end:
                place += 1
            if place == len(self.durable):
                raise BackupError(f"by {self.way}, a commit at {Lsn(end)} was never seen to be durable")
            found.append(max(0.0, self.durable[place][0] - at_s))
        return sorted(found)


@dataclass(frozen=True)
class Site:
    """Where it is measured."""

    folder: Path
    cluster: LocalCluster
    config: Path

    def program(self, *args: str) -> Command:
        """The program as an operator starts it."""
        return Command((sys.executable, "-m", "backup_pipeline.cli", "--config", str(self.config), *args))

    def session(self) -> contextlib.closing[Connection]:
        """A client of the server."""
        return contextlib.closing(connect(self.cluster.endpoint()))


def main() -> int:
    """Measure and print. The exit code says whether it ran, not whether it was fast."""
    arguments = _parse()
    if os.getuid() == 0:
        print("ERROR: run this as a user other than root", file=sys.stderr)
        return 2
    try:
        found = [_measured(way, arguments.seconds, arguments.rate) for way in arguments.ways]
    except KeyboardInterrupt:
        return 130
    except BackupError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    print(f"commit to durable in S3 on loopback, {os.cpu_count()} cores; ship_every is 5 s\n")
    print(
        markdown(
            ("way", "WAL a second", "commits", "median s", "p99 s", "max s"), [_row(lags) for lags in found]
        )
    )
    return 0


def _row(lags: Lags) -> tuple[str, ...]:
    waited = lags.seconds()
    places = (len(waited) // 2, min(len(waited) - 1, len(waited) * 99 // 100), -1)
    figures = tuple(f"{waited[place]:.2f}" for place in places)
    return (lags.way, show_bytes(lags.written_bytes / lags.took_s), str(len(waited)), *figures)


def _measured(way: str, seconds: float, rate_bytes_s: int) -> Lags:
    with _site(way) as site, _archiving(site, way):
        lags, stop = Lags(way), threading.Event()
        watcher = threading.Thread(target=_watch, args=(site, lags, stop))
        watcher.start()
        try:
            _write(site, lags, seconds, rate_bytes_s)
            deadline_s = time.monotonic() + _DRAIN_S
            while lags.durable[-1][1] < lags.commits[-1][1]:
                if time.monotonic() > deadline_s:
                    break
                time.sleep(_POLL_S)
        finally:
            stop.set()
            watcher.join()
    return lags


def _write(site: Site, lags: Lags, seconds: float, rate_bytes_s: int) -> None:
    """Commit at a steady rate of WAL; when the server is slower than that, as fast as it can."""
    with site.session() as session:
        session.execute("CREATE TABLE public.load (i int, text text)")
        begun_s, first = time.monotonic(), _position(session)
        while time.monotonic() - begun_s < seconds:
            session.execute(
                "INSERT INTO public.load SELECT i, md5(random()::text) || md5(random()::text)"
                f" FROM generate_series(1, {_ROWS}) AS i"
            )
            at_s, end = time.monotonic(), _position(session)
            lags.commits.append((at_s, end))
            ahead_s = (end - first) / rate_bytes_s - (at_s - begun_s)
            time.sleep(max(0.0, ahead_s))
        lags.written_bytes, lags.took_s = lags.commits[-1][1] - first, time.monotonic() - begun_s
        if lags.way == "archive_command":
            session.execute("SELECT pg_switch_wal()")


def _position(session: Connection) -> int:
    row = session.execute("SELECT pg_current_wal_lsn()::text").fetchone()
    return Lsn.parse(str(row[0])).value if row else 0


def _watch(site: Site, lags: Lags, stop: threading.Event) -> None:
    query = (
        "SELECT last_archived_wal FROM pg_stat_archiver"
        if lags.way == "archive_command"
        else f"SELECT restart_lsn::text FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
    )
    with site.session() as session:
        session.execute("SET stats_fetch_consistency = none")
        while not stop.is_set():
            row = session.execute(query.encode()).fetchone()
            end = _durable(str(row[0]), lags.way) if row and row[0] else 0
            if not lags.durable or end > lags.durable[-1][1]:
                lags.durable.append((time.monotonic(), end))
            stop.wait(_POLL_S)


def _durable(said: str, way: str) -> int:
    if way == "receive":
        return Lsn.parse(said).value
    name, size_bytes = parse_wal_name(said[:24]), 16 * 1024 * 1024
    return WalSegment(name.timeline, name.number(size_bytes)).end(size_bytes).value


@contextlib.contextmanager
def _site(way: str) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="backup-lag-")))
        (folder / "s3" / "backups").mkdir(parents=True)
        endpoint = stack.enter_context(s3_server(folder / "s3", *KEYS))
        mode = {"archive_mode": "on" if way == "archive_command" else "off"}
        tools = find_tools(exactly=MAJOR, needs=SERVER)
        cluster = LocalCluster(tools.bin_dir, folder / "cluster", settings={**SETTINGS, **mode})
        cluster.create()
        stack.callback(cluster.stop)
        cluster.start()
        config = folder / "wal.toml"
        config.write_text(_configuration(folder, cluster, endpoint, way), encoding="utf-8")
        yield Site(folder, cluster, config)


def _configuration(folder: Path, cluster: LocalCluster, endpoint: str, way: str) -> str:
    for name, text in zip(("key", "secret"), KEYS, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o600)
    dsn = cluster.endpoint().dsn.replace('"', '\\"')
    lines = [
        f'[store]\nurl = "s3://backups/lag"\nendpoint = "{endpoint}"\nregion = "us-east-1"',
        f'access_key_id = {{ file = "{folder}/key" }}\nsecret_access_key = {{ file = "{folder}/secret" }}',
        f'[clusters.main]\ndsn = "{dsn}"\ndata_directory = "{cluster.data}"',
        f'socket = "{folder}/run/main.sock"',
        *(["receive = {}"] if way == "receive" else []),
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _archiving(site: Site, way: str) -> Iterator[None]:
    """The agent, or the receiver, while the block runs; something is archived when it begins."""
    setup = ("wal", "setup", "main", "--apply", *(["--receive"] if way == "receive" else []))
    process.run(site.program(*setup), timeout_s=60)
    with (site.folder / "program.log").open("wb") as log:
        verb = "receive" if way == "receive" else "agent"
        child = process.start(site.program("wal", verb, "main"), stderr=log)
        try:
            _await_first(site, way)
            yield
        finally:
            process.terminate(child, grace_s=60.0)


def _await_first(site: Site, way: str) -> None:
    query = "SELECT last_archived_wal FROM pg_stat_archiver"
    if way == "receive":
        query = f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{SLOT}' AND active"
    with site.session() as session:
        session.execute("SET stats_fetch_consistency = none")
        session.execute("SELECT pg_switch_wal()")
        deadline_s = time.monotonic() + _DRAIN_S
        while not (row := session.execute(query.encode()).fetchone()) or row[0] is None:
            if time.monotonic() > deadline_s:
                said = (site.folder / "program.log").read_text(errors="replace")[-2000:]
                raise BackupError(f"nothing was archived by {way}", detail={"said": said})
            time.sleep(_POLL_S)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="how long it is written (300)")
    parser.add_argument("--rate", type=parse_size_bytes, default=20_000_000, help="WAL a second (20MB)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
