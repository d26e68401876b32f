"""How long Dagster takes to load the definitions of 1, 100 and 1,000 databases.

    python -m benchmarks.definitions_load [--runs 3] [COUNT ...]

Each measurement is a fresh process. `run` is what each run's process does before its first step:
import, read backups.toml, build all definitions, resolve its own job. `server` is what the code server
does once, when it starts: all jobs, and the snapshot that it hands to the webserver and the daemon.
All are seconds of CPU, which hold on a busy machine; on an idle one the clock says the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

COUNTS = (1, 100, 1000)
COLUMNS = ("databases", "assets", "checks", "import s", "run s", "server s", "snapshot MB", "peak MB")

_CHILD = """
import json, resource, time
began = time.process_time()
import dagster as dg
from backup_pipeline.definitions import defs
from backup_pipeline.orchestration import build
imported = time.process_time()
repository = defs().get_repository_def()
repository.get_job("daily_backups")
ready = time.process_time()
repository.get_all_jobs()
from dagster._core.remote_representation.external_data import RepositorySnap
snapshot = dg.serialize_value(RepositorySnap.from_def(repository))
graph = repository.asset_graph
print(json.dumps({
    "assets": len(graph.get_all_asset_keys()),
    "checks": len(graph.asset_check_keys),
    "import s": imported - began,
    "run s": ready - began,
    "server s": time.process_time() - began,
    "snapshot MB": len(snapshot) / 1e6,
    "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
}))
"""


def configuration(databases: int) -> str:
    """A backups.toml with so many databases, all with the default tiers."""
    tables = "".join(
        f'[databases.database_{number:04}]\ndsn = "postgresql://backup@db.example.net/database_{number:04}"\n'
        for number in range(databases)
    )
    return f'[store]\nurl = "s3://backups/production"\n\n{tables}'


def measure(databases: int) -> dict[str, float]:
    """Load so many databases in a fresh process; what was measured, by column."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backups.toml"
        path.write_text(configuration(databases), encoding="utf-8")
        environment = {**os.environ, "BACKUP_PIPELINE_CONFIG": str(path)}
        argv = [sys.executable, "-c", _CHILD]
        done = subprocess.run(
            argv, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=600
        )
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"databases": databases, **measured}


def _statement(run_s: Mapping[int, float]) -> str:
    """What the smallest and the largest measurement say of a database more."""
    fewest, most = min(run_s), max(run_s)
    if fewest == most:
        return ""
    more_ms = (run_s[most] - run_s[fewest]) / (most - fewest) * 1000
    return f"Each database more costs each run {more_ms:.0f} ms before its first step."


def main() -> None:
    """Print the table, and what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", nargs="*", type=int, default=COUNTS, metavar="COUNT")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    run_s = {}
    for count in options.counts:
        runs = [measure(count) for _ in range(options.runs)]
        middle = {name: statistics.median(run[name] for run in runs) for name in COLUMNS}
        run_s[count] = middle["run s"]
        shown = [
            f"{middle[name]:.1f}" if name[-1] in "sB" and " " in name else f"{middle[name]:.0f}"
            for name in COLUMNS
        ]
        print(f"| {' | '.join(shown)} |", flush=True)
    print(f"\nMedian of {options.runs}, CPU seconds.", _statement(run_s))


if __name__ == "__main__":
    main()
