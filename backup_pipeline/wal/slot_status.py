"""What is wrong with the slot that a cluster is received through, and what to do. Pure.

Called by status.py, of what engines/postgres/slots.py read.
"""

from collections.abc import Iterator

from backup_pipeline.config import ClusterConfig
from backup_pipeline.engines.postgres.slots import LOST, SlotLook
from backup_pipeline.units import show_bytes

NO_LIMIT = "no limit (max_slot_wal_keep_size is -1)"


def slot_problems(cluster: ClusterConfig, look: SlotLook, segment_bytes: int) -> Iterator[str]:
    """What somebody has to look at, a line each."""
    slot, receive = look.status, f"backup-pipeline wal receive {cluster.name}"
    if slot is None:
        yield f"the server has no slot of ours, and nothing is received: {receive} makes it"
        return
    if slot.wal_status == LOST or slot.confirmed is None:
        yield (
            f"the slot {slot.name} is LOST: the server removed WAL that was not archived, which is a GAP. "
            f"{receive} --accept-gap begins behind it; at once after it: backup-pipeline base-backup "
            f"{cluster.name}"
        )
        return
    if not slot.active:
        kept = f"the server keeps {show_bytes(slot.kept_bytes)} for it, {_room(look)}"
        yield f"no receiver reads from slot {slot.name}: {receive}; {kept}"
    if slot.wal_status == "unreserved":
        yield (
            f"the slot {slot.name} is about to be lost, at the next checkpoint: raise "
            "max_slot_wal_keep_size and reload the server, NOW, then see why the receiver is behind"
        )
    elif slot.wal_status == "extended" and slot.kept_bytes > segment_bytes:
        yield (
            f"the server keeps {show_bytes(slot.kept_bytes)} of WAL for slot {slot.name}, more than "
            f"max_wal_size, {_room(look)}: see why the receiver is behind, and watch the disk of pg_wal"
        )


def slot_line(look: SlotLook) -> str:
    """The slot in one line."""
    slot = look.status
    if slot is None:
        return "NONE"
    state = "read by a receiver" if slot.active else "NOT READ"
    confirmed = f"archived up to {slot.confirmed}" if slot.confirmed else "nothing kept"
    kept = f"{show_bytes(slot.kept_bytes)} kept on the server, {_room(look)}"
    return f"{slot.name}, {state}, {slot.wal_status}, {confirmed}, {kept}"


def _room(look: SlotLook) -> str:
    if look.max_keep_mb < 0:
        return f"with {NO_LIMIT}"
    if look.status is None or look.status.safe_bytes is None:
        return f"of {show_bytes(look.max_keep_mb << 20)} at the most"
    return f"and {show_bytes(max(0, look.status.safe_bytes))} more before it is lost"
