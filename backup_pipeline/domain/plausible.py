"""Whether a backup's size is what one would expect after those before it. Pure.

Called by proofs, of which it fails none: rows may have been deleted on purpose. It is said, so that a
person can tell.
"""

from collections.abc import Sequence
from statistics import median

from backup_pipeline.domain.findings import Findings
from backup_pipeline.units import show_bytes, show_count

COMPARED = 7
"""So many backups before this one are looked at; enough that one odd size among them is outvoted."""

_FEWEST = 3
_SMALL_SHARE = 0.5
_LARGE_SHARE = 4.0
_SMALL_BYTES = 64 * 1024  # below, a single table's definition makes a difference


def assess_size(size_bytes: int, before: Sequence[int]) -> Findings:
    """Hold a dump's size against those `before` it, the newest first."""
    known = before[:COMPARED]
    if len(known) < _FEWEST:
        earlier = show_count(len(known), "earlier backup")
        return Findings(checked=[f"size: {show_bytes(size_bytes)}; {earlier} to hold it against"])
    usual = median(known)
    said = f"{show_bytes(size_bytes)}, where the {len(known)} before had {show_bytes(usual)} (median)"
    matters = max(size_bytes, usual) > _SMALL_BYTES
    if matters and size_bytes < usual * _SMALL_SHARE:
        return Findings(notes=[f"the dump is much smaller than usual: {said}; were rows deleted on purpose?"])
    if matters and size_bytes > usual * _LARGE_SHARE:
        return Findings(notes=[f"the dump is much larger than usual: {said}"])
    return Findings(checked=[f"size plausible: {said}"])
