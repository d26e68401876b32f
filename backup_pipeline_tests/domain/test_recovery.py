"""Which restores are planned, and which are refused, with every reason and its cure."""

from dataclasses import replace
from datetime import timedelta

import pytest

from backup_pipeline.domain.backup import Backup, CatalogListing, Verdict
from backup_pipeline.domain.recovery import RestorePlan, RestoreRequest, TargetFacts, plan_restore
from backup_pipeline.errors import BackupNotFound, Refused
from backup_pipeline_tests.domain import values

TAKEN = values.NOW - timedelta(hours=10)
PROVEN = values.backup(at=TAKEN, verdict=Verdict.PROVEN)
FACTS = TargetFacts(
    server="db.example:5432",
    server_version=170010,
    server_version_text="17.10",
    client_version=170010,
    client_version_text="17.10",
    databases=("app", "postgres"),
    need_bytes=6 * 10**6,
    free_bytes=10**9,
    sessions=3,
)


def plan(
    request: RestoreRequest | None = None, facts: TargetFacts = FACTS, backup: Backup = PROVEN
) -> RestorePlan:
    return plan_restore(CatalogListing((backup,)), request or RestoreRequest(), facts, now=values.NOW)


def refusal(
    request: RestoreRequest | None = None, facts: TargetFacts = FACTS, backup: Backup = PROVEN
) -> Refused:
    with pytest.raises(Refused) as caught:
        plan(request, facts, backup)
    return caught.value


def test_the_defaults_restore_the_newest_proven_into_a_new_database() -> None:
    made = plan()
    assert made.backup == PROVEN
    assert made.target == "app_restored_20260310t020000z"
    assert not made.kept_name
    assert made.lines == (
        "backup: app/20260310T020000Z-3f9a1c, daily, 80 B, taken 10 h 0 min ago",
        "verdict: proven at 2026-03-10T12:00:00Z by drill-1, 0.1.0",
        "from: app on PostgreSQL 17.10",
        "into: a new database on db.example:5432 (17.10)",
        "then: it is named app_restored_20260310t020000z; no database that exists is touched",
        "space: 5.7 MiB needed, 953.7 MiB are free",
        "time: 12.5 s, as its proof measured",
        "note: the unlogged table public.cache comes back empty",
    )


def test_a_new_name_is_free_and_fits() -> None:
    taken = replace(FACTS, databases=("app", "app_restored_20260310t020000z"))
    assert plan(facts=taken).target == "app_restored_20260310t020000z_2"
    long = plan(facts=replace(FACTS, live="é" * 31)).target
    assert len(long.encode()) <= 63
    assert long.endswith("_restored_20260310t020000z")
    assert long != plan(facts=replace(FACTS, live="é" * 30 + "e")).target


def test_nothing_proven_is_refused_unless_named() -> None:
    unproven = values.backup(at=TAKEN)
    with pytest.raises(BackupNotFound):
        plan(backup=unproven)
    made = plan(RestoreRequest(backup=str(unproven.id)), backup=unproven)
    assert any("never compared" in warning for warning in made.warnings)


def test_what_failed_is_refused_unless_accepted() -> None:
    failed = values.backup(at=TAKEN, verdict=Verdict.FAILED)
    request = RestoreRequest(backup="latest")
    assert "10 rows instead of 12" in refusal(request, backup=failed).message
    assert "10 rows instead of 12" in plan(replace(request, accept_failed=True), backup=failed).warnings[0]


def test_a_database_that_exists_is_replaced_only_when_its_name_is_typed() -> None:
    found = refusal(RestoreRequest(into="app"))
    assert "app exists on db.example:5432" in found.message
    for confirm in ("", "App", "app "):
        assert "not confirmed" in refusal(RestoreRequest(replace=True, confirm=confirm)).message
    made = plan(RestoreRequest(replace=True, confirm="app"))
    assert made.target == "app"
    assert made.kept_name == "app_before_<time>"
    assert "app becomes app_before_<time>, which stays" in "\n".join(made.lines)
    assert "3 sessions to be ended" in "\n".join(made.lines)


def test_replacing_what_is_gone_is_a_plain_restore() -> None:
    made = plan(RestoreRequest(replace=True), facts=replace(FACTS, databases=("postgres",)))
    assert (made.target, made.kept_name) == ("app", "")


@pytest.mark.parametrize(
    "name", ["postgres", "template1", "x" * 64, "é" * 32, "a\0b", "app.restoring-0badcafe"]
)
def test_names_that_cannot_be(name: str) -> None:
    assert refusal(RestoreRequest(into=name, replace=True, confirm=name)).hint


