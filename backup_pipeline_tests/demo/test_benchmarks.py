"""The benchmarks run, say everything, and measure what they say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backup_pipeline.errors import BackupError
from backup_pipeline_tests.servers import postgres as servers
from benchmarks import lag, table
from benchmarks.measure import CommandFailed, Cost, measure
from benchmarks.table import COLUMNS, MIB, Result

ENVIRONMENT = {"PATH": os.environ["PATH"]}


def test_the_cost_of_a_command_is_that_of_all_its_processes() -> None:
    child = "import subprocess, sys, time; b = bytearray(60 << 20); time.sleep(0.3)"
    script = (
        f"import subprocess, sys; b = bytearray(40 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    cost = measure([sys.executable, "-c", script], ENVIRONMENT)
    assert 100 * MIB < cost.peak_bytes < 140 * MIB
    assert 0.3 < cost.wall_s < 20
    assert 0 < cost.cpu_s < cost.wall_s * 2


def test_servers_among_the_children_do_not_count(tmp_path: Path) -> None:
    busy = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    server = tmp_path / "postgres"  # a process is known by its program's name
    server.symlink_to(sys.executable)
    script = f"import subprocess; subprocess.run([{str(server)!r}, '-c', {busy!r}])"
    assert measure([sys.executable, "-c", busy], ENVIRONMENT).cpu_s > 0.45
    cost = measure([sys.executable, "-c", script], ENVIRONMENT)
    assert cost.cpu_s < 0.35
    assert cost.machine_cpu_s > 0.45


def test_a_command_that_fails_is_no_result() -> None:
    with pytest.raises(CommandFailed, match="exit code 3\nbroken"):
        measure(["sh", "-c", "echo broken >&2; exit 3"], ENVIRONMENT)


def test_the_table_has_ratios_of_medians() -> None:
    results = [
        Result("cron", "cron", tuple(Cost(wall, 1.0, 2.0, 50 * MIB) for wall in (10.0, 12.0, 90.0)), 5 * MIB),
        Result("floor", "floor", (Cost(2.0, 1.0, 2.0, 5 * MIB),), 0),
        Result("counts", "ours", (Cost(2.2, 1.0, 2.0, 80 * MIB),), 6 * MIB),
        Result("ours", "ours", (Cost(3.0, 1.0, 2.0, 90 * MIB),), 6 * MIB),
    ]
    rows = table.rows(results, 40 * MIB)
    assert rows[0] == ("cron", "12.0", "10.0-90.0", "1.0", "2.0", "50", "", "5", "1.00", "6.00")
    assert rows[3] == ("ours", "3.0", "3.0-3.0", "1.0", "2.0", "90", "50", "6", "0.25", "1.50")
    by_key = {result.key: result for result in results}
    assert all(target.met for target in table.targets(by_key, by_key, 40 * MIB, sizes=("1 GB", "2 GB")))


@pytest.mark.timeout(600)
def test_a_quick_run_measures_everything(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "dump", "--quick", "--folder", folder],
        capture_output=True,
        text=True,
        check=False,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    measured = [[cell.strip() for cell in line] for line in lines if len(line) == len(COLUMNS)]
    assert tuple(measured[0]) == COLUMNS
    titles = {row[0] for row in measured}
    for what in ("pg_dump -Fc -Z9", "aws s3 cp", "-Z0 to nowhere", "without fingerprint", "with fingerprint"):
        assert any(what in title for title in titles), what
    for row in measured:
        if row[0].startswith("backup-pipeline"):
            assert all(float(row[i]) > 0 for i in (1, 3, 4, 5, 6)), row


def test_a_commit_has_waited_until_its_end_was_seen_to_be_durable() -> None:
    lags = lag.Lags("receive", commits=[(1.0, 10), (1.5, 20), (4.0, 21)])
    lags.durable = [(0.5, 5), (2.0, 19), (3.0, 20), (3.5, 30)]
    assert lags.seconds() == [0.0, 1.0, 1.5]
    lags.commits.append((5.0, 31))
    with pytest.raises(BackupError, match="never seen"):
        lags.seconds()


def test_what_archive_command_made_durable_ends_with_its_segment() -> None:
    assert lag._durable("000000010000000000000004", "archive_command") == 5 * 16 * MIB
    assert lag._durable("000000010000000000000004.00000028.backup", "archive_command") == 5 * 16 * MIB
    assert lag._durable("0/5000028", "receive") == 5 * 16 * MIB + 0x28


def test_the_work_of_what_leaves_its_parent_is_counted(tmp_path: Path) -> None:
    busy = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    peer = tmp_path / "pgbackrest"  # which works in a process that nobody waits for
    peer.symlink_to(sys.executable)
    measured = f"""
import subprocess, time
from benchmarks.measure import working
with working() as work:
    subprocess.run(["sh", "-c", 'setsid "$0" -c "$1" & sleep 0.2', {str(peer)!r}, {busy!r}], check=True)
    time.sleep(2.0)
print(work.done.cpu_s)
"""
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.45


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """A benchmark, as a module of Python."""
    argv = [sys.executable, "-m", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=270)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def rows_of(text: str) -> list[list[str]]:
    """The cells of all tables."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


@pytest.mark.timeout(300)
def test_two_segments_are_archived_replayed_and_backed_up_by_everybody(folder: Path) -> None:
    done = run("benchmarks", "wal", "base", "--quick", "--folder", folder)
    rows = rows_of(done.stdout)
    titles = [row[0] for row in rows]
    for title in ("cp, nothing synced", "ours, to S3", "aws s3 cp", "ours"):
        assert titles.count(title) == 2, done.stdout
    assert titles.count("ours, PostgreSQL 17") == 2
    if shutil.which("pgbackrest") and servers.DEBIAN_15.exists():
        assert sum(title.startswith("pgBackRest") for title in titles) == 5
    else:
        assert "pgBackRest is not measured" in done.stderr
    for row in rows:
        if row[0].startswith(("ours", "pgBackRest", "cp", "aws")):
            assert float(row[1]) > 0, row
    shares = rows_of(run("benchmarks.wal_shares", "--quick", "--folder", folder / "wal").stdout)
    assert {row[0] for row in shares if row[0].startswith(("push", "fetch"))} >= {
        "push: writing the object",
        "fetch: all of it",
    }
