"""What the tests of proofs share: which backup is meant, its record, and a proof of it."""

from backup_pipeline.actions import prove
from backup_pipeline.domain.backup import Backup, Manifest, ObjectDigest, ObjectRole, Proof
from backup_pipeline.storage import catalog
from backup_pipeline_tests.actions.box import Box, now


def daily(box: Box) -> Backup:
    """The proven one."""
    (found,) = (item for item in catalog.list_backups(box.store, fresh=True).backups if item.tier == "daily")
    return found


def weekly(box: Box) -> Backup:
    """The one that nobody has proven yet."""
    (found,) = (item for item in catalog.list_backups(box.store, fresh=True).backups if item.tier == "weekly")
    return found


def record(backup: Backup) -> Manifest:
    assert backup.manifest is not None
    return backup.manifest


def one(backup: Backup, role: ObjectRole) -> ObjectDigest:
    (item,) = record(backup).of_role(role)
    return item


def run(box: Box, backup: Backup) -> Proof:
    return prove.prove(box.protected, backup.id, clock=now, report=box.said)
