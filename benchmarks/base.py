"""How fast a cluster is copied into S3, and running again from there: ours beside pgBackRest.

    python -m benchmarks.base [--runs 3] [--only KEY …] [--quick]

Of a cluster of some 2 GB, whose WAL is archived by whoever takes the backup, then of a small change to it.
Both write to an S3 server by TLS, with zstd. Debian's pgBackRest knows PostgreSQL 15, which has no
incremental base backups of its own: those of ours are of a cluster of 17 with the same rows. `make bench`
runs this too.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from backup_pipeline.demo import place
from backup_pipeline.demo.place import BUCKET
from backup_pipeline.demo.servers import MAJOR
from backup_pipeline.engines.postgres import recovery
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.errors import BackupError
from backup_pipeline.units import show_bytes
from benchmarks import pgbackrest, table
from benchmarks.measure import working
from benchmarks.turns import Measured, cells, machine, megabytes, ratio
from benchmarks.wal_contenders import Turn, ours_config, push_by_ours, push_by_pgbackrest
from benchmarks.wal_ground import Ground, installed_pgbackrest, standing
from benchmarks.wal_load import LARGE, SMALL

COLUMNS = ("what", "s", "spread s", "CPU s", "S3 CPU s", "MB", "to pgBackRest")
INCREMENT = 0.2
LEVEL = 1.05
"""Medians of a few runs tell no smaller difference."""

_WITHIN_S = 900.0
Step = Callable[[Ground, str], object]
"""Done on a ground, in the place that a turn has in the store."""


@dataclass(frozen=True)
class Contender:
    """One line of the tables: how WAL is archived meanwhile, and what is done one after the other."""

    key: str
    title: str
    push: Turn
    backup: Step
    stored: str  # where in the store its base backups lie
    restore: Step | None = None
    increment: Step | None = None
    newest: bool = False  # of which of the two servers


@dataclass
class Found:
    """What was measured, by contender."""

    taken: dict[str, Measured] = field(default_factory=dict)
    restored: dict[str, Measured] = field(default_factory=dict)
    increments: dict[str, Measured] = field(default_factory=dict)


def contenders() -> list[Contender]:
    """Those that can be measured here; PostgreSQL has incremental base backups from 17 on."""
    stored = "clusters/main/base"
    found = [Contender("ours", "ours", push_by_ours, _back_up, stored, restore=_recover)]
    if installed_pgbackrest():
        title = "pgBackRest, 2 processes"
        peer = Contender("pgbackrest", title, push_by_pgbackrest, partial(_peer, "full"), "backup")
        found.append(replace(peer, restore=_peer_restore, increment=partial(_peer, "incr")))
    else:
        print("pgBackRest is not measured: apt-get install pgbackrest", file=sys.stderr)
    ours = Contender("newest", f"ours, PostgreSQL {MAJOR}", push_by_ours, _back_up, stored)
    return [*found, replace(ours, increment=_increment, newest=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. The exit code says whether everything ran, not whether it was fast."""
    asked = _parse(argv)
    size = SMALL if asked.quick else LARGE
    try:
        with (
            place.held(asked.folder, "python -m benchmarks.base") as here,
            place.held(asked.folder / "newest", "python -m benchmarks.base") as there,
        ):
            for each in (here, there):
                shutil.rmtree(each.objects, ignore_errors=True)
            with standing(here, size) as ground, standing(there, size, newest=True) as newest:
                _report(ground, newest, asked)
            for each in (here, there):
                shutil.rmtree(each.objects, ignore_errors=True)
    except KeyboardInterrupt:
        return 130
    except BackupError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    return 0


def _report(ground: Ground, newest: Ground, asked: argparse.Namespace) -> None:
    wanted, found = [each for each in contenders() if not asked.only or each.key in asked.only], Found()
    for run in range(asked.runs):
        for each in wanted:
            print(f"run {run + 1}: {each.title}", file=sys.stderr, flush=True)
            _turn(newest if each.newest else ground, each, f"base-{each.key}-{run}", found)
    print(f"{machine(ground)}; {asked.runs} runs each, medians\n")
    print(f"A base backup of {show_bytes(ground.size_bytes)}\n\n{_table(found.taken)}\n")
    print(f"A cluster from it: unpacked, all WAL replayed, ended in order\n\n{_table(found.restored)}\n")
    print(f"An incremental one after a small change\n\n{_table(found.increments)}\n")
    print(table.markdown(("target", "found", ""), _targets(found)), flush=True)


