"""What a failed load says of the backup: that it does not restore, or nothing.

Called by proofs, with pg_restore's error and, of a scratch cluster of our own, the server's log, which
names an error's SQLSTATE where pg_restore prints only texts. Pure.
"""

import re
from enum import StrEnum

from backup_pipeline.errors import ToolError

LOG_LINE_PREFIX = "%e "
"""What begins each line of a log that is read here: the SQLSTATE."""


class Blame(StrEnum):
    """Whom a failed load speaks of."""

    BACKUP = "backup"  # it does not restore
    SERVER = "server"  # the scratch server lacks something that the backup needs
    FILES = "files"  # it reads files, which the scratch server is kept from
    NETWORK = "network"  # it connects to another server, and the scratch server is cut off
    CLIENT = "client"  # this pg_restore cannot read it
    MISHAP = "mishap"  # no space, a server that went, a signal: another attempt may succeed


_SAID = re.compile(
    r"pg_restore (?:failed|ended with exit code \d+): (?:pg_restore: error: )?(?P<said>.*)", re.S
)
_CONNECTING = re.compile(r"(?:[^:]*: )?connection to server .* failed: ")
_FROM_SERVER = re.compile(r"could not execute query: |COPY failed|error returned by ")
_SQL = re.compile(r"(?:ERROR|FATAL|PANIC):  (?P<message>.*)")
_CRASH = re.compile(r"\(PID \d+\) was terminated by signal|^\w{5} PANIC: ", re.M)

MISHAP_STATES = ("08", "40", "53", "57", "58")
"""What SQLSTATEs that blame nobody begin with: connection, rollback, resources, operator, system."""

_LACKING_STATE = "F0"  # a file of text search
_REFUSED_STATE = "42501"
_UNREACHED_STATE = "08001"

_MISHAP = re.compile(
    r".*: (?:No space left on device|Disk quota exceeded|Input/output error|Read-only file system"
    r"|Too many open files|Cannot allocate memory)"
    r"|could not (?:extend|write|fsync|resize|fork|allocate)\b.*"
    r"|out of (?:shared )?memory.*|sorry, too many clients.*|remaining connection slots.*"
    r"|terminating .*|canceling .*|deadlock detected.*|the database system is .*"
)
_LACKING = re.compile(
    r"could not (?:create locale|open collator|open [a-z-]+(?: control)? file|access file|load library).*"
    r'|collation "pg_catalog\..*" for encoding ".*" does not exist'
    r'|extension ".*" (?:is not available|has no installation script|must be preloaded).*'
    r"|.*shared_preload_libraries.*|can only create extension in database.*"
)
_KEPT_FROM = re.compile(r"could not .*: Permission denied")
_UNREACHED = re.compile(r"could not (?:connect to server|establish connection)")
_REFUSED = re.compile(r"permission denied.*|must be .*")

_MISHAP_OF_CLIENT = re.compile(
    r"server closed the connection|no connection to the server|out of memory"
    r"|SSL (?:connection|error|SYSCALL)"
    r"|could not (?:receive|send|connect|fork|create|open|write)|a worker process died"
    r"|No space left on device|Input/output error"
)
_UNREADABLE = re.compile(r"unsupported version|support compression")


def blame(
    error: ToolError,
    *,
    log: str = "",
    superuser: bool = True,
    english: bool = True,
    hidden: bool = False,
    cut_off: bool = False,
) -> Blame:
    """Judge `error`, of a load whose archive's digests were right.

    `log` is all that the server wrote since it began, "" where it is not known. `superuser` says that
    nothing was forbidden to the load; `english`, that the server's messages can be told apart; `hidden`
    and `cut_off`, that the server was kept from files, and from other machines.
    """
    match = _SAID.match(error.message)
    if match is None or _CRASH.search(log) or _CONNECTING.match(match["said"]):
        return Blame.MISHAP  # killed, hung, not even started, or without its server
    # What fails at CREATE EXTENSION is the extension, not the dump.
    at_extension = str(error.detail.get("at", "")).startswith("EXTENSION ")
    if not english and _FROM_SERVER.match(match["said"]):
        return Blame.SERVER if at_extension else Blame.MISHAP
    sql = _SQL.search(match["said"])
    if sql is None:
        return _of_client(match["said"])
    message, state = sql["message"], _state(sql["message"], log)
    if hidden and _KEPT_FROM.match(message):
        return Blame.FILES
    if cut_off and (state == _UNREACHED_STATE or _UNREACHED.match(message)):
        return Blame.NETWORK
    found = _of_server(message, state, superuser=superuser)
    return Blame.SERVER if found is Blame.BACKUP and at_extension else found


def _of_server(message: str, state: str, *, superuser: bool) -> Blame:
    """What the server says of a statement, or of itself."""
    refused = not superuser and (state == _REFUSED_STATE or _REFUSED.match(message))
    if refused or state.startswith(_LACKING_STATE) or _LACKING.match(message):
        return Blame.SERVER
    if state.startswith(MISHAP_STATES) or _MISHAP.match(message):
        return Blame.MISHAP
    return Blame.BACKUP


def _of_client(said: str) -> Blame:
    """What pg_restore says by itself: about the archive, its connection, or this machine."""
    if _UNREADABLE.search(said):
        return Blame.CLIENT
    return Blame.MISHAP if _MISHAP_OF_CLIENT.search(said) else Blame.BACKUP


def _state(message: str, log: str) -> str:
    """The SQLSTATE with which the server logged this message, or ""."""
    found = ""
    for line in log.splitlines():
        state, _, rest = line.partition(" ")
        logged = _SQL.match(rest)
        if logged and logged["message"] == message:
            found = state
    return found
