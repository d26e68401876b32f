"""What a child process may touch of this machine's files: Linux's Landlock.

Called by process.py, for servers that run what a dump brings along. It holds for the child and all that it
starts, takes no privilege to ask for, and leaves out what the kernel is too old for. Whoever is confined
cannot look into other processes either, whatever user they run as, nor, from Linux 6.12, send them signals.

Source: the kernel's manual, userspace-api/landlock.
"""

import contextlib
import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from backup_pipeline.errors import ToolError

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_VERSION_FLAG = 1
_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_KNOWN = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # version: how many rights of files it knows
_SINCE_RENAMES, _SINCE_NETWORK, _SINCE_SCOPES = 2, 4, 6
_TCP = 0b11  # bind and connect
_SCOPES = 0b11  # abstract sockets and signals

SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/alternatives",
    "/etc/group",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/timezone",
    "/dev/random",
    "/dev/urandom",
    "/sys/devices/system",
    "/var/cache/postgresql",
)
"""What programs of the system read, and nobody keeps secrets in."""

DEVICES = ("/dev/null", "/dev/zero")
"""What they write. Not /dev/shm: it holds the segments of all processes of a user."""


@dataclass(frozen=True)
class Confinement:
    """Files and folders, with all below them, that a child may read and run, and those that it may
    also write. One that does not exist counts for nothing. Without `network` it opens no TCP connection.
    """

    readable: tuple[str, ...]
    writable: tuple[str, ...]
    network: bool = True


@cache
def available() -> bool:
    """Whether this kernel can confine a child that renames files between folders, as PostgreSQL does."""
    return version() >= _SINCE_RENAMES


def keeps_from_network() -> bool:
    """Whether this kernel can keep a child from TCP connections, where there is no namespace for it."""
    return version() >= _SINCE_NETWORK


def version() -> int:
    """Of the kernel's Landlock; 0 without."""
    if sys.platform != "linux":
        return 0
    with contextlib.suppress(OSError):
        return _call(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    return 0


@contextlib.contextmanager
def prepared(confinement: Confinement) -> Iterator[int]:
    """The handle that `enter` takes, in a child of this process. Raises ToolError where there is none."""
    known = version()
    if known < _SINCE_RENAMES:
        raise ToolError("this kernel cannot keep a child from files: it has no Landlock of version 2")
    handled = (1 << _KNOWN.get(known, 16)) - 1
    tcp = _TCP if known >= _SINCE_NETWORK and not confinement.network else 0
    scopes = _SCOPES if known >= _SINCE_SCOPES else 0
    attributes = struct.pack("=QQQ", handled, tcp, scopes)
    size = 24 if known >= _SINCE_SCOPES else 16 if known >= _SINCE_NETWORK else 8
    ruleset = _call(_CREATE_RULESET, attributes, size, 0)
    try:
        for paths, rights in ((confinement.readable, _READING), (confinement.writable, handled)):
            for path in paths:
                _allow(ruleset, path, rights & handled)
        yield ruleset
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= _OF_FILES
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, handle), 0)
    finally:
        os.close(handle)


def enter(libc: ctypes.CDLL, ruleset: int) -> None:
    """Confine this process for good, by two system calls: for a forked child."""
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")


def _call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
