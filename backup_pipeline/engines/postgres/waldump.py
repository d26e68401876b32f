"""What a WAL segment holds, by pg_waldump: when its last transaction ended.

Called before a recovery is planned: the newest moment that can be recovered is in the last segment, and no
name or date of a file tells it. The segment's digest has been verified before.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.domain.wal import Lsn
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command

_STALL_S = 120.0
_WITHIN_ONE_RECORD = "could not find a valid record after"  # the segment is the middle of a large one
_WHERE_IT_ENDS = ("error in WAL record at", "could not read from", "could not find file")
_RECORD = re.compile(
    rb"rmgr: Transaction .*\btx:\s+(?P<xid>\d+), lsn: (?P<lsn>[0-9A-F]+/[0-9A-F]+), .*desc: "
    rb"(?P<what>COMMIT|ABORT)(?:_PREPARED| PREPARED)? (?:\S+: )?"
    rb"(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) UTC"
)


@dataclass(frozen=True)
class TransactionEnd:
    """The end of a transaction, as the log has it. A recovery by time stops at commits and at aborts."""

    xid: int
    lsn: Lsn
    at: datetime
    committed: bool


def waldump_argv(pg_waldump: str, segment: Path) -> tuple[str, ...]:
    """The command that prints the transactions' ends in a whole segment."""
    return (pg_waldump, "--rmgr=Transaction", str(segment))


def last_transaction(pg_waldump: str, segment: Path, *, ends_early: bool = False) -> TransactionEnd | None:
    """The last transaction that ended in a segment under its own name; None when none did.

    Raises ToolError, also for a segment that is not whole, unless it is known to end early: then pg_waldump
    ends with an error where the WAL ends, having told all that comes before.
    """
    command = Command(waldump_argv(pg_waldump, segment), {"TZ": "UTC", "LC_ALL": "C"})
    last, rest = b"", b""
    try:
        with process.stream(command, stall_s=_STALL_S) as chunks:
            for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                last = next((line for line in reversed(lines) if _RECORD.match(line)), last)
    except ToolError as error:
        if _WITHIN_ONE_RECORD in str(error):
            return None
        if not ends_early or not any(part in str(error) for part in _WHERE_IT_ENDS):
            raise
    match = _RECORD.match(last)
    return _ended(match) if match else None


def _ended(match: re.Match[bytes]) -> TransactionEnd:
    at = datetime.strptime(match["at"].decode(), "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
    lsn = Lsn.parse(match["lsn"].decode())
    return TransactionEnd(int(match["xid"]), lsn, at, match["what"] == b"COMMIT")
