"""The Launchpad's forms: flat, every field with a default that is shown.

The fields are plain strings, booleans and lists of choices, so that Dagster refuses a typing error
before the launch, and never resolves `{env: …}` in them: a form must not read the server's
environment. What the values mean is checked by the first step of each job.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from backup_pipeline.actions.drill_recovery import RANDOM
from backup_pipeline.config import Config

_CHECKS = {
    "content": "compare every row with what was dumped (recommended)",
    "counts": "compare row counts only",
    "none": "compare nothing",
}


class DatabaseForm(dg.Config):
    """Which database."""

    database: str


class VerifyForm(DatabaseForm):
    """Which backup to prove."""

    backup: str


class BackupForm(DatabaseForm):
    """What to back up now."""

    prove: bool


class PruneForm(DatabaseForm):
    """Whose backups to prune, or only to look at."""

    dry_run: bool


class UndoForm(DatabaseForm):
    """Whose swap to take back, or which copy to swap in."""

    into: str
    copy_name: str
    confirm: str


class RestoreForm(DatabaseForm):
    """What to restore, and where to."""

    backup: str
    into: str
    replace: bool
    confirm: str
    create_roles: bool
    without_owners: bool
    check: str
    jobs: int
    accept_failed: bool
    accept_unverified: bool


class RecoverForm(dg.Config):
    """Which cluster to recover, to which moment, and where to."""

    cluster: str
    target: str
    into: str
    exclusive: bool
    timeline: int
    base: str
    dry_run: bool


class PruneClusterForm(dg.Config):
    """Whose base backups and WAL to prune, or only to look at."""

    cluster: str
    dry_run: bool


class DrillForm(dg.Config):
    """Which cluster to drill, and to which moment."""

    cluster: str
    target: str


def form(config: Config, op: str, fields: Mapping[str, dg.Field]) -> dg.ConfigMapping:
    """A form with `database` and `fields` for a job whose first op is `op`."""
    return _form(op, {"database": _name_field("Database", list(config.databases)), **fields})


def recover_form(config: Config, op: str) -> dg.ConfigMapping:
    """The form of a recovery. The defaults show the plan for the newest moment, and touch nothing."""
    fields = {
        "cluster": _name_field("Cluster", list(config.clusters)),
        "target": text(
            "latest",
            "Where to stop: a time with its zone (2026-03-01T02:00:00Z), an LSN, a transaction's number, the "
            "name of a restore point, or latest.",
        ),
        "into": text("", "The new data directory, its whole path on the machine where the run executes."),
        "exclusive": flag(False, "Stop right before the target instead of right after it."),
        "timeline": number(0, "Follow this timeline; 0: the newest."),
        "base": text("", "Begin with this base backup; empty: the newest that fits."),
        "dry_run": flag(True, "Only show the plan. Set to false to recover."),
    }
    return _form(op, fields)


def prune_cluster_form(config: Config, op: str) -> dg.ConfigMapping:
    """The form of a cluster's prune; as it stands, it only shows."""
    dry_run = flag(True, "Only show what would be deleted, and why. Set to false to delete.")
    return _form(op, {"cluster": _name_field("Cluster", list(config.clusters)), "dry_run": dry_run})


def drill_form(config: Config, op: str) -> dg.ConfigMapping:
    """The form of a drill; as it stands, of a random second."""
    target = text(RANDOM, f"Which moment: {RANDOM}, or a time with its zone (2026-03-01T02:00:00Z).")
    return _form(op, {"cluster": _name_field("Cluster", list(config.clusters)), "target": target})


def _form(op: str, schema: Mapping[str, dg.Field]) -> dg.ConfigMapping:
    def to_op(values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"ops": {op: {"config": dict(values)}}}

    return dg.ConfigMapping(config_fn=to_op, config_schema=dict(schema))


def restore_fields() -> dict[str, dg.Field]:
    """The defaults restore the newest proven backup into a new database, beside the live one."""
    return {
        "backup": text(
            "proven", 'Which backup: "proven" (the newest proven one), "latest", or an id from the table.'
        ),
        "into": text("", "The new database's name; empty: one is made up and shown in the plan."),
        "replace": flag(False, "Swap with the live database once the copy is checked; the old one is kept."),
        "confirm": text("", "With replace: the live database's name, typed."),
        "create_roles": flag(
            False, "Create the roles that the server lacks; with passwords only if the backup holds them."
        ),
        "without_owners": flag(False, "Leave out owners, grants, and settings of single roles."),
        "check": choice("content", "What must be equal before the copy counts as restored.", _CHECKS),
        "jobs": number(
            0, "How many tables or indexes to load at once; 0: as many as the dump was taken with."
        ),
        "accept_failed": flag(False, "Restore even a backup whose proof failed: the last resort."),
        "accept_unverified": flag(
            False, "Open an imported dump though pg_restore has a known hole: you know who wrote it."
        ),
    }


def undo_fields() -> dict[str, dg.Field]:
    """The defaults swap back what the last restore put aside, once its name is typed."""
    return {
        "into": text("", "The live database; empty: the configured one."),
        "copy_name": text("", "The copy to swap in; empty: the one that the last restore put aside."),
        "confirm": text("", "The live database's name, typed."),
    }


def text(default: str, description: str) -> dg.Field:
    """A line of text."""
    return dg.Field(dg.String, default_value=default, description=description)


def number(default: int, description: str) -> dg.Field:
    """A whole number."""
    return dg.Field(dg.Int, default_value=default, description=description)


def flag(default: bool, description: str) -> dg.Field:
    """Yes or no."""
    return dg.Field(dg.Bool, default_value=default, description=description)


def choice(default: str, description: str, choices: Mapping[str, str], name: str = "Check") -> dg.Field:
    """One of several words, each explained; anything else is refused before the launch."""
    values = [dg.EnumValue(value, description=meaning) for value, meaning in choices.items()]
    return dg.Field(dg.Enum(name, values), default_value=default, description=description)


def _name_field(what: str, names: list[str]) -> dg.Field:
    return choice(names[0], f"Which {what.lower()}.", dict.fromkeys(names, ""), name=what)
