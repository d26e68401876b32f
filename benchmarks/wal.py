"""How fast WAL goes into an archive and comes back: ours beside `cp`, `aws s3 cp` and pgBackRest.

    python -m benchmarks.wal [--segments 100] [--replayed 50] [--few 10] [--runs 3] [--only KEY …] [--quick]

PostgreSQL's own archiver drains the same backlog by each archive_command in turn, and its own recovery
replays the first segments of what each has archived. `make bench` runs this too.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from backup_pipeline.demo import place
from backup_pipeline.errors import BackupError
from benchmarks import table
from benchmarks.archiving import drain
from benchmarks.replaying import replay
from benchmarks.turns import Measured, cells, machine, ratio
from benchmarks.wal_contenders import Contender, wal_contenders
from benchmarks.wal_ground import Ground, standing
from benchmarks.wal_load import BACKLOG, SMALL

COLUMNS = ("what", "ms", "spread ms", "CPU ms", "S3 CPU ms", "to cp", "to pgBackRest")
PUSH_TO_PGBACKREST, REPLAY_TO_CP = 0.8, 1.2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. The exit code says whether everything ran, not whether it was fast."""
    asked = _parse(argv)
    try:
        with place.held(asked.folder, "python -m benchmarks.wal") as here:
            shutil.rmtree(here.objects, ignore_errors=True)
            with standing(here, SMALL if asked.quick else BACKLOG) as ground:
                _report(ground, asked)
            shutil.rmtree(here.objects, ignore_errors=True)
    except KeyboardInterrupt:
        return 130
    except BackupError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    return 0


def _report(ground: Ground, asked: argparse.Namespace) -> None:
    found = [each for each in wal_contenders() if not asked.only or each.key in asked.only]
    pushed = {each.key: Measured(each.title, 1000) for each in found}
    replayed = {each.key: Measured(each.title, 1000) for each in found if each.fetch}
    drain(ground, "cp %p /dev/null", ground.segments)  # the caches are warm for everybody then
    for run in range(asked.runs):
        for each in found:
            _turn(ground, each, run, asked, pushed, replayed)
    print(f"{machine(ground)}; {asked.runs} runs each, medians for a segment of 16 MiB\n")
    print(f"Drain of {asked.segments} segments\n\n{_table(pushed)}\n")
    print(f"Replay of {asked.replayed} segments\n\n{_table(replayed)}\n")
    print(table.markdown(("target", "found", ""), _targets(pushed, replayed)), flush=True)


def _turn(
    ground: Ground,
    each: Contender,
    run: int,
    asked: argparse.Namespace,
    pushed: dict[str, Measured],
    replayed: dict[str, Measured],
) -> None:
    """Archive by one contender, and replay what it has archived."""
    names = ground.segments[: asked.few if each.few else asked.segments]
    again = ground.segments[: min(len(names), asked.few if each.few else asked.replayed)]
    turn = f"{each.key}-{run}"
    print(f"run {run + 1}: {each.title}", file=sys.stderr, flush=True)
    with each.push(ground, turn) as command:
        pushed[each.key].add(drain(ground, command, names), per=len(names))
    if each.fetch and len(again) > 1:
        replayed[each.key].add(replay(ground, each, turn, again), per=len(again))
    ground.forget(turn)


def _table(found: dict[str, Measured]) -> str:
    cp, peer = found.get("cp"), found.get("pgbackrest")
    rows = [(*cells(each), ratio(each.to(cp)), ratio(each.to(peer))) for each in found.values() if each.walls]
    return table.markdown(COLUMNS, rows)


def _targets(pushed: dict[str, Measured], replayed: dict[str, Measured]) -> list[tuple[str, str, str]]:
    wanted = (
        ("push: at most 0.8 of pgBackRest's time", pushed, "pgbackrest", PUSH_TO_PGBACKREST),
        ("replay: at most 1.2 times cp's", replayed, "cp", REPLAY_TO_CP),
    )
    ratios = (
        (promise, found["ours"].to(found.get(base)), limit)
        for promise, found, base, limit in wanted
        if "ours" in found
    )
    return [
        (promise, ratio(value), "met" if value <= limit else "MISSED")
        for promise, value, limit in ratios
        if value is not None
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wal", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=place.default_folder() / "bench" / "wal")
    parser.add_argument("--segments", type=int, default=100)
    parser.add_argument("--replayed", type=int, default=50)
    parser.add_argument("--few", type=int, default=10, help="segments for what takes a second for each")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY", help="cp, ours, pgbackrest, aws …")
    parser.add_argument("--quick", action="store_true", help="two segments, one run: does it run at all?")
    asked = parser.parse_args(argv)
    if asked.quick:
        asked.segments, asked.replayed, asked.few, asked.runs = 2, 2, 2, 1
    return asked


if __name__ == "__main__":
    sys.exit(main())