def _turn(ground: Ground, each: Contender, turn: str, found: Found) -> None:
    """A backup, a cluster that is recovered from it, and an incremental one."""

    def measure(into: dict[str, Measured], step: Step) -> None:
        before = _stored_bytes(ground, turn, each)
        ground.sync()
        with working() as work:
            step(ground, turn)
        measured = into.setdefault(each.key, Measured(each.title))
        measured.add(work.done, stored_bytes=_stored_bytes(ground, turn, each) - before)

    ground.is_waiting(())
    with each.push(ground, turn) as command:
        ground.archive_by(command)
        measure(found.taken, each.backup)
        ground.await_archived()
        if each.restore is not None:
            measure(found.restored, each.restore)
        if each.increment is not None:
            ground.change()
            measure(found.increments, each.increment)
        ground.await_archived()
        ground.archive_by("")
    ground.forget(turn)
    ground.forget("replay")


def _stored_bytes(ground: Ground, turn: str, each: Contender) -> int:
    stored = (ground.bucket / turn / each.stored).rglob("*")
    return sum(path.stat().st_size for path in stored if path.is_file() and not path.is_symlink())


def _back_up(ground: Ground, turn: str) -> None:
    _ours(ground, turn, "base-backup", "main", "--fast")


def _increment(ground: Ground, turn: str) -> None:
    _ours(ground, turn, "base-backup", "main", "--fast", "--incremental")


def _recover(ground: Ground, turn: str) -> None:
    into = ground.made("replay") / "data"
    _ours(ground, turn, "recover", "main", "--to", "latest", "--into", str(into))


def _ours(ground: Ground, turn: str, *arguments: str) -> None:
    config = ours_config(ground, f"s3://{BUCKET}/{turn}")
    argv = (ground.python, "-m", "backup_pipeline.cli", "--quiet", "--config", str(config), *arguments)
    ground.run(argv, ground.environment())


def _peer(kind: str, ground: Ground, turn: str) -> None:
    config = pgbackrest.configure(ground, turn)
    ground.run(pgbackrest.argv(installed_pgbackrest(), config, "backup", f"--type={kind}"))


def _peer_restore(ground: Ground, turn: str) -> None:
    config = pgbackrest.configure(ground, turn)
    into = ground.made("replay") / "data"
    where = f"--pg1-path={into}"
    ground.run(pgbackrest.argv(installed_pgbackrest(), config, where, "--archive-mode=off", "restore"))
    # As `recover` has done by then: all that is archived is replayed, and the server has ended in order.
    server = LocalCluster(ground.cluster.bin_dir, into.parent, settings={"hot_standby": "off"})
    server.answers = partial(recovery.is_ready, server.log)
    try:
        server.start(timeout_s=_WITHIN_S)
    finally:
        server.stop()


def _targets(found: Found) -> list[tuple[str, str, str]]:
    wanted = (
        ("backup: level with pgBackRest", found.taken, "ours", LEVEL),
        ("recovery: level with it", found.restored, "ours", LEVEL),
        ("incremental backup: at most 0.2 of its time", found.increments, "newest", INCREMENT),
    )
    lines = []
    for promise, measured, ours, limit in wanted:
        value = measured[ours].to(measured.get("pgbackrest")) if ours in measured else None
        if value is not None:
            lines.append((promise, ratio(value), "met" if value <= limit else "MISSED"))
    return lines


def _table(found: dict[str, Measured]) -> str:
    base = found.get("pgbackrest")
    return table.markdown(
        COLUMNS, [(*cells(each), megabytes(each), ratio(each.to(base))) for each in found.values()]
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.base", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=place.default_folder() / "bench" / "base")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY", help="ours, pgbackrest")
    parser.add_argument("--quick", action="store_true", help="a small cluster, one run: does it run at all?")
    asked = parser.parse_args(argv)
    asked.runs = 1 if asked.quick else asked.runs
    return asked


if __name__ == "__main__":
    sys.exit(main())
