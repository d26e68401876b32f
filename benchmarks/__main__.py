"""`make bench`: backups side by side with what a team would write itself, on one machine, in one run.

    python -m benchmarks [dump] [wal] [base] [--runs 3] [--quick] [--folder F]

Dumps, WAL and base backups, or those of them that are named; wal.py and base.py may be run by themselves.
Of dumps: two databases of the demo's generator (some 2 GB and 0.2 GB; made once, and kept in `.demo/bench`),
a PostgreSQL and an S3 server on loopback. Contenders take turns, so that what else the machine does meets
all of them alike. Read ratios, not seconds.
"""

import argparse
import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from psycopg import sql

from backup_pipeline.demo import place, servers
from backup_pipeline.demo.servers import Servers
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import BackupError
from backup_pipeline.units import show_bytes
from benchmarks import base, table, wal
from benchmarks.contenders import COMPARED, COUNTED, RESTORED, Bench, Contender
from benchmarks.databases import LARGE_ROWS, SMALL_ROWS, bench_of
from benchmarks.measure import CommandFailed, Cost, measure
from benchmarks.table import Result

PARTS = ("dump", "wal", "base")
QUICK_ROWS = (4_000, 2_000)


def main() -> int:
    """Measure and print. The exit code says whether everything ran, not whether it was fast."""
    arguments = _parse()
    folder: Path = arguments.folder
    options = ["--runs", str(arguments.runs), *(["--quick"] if arguments.quick else [])]
    doors = {
        "dump": lambda: _dumps(arguments),
        "wal": lambda: wal.main(["--folder", str(folder / "wal"), *options]),
        "base": lambda: base.main(["--folder", str(folder / "base"), *options]),
    }
    for part in arguments.parts or doors:
        if code := doors[part]():
            return code
    return 0


def _dumps(arguments: argparse.Namespace) -> int:
    large_rows, small_rows = QUICK_ROWS if arguments.quick else (arguments.large_rows, arguments.small_rows)
    runs = 1 if arguments.quick else arguments.runs
    try:
        with place.held(arguments.folder, "python -m benchmarks") as here:
            shutil.rmtree(here.objects, ignore_errors=True)
            with servers.running(here, durable=True) as running:
                _report(running, here.folder, large_rows, small_rows, runs)
            shutil.rmtree(here.objects, ignore_errors=True)
    except KeyboardInterrupt:
        return 130
    except (BackupError, CommandFailed) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    return 0


def _report(running: Servers, folder: Path, large_rows: int, small_rows: int, runs: int) -> None:
    large, large_bytes = bench_of(running, folder, large_rows)
    small, small_bytes = bench_of(running, folder, small_rows)
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, PostgreSQL {running.tools.version_text}, loopback; {runs} runs each\n")
    idle = max(measure(large.idle(), large.environment).peak_bytes for _ in range(runs))
    on_large = _measure(
        large, [large.cron(), large.pipe(), large.floor(), large.compressed(), *_ours(large)], runs
    )
    _show(f"A database of {show_bytes(large_bytes)}", on_large, idle)
    on_small = _measure(small, [small.floor(), small.backup(COMPARED), small.prove()], runs)
    _show(f"A database of {show_bytes(small_bytes)}", on_small, idle)
    print(f"Our program idle: {idle / table.MIB:.0f} MB. A MB is {table.MIB:,} bytes here.\n")
    found = table.targets(
        {result.key: result for result in on_large},
        {result.key: result for result in on_small},
        idle,
        sizes=(show_bytes(small_bytes), show_bytes(large_bytes)),
    )
    lines = [(target.promise, target.found, "met" if target.met else "MISSED") for target in found]
    print(table.markdown(("target", "found", ""), lines))


def _ours(bench: Bench) -> list[Contender]:
    return [bench.backup(COUNTED), bench.backup(COMPARED), bench.prove(), bench.restore()]


def _measure(bench: Bench, contenders: Sequence[Contender], runs: int) -> list[Result]:
    """All of them once unmeasured (the caches are warm for everybody then), and `runs` times in turn."""
    environment = bench.environment
    measure(bench.floor().commands()[0], environment)
    costs: dict[str, list[Cost]] = {contender.key: [] for contender in contenders}
    sizes: dict[str, int] = {}
    for run in range(runs):
        for contender in contenders:
            print(f"{bench.database}, run {run + 1}: {contender.title}", file=sys.stderr, flush=True)
            cost = Cost()
            for command in contender.commands():
                cost += measure(command, environment)
            costs[contender.key].append(cost)
            sizes[contender.key] = contender.size()
            _drop_restored(bench.running)
    return [Result(each.key, each.title, tuple(costs[each.key]), sizes[each.key]) for each in contenders]


def _drop_restored(running: Servers) -> None:
    with contextlib.closing(connect(running.postgres.endpoint())) as session:
        session.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(RESTORED)))


def _show(title: str, results: Sequence[Result], idle_bytes: int) -> None:
    print(f"{title}\n\n{table.markdown(table.COLUMNS, table.rows(results, idle_bytes))}\n", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="dump, wal, base; all without")
    parser.add_argument("--folder", type=Path, default=place.default_folder() / "bench")
    parser.add_argument("--large-rows", type=int, default=LARGE_ROWS)
    parser.add_argument("--small-rows", type=int, default=SMALL_ROWS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small databases, one run: does it run at all?")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
