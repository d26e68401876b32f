"""The whole of it, as in production: code server, webserver, daemon; PostgreSQL; an S3 server.

One story after another on one Dagster: a schedule's tick ends in a proven backup and a pruned list, a
restore is launched as from the UI, a refusal says what to do, a run that is terminated leaves nothing.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline_tests.e2e.dagster_box import CHECKOUT, DagsterBox, Event, Run
from backup_pipeline_tests.servers.postgres import fresh_database
from backup_pipeline_tests.servers.s3 import S3Server
from backup_pipeline_tests.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

EVERY_MINUTE = "cron_x_x_x_x_x"
BIG_MB = 400
TABLES = """
[defaults]
bin_dir = "{bin_dir}"
restore_dsn = "{restore_dsn}"

[databases.shop]
dsn = "{shop}"
owner = "team:shop"

[databases.shop.tiers.often]
cron = "* * * * *"
keep = 2

[databases.shop.tiers.also-often]
cron = "* * * * *"
keep = 2

[databases.big]
dsn = "{big}"
prove = "0 4 29 2 *"

[databases.big.tiers.leap]
cron = "0 2 29 2 *"
keep = 2
"""


@dataclass(frozen=True)
class Site:
    """What the stories happen on."""

    dagster: DagsterBox
    s3: S3Server
    cluster: LocalCluster
    shop: Endpoint
    big: Endpoint

    def objects(self, database: str) -> list[str]:
        """The keys of a database's objects and manifests."""
        listed = self.s3.client().list_objects_v2(Bucket=self.s3.bucket)
        return [item["Key"] for item in listed.get("Contents", []) if f"/{database}/" in item["Key"]]


@pytest.fixture(scope="module")
def site(
    postgres: LocalCluster,
    s3: S3Server,
    dagster_with: Callable[[str], AbstractContextManager[DagsterBox]],
) -> Iterator[Site]:
    with fresh_database(postgres) as shop, fresh_database(postgres) as big:
        fill(
            shop,
            "CREATE TABLE public.orders AS "
            "SELECT n AS id, 'item ' || n AS item FROM generate_series(1, 5000) AS n",
        )
        tables = TABLES.format(
            bin_dir=postgres.bin_dir, restore_dsn=postgres.endpoint().dsn, shop=shop.dsn, big=big.dsn
        )
        with dagster_with(tables) as dagster:
            yield Site(dagster, s3, postgres, shop, big)


def fill(endpoint: Endpoint, *statements: str) -> None:
    with contextlib.closing(connect(endpoint, statement_timeout_s=0)) as session:
        for statement in statements:
            session.execute(statement.encode())


@pytest.fixture(scope="module")
def tick(site: Site) -> list[Run]:
    """The ended runs of the first tick of both tiers, in the order in which they ran."""
    dagster = site.dagster
    seen = dagster.wait(lambda: dagster.runs(database="shop") or None, "the first tick")
    first = min(run.tags["backup/scheduled_for"] for run in seen)
    runs = dagster.wait(
        lambda: due if len(due := dagster.runs(database="shop", scheduled_for=first)) == 2 else None,
        "both tiers' runs",
    )
    for tier in ("often", "also_often"):  # not before: a schedule that is stopped drops its due tick
        dagster.stop_schedule(f"{tier}_{EVERY_MINUTE}")
    return [dagster.wait_for_run(run.id) for run in reversed(runs)]


def materialized(events: list[Event]) -> dict[str, Event]:
    """The materialization of each asset of a run, by its step."""
    return {event.step: event for event in events if event.kind == "MaterializationEvent"}


def test_a_tick_ends_in_a_proven_backup_and_a_pruned_list(site: Site, tick: list[Run]) -> None:
    assert [run.status for run in tick] == ["SUCCESS", "SUCCESS"]
    assert {run.tags["backup/tier"] for run in tick} == {"often", "also-often"}
    for run in tick:
        tier = run.tags["backup/tier"]
        assert run.job == f"{tier.replace('-', '_')}_backups"
        assert (run.tags["backup/action"], run.tags["backup/database"]) == ("backup", "shop")
        (check,) = site.dagster.checks("shop", tier)
        assert check["executionForLatestMaterialization"]["status"] == "SUCCEEDED"
        assert check["canExecuteIndividually"] == "CAN_EXECUTE"
        assert check["blocking"]


