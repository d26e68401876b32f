"""The Launchpad's forms: flat, every default shown, and refused before the launch where that can be."""

from collections.abc import Mapping
from typing import Any, get_type_hints

import dagster as dg
import pytest

from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.orchestration.build import definitions_of
from backup_pipeline.orchestration.forms import RestoreForm
from backup_pipeline_tests.orchestration.configurations import configuration

DEFAULTS: dict[str, dict[str, object]] = {
    "backup_database": {"database": "agentweave", "prove": True},
    "restore_database": {
        "accept_failed": False,
        "accept_unverified": False,
        "backup": "proven",
        "check": "content",
        "confirm": "",
        "create_roles": False,
        "database": "agentweave",
        "into": "",
        "jobs": 0,
        "replace": False,
        "without_owners": False,
    },
    "undo_restore": {"confirm": "", "copy_name": "", "database": "agentweave", "into": ""},
    "verify_restore": {"backup": "latest", "database": "agentweave"},
    "prune_backups": {"database": "agentweave", "dry_run": True},
}


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return definitions_of(configuration())


def filled(definitions: dg.Definitions, job: str, form: Mapping[str, Any]) -> dict[str, object]:
    """What the job's first op is given for a form."""
    ops = dg.validate_run_config(definitions.resolve_job_def(job), dict(form))["ops"]
    (config,) = (op["config"] for op in ops.values() if op.get("config"))
    return dict(config)


@pytest.mark.parametrize("job", DEFAULTS)
def test_an_empty_form_means_the_defaults(definitions: dg.Definitions, job: str) -> None:
    assert filled(definitions, job, {}) == DEFAULTS[job]


def test_a_restore_takes_what_its_form_asks_for() -> None:
    asked = {name: field.annotation for name, field in RestoreForm.model_fields.items() if name != "database"}
    assert asked.items() <= get_type_hints(RestoreRequest).items()


@pytest.mark.parametrize("job", DEFAULTS)
def test_every_field_is_flat_and_explained(definitions: dg.Definitions, job: str) -> None:
    mapping = definitions.resolve_job_def(job).config_mapping
    assert mapping is not None
    fields = getattr(mapping.config_schema.as_field().config_type, "fields")  # noqa: B009 - not in its hints
    assert set(fields) == set(DEFAULTS[job])
    assert all(field.description for field in fields.values())
    assert {name: field.default_value for name, field in fields.items()} == DEFAULTS[job]


@pytest.mark.parametrize(
    ("job", "form"),
    [
        ("restore_database", {"database": "agentweaver"}),
        ("restore_database", {"check": "perhaps"}),
        ("restore_database", {"replace": "yes"}),
        ("restore_database", {"jobs": "two"}),
        ("restore_database", {"bakup": "latest"}),
        ("prune_backups", {"dry_run": "no"}),
        ("verify_restore", {"backup": None}),
    ],
)
def test_a_typing_error_is_refused_before_the_launch(
    definitions: dg.Definitions, job: str, form: dict[str, object]
) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError):
        filled(definitions, job, form)


@pytest.mark.parametrize("field", ["backup", "into", "confirm", "database"])
def test_no_form_reads_the_environment(
    definitions: dg.Definitions, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "geheim-4711")
    with pytest.raises(dg.DagsterInvalidConfigError) as raised:
        filled(definitions, "restore_database", {field: {"env": "PGPASSWORD"}})
    assert "geheim" not in str(raised.value)
