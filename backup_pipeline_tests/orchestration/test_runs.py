"""Whole runs in this process: real PostgreSQL, a real directory as store, a real Dagster instance."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from backup_pipeline.actions.backups import listing
from backup_pipeline.actions.protected import open_protected
from backup_pipeline.config import Config
from backup_pipeline.domain.backup import Backup, ObjectRole, Verdict
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.orchestration.build import definitions_of
from backup_pipeline.orchestration.checks import check_key
from backup_pipeline_tests.orchestration.configurations import configuration

DAILY = dg.AssetKey(["shop", "daily"])
LIST = dg.AssetKey(["shop", "backups"])
LATER = '"0 4 * * 6"'
TEXT = """
[store]
url = "file://{store}"

[databases.shop]
dsn = "{dsn}"
restore_dsn = "{restore_dsn}"
prove = {prove}
bin_dir = "{bin_dir}"

[databases.shop.tiers.daily]
cron = "0 2 * * *"
keep = 2

[databases.shop.tiers.weekly]
cron = "0 2 * * 0"
keep = 2
"""


class Box:
    """A configuration on disk, its definitions and an instance to run them in."""

    def __init__(self, config: Config, instance: dg.DagsterInstance) -> None:
        self.config = config
        self.instance = instance
        self.definitions = definitions_of(config)

    def backup(
        self, tier: str = "daily", *, scheduled_for: str = "", **tags: str
    ) -> dg.ExecuteInProcessResult:
        """What a schedule's run does; `tags` are Dagster's."""
        tags = {f"dagster/{name}": value for name, value in tags.items()}
        if scheduled_for:
            tags["backup/scheduled_for"] = scheduled_for
        return self.definitions.resolve_job_def(f"{tier}_backups").execute_in_process(
            instance=self.instance, tags=tags, raise_on_error=False
        )

    def form(self, job: str, **form: object) -> dg.ExecuteInProcessResult:
        """What a launch from the Launchpad does."""
        return self.definitions.resolve_job_def(job).execute_in_process(
            instance=self.instance, run_config={"database": "shop", **form}, raise_on_error=False
        )

    def backups(self) -> tuple[Backup, ...]:
        """What exists in the store, newest first."""
        return listing(open_protected(self.config, "shop")).backups

    def check(self) -> dg.AssetCheckEvaluation:
        """What the check of the daily asset shows now."""
        key = check_key("shop", "daily")
        record = self.instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
        assert record.evaluation is not None
        return record.evaluation

    def tags(self, result: dg.ExecuteInProcessResult) -> dict[str, str]:
        """The audit that a run left behind."""
        run = self.instance.get_run_by_id(result.run_id)
        assert run is not None
        return {name[7:]: value for name, value in run.tags.items() if name.startswith("backup/")}


@pytest.fixture
def make(postgres: LocalCluster, database: Endpoint, tmp_path: Path) -> Iterator["MakeBox"]:
    with contextlib.closing(connect(database)) as session:
        session.execute("CREATE TABLE public.orders (id bigint PRIMARY KEY, item text NOT NULL)")
        session.execute("INSERT INTO public.orders SELECT n, 'item ' || n FROM generate_series(1, 1000) AS n")
    with dg.instance_for_test() as instance:
        yield MakeBox(postgres, database, tmp_path, instance)


class MakeBox:
    """Writes the configuration of one test."""

    def __init__(
        self, cluster: LocalCluster, database: Endpoint, folder: Path, instance: dg.DagsterInstance
    ) -> None:
        self.cluster, self.database, self.folder, self.instance = cluster, database, folder, instance

    def __call__(self, prove: str = '"always"') -> Box:
        store = self.folder / "store"
        store.mkdir(exist_ok=True)
        text = TEXT.format(
            store=store,
            dsn=self.database.dsn,
            restore_dsn=self.cluster.endpoint().dsn,
            prove=prove,
            bin_dir=self.cluster.bin_dir,
        )
        path = self.folder / "backups.toml"
        path.write_text(text, encoding="utf-8")
        return Box(configuration(text, path), self.instance)


def steps(result: dg.ExecuteInProcessResult) -> list[str]:
    return [str(event.step_key) for event in result.all_events if event.is_step_success]


def failure(result: dg.ExecuteInProcessResult, step: str) -> str:
    data = result.failure_data_for_node(step)
    assert data is not None
    assert data.user_failure_data is not None
    return data.user_failure_data.description or ""


def test_a_backup_is_taken_proven_and_listed_in_one_run(make: MakeBox) -> None:
    box = make()
    result = box.backup(scheduled_for="2026-03-01T02:00:00+00:00")
    assert result.success
    assert steps(result) == [
        "shop__daily.preflight",
        "shop__daily.dump_and_upload",
        "shop__daily.publish",
        "shop__proven",
        "shop__backups",
    ]
    (backup,) = box.backups()
    assert (backup.tier, backup.verdict) == ("daily", Verdict.PROVEN)
    assert box.tags(result) == {
        "action": "backup",
        "database": "shop",
        "queue": "shop",
        "tier": "daily",
        "id": str(backup.id),
        "scheduled_for": "2026-03-01T02:00:00+00:00",
    }


def test_what_was_taken_is_shown_in_numbers_and_words(make: MakeBox) -> None:
    box = make()
    result = box.backup()
    (backup,) = box.backups()
    (taken,) = result.asset_materializations_for_node("shop__daily")
    shown = {label: value.value for label, value in taken.metadata.items()}
    assert shown["backup_id"] == str(backup.id)
    assert shown["size_bytes"] == backup.size_bytes
    assert {"duration_s", "throughput_mib_s", "compression_ratio"} < set(shown)
    (listed,) = result.asset_materializations_for_node("shop__backups")
    assert (listed.metadata["count"].value, listed.metadata["proven"].value) == (1, 1)
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.passed
    assert evaluation.metadata["restore_s"].value > 0  # type: ignore[operator]


def test_tiers_due_together_share_one_dump(make: MakeBox) -> None:
    box = make(LATER)
    assert box.backup("daily", scheduled_for="2026-03-01T02:00:00+00:00").success
    assert box.backup("weekly", scheduled_for="2026-03-01T02:00:00+00:00").success
    weekly, daily = sorted(box.backups(), key=lambda item: item.tier, reverse=True)
    assert weekly.manifest is not None
    assert weekly.manifest.copied_from == daily.id


@pytest.mark.parametrize(("retry", "shares"), [({}, False), ({"retry_number": "1"}, True)])
def test_only_a_person_s_second_start_is_a_backup_of_now(
    make: MakeBox, retry: dict[str, str], shares: bool
) -> None:
    box, tick = make(LATER), "2026-03-01T02:00:00+00:00"
    first = box.backup("daily", scheduled_for=tick)
    assert first.success
    again = {"parent_run_id": first.run_id, "root_run_id": first.run_id, **retry}
    assert box.backup("weekly", scheduled_for=tick, **again).success
    (weekly,) = (backup.manifest for backup in box.backups() if backup.tier == "weekly")
    assert weekly is not None
    assert (weekly.copied_from is not None) is shares
    assert (weekly.scheduled_for is not None) is shares


def test_what_the_retention_gives_up_goes_in_the_same_run(make: MakeBox) -> None:
    box = make(LATER)
    assert all(box.backup().success for _ in range(3))
    assert len(box.backups()) == 2


def break_what_is_published(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    """From now on, one byte of each dump changes as soon as it is published."""
    from backup_pipeline.actions import dump

    publish = dump.publish

    def publish_and_break(*arguments: object, **named: object) -> Backup:
        backup = publish(*arguments, **named)  # type: ignore[arg-type]
        assert backup.manifest is not None
        path = store / backup.manifest.of_role(ObjectRole.DUMP)[0].key
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)
        return backup

    monkeypatch.setattr(dump, "publish", publish_and_break)


def test_a_failed_proof_is_red_and_nothing_is_pruned_in_its_run(
    make: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = make()
    assert box.backup().success
    assert box.backup().success
    break_what_is_published(monkeypatch, make.folder / "store")
    result = box.backup()
    assert not result.success
    (evaluation,) = result.get_asset_check_evaluations()
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.ERROR
    assert "FAILED its proof" in (evaluation.description or "")
    assert "shop__backups" not in steps(result)
    assert failure(result, "shop__proven").splitlines() == [
        evaluation.description,
        "What to do: Take a new backup now: launch backup_database. Nothing was pruned in this run.",
    ]
    assert [backup.verdict for backup in box.backups()] == [Verdict.FAILED, Verdict.PROVEN, Verdict.PROVEN]


def test_a_proof_left_for_later_is_neither_green_nor_red(make: MakeBox) -> None:
    box = make('{ up_to = "1kB", cron = "0 4 * * 6" }')
    result = box.backup()
    assert result.success
    assert result.get_asset_check_evaluations() == []
    assert "shop__backups" in steps(result)
    assert [backup.verdict for backup in box.backups()] == [Verdict.NONE]


def test_a_proof_by_hand_shows_on_the_asset(make: MakeBox) -> None:
    box = make(LATER)
    box.backup()
    result = box.form("verify_restore")
    assert result.success
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.asset_key == DAILY
    assert evaluation.passed
    assert box.backups()[0].verdict is Verdict.PROVEN


def test_an_older_proof_by_hand_leaves_the_failed_newest_red(
    make: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = make()
    assert box.backup().success
    break_what_is_published(monkeypatch, make.folder / "store")
    assert not box.backup().success
    newest, older = box.backups()
    for wanted in ("proven", older.id.stamp):
        result = box.form("verify_restore", backup=wanted)
        assert result.success
        assert result.get_asset_check_evaluations() == []
    assert not box.check().passed
    assert (box.check().description or "").startswith(f"{newest.id} (daily) FAILED its proof")


def test_an_older_failure_by_hand_leaves_the_proven_newest_green(make: MakeBox) -> None:
    box = make(LATER)
    with pytest.MonkeyPatch.context() as breaking:
        break_what_is_published(breaking, make.folder / "store")
        assert box.backup().success
    assert box.backup().success
    newest, older = box.backups()
    assert box.form("verify_restore").success
    assert not box.form("verify_restore", backup=older.id.stamp).success
    assert box.check().passed
    assert (box.check().description or "").startswith(f"{newest.id} (daily) restored")


def test_a_backup_by_hand_expires_by_itself(make: MakeBox) -> None:
    box = make()
    result = box.form("backup_database")
    assert result.success
    (backup,) = box.backups()
    assert (backup.tier, backup.verdict) == ("manual", Verdict.PROVEN)
    assert backup.expires_at is not None
    assert box.tags(result)["tier"] == "manual"
    (listed,) = result.asset_materializations_for_node("prove_if_wanted")
    assert listed.asset_key == LIST


def test_a_backup_by_hand_that_is_not_proven_needs_no_secret_of_a_proof(make: MakeBox) -> None:
    path = make().config.path
    scratch = '[scratch]\ndsn = "host=h dbname=x"\npassword = { env = "SET_NOWHERE" }\n'
    text = path.read_text(encoding="utf-8") + scratch
    path.write_text(text, encoding="utf-8")
    box = Box(configuration(text, path), make.instance)
    assert "SET_NOWHERE" in failure(box.form("backup_database"), "preflight")
    assert box.form("backup_database", prove=False).success


def test_a_tier_s_newest_is_proven_by_the_tier_s_name(make: MakeBox) -> None:
    box = make(LATER)
    assert box.backup("weekly").success
    assert box.backup("daily").success
    assert box.form("verify_restore", backup="weekly").success
    assert {backup.tier: backup.verdict for backup in box.backups()} == {
        "daily": Verdict.NONE,
        "weekly": Verdict.PROVEN,
    }


def test_a_restore_shows_its_plan_and_makes_a_new_database(make: MakeBox) -> None:
    box = make()
    box.backup()
    result = box.form("restore_database", into=f"{make.database.database}_copy")
    assert result.success
    with contextlib.closing(connect(make.cluster.endpoint(f"{make.database.database}_copy"))) as session:
        assert session.execute("SELECT count(*) FROM public.orders").fetchone() == (1000,)
    with contextlib.closing(connect(make.cluster.endpoint())) as session:
        session.execute(f'DROP DATABASE "{make.database.database}_copy"'.encode())


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"backup": "20200101T000000Z-none"}, "no backup"),
        ({"backup": "latest", "replace": True, "confirm": "shop!"}, "confirm"),
    ],
)
def test_a_restore_is_refused_in_its_first_step(make: MakeBox, form: dict[str, object], said: str) -> None:
    box = make(LATER)
    box.backup()
    result = box.form("restore_database", **form)
    assert not result.success
    assert steps(result) == []
    assert said in failure(result, "plan_restore")
    assert "What to do: " in failure(result, "plan_restore")


def test_a_prune_only_looks_unless_it_is_told_otherwise(make: MakeBox) -> None:
    box = make(LATER)
    for _ in range(3):
        job = box.definitions.resolve_job_def("daily_backups")
        assert job.execute_in_process(instance=box.instance, asset_selection=[DAILY]).success
    assert box.form("prune_backups").success
    assert len(box.backups()) == 3
    result = box.form("prune_backups", dry_run=False)
    assert result.success
    assert len(box.backups()) == 2
    (listed,) = result.asset_materializations_for_node("carry_out_prune")
    assert (listed.asset_key, listed.metadata["count"].value) == (LIST, 2)


def test_a_swap_is_undone_once_the_name_is_typed(make: MakeBox) -> None:
    box, name = make(LATER), make.database.database
    box.backup()
    swapped = box.form("restore_database", backup="latest", replace=True, confirm=name)
    assert swapped.success
    assert box.tags(swapped)["id"] == str(box.backups()[0].id)
    refused = box.form("undo_restore", confirm="shop")
    assert not refused.success
    assert steps(refused) == []
    assert "is not confirmed: found 'shop'" in failure(refused, "plan_undo")
    undone = box.form("undo_restore", confirm=name)
    assert undone.success
    with contextlib.closing(connect(make.cluster.endpoint())) as session:
        extra = session.execute("SELECT datname FROM pg_database WHERE datname LIKE %s", [f"{name}_%"])
        (kept,) = [str(row[0]) for row in extra]
        assert "_undone_" in kept
        session.execute(f'DROP DATABASE "{kept}"'.encode())
