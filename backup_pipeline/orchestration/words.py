"""What the UI says about backups: descriptions, metadata, tables. Pure; decides nothing.

Metadata comes twice: as numbers, which Dagster plots, and in words. The first line of every
description is plain text, because lists show it raw.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import dagster as dg
from cronsim import CronSim

from backup_pipeline.config import DatabaseConfig, StoreConfig, TierConfig
from backup_pipeline.domain import layout
from backup_pipeline.domain.backup import MANUAL_TIER, Backup, Manifest, Proof, Verdict
from backup_pipeline.units import show_bytes, show_seconds

Metadata = dict[str, Any]  # what Dagster takes as metadata: numbers, texts, MetadataValues

MIB = 1024 * 1024
NOTHING = "-"
_ANY_MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
_TICKS = 400  # a year of a daily cron, and longer of rarer ones


@lru_cache(maxsize=1024)
def when(cron: str) -> str:
    """A cron in words: "at 02:00 on Sunday (UTC)"."""
    said = CronSim(cron, _ANY_MOMENT).explain()
    return f"{said[0].lower()}{said[1:]} (UTC)"


@lru_cache(maxsize=1024)
def longest_gap(cron: str) -> timedelta:
    """The longest time between two ticks of a cron."""
    ticks = list(islice(CronSim(cron, _ANY_MOMENT), _TICKS))
    return max((later - earlier for earlier, later in pairwise(ticks)), default=timedelta(days=1))


def tier_description(database: DatabaseConfig, tier: TierConfig, store: StoreConfig) -> str:
    """What a tier's asset page says."""
    name = tier.name.capitalize()
    return f"""{name} backup of {database.name}, taken {when(tier.cron)}; the newest {tier.keep} are kept.

- **Where**: `{store.url}/{layout.DATA}{database.name}/dumps/{tier.name}/`, as standard `pg_dump` archives
- **Proof**: {_proof_description(database)}
- **Kept**: the newest {tier.keep}, what is pinned, and always the newest proven backup of {database.name}
- **Take one now**: launch `backup_database` (it expires by itself), or Materialize here
- **Restore**: launch `restore_database`; with Dagster down: `backup-pipeline restore {database.name}`
"""


def _proof_description(database: DatabaseConfig) -> str:
    what = "row counts are compared" if database.proof == "counts" else "it is compared row for row"
    return f"restored into an empty server, where {what}; {prove_rule(database)}"


def prove_rule(database: DatabaseConfig) -> str:
    """When proofs are made, as configured."""
    policy = database.prove
    rule = ["right after each dump"] if policy.always and policy.up_to_bytes is None else []
    if policy.up_to_bytes is not None:
        rule.append(f"right after each dump of up to {show_bytes(policy.up_to_bytes)} of database")
    if policy.cron:
        rule.append(f"the newest one {when(policy.cron)}")
    return ", and ".join(rule)


def backups_description(database: DatabaseConfig, store: StoreConfig) -> str:
    """What the page of a database's list of backups says."""
    kept = ", ".join(f"{tier.keep} {tier.name}" for tier in database.tiers)
    days = f"{database.manual_keep.total_seconds() / 86400:g} days"
    return f"""All backups of {database.name} in the store, once the retention has been applied.

- **Kept**: {kept}; manual ones for {days}; pinned ones for ever
- **Never deleted**: the newest proven backup, and the two newest good ones
- **Where**: `{store.url}`; the manifests there are the truth, this table is a copy of what they said
- **Look without deleting**: launch `prune_backups`, which shows its plan by default
- **Restore**: launch `restore_database`; with Dagster down: `backup-pipeline restore {database.name}`
"""


def backup_metadata(backup: Backup, store_url: str) -> Metadata:
    """What is shown, and plotted, of a published backup."""
    manifest = backup.manifest
    if manifest is None:
        return {"backup_id": str(backup.id), "size_bytes": backup.size_bytes}
    return {
        "backup_id": str(backup.id),
        "tier": backup.tier,
        "taken_at": dg.MetadataValue.timestamp(backup.taken_at),
        "size": show_bytes(manifest.size_bytes),
        "duration": show_seconds(manifest.duration_s),
        "database_size": show_bytes(manifest.source.size_bytes),
        "server": f"PostgreSQL {manifest.source.server_version_text}",
        "format": f"{manifest.format}, {manifest.compression}",
        "stored_in": f"{store_url}/{layout.data_prefix(backup.id, backup.tier)}",
        "copied_from": str(manifest.copied_from or NOTHING),
        "restore_with": f"backup-pipeline restore {backup.id.database} --backup {backup.id.stamp}",
        **manifest_numbers(manifest),
        **({"notes": "\n".join(manifest.source.notes)} if manifest.source.notes else {}),
    }


