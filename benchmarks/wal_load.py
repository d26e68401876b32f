"""A cluster and a backlog of real WAL: updates and inserts, and the full pages that follow a checkpoint.

Made once, and kept. Nothing is archived while it is made, so that every segment waits for whoever is
measured. Called by wal_ground.py.
"""

import contextlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.domain.wal import WalKind, parse_wal_name
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import ConfigError
from backup_pipeline.process import Command

_MAKING = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "on"}
_TABLES = (
    "CREATE TABLE public.account (id int PRIMARY KEY, branch int, balance numeric, note text)",
    "CREATE TABLE public.entry"
    " (id bigserial PRIMARY KEY, account int, amount numeric, at timestamptz, note text)",
    "CREATE INDEX ON public.entry (account)",
)
_INDEX = "CREATE INDEX ON public.account (branch)"
_FILL = (
    "INSERT INTO public.account"
    " SELECT i, mod(i, 1000), random() * 10000, md5(i::text) || ' of branch ' || mod(i, 1000)"
    " FROM generate_series(1, %s) AS i"
)
_UPDATE = (
    "UPDATE public.account"
    " SET balance = balance + (random() * 100)::numeric(9, 2), branch = (random() * 1000)::int"
    " WHERE id IN (SELECT (random() * %s)::int FROM generate_series(1, 4000))"
)
_INSERT = (
    "INSERT INTO public.entry (account, amount, at, note)"
    " SELECT (random() * %s)::int, (random() * 500)::numeric(9, 2), clock_timestamp(),"
    " 'invoice ' || (random() * 100000)::int || ', paid by bank transfer'"
    " FROM generate_series(1, 4000)"
)


@dataclass(frozen=True)
class Size:
    """How many segments wait, and of how many rows they tell."""

    segments: int
    accounts: int


BACKLOG, LARGE, SMALL = Size(100, 1_000_000), Size(4, 12_000_000), Size(2, 2_000)
"""Much WAL; much data; and enough to see that everything runs."""


def make(cluster: LocalCluster, size: Size) -> None:
    """The template, and behind it a load that fills the segments and a few more."""
    segments, accounts = size.segments, size.accounts
    stamp = cluster.folder / "complete"
    wanted = f"{cluster.bin_dir} {segments} {accounts}"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"making a cluster with {segments} segments of WAL", file=sys.stderr, flush=True)
    for old in (cluster.data, cluster.folder / "template"):
        shutil.rmtree(old, ignore_errors=True)
    settings, cluster.settings = cluster.settings, {**cluster.settings, **_MAKING}
    cluster.create()
    cluster.start()
    with contextlib.closing(connect(cluster.endpoint(), statement_timeout_s=0)) as session:
        for statement in _TABLES:
            session.execute(statement.encode())
        session.execute(_FILL, [accounts])
        session.execute(_INDEX.encode())
    cluster.stop()
    _keep(cluster.data, cluster.folder / "template")
    cluster.start()
    with contextlib.closing(connect(cluster.endpoint(), statement_timeout_s=0)) as session:
        while len(segments_of(cluster.data)) < segments + 1:
            session.execute(_UPDATE, [accounts])
            session.execute(_INSERT, [accounts])
    cluster.stop()
    cluster.settings = settings
    stamp.write_text(wanted, encoding="utf-8")


def _keep(data: Path, template: Path) -> None:
    """Copy a data directory that has ended in order, without its WAL; what waits then is the load's alone."""
    process.run(Command(("cp", "--archive", "--reflink=auto", str(data), str(template))), timeout_s=600.0)
    for folder in (template / "pg_wal", data / "pg_wal" / "archive_status"):
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()


def segments_of(data: Path) -> list[Path]:
    """The segments that are or were waiting to be archived, in order."""
    found = []
    for path in (data / "pg_wal" / "archive_status").iterdir():
        with contextlib.suppress(ConfigError):
            if parse_wal_name(path.stem).kind is WalKind.SEGMENT:
                found.append(path.with_name(path.stem))
    return sorted(found)


def change(cluster: LocalCluster) -> None:
    """Write to some thousand rows, here and there."""
    with contextlib.closing(connect(cluster.endpoint())) as session:
        row = session.execute("SELECT max(id) FROM public.account").fetchone()
        accounts = int(str(row[0])) if row else 0
        session.execute(_UPDATE, [accounts])
        session.execute(_INSERT, [accounts])
