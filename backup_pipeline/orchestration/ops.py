"""The steps of a backup: preflight, dump_and_upload, publish. The same in assets and in a job.

Each opens the database, calls one action and shows what came of it. `subject` is handed in by jobs;
in an asset it is read from the asset's key.
"""

import dagster as dg

from backup_pipeline.actions import dump
from backup_pipeline.domain.backup import Backup, Manifest
from backup_pipeline.orchestration import words
from backup_pipeline.orchestration.failures import explained
from backup_pipeline.orchestration.resources import Backups, now
from backup_pipeline.orchestration.runs import Subject, report_to, subject_of, tag_run
from backup_pipeline.units import show_bytes


@dg.op(
    description="Tries everything that the dump will need: server, client tools, store. Changes nothing.",
    ins={"subject": dg.In(dg.Any, default_value=None)},
    out=dg.Out(dg.Any),
)
def preflight(
    context: dg.OpExecutionContext, backups: Backups, subject: Subject | None
) -> dg.Output[Subject]:
    """Check what the dump needs, and say what will be backed up."""
    subject = subject or subject_of(context)
    tag_run(context, "backup", subject.database, tier=subject.tier)
    with explained(context):
        protected = backups.open(subject.database)
        ready = dump.preflight(protected, report=report_to(context), proving=subject.prove)
    for warning in ready.warnings:
        context.log.warning(warning)
    shown = {
        "server": f"PostgreSQL {ready.server_version}",
        "client": f"pg_dump {ready.client_version}",
        "database_size": show_bytes(ready.source_bytes),
        "compression": ready.compression,
    }
    return dg.Output(subject, metadata=shown)


@dg.op(
    description="Dumps one snapshot straight into the store, with its fingerprint. Nothing is listed yet.",
    ins={"subject": dg.In(dg.Any)},
    out=dg.Out(dg.Any),
)
def dump_and_upload(
    context: dg.OpExecutionContext, backups: Backups, subject: Subject
) -> dg.Output[Manifest]:
    """Store everything that the backup consists of."""
    with explained(context):
        manifest = dump.dump_and_upload(
            backups.open(subject.database),
            tier=subject.tier,
            scheduled_for=subject.scheduled_for,
            clock=now,
            report=report_to(context),
        )
    tag_run(context, "backup", subject.database, id=str(manifest.id))
    return dg.Output(manifest, metadata={"backup_id": str(manifest.id), **words.manifest_numbers(manifest)})


@dg.op(
    description="Writes the manifest: from here on the backup exists.",
    ins={"manifest": dg.In(dg.Any)},
    out=dg.Out(dg.Any),
)
def publish(context: dg.OpExecutionContext, backups: Backups, manifest: Manifest) -> dg.Output[Backup]:
    """Make the uploaded dump a backup."""
    with explained(context):
        protected = backups.open(manifest.id.database)
        backup = dump.publish(protected, manifest, report=report_to(context))
    return dg.Output(backup, metadata=words.backup_metadata(backup, protected.store.url))
