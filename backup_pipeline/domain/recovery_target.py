"""Where a recovery is to stop: a moment, an LSN, a transaction, a named restore point, or the newest. Pure.

Read from what an operator types, and turned into PostgreSQL's settings; whether it can be reached is judged
in domain/recovery_route.py.

Source: PostgreSQL, "Recovery Target".
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from backup_pipeline.domain.wal import Lsn
from backup_pipeline.errors import ConfigError

_TIME = re.compile(r"\d{4}-\d{2}-\d{2}([T ].*)?")
_KIND = re.compile(r"(?P<kind>time|lsn|xid|name):(?P<value>.*)", re.DOTALL)
_NAME_BYTES = 63
_HINT = (
    "Write a time as 2026-03-01T02:00:00Z, an LSN as 16/B374D848, a transaction as its number, a restore "
    "point by its name (name:… where it looks like one of the others), or latest."
)


class TargetKind(StrEnum):
    """What a target is given by."""

    LATEST = "latest"
    TIME = "time"
    LSN = "lsn"
    XID = "xid"
    NAME = "name"


@dataclass(frozen=True)
class RecoveryTarget:
    """Where to stop. Of `at`, `lsn`, `xid` and `name` the one that `kind` says is set.

    An `inclusive` target is the last that is replayed: a commit at exactly that time, that LSN or that
    transaction is in; otherwise it is the first that is not.
    """

    kind: TargetKind
    at: datetime | None = None
    lsn: Lsn | None = None
    xid: int = 0
    name: str = ""
    inclusive: bool = True

    def __str__(self) -> str:
        side = "" if self.inclusive or self.kind in (TargetKind.LATEST, TargetKind.NAME) else ", without it"
        match self.kind:
            case TargetKind.TIME:
                return f"{show_moment(self.at)}{side}"
            case TargetKind.LSN:
                return f"LSN {self.lsn}{side}"
            case TargetKind.XID:
                return f"transaction {self.xid}{side}"
            case TargetKind.NAME:
                return f"restore point {self.name}"
            case TargetKind.LATEST:
                return "the end of the archive"

    def settings(self) -> dict[str, str]:
        """PostgreSQL's settings; none for LATEST, which replays all that there is."""
        given = {
            TargetKind.TIME: _postgres_time(self.at),
            TargetKind.LSN: str(self.lsn),
            TargetKind.XID: str(self.xid),
            TargetKind.NAME: self.name,
        }
        if self.kind is TargetKind.LATEST:
            return {}
        side = {"recovery_target_inclusive": "on" if self.inclusive else "off"}
        return {f"recovery_target_{self.kind}": given[self.kind], **side}


LATEST = RecoveryTarget(TargetKind.LATEST)


def parse_target(text: str, *, inclusive: bool = True) -> RecoveryTarget:
    """Read what an operator typed. Raises ConfigError, also for a time that does not say its time zone."""
    match = _KIND.fullmatch(text)
    kind, value = (match["kind"], match["value"]) if match else ("", text)
    if not kind and value == "latest":
        return LATEST
    if kind == "time" or (not kind and _TIME.fullmatch(value)):
        return RecoveryTarget(TargetKind.TIME, at=_moment(value), inclusive=inclusive)
    if kind == "lsn" or (not kind and re.fullmatch(r"[0-9A-Fa-f]+/[0-9A-Fa-f]+", value)):
        return RecoveryTarget(TargetKind.LSN, lsn=Lsn.parse(value), inclusive=inclusive)
    if kind == "xid" or (not kind and value.isascii() and value.isdigit()):
        if not re.fullmatch(r"[0-9]{1,20}", value) or not 3 <= int(value) < 2**64:
            raise ConfigError(f"not a transaction's number: {value!r}", hint=_HINT)
        return RecoveryTarget(TargetKind.XID, xid=int(value), inclusive=inclusive)
    if not value or len(value.encode()) > _NAME_BYTES or any(char < " " for char in value):
        raise ConfigError(f"not a recovery target: {value!r}", hint=_HINT)
    return RecoveryTarget(TargetKind.NAME, name=value)


def show_moment(moment: datetime | None) -> str:
    """`2026-03-01T02:00:00Z`, with a fraction where there is one; "an unknown time" for None."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment else "an unknown time"


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"not a time: {text!r}", hint=_HINT) from None
    if moment.tzinfo is None:
        raise ConfigError(
            f"{text} does not say its time zone",
            hint=f"Write {moment.isoformat()}Z for UTC, or add an offset such as +02:00.",
        )
    return moment.astimezone(UTC)


def _postgres_time(moment: datetime | None) -> str:
    # PostgreSQL 15's setting does not take a Z.
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00") if moment else ""
