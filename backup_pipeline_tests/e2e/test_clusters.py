"""A cluster as in production: code server, webserver, daemon; PostgreSQL; an S3 server.

A schedule's tick takes a base backup, the sensor shows the WAL without a run, a recovery is launched as from
the Launchpad, and one that is terminated leaves no server and no directory.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline.storage.store import open_store
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.e2e.dagster_box import DagsterBox, Run
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.servers.s3 import S3Server
from backup_pipeline_tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

SCHEDULE = "base_backup_cron_x_x_x_x_x"
NOISE_ROWS = 400_000
TABLES = """
[clusters.main]
dsn = "{dsn}"
bin_dir = "{bin_dir}"
base_backup = {{ cron = "* * * * *", checkpoint = "fast" }}
drill = ""
"""
_LATEST = """query ($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  assetMaterializations(limit: 1) { runId metadataEntries { label ... on IntMetadataEntry { intValue } } }
} } }"""


@dataclass(frozen=True)
class Site:
    """What the stories happen on."""

    dagster: DagsterBox
    box: RecoveryBox

    def latest(self, *path: str) -> dict[str, Any] | None:
        """The newest materialization of an asset."""
        node = self.dagster.query(_LATEST, key={"path": list(path)})["assetNodeOrError"]
        found: list[dict[str, Any]] = node["assetMaterializations"]
        return found[0] if found else None


@pytest.fixture(scope="module")
def site(s3: S3Server, dagster_with: Callable[[str], AbstractContextManager[DagsterBox]]) -> Iterator[Site]:
    with a_recovery_box(servers.bin_dir_17(), open_store(s3.store("e2e"))) as box:
        box.commit(1, switch=True)
        tables = TABLES.format(dsn=box.cluster.endpoint().dsn, bin_dir=servers.bin_dir_17())
        with box.shipping(), dagster_with(tables) as dagster:
            yield Site(dagster, box)


@pytest.fixture(scope="module")
def tick(site: Site) -> Run:
    """The ended run of the schedule's first tick."""
    dagster = site.dagster
    first, *_ = dagster.wait(lambda: dagster.runs(database="main", action="backup") or None, "the first tick")
    dagster.stop_schedule(SCHEDULE)
    return dagster.wait_for_run(first.id)


def test_a_tick_takes_a_base_backup_and_lists_it(site: Site, tick: Run) -> None:
    assert (tick.job, tick.status) == ("take_base_backup", "SUCCESS")
    assert tick.tags["backup/queue"] == "main"
    made = {e.step: e.metadata for e in site.dagster.events(tick.id) if e.kind == "MaterializationEvent"}
    taken, listed = made["main__base_backup.take"], made["main__backups"]
    assert taken["backup_id"] == tick.tags["backup/id"]
    assert {"size_bytes", "duration_s", "throughput_mib_s", "wal_wait_s"} <= set(taken)
    assert listed["count"] >= 1


def test_the_sensor_shows_the_wal_without_a_run(site: Site) -> None:
    shown = site.dagster.wait(lambda: site.latest("main", "wal"), "the sensor's first tick")
    assert not shown["runId"]
    numbers = {entry["label"]: entry.get("intValue") for entry in shown["metadataEntries"]}
    assert numbers["gaps"] == 0
    assert {check["name"] for check in site.dagster.checks("main", "wal")} == {
        "no_gaps",
        "archiving",
        "window_met",
    }


def test_a_recovery_as_from_the_launchpad(site: Site, tick: Run) -> None:
    site.box.commit(2)
    with site.box.session() as session:
        session.execute("SELECT pg_switch_wal()")
    last = site.box.ledger[-1]
    form = {"target": str(last.xid), "into": str(site.box.folder / "recovered"), "exclusive": True}
    done = site.dagster.wait(lambda: recovered(site, form), "a recovery", timeout_s=120)
    assert done.status == "SUCCESS"
    assert site.box.numbers() == [each.number for each in site.box.ledger[:-1]]


def recovered(site: Site, form: dict[str, object]) -> Run | None:
    """A recovery's run; None while what it needs is still on its way into the archive."""
    run = site.dagster.wait_for_run(site.dagster.launch("recover_cluster", {**form, "dry_run": False}))
    return run if run.status == "SUCCESS" else None


def test_a_recovery_that_is_terminated_leaves_nothing(site: Site, tick: Run) -> None:
    with site.box.session() as session:
        session.execute(
            "CREATE TABLE public.noise_to_replay AS SELECT n, repeat(md5(n::text), 8) AS text"
            f" FROM generate_series(1, {NOISE_ROWS}) AS n".encode()
        )
        session.execute("SELECT pg_switch_wal()")
    into = site.box.folder / "terminated"
    run_id = site.dagster.launch("recover_cluster", {"into": str(into), "dry_run": False})
    replaying = held_replay(site.box.folder, within_s=90)
    site.dagster.terminate(run_id)
    site.dagster.wait(lambda: told_to_stop(site.box.folder) or None, "PostgreSQL to be told")
    os.kill(replaying, signal.SIGCONT)
    assert site.dagster.wait_for_run(run_id).status == "CANCELED"
    wait_until(lambda: not Path(f"/proc/{replaying}").exists(), within_s=20)
    assert [path.name for path in site.box.folder.iterdir() if path.name != "recovered"] == []


def held_replay(folder: Path, *, within_s: float) -> int:
    """The process that replays below `folder`, stopped as soon as it is there: it never comes to its end."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        for pid, parent, title in processes():
            if title.startswith("postgres: startup") and str(folder) in title_of(parent):
                os.kill(pid, signal.SIGSTOP)
                return pid
        time.sleep(0.01)
    raise AssertionError(f"nothing replayed below {folder}")


def told_to_stop(folder: Path) -> bool:
    """Whether a server below `folder` was told to stop."""
    return any(b"shutdown request" in log.read_bytes() for log in folder.glob("*/cluster/*.log"))


def processes() -> Iterator[tuple[int, int, str]]:
    """(process, parent, title) of all processes."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(path.name), parent, title_of(int(path.name))


def title_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
