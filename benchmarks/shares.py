"""`python -m benchmarks.shares`: what a dump to S3 adds to pg_dump's floor, each share measured alone.

Uses the large database that `make bench` made and keeps. Each line is a command of its own, so that what
the whole machine worked for it can be told; shares overlap in a real dump, and do not add up exactly.
"""

import argparse
import sys
from pathlib import Path

from backup_pipeline.demo import place, servers
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.units import show_bytes
from benchmarks.contenders import COUNTED, Bench
from benchmarks.databases import LARGE_ROWS, bench_of
from benchmarks.measure import measure
from benchmarks.table import MIB, Result, markdown

EMPTY = "bench_empty"
_UPLOAD = """
import os, sys
from backup_pipeline.config import load
from backup_pipeline.storage.store import open_store
block, blocks = os.urandom(2**20), int(sys.argv[1])
open_store(load().store).put("random", (block for _ in range(blocks)))
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=place.default_folder() / "bench")
    parser.add_argument("--rows", type=int, default=LARGE_ROWS)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with (
        place.held(arguments.folder, "python -m benchmarks.shares") as here,
        servers.running(here, durable=True) as running,
    ):
        large, large_bytes = bench_of(running, here.folder, arguments.rows)
        empty = Bench(running, _empty(running), here.folder)
        compressed = large.compressed().commands()[0]
        dump_bytes = _length(large, compressed, here.folder / "measured.dump")
        upload = [sys.executable, "-c", _UPLOAD, str(dump_bytes // MIB)]
        lines = [
            ("pg_dump -Fc -Z0 to nowhere: the floor", large, large.floor().commands()[0]),
            ("pg_dump -Fc -Z zstd:1 to nowhere", large, compressed),
            (f"an upload of {show_bytes(dump_bytes)} of random bytes by our store", large, upload),
            ("our program with nothing to do (and a second's sleep)", large, large.idle()),
            ("backup-pipeline backup of an empty database", empty, empty.backup(COUNTED).commands()[0]),
            ("backup-pipeline backup, without fingerprint", large, large.backup(COUNTED).commands()[0]),
        ]
        print(f"A database of {show_bytes(large_bytes)}; medians of {arguments.runs}\n")
        rows = [_row(title, bench, argv, arguments.runs) for title, bench, argv in lines]
        print(markdown(("what", "wall s", "CPU s", "machine CPU s"), rows))
    return 0


def _empty(running: servers.Servers) -> str:
    with connect(running.postgres.endpoint()) as session:
        if not session.execute("SELECT FROM pg_database WHERE datname = %s", [EMPTY]).fetchone():
            session.execute(f"CREATE DATABASE {EMPTY}".encode())
    return EMPTY


def _length(bench: Bench, argv: list[str], file: Path) -> int:
    measure(argv, bench.environment, into=file)
    length = file.stat().st_size
    file.unlink()
    return length


def _row(title: str, bench: Bench, argv: list[str], runs: int) -> tuple[str, ...]:
    costs = tuple(measure(argv, bench.environment) for _ in range(runs))
    found = Result(title, title, costs, 0)
    return title, f"{found.wall_s:.1f}", f"{found.cpu_s:.1f}", f"{found.machine_cpu_s:.1f}"


if __name__ == "__main__":
    sys.exit(main())
