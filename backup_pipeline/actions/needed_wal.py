"""Whether the WAL that a base backup needs is in the archive: asked, and waited for.

Called by base_backup.py. What is archived, and how, is wal/'s.
"""

import time
from collections.abc import Iterable

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.domain.layout import (
    parse_wal_key,
    wal_name_prefix,
    wal_system_prefix,
    wal_timeline_prefix,
)
from backup_pipeline.domain.wal import TimelineHistory, WalKind, parse_wal_name
from backup_pipeline.errors import ServerError
from backup_pipeline.storage.store import Store
from backup_pipeline.units import show_count

_FIRST_POLL_S = 0.1
_LAST_POLL_S = 5.0


def has_wal(cluster: ProtectedCluster, system_identifier: str) -> bool:
    """Whether anything of this system was ever archived. Raises StoreError."""
    prefix = wal_system_prefix(cluster.name, system_identifier)
    return next(iter(cluster.store.list(prefix)), None) is not None


def await_wal(
    cluster: ProtectedCluster,
    manifest: BaseManifest,
    history: TimelineHistory,
    *,
    timeout_s: float,
    report: Report,
) -> None:
    """Return when every segment that makes the backup consistent is in the archive.

    A primary closes the last one by itself when the backup ends; of a standby's primary somebody must. While
    the archiver works off what is older, it is waited for: `timeout_s` is for the next one to come, of
    those up to the last that is needed. Raises ServerError naming the first that did not.
    """
    missing, pause_s = needed_names(manifest, history), _FIRST_POLL_S
    deadline, there = time.monotonic() + timeout_s, -1
    while True:
        before, missing = missing, not_archived(cluster, manifest, missing)
        if not missing:
            return
        if there < 0 or len(missing) < len(before):
            deadline, there = time.monotonic() + timeout_s, _count_up_to(cluster, manifest, missing[-1])
        if time.monotonic() > deadline:
            found = _count_up_to(cluster, manifest, missing[-1])
            if found <= there:
                raise _too_late(cluster, manifest, missing)
            report.say(f"the archiver works off what is older; {missing[0]} is waited for")
            deadline, there = time.monotonic() + timeout_s, found
        if pause_s < _LAST_POLL_S <= 2 * pause_s:
            report.say(f"{show_count(len(missing), 'segment')} not archived yet, {missing[0]} the first")
        time.sleep(pause_s)
        pause_s = min(_LAST_POLL_S, 2 * pause_s)


def needed_names(manifest: BaseManifest, history: TimelineHistory) -> list[str]:
    """The segments that make a base backup consistent, by name, in order."""
    return [item.name(manifest.segment_bytes) for item in manifest.needed_segments(history)]


def not_archived(cluster: ProtectedCluster, manifest: BaseManifest, names: Iterable[str]) -> list[str]:
    """Those of the `names` that are not in the archive of the backup's system. Raises StoreError."""
    return _missing(cluster.store, cluster.name, manifest.system_identifier, names)


def _count_up_to(cluster: ProtectedCluster, manifest: BaseManifest, last: str) -> int:
    """How many segments of a timeline are archived, up to one of it: whether the archiver moves."""
    timeline = parse_wal_name(last).timeline
    prefix = wal_timeline_prefix(cluster.name, manifest.system_identifier, timeline)
    found = (parse_wal_key(info.key) for info in cluster.store.list(prefix))
    return sum(1 for each in found if each and each.name.kind is WalKind.SEGMENT and each.name.text <= last)


def _too_late(cluster: ProtectedCluster, manifest: BaseManifest, missing: list[str]) -> ServerError:
    hint = "Look at pg_stat_archiver there, and into its log for what archive_command says."
    if manifest.from_standby:
        hint = (
            "A standby's backup needs WAL that its primary archives: see that it archives into this store, "
            "and set archive_timeout there, or call pg_switch_wal() when it is idle."
        )
    return ServerError(
        f"the base backup of cluster {cluster.name} needs WAL that is not in the archive: {missing[0]}"
        + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
        detail={
            "from": str(manifest.start),
            "to": str(manifest.end),
            "kept": f"{manifest.id}, not listed; the next base backup lists it if its WAL is there by then",
        },
        hint=hint,
    )


def _missing(store: Store, cluster: str, system_identifier: str, names: Iterable[str]) -> list[str]:
    """Those segments that are not archived; a listing for each 256 of them."""
    wanted = list(names)
    folders = {
        wal_name_prefix(cluster, system_identifier, parse_wal_name(name)).rpartition("/")[0] + "/"
        for name in wanted
    }
    there: dict[str, int] = {}
    for folder in folders:
        for info in store.list(folder):
            found = parse_wal_key(info.key)
            if found is not None and found.name.kind is WalKind.SEGMENT:
                there[found.name.text] = there.get(found.name.text, 0) + 1
    # Of two versions nobody knows which is right: that is as if there were none.
    return [name for name in wanted if there.get(name) != 1]