def manifest_numbers(manifest: Manifest) -> Metadata:
    """The plotted numbers; always the same labels, or the plots lose their lines."""
    seconds = max(manifest.duration_s, 0.001)
    return {
        "size_bytes": manifest.size_bytes,
        "duration_s": round(manifest.duration_s, 3),
        "throughput_mib_s": round(manifest.dump_bytes / MIB / seconds, 3),
        "compression_ratio": round(manifest.source.size_bytes / max(manifest.dump_bytes, 1), 3),
    }


def proof_metadata(backup: Backup, proof: Proof) -> Metadata:
    """What a check shows of a proof. Lists are tables, because the page joins the lines of a text."""
    times: Metadata = {"restore_s": round(proof.restore_s, 3), "compare_s": round(proof.compare_s, 3)}
    return {
        "backup_id": str(backup.id),
        "verdict": str(proof.verdict),
        **({**times, "restore_time": show_seconds(proof.restore_s)} if proof.restore_s else {}),
        "proven_on": proof.by,
        **list_tables(differences=proof.differences, checked=proof.checked, notes=proof.notes),
    }


def verdict_sentence(backup: Backup, proof: Proof) -> str:
    """A proof in one line, for a check's description and a failure's first line."""
    name, took = f"{backup.id} ({backup.tier})", show_seconds(proof.restore_s)
    found = proof.differences[0] if proof.differences else ""
    match proof.verdict:
        case Verdict.PROVEN:
            return f"{name} restored in {took} and is equal, row for row"
        case Verdict.RESTORED:
            return f"WARNING: {name} restored in {took}, but {found or 'not all was compared'}"
        case Verdict.FAILED:
            return f"{name} FAILED its proof: {found or 'it did not restore'}"
        case _:
            return f"{name} could not be proven here: {found or 'something is missing'}"


_COLUMNS = ("backup", "age", "tier", "size", "proof", "kept until")  # more do not fit beside each other


def backups_table(
    backups: Sequence[Backup], database: DatabaseConfig, now: datetime
) -> dg.TableMetadataValue:
    """The backups that exist, newest first."""
    until = _kept_until(backups, database, now)
    rows = [
        (
            backup.id.stamp,
            age(now - backup.taken_at),
            backup.tier,
            show_bytes(backup.size_bytes),
            str(backup.verdict),
            until.get(str(backup.id), NOTHING),
        )
        for backup in backups
    ]
    return table(_COLUMNS, rows)


def age(span: timedelta) -> str:
    """A span in its largest unit alone, never broken over two lines: "3 h"; narrow, for tables."""
    seconds = max(0, int(span.total_seconds()))
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds // length_s}\u00a0{unit}"
    return f"{seconds}\u00a0s"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dg.TableMetadataValue:
    """A table of texts."""
    return dg.MetadataValue.table(
        records=[dg.TableRecord(dict(zip(columns, row, strict=True))) for row in rows],
        schema=dg.TableSchema(columns=[dg.TableColumn(name=name, type="string") for name in columns]),
    )


def list_tables(**lists: Sequence[str]) -> Metadata:
    """Lists under their names, each a table of one column; an empty one is left out."""
    return {name: table([name], [[line] for line in lines]) for name, lines in lists.items() if lines}


def _kept_until(backups: Sequence[Backup], database: DatabaseConfig, now: datetime) -> dict[str, str]:
    """Until when each backup stays: exact for an expiry, an estimate from the cron for a count."""
    tiers = {tier.name: tier for tier in database.tiers}
    seen = dict.fromkeys(tiers, 0)
    until = {}
    for backup in backups:
        tier = tiers.get(backup.tier)
        if backup.pinned:
            until[str(backup.id)] = "pinned"
        elif backup.tier == MANUAL_TIER and backup.expires_at:
            until[str(backup.id)] = f"{backup.expires_at:%Y-%m-%d}"
        elif tier is not None:
            until[str(backup.id)] = _about(tier, seen[tier.name], now)
        if tier is not None and backup.verdict is not Verdict.FAILED:
            seen[tier.name] += 1
    return until


def _about(tier: TierConfig, place: int, now: datetime) -> str:
    """When so many newer ones will exist that the tier gives this one up."""
    left = max(1, tier.keep - place)
    ticks = list(islice(CronSim(tier.cron, now), left))
    return f"~{ticks[-1]:%Y-%m-%d}" if len(ticks) == left else NOTHING