def test_two_tiers_of_one_tick_share_one_dump(site: Site, tick: list[Run]) -> None:
    first, second = (materialized(site.dagster.events(run.id)) for run in tick)
    taken = next(event for step, event in first.items() if step.endswith(".publish"))
    copied = next(event for step, event in second.items() if step.endswith(".publish"))
    assert taken.metadata["copied_from"] == "-"
    assert copied.metadata["copied_from"] == taken.metadata["backup_id"]
    assert isinstance(taken.metadata["size_bytes"], int)
    assert isinstance(taken.metadata["throughput_mib_s"], float)


def test_the_list_shows_what_the_store_holds(site: Site, tick: list[Run]) -> None:
    listed = materialized(site.dagster.events(tick[1].id))["shop__backups"]
    assert (listed.metadata["count"], listed.metadata["proven"]) == (2, 2)
    assert len(listed.metadata["backups"]["records"]) == 2
    manifests = [key for key in site.objects("shop") if "/catalog/" in key and ".verdict." not in key]
    assert len(manifests) == 2


@pytest.mark.filterwarnings("ignore:Using variable_values:DeprecationWarning")  # dagster_graphql's own
def test_a_restore_as_from_the_launchpad(site: Site, tick: list[Run]) -> None:
    from dagster_graphql import DagsterGraphQLClient

    host, port = site.dagster.url.removeprefix("http://").split(":")
    client = DagsterGraphQLClient(host, port_number=int(port))
    form = {"database": "shop", "into": "shop_at_three"}
    run_id = client.submit_job_execution("restore_database", run_config=form)
    assert site.dagster.wait_for_run(run_id).status == "SUCCESS"
    with contextlib.closing(connect(site.cluster.endpoint("shop_at_three"))) as session:
        assert session.execute("SELECT count(*) FROM public.orders").fetchone() == (5000,)
    events = site.dagster.events(run_id)
    plan = next(event for event in events if event.step == "plan_restore" and "plan" in event.metadata)
    first_said = next(event for event in events if event.kind == "LogMessageEvent")
    assert first_said.step == "plan_restore"
    assert first_said.message == plan.metadata["plan"].splitlines()[0]
    fill(site.cluster.endpoint(), "DROP DATABASE shop_at_three")


def test_a_refusal_says_what_to_do_and_touches_nothing(site: Site, tick: list[Run]) -> None:
    form = {"database": "shop", "replace": True, "confirm": "shopp"}
    run_id = site.dagster.launch("restore_database", form)
    assert site.dagster.wait_for_run(run_id).status == "FAILURE"
    assert "What to do: " in site.dagster.failure(run_id)
    started = {event.step for event in site.dagster.events(run_id) if event.kind == "ExecutionStepStartEvent"}
    assert started == {"plan_restore"}


def test_a_wrong_name_does_not_even_start_a_run(site: Site) -> None:
    with pytest.raises(AssertionError, match="RunConfigValidationInvalid"):
        site.dagster.launch("restore_database", {"database": "shopp"})


def test_execute_on_the_check_s_page_proves_again(site: Site, tick: list[Run]) -> None:
    run_id = site.dagster.launch("__ASSET_JOB", checks=[(["shop", "often"], "proven")])
    run = site.dagster.wait_for_run(run_id)
    assert run.status == "SUCCESS"
    assert run.tags["backup/action"] == "prove"
    assert not materialized(site.dagster.events(run_id))


