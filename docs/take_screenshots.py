"""Takes the pictures in docs/images: the demo's database, its backups and a real Dagster, seen by a browser.

    python docs/take_screenshots.py [FOLDER]

Needs Chromium (on Debian: apt-get install chromium) and what `make` installs. Takes some minutes; starts
everything that it needs on loopback and ends it again.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster_story import CLUSTER, ClusterStory, cluster, tell_of_cluster

from backup_pipeline.actions.backups import listing
from backup_pipeline.actions.protected import open_protected
from backup_pipeline.config import load
from backup_pipeline.demo import filler, servers
from backup_pipeline.demo.place import Place, empty
from backup_pipeline.domain.backup import Backup, ObjectRole
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.storage import catalog
from backup_pipeline_tests.actions.recovery_box import RecoveryBox
from backup_pipeline_tests.e2e.dagster_box import DagsterBox, running_dagster

ROWS = 60_000
DATABASE = filler.DATABASE
WIDTH = 1440
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


_SHORTEN = """prefix => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    texts.currentNode.data = texts.currentNode.data.replaceAll(prefix, "…");
  }
}"""
"""Where this Python lies says nothing to a reader."""


@dataclass(frozen=True)
class Shot:
    """A page, a text that is there when it is whole, what to click, and what to scroll to."""

    path: str
    expected: str
    click: str = ""
    show: str = ""
    height: int = 900


@dataclass(frozen=True)
class Story:
    """The runs that the pictures show."""

    backup: str
    refused: str
    restored: str
    failed: str


@contextlib.contextmanager
def site(folder: Path) -> Iterator[tuple[DagsterBox, servers.Servers, Place, RecoveryBox]]:
    """The demo's servers, a filled database, a cluster, and Dagster over the reference configuration."""
    place = Place(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(empty, place)  # the cluster may lie elsewhere: see Place
        running = stack.enter_context(servers.running(place))
        filler.create_database(running.database("postgres"))
        filler.fill(running.database(), rows=ROWS, today=datetime.now(UTC).date())
        os.environ.update(running.variables)
        reference = Path(running.variables["BACKUP_PIPELINE_CONFIG"])
        protected, configuration = stack.enter_context(cluster(reference, folder))
        variables = {**running.variables, "BACKUP_PIPELINE_CONFIG": str(configuration)}
        os.environ.update(variables)
        with running_dagster(folder / "dagster_home", configuration, variables) as box:
            yield box, running, place, protected


def tell(box: DagsterBox, running: servers.Servers, place: Place) -> Story:
    """What an operator's weeks bring, in some minutes."""
    taken = [_backup(box, running, number) for number in range(4)]
    for tier in ("weekly", "monthly"):
        box.wait_for_run(box.launch(f"{tier}_backups"), timeout_s=180)
    catalog.pin(open_protected(load(), DATABASE).store, _newest("monthly").id, at=datetime.now(UTC))
    box.wait_for_run(box.launch("backup_database"), timeout_s=180)
    box.wait_for_run(box.launch("prune_backups", {"dry_run": False}))
    refused = box.launch("restore_database", {"replace": True, "confirm": "agentweav"})
    restored = box.launch("restore_database", {"into": "agentweave_at_three"})
    for run in (refused, restored):
        box.wait_for_run(run, timeout_s=180)
    break_a_byte(place, _newest("weekly"))
    failed = box.launch("verify_restore", {"backup": "weekly"})
    box.wait_for_run(failed, timeout_s=180)
    return Story(taken[-1], refused, restored, failed)


def _backup(box: DagsterBox, running: servers.Servers, number: int) -> str:
    """One more day: the application writes, the backup is taken and proven."""
    with contextlib.closing(connect(running.database(), statement_timeout_s=0)) as session:
        session.execute(
            "INSERT INTO public.settings SELECT 'day ' || %s::text || n, to_jsonb(md5(n::text)), now() "
            "FROM generate_series(1, 20000) AS n",
            [number],
        )
    run = box.launch("daily_backups")
    box.wait_for_run(run, timeout_s=180)
    return run


def _newest(tier: str) -> Backup:
    found = listing(open_protected(load(), DATABASE)).backups
    return next(backup for backup in found if backup.tier == tier)


def break_a_byte(place: Place, backup: Backup) -> None:
    """What a disk does to a dump when nobody looks."""
    objects = backup.manifest.of_role(ObjectRole.DUMP) if backup.manifest else ()
    (path,) = place.objects.rglob(objects[0].key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def pages(story: Story, of_cluster: ClusterStory) -> dict[str, Shot]:
    """The pictures by name."""
    jobs = "/locations/backup_pipeline/jobs"
    proving = f"step%3A{DATABASE}__proven"
    return {
        "overview": Shot("/overview/timeline", "daily_backups"),
        "lineage": Shot(f"/locations/backup_pipeline/asset-groups/{DATABASE}/lineage", "monthly"),
        "asset": Shot(f"/assets/{DATABASE}/daily", "Latest materialization"),
        "plots": Shot(f"/assets/{DATABASE}/daily", "Latest materialization", click="Plots", height=1450),
        "backups": Shot(f"/assets/{DATABASE}/backups", "Show schema", show="Metadata"),
        "check": Shot(f"/assets/{DATABASE}/daily?view=checks&checkDetail=proven", "Evaluation result"),
        "check_failed": Shot(
            f"/assets/{DATABASE}/weekly?view=checks&checkDetail=proven", "Evaluation result"
        ),
        "launchpad": Shot(f"{jobs}/restore_database/playground", "create_roles"),
        "restore": Shot(f"/runs/{story.restored}?logs=step%3Aplan_restore", "STEP_SUCCESS", height=1200),
        "failure": Shot(f"/runs/{story.refused}?logs=type%3ASTEP_FAILURE", "What to do"),
        "proof_failed": Shot(f"/runs/{story.failed}?logs=type%3ASTEP_FAILURE", "What to do"),
        "backup_run": Shot(f"/runs/{story.backup}?logs={proving}", "STEP_SUCCESS", height=1100),
        "automation": Shot("/automation", "prune_every_day"),
        "jobs": Shot("/jobs", "restore_database"),
        **cluster_pages(of_cluster),
    }


def cluster_pages(story: ClusterStory) -> dict[str, Shot]:
    """The pictures of a cluster by name."""
    base, wal = f"/assets/{CLUSTER}/base_backup", f"/assets/{CLUSTER}/wal"
    return {
        "cluster": Shot(f"/locations/backup_pipeline/asset-groups/{CLUSTER}/lineage", "base_backup"),
        "wal": Shot(wal, "Show schema", height=1100),
        "wal_plots": Shot(wal, "Latest materialization", click="Plots", height=1450),
        "base_backup_plots": Shot(base, "Latest materialization", click="Plots", height=1450),
        "drilled": Shot(f"{base}?view=checks&checkDetail=drilled", "Evaluation result"),
        "recover": Shot("/locations/backup_pipeline/jobs/recover_cluster/playground", "exclusive"),
        "recovery_plan": Shot(
            f"/runs/{story.planned}?logs=step%3Aplan_recovery", "STEP_SUCCESS", height=1100
        ),
    }


def shoot(box: DagsterBox, shots: Mapping[str, Shot], folder: Path, only: Sequence[str] = ()) -> None:
    """Take the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page()
        for name, shot in shots.items():
            if not only or name in only:
                _open(page, box.url, shot)
                page.screenshot(path=folder / f"{name}.png")
        browser.close()


def _open(page: Page, url: str, shot: Shot) -> None:
    page.set_viewport_size({"width": WIDTH, "height": shot.height})
    page.goto(url + shot.path)
    page.get_by_text(shot.expected).first.wait_for(timeout=30_000)
    page.wait_for_timeout(2_000)
    if shot.click:
        page.get_by_role("button", name=shot.click).click()
        page.get_by_text("Loading").first.wait_for(state="hidden", timeout=30_000)
    if shot.show:
        page.get_by_text(shot.show, exact=True).first.evaluate("found => found.scrollIntoView()")
    page.wait_for_timeout(1_500)
    page.evaluate(_SHORTEN, str(Path(sys.prefix)))


def main() -> None:
    """Take all pictures."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    with (
        tempfile.TemporaryDirectory(prefix="screenshots-") as folder,
        site(Path(folder)) as (box, running, place, protected),
    ):
        of_cluster = tell_of_cluster(box, protected)
        shoot(box, pages(tell(box, running, place), of_cluster), target)


if __name__ == "__main__":
    main()
