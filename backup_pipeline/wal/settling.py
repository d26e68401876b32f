"""A gap that may be none: the agent archives what follows a segment that is slow, so look again.

Called by what would refuse a gap near the end of a timeline, while its cluster may be archiving.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from backup_pipeline.wal.ahead import AHEAD

_LOOKS = 15
_PAUSE_S = 2.0

Found = TypeVar("Found")
Pause = Callable[[float], object]
"""Waits so many seconds."""


def may_be_filled(behind: int) -> bool:
    """Whether a missing segment, with so many behind it, may be under way: no more are archived ahead."""
    return 0 < behind <= AHEAD


def settled(
    look: Callable[[], Found], is_unsettled: Callable[[Found], bool], *, pause: Pause = time.sleep
) -> Found:
    """What `look` finds, as soon as it is settled; else what it finds after half a minute."""
    found = look()
    for _ in range(_LOOKS):
        if not is_unsettled(found):
            break
        pause(_PAUSE_S)
        found = look()
    return found