def test_a_scheduled_run_that_a_person_starts_again_takes_a_new_backup(site: Site, tick: list[Run]) -> None:
    again = site.dagster.wait_for_run(site.dagster.launch_again(tick[0].id))
    assert again.status == "SUCCESS"
    taken = materialized(site.dagster.events(again.id))
    published = next(event for step, event in taken.items() if step.endswith(".publish"))
    assert published.metadata["copied_from"] == "-"
    assert again.tags["backup/scheduled_for"] == ""


def test_nothing_that_dagster_keeps_holds_a_secret(site: Site, tick: list[Run]) -> None:
    for path in site.dagster.home.rglob("*"):
        if path.is_file():
            assert site.s3.secret_access_key.encode() not in path.read_bytes(), path


def children_of(database: str) -> list[int]:
    """The processes of pg_dump that read this database now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            argv = (path.parent / "cmdline").read_bytes().split(b"\0")
            if argv[0].endswith(b"pg_dump") and database.encode() in path.read_bytes() + b" ".join(argv):
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def noise(site: Site) -> None:
    """Enough in the database `big` for a dump of it to be met while it runs."""
    noise = f"SELECT n, public.gen_random_bytes(1000) AS noise FROM generate_series(1, {BIG_MB * 125}) AS n"
    fill(
        site.big, "CREATE EXTENSION pgcrypto SCHEMA public", f"CREATE UNLOGGED TABLE public.noise AS {noise}"
    )


def test_a_terminated_run_leaves_nothing_behind(site: Site, noise: None) -> None:
    run_id = site.dagster.launch("leap_backups", assets=[["big", "leap"]], checks=[])
    site.dagster.wait(lambda: children_of(site.big.database) or None, "pg_dump to start")
    site.dagster.terminate(run_id)
    run = site.dagster.wait_for_run(run_id)
    assert run.status == "CANCELED"
    wait_until(lambda: children_of(site.big.database) == [], within_s=10)
    assert site.objects("big") == []


def parent_of(pid: int) -> int:
    """The process that started this one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_a_backup(site: Site) -> str:
    """A run of a backup whose process was killed, once Dagster has found out."""
    dagster = site.dagster
    run_id = dagster.launch("leap_backups", assets=[["big", "leap"]], checks=[])
    (dump,) = dagster.wait(lambda: children_of(site.big.database) or None, "pg_dump to start")
    os.kill(parent_of(dump), signal.SIGKILL)
    assert dagster.wait_for_run(run_id).status == "FAILURE"
    return run_id


def started_again(dagster: DagsterBox, run_id: str) -> str:
    """The run that the daemon has started instead; "" when it has passed over the failure.

    Dagster stores a failure first and the run's status next; a daemon that looks between the two takes
    the run for a living one, and does not look again.
    """

    def look() -> str | None:
        done = dagster.failures_handled(run_id)
        again = dagster.run(run_id).tags.get("dagster/auto_retry_run_id")
        return again or ("" if done else None)

    return dagster.wait(look, "the daemon to handle the failure")


def test_a_backup_whose_process_is_killed_starts_again_from_its_first_step(site: Site, noise: None) -> None:
    dagster = site.dagster
    tries = ((run_id, started_again(dagster, run_id)) for run_id in (kill_a_backup(site) for _ in range(3)))
    run_id, again = next(pair for pair in tries if pair[1])
    assert dagster.wait_for_run(again).status == "SUCCESS"
    assert "big__leap.publish" in materialized(dagster.events(again))
    by_hand = dagster.wait_for_run(dagster.launch_again(run_id, "FROM_FAILURE"))
    assert by_hand.status == "FAILURE"
    assert "“Re-execute all”" in dagster.failure(by_hand.id)


@pytest.mark.parametrize("argv", [["check", "defs"], ["list", "defs"]])
def test_dg_reads_the_project(site: Site, argv: list[str]) -> None:
    environment = {**os.environ, "BACKUP_PIPELINE_CONFIG": str(site.dagster.home.parent / "backups.toml")}
    dg = Path(sys.executable).parent / "dg"
    done = subprocess.run(
        [dg, *argv], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if argv[0] == "list":
        assert "shop/often" in done.stdout.replace("\n", "")
