"""The definitions: what exists, under which names, with which words; and that nothing secret is in them."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest

from backup_pipeline import definitions as door
from backup_pipeline.errors import ConfigError
from backup_pipeline.orchestration.assets import freshness
from backup_pipeline.orchestration.build import definitions_of
from backup_pipeline.orchestration.jobs import tier_job_name
from backup_pipeline_tests.orchestration.configurations import ACCEPTED, TWO, configuration

SECRET = "geheim-4711"
TITLES = {
    "agentweave/daily": "Daily backup of agentweave, taken at 02:00 every day (UTC); the newest 7 are kept.",
    "archive/weekly": "Weekly backup of archive, taken at 02:00 on Sunday (UTC); the newest 4 are kept.",
    "shop-eu/yearly": "Yearly backup of shop-eu, taken at 05:00 on January 1 (UTC); the newest 3 are kept.",
    "shop-eu/backups": "All backups of shop-eu in the store, once the retention has been applied.",
}


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return definitions_of(configuration())


@pytest.fixture(scope="module")
def specs(definitions: dg.Definitions) -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}


def test_the_definitions_load(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_dagster_loads_whatever_the_configuration_accepts(text: str) -> None:
    config = configuration(text)
    loaded = definitions_of(config)
    dg.Definitions.validate_loadable(loaded)
    for database in config.databases.values():
        for tier in database.tiers:
            job = loaded.resolve_job_def(tier_job_name(tier.name))
            assert dg.AssetKey([database.name, tier.name]) in job.asset_layer.selected_asset_keys


def test_each_tier_is_an_asset_and_each_database_has_its_list(specs: dict[str, dg.AssetSpec]) -> None:
    assert set(specs) == {
        *(f"agentweave/{name}" for name in ("daily", "weekly", "monthly", "backups")),
        *(f"shop-eu/{name}" for name in ("daily", "yearly", "backups")),
        *(f"archive/{name}" for name in ("daily", "weekly", "monthly", "backups")),
    }


def test_the_list_follows_all_tiers(specs: dict[str, dg.AssetSpec]) -> None:
    deps = {dep.asset_key.to_user_string() for dep in specs["shop-eu/backups"].deps}
    assert deps == {"shop-eu/daily", "shop-eu/yearly"}


def test_assets_are_grouped_owned_and_drawn(specs: dict[str, dg.AssetSpec]) -> None:
    assert specs["shop-eu/daily"].group_name == "shop_eu"
    assert specs["shop-eu/daily"].kinds == {"postgres", "s3"}
    assert specs["shop-eu/backups"].kinds == {"table", "s3"}
    owners = {name: list(specs[f"{name}/daily"].owners) for name in ("agentweave", "shop-eu", "archive")}
    assert owners == {"agentweave": ["team:platform"], "shop-eu": ["shop@example.net"], "archive": []}


@pytest.mark.parametrize(("key", "title"), TITLES.items())
def test_the_first_line_of_a_description_is_plain(
    specs: dict[str, dg.AssetSpec], key: str, title: str
) -> None:
    description = specs[key].description or ""
    assert description.splitlines()[0] == title
    assert not set(title) & set("*`#[]|")


@pytest.mark.parametrize(
    ("cron", "warn", "fail"),
    [
        ("0 2 * * *", timedelta(hours=26), timedelta(hours=30)),
        ("0 2 * * 0", timedelta(days=7, hours=14), timedelta(days=8, hours=18)),
        ("0 2 1 * *", timedelta(days=33, hours=14), timedelta(days=38, hours=18)),
    ],
)
def test_a_tier_is_overdue_in_proportion_to_its_cron(cron: str, warn: timedelta, fail: timedelta) -> None:
    config = configuration(TWO.replace('cron = "0 2 * * *"', f'cron = "{cron}"'))
    policy = freshness(config.database("shop-eu").tier("daily").cron)
    assert policy == dg.FreshnessPolicy.time_window(fail_window=fail, warn_window=warn)


def test_every_tier_has_that_badge(specs: dict[str, dg.AssetSpec]) -> None:
    assert {key for key, spec in specs.items() if spec.freshness_policy is None} == {
        "agentweave/backups",
        "shop-eu/backups",
        "archive/backups",
    }


def test_every_tier_has_a_blocking_proof_of_its_own(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    assert {f"{key.asset_key.to_user_string()}:{key.name}" for key in graph.asset_check_keys} == {
        *(f"agentweave/{name}:proven" for name in ("daily", "weekly", "monthly")),
        *(f"shop-eu/{name}:proven" for name in ("daily", "yearly")),
        *(f"archive/{name}:proven" for name in ("daily", "weekly", "monthly")),
    }
    assert all(graph.get_check_spec(key).blocking for key in graph.asset_check_keys)


def test_jobs_have_the_names_that_people_look_for(definitions: dg.Definitions) -> None:
    jobs = {job.name for job in definitions.resolve_all_job_defs() if not job.name.startswith("__")}
    tiers = {f"{tier}_backups" for tier in ("daily", "weekly", "monthly", "yearly")}
    forms = {"backup_database", "restore_database", "undo_restore", "verify_restore", "prune_backups"}
    assert jobs == {*tiers, *forms}


def test_only_backups_start_again_when_their_process_died(definitions: dg.Definitions) -> None:
    tags = {job.name: job.run_tags for job in definitions.resolve_all_job_defs()}
    again = {name for name, tag in tags.items() if tag.get("dagster/max_retries") == "2"}
    assert again == {f"{tier}_backups" for tier in ("daily", "weekly", "monthly", "yearly")}
    assert {tags[name]["dagster/retry_strategy"] for name in again} == {"ALL_STEPS"}
    assert tags["restore_database"]["dagster/max_retries"] == "0"


@pytest.mark.filterwarnings("ignore:.*environment_vars:DeprecationWarning")  # Dagster's own, of itself
def test_no_secret_reaches_definitions_or_run_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text(SECRET, encoding="utf-8")
    text = TWO.replace('{ env = "BACKUP_DB_PASSWORD" }', f'{{ file = "{tmp_path}/password" }}')
    monkeypatch.setenv("BACKUP_S3_SECRET", SECRET)
    definitions = definitions_of(configuration(text))
    from dagster._core.remote_representation.external_data import RepositorySnap

    shown = dg.serialize_value(RepositorySnap.from_def(definitions.get_repository_def()))
    assert "restore_database" in shown
    assert SECRET not in shown


def test_importing_the_door_reads_nothing() -> None:
    program = "import sys, backup_pipeline.definitions; sys.exit('backup_pipeline.config' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd="/", check=False, timeout=60)
    assert done.returncode == 0


def test_a_broken_configuration_is_told_by_file_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "backups.toml"
    path.write_text(TWO.replace("keep = 14", "keeep = 14"), encoding="utf-8")
    monkeypatch.setenv("BACKUP_PIPELINE_CONFIG", str(path))
    with pytest.raises(ConfigError) as raised:
        door.defs()
    assert str(raised.value) == (
        f"{path}: databases.shop-eu.tiers.daily.keeep: unknown key\nHINT: Did you mean keep?"
    )


def test_no_database_is_an_error_too() -> None:
    with pytest.raises(ConfigError, match="no database is configured"):
        definitions_of(configuration('[store]\nurl = "s3://backups"\n'))