@pytest.mark.parametrize(
    ("change", "problem", "fix"),
    [
        (
            {"server_version": 160014, "server_version_text": "16.14"},
            "the target 16.14",
            "PostgreSQL 17 or newer",
        ),
        (
            {"client_version": 160014, "client_version_text": "16.14"},
            "pg_restore is 16.14",
            "PostgreSQL 17 or newer",
        ),
        (
            {"missing_roles": ("app_owner", "reporting")},
            "roles are missing on db.example:5432: app_owner, reporting",
            "--create-roles",
        ),
        (
            {"missing_extensions": ("pgcrypto",)},
            "extensions are not installed on db.example:5432: pgcrypto",
            "Install",
        ),
        ({"free_bytes": 5_999_999}, "5.7 MiB are needed on db.example:5432, 5.7 MiB are free", "Make room"),
        ({"may_create": False}, "may not create databases", "CREATEDB"),
        ({"problems": (("the client is too old", "Upgrade it."),)}, "the client is too old", "Upgrade it."),
    ],
)
def test_a_target_that_does_not_fit_is_refused_with_the_cure(
    change: dict[str, object], problem: str, fix: str
) -> None:
    found = refusal(facts=TargetFacts(**{**vars(FACTS), **change}))
    assert problem in found.message
    assert fix in found.hint


def test_a_backup_of_something_else_is_refused() -> None:
    assert PROVEN.manifest is not None
    other = replace(PROVEN, manifest=replace(PROVEN.manifest, engine="sqlite"))
    assert "is a backup of sqlite" in refusal(backup=other).message


def test_all_reasons_are_told_at_once() -> None:
    found = refusal(RestoreRequest(into="app"), replace(FACTS, missing_roles=("x",), free_bytes=0))
    assert found.message.endswith("is not restored into app, for 3 reasons")
    assert list(found.detail) == ["reason 1", "reason 2", "reason 3"]
    assert "(3) Make room" in found.hint


def test_missing_roles_can_be_created_or_left_out() -> None:
    facts = replace(FACTS, missing_roles=("app_owner", "reporting"))
    made = plan(RestoreRequest(create_roles=True), facts)
    assert made.warnings[0] == "these roles are created: app_owner, reporting"
    made = plan(RestoreRequest(without_owners=True), facts)
    assert made.without_owners
    assert "left out" in made.left_out[0]
    assert f"note: {made.left_out[0]}" in made.lines


def test_roles_that_nobody_describes_cannot_be_created() -> None:
    facts = replace(FACTS, missing_roles=("app_owner", "gone"), undescribed_roles=("gone",))
    found = refusal(RestoreRequest(create_roles=True), facts)
    assert found.message.endswith(
        "roles are missing on db.example:5432 that the backup's globals do not have: gone"
    )
    assert "--without-owners" in found.hint
    made = plan(RestoreRequest(create_roles=True, without_owners=True), facts)
    assert made.warnings[0] == "these roles are created: app_owner"


def test_what_is_different_but_possible_is_told() -> None:
    facts = replace(
        FACTS, missing_tablespaces=("fast",), free_bytes=None, notes=("extension pgcrypto will be 1.4",)
    )
    made = plan(facts=facts)
    assert made.without_tablespaces
    assert "note: extension pgcrypto will be 1.4" in made.lines
    assert any("missing here: fast" in warning for warning in made.warnings)
    assert "free space is not known" in "\n".join(made.lines)
    newer = replace(FACTS, server_version=180004, server_version_text="18.4", client_version=180006)
    assert plan(facts=newer).backup == PROVEN


def test_an_imported_dump_is_planned_with_what_little_is_known() -> None:
    backup = values.imported(at=TAKEN)
    made = plan(RestoreRequest(backup="latest"), replace(FACTS, need_bytes=None), backup)
    assert made.without_owners
    assert len(made.left_out) == 1
    assert made.target == "app_restored_20260310t020000z"
    assert "from: daily/backup_daily_20260310_020000.sql.gz, a dump of an older layout" in made.lines
    assert "space: an unknown amount needed, 953.7 MiB are free" in made.lines


def test_what_an_imported_dump_does_not_bring_is_told_before_it_replaces_anything() -> None:
    made = plan(RestoreRequest("latest", replace=True, confirm="app"), backup=values.imported(at=TAKEN))
    assert made.left_out[1].startswith("owner, grants, settings, comment and connection limit of app are not")
    assert {f"note: {line}" for line in made.left_out} <= set(made.lines)


def test_an_unreadable_verdict_is_told() -> None:
    backup = values.backup(at=TAKEN, unreadable_verdict="damaged")
    assert "cannot be read: damaged" in plan(RestoreRequest(backup="latest"), backup=backup).warnings[0]
