"""Which backup an operator means by what was typed. Pure."""

import re
from collections.abc import Iterable

from backup_pipeline.domain.backup import Backup, CatalogListing, Verdict
from backup_pipeline.errors import BackupNotFound
from backup_pipeline.units import show_bytes

LATEST = "latest"
PROVEN = "proven"

_TYPED_TIME = re.compile(r"[0-9]{4}-[0-9]{2}(-[0-9]{2}([T ][0-9]{2}(:[0-9]{2}(:[0-9]{2})?)?)?)?Z?")


def find(listing: CatalogListing, text: str) -> Backup:
    """The backup that `text` names: an id, a stamp, the beginning of one, a time such as 2026-03-01,
    "latest", or "proven" for the newest proven one; all may follow `<database>/`.

    Raises BackupNotFound when there is none or more than one, naming the nearest.
    """
    database, slash, wanted = text.strip().rpartition("/")
    backups = [backup for backup in listing.backups if not slash or backup.id.database == database]
    if not backups:
        raise BackupNotFound(
            f"there is no backup of {database}" if slash else "there is no backup",
            hint=_unreadable_hint(listing)
            or "`backup-pipeline list` shows what there is, of every database.",
        )
    if wanted in (LATEST, PROVEN):
        return _newest(backups, listing, wanted)
    if _TYPED_TIME.fullmatch(wanted):
        wanted = re.sub(r"[-:Z]", "", wanted).replace(" ", "T")
    matches = [backup for backup in backups if backup.id.stamp == wanted]
    matches = matches or [backup for backup in backups if wanted and backup.id.stamp.startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise BackupNotFound(
            f"{text} names {len(matches)} backups", detail=_shown(matches), hint="Write more of the id."
        )
    near = sorted(backups, key=lambda backup: _distance(backup.id.stamp, wanted))[:3]
    raise BackupNotFound(
        f"no backup is named {text}",
        detail=_shown(near),
        hint="These are the nearest; `backup-pipeline list` shows all.",
    )


def _newest(backups: list[Backup], listing: CatalogListing, wanted: str) -> Backup:
    names = sorted({backup.id.database for backup in backups})
    if len(names) > 1:
        raise BackupNotFound(
            f"{wanted} of which database: {', '.join(names)}?",
            hint=f"Write {names[0]}/{wanted}, for example.",
        )
    for backup in backups:
        if wanted == LATEST or backup.verdict is Verdict.PROVEN:
            return backup
    raise BackupNotFound(
        f"no backup of {names[0]} is proven",
        detail=_shown(backups[:3]),
        hint="Prove one with `backup-pipeline prove`, or name an unproven one by its id. "
        + _unreadable_hint(listing),
    )


def _shown(backups: Iterable[Backup]) -> dict[str, object]:
    return {
        str(backup.id): f"{backup.tier}, {show_bytes(backup.size_bytes)}, {backup.verdict}"
        for backup in list(backups)[:10]
    }


def _unreadable_hint(listing: CatalogListing) -> str:
    if not listing.unreadable:
        return ""
    return (
        f"{len(listing.unreadable)} objects in the catalog cannot be read: `backup-pipeline list` names them."
    )


def _distance(stamp: str, wanted: str) -> tuple[int, int]:
    """How far two stamps are apart, by their digits."""
    common = next((at for at, (a, b) in enumerate(zip(stamp, wanted, strict=False)) if a != b), len(wanted))
    digits = [int(re.sub(r"[^0-9]", "", text[:16])[:14].ljust(14, "0")) for text in (stamp, wanted)]
    return abs(digits[0] - digits[1]), -common
