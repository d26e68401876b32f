"""The proof as an asset check: Execute on the page, and in each run right after its dump.

What a proof is and whether one is due is decided in actions/prove.py; here a verdict becomes a
result that Dagster shows. A failed proof blocks what follows in its run: nothing is pruned then.
"""

from collections.abc import Iterator

import dagster as dg

from backup_pipeline.actions import prove
from backup_pipeline.actions.backups import listing, load
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import Config, DatabaseConfig, TierConfig
from backup_pipeline.domain.backup import Backup, BackupId, Proof, Verdict
from backup_pipeline.errors import BackupNotFound
from backup_pipeline.orchestration import words
from backup_pipeline.orchestration.assets import plain
from backup_pipeline.orchestration.evaluations import log_evaluation
from backup_pipeline.orchestration.failures import explained
from backup_pipeline.orchestration.resources import Backups, now
from backup_pipeline.orchestration.runs import report_to, tag_run, taken_in

PROVEN_CHECK = "proven"


def check_key(database: str, tier: str) -> dg.AssetCheckKey:
    """The check that says whether the newest backup of a tier is proven."""
    return dg.AssetCheckKey(dg.AssetKey([database, tier]), PROVEN_CHECK)


def checks_of(config: Config) -> list[dg.AssetChecksDefinition]:
    """The checks of all databases: one for each tier, made by one step for each database."""
    return [proof_checks(database) for database in config.databases.values()]


def proof_checks(database: DatabaseConfig) -> dg.AssetChecksDefinition:
    """A database's checks. One may give no result: when the policy leaves its proof for later."""

    # can_subset makes results optional: a proof that was not made must show neither green nor red.
    @dg.multi_asset_check(
        name=f"{plain(database.name)}__{PROVEN_CHECK}",
        specs=[_spec(database, tier) for tier in database.tiers],
        can_subset=True,
    )
    def proven(context: dg.AssetCheckExecutionContext, backups: Backups) -> Iterator[dg.AssetCheckResult]:
        failed = []
        for key in sorted(context.selected_asset_check_keys, key=str):
            for result in prove_newest(context.op_execution_context, backups, key.asset_key):
                yield result
                failed += [result] if is_bad(result) else []
        for result in failed:
            raise proof_failure(result)

    return proven


def _spec(database: DatabaseConfig, tier: TierConfig) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        PROVEN_CHECK,
        asset=[database.name, tier.name],
        blocking=True,
        description=f"Restores the newest {tier.name} backup of {database.name} and compares it row for row.",
    )


def prove_newest(
    context: dg.OpExecutionContext, backups: Backups, key: dg.AssetKey
) -> Iterator[dg.AssetCheckResult]:
    """Prove what this run has just taken, if the policy wants it at once; else the tier's newest backup."""
    database, tier = key.path
    tag_run(context, "prove", database, tier=tier)
    with explained(context):
        protected = backups.open(database)
        taken = taken_in(context, key)
        backup = load(protected, BackupId.parse(taken)) if taken else newest_of(protected, tier)
        if not taken or prove.due_at_once(protected, backup):
            yield prove_one(context, protected, backup)
        elif backup.proof is not None:  # a copy is proven together with the dump whose bytes it shares
            yield result_of(protected, backup, backup.proof)
        else:
            context.log.info(f"{taken} is not proven now: {words.prove_rule(protected.config)}")


def newest_of(protected: Protected, tier: str) -> Backup:
    """The newest backup of a tier. Raises BackupNotFound."""
    for backup in listing(protected).backups:
        if backup.tier == tier:
            return backup
    raise BackupNotFound(
        f"{protected.name} has no {tier} backup yet: there is nothing to prove",
        hint=f"Materialize {protected.name}/{tier} first; its proof follows by itself.",
    )


def prove_one(context: dg.OpExecutionContext, protected: Protected, backup: Backup) -> dg.AssetCheckResult:
    """Prove one backup; tell the result, and the restore's time for the asset's plots."""
    proof = prove.prove(protected, backup.id, clock=now, report=report_to(context))
    if has_asset(protected, backup) and backup.manifest is not None and proof.restore_s:
        numbers = {**words.manifest_numbers(backup.manifest), "restore_s": round(proof.restore_s, 3)}
        context.log_event(dg.AssetObservation(_key(backup), metadata=numbers))
    return result_of(protected, backup, proof)


def result_of(protected: Protected, backup: Backup, proof: Proof) -> dg.AssetCheckResult:
    """A proof as Dagster shows it."""
    return dg.AssetCheckResult(
        asset_key=_key(backup),
        check_name=PROVEN_CHECK,
        passed=prove.as_asked(proof, backup.id, protected.config),
        severity=severity(proof),
        description=words.verdict_sentence(backup, proof),
        metadata=words.proof_metadata(backup, proof),
    )


def is_bad(result: dg.AssetCheckResult) -> bool:
    """Whether the backup itself was found to be bad."""
    return not result.passed and result.severity is dg.AssetCheckSeverity.ERROR


def proof_failure(result: dg.AssetCheckResult) -> dg.Failure:
    """What the run's page says when a backup did not pass: the verdict, then what to do."""
    todo = "Take a new backup now: launch backup_database. Nothing was pruned in this run."
    if not is_bad(result):
        todo = "See below what is missing here, and prove the backup where it is not."
    return dg.Failure(
        f"{result.description}\nWhat to do: {todo}", metadata=result.metadata, allow_retries=False
    )


def has_asset(protected: Protected, backup: Backup) -> bool:
    """Whether the backup's tier is an asset: manual backups, and tiers of the past, are none."""
    return backup.tier in [tier.name for tier in protected.config.tiers]


def _key(backup: Backup) -> dg.AssetKey:
    return dg.AssetKey([backup.id.database, backup.tier])


def show_on_asset(
    context: dg.OpExecutionContext, protected: Protected, backup: Backup, result: dg.AssetCheckResult
) -> None:
    """Let the check of the backup's asset show a result that another job found: of the tier's newest alone.

    A failed newest backup stays red, whatever is found of an older one.
    """
    if not has_asset(protected, backup):
        return
    newest = newest_of(protected, backup.tier)
    if newest.id != backup.id:
        context.log.info(f"the check of {backup.tier} stays as it is: it speaks of the newest, {newest.id}")
        return
    evaluation = dg.AssetCheckEvaluation(
        asset_key=_key(backup),
        check_name=PROVEN_CHECK,
        passed=result.passed,
        metadata=result.metadata,
        severity=result.severity,
        description=result.description,
    )
    log_evaluation(context, evaluation)


def severity(proof: Proof) -> dg.AssetCheckSeverity:
    """Red for a backup that is bad; yellow for one of which nobody can say."""
    return dg.AssetCheckSeverity.ERROR if proof.verdict is Verdict.FAILED else dg.AssetCheckSeverity.WARN
