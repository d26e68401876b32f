"""What recoveries took: recorded in the store when one is finished, and read for the plan of the next.

Called by recover.py. The figures help a person to plan; a store that may not be written, or a record that
cannot be read, never fails a recovery.
"""

import secrets
from collections.abc import Sequence

from backup_pipeline.actions.report import Report
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.layout import recoveries_prefix, recovery_key
from backup_pipeline.domain.manifest import MAX_RECORD_BYTES
from backup_pipeline.domain.recovered import (
    RecoveryFigures,
    estimate,
    figures_from_json,
    figures_to_json,
)
from backup_pipeline.errors import BackupError
from backup_pipeline.storage.store import Store
from backup_pipeline.units import show_bytes, show_count, show_seconds

_READ_AT_MOST = 5
_KEPT = 100


def record_figures(store: Store, figures: RecoveryFigures, report: Report) -> None:
    """Keep them for later plans; what prevents it is told, and is no error."""
    stamp = BackupId.make(figures.cluster, figures.finished_at, secrets.token_hex(3)).stamp
    try:
        store.put(recovery_key(figures.cluster, stamp), [figures_to_json(figures)])
        older = _keys(store, figures.cluster)[_KEPT:]
        if older:
            store.delete(older)  # what may not be deleted stays; it does no harm
    except BackupError as error:
        report.say(f"how long it took is not recorded for later plans: {error.message}")


def known_figures(store: Store, cluster: str) -> tuple[RecoveryFigures, ...]:
    """Those of the last few recoveries that can be read, newest first."""
    found: list[RecoveryFigures] = []
    try:
        for key in _keys(store, cluster)[:_READ_AT_MOST]:
            found.append(figures_from_json(store.read_range(key, offset=0, length=MAX_RECORD_BYTES), key))
    except BackupError:
        pass
    return tuple(found)


def _keys(store: Store, cluster: str) -> list[str]:
    """Newest first: a key begins with the time."""
    return sorted((info.key for info in store.list(recoveries_prefix(cluster))), reverse=True)


def duration_line(known: Sequence[RecoveryFigures], *, source_bytes: int, wal_bytes: int) -> str:
    """What a plan says of it."""
    expected = estimate(known, source_bytes=source_bytes, wal_bytes=wal_bytes)
    if expected is None:
        return "takes: not known; no recovery of this cluster was recorded yet"
    last = known[0]
    return (
        f"takes: about {show_seconds(expected.total_seconds())}, as fast as before; the last, of "
        f"{show_bytes(last.source_bytes)} and {show_count(last.segments, 'segment')}, took "
        f"{show_seconds(last.took_s)}"
    )
