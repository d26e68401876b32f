"""Run one command and say what it cost: seconds, CPU seconds, memory of its whole tree of processes.

Servers do not count: a process whose program is named in `SERVERS` is left out, with its children. What
the whole machine worked meanwhile, servers and all, is told apart. Memory is the peak of the tree's PSS
(shared pages counted once between them), looked at every 20 ms.
"""

import contextlib
import ctypes
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SERVERS = ("postgres", "rclone")
S3_SERVERS = ("rclone",)
ADOPTED = ("pgbackrest",)
_PR_SET_CHILD_SUBREAPER = 36
_EVERY_S = 0.02
_TICKS = os.sysconf("SC_CLK_TCK")


class CommandFailed(Exception):
    """A command under measurement ended with an error; its last words are the message."""


@dataclass(frozen=True)
class Cost:
    """What a command cost. `cpu_s` is user and system time of all its processes but servers.

    `machine_cpu_s` is that of everything that ran: with as many cores as `machine_cpu_s / wall_s`, there
    was nothing left to gain by doing more at once.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    machine_cpu_s: float = 0.0
    peak_bytes: int = 0

    def __add__(self, after: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(
            self.wall_s + after.wall_s,
            self.cpu_s + after.cpu_s,
            self.machine_cpu_s + after.machine_cpu_s,
            max(self.peak_bytes, after.peak_bytes),
        )


def measure(argv: Sequence[str], environment: Mapping[str, str], *, into: Path | None = None) -> Cost:
    """Run `argv` with its output to `into`, or to nowhere. Raises CommandFailed."""
    with tempfile.TemporaryFile() as errors, (into or Path(os.devnull)).open("wb") as output:
        started, machine_s = time.monotonic(), machine_cpu_s()
        child = subprocess.Popen(
            list(argv), env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
        watch = _Watch(child.pid)
        watch.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            watch.stop()
        wall_s, machine_s = time.monotonic() - started, machine_cpu_s() - machine_s
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
            said = errors.read().decode(errors="replace")
            raise CommandFailed(f"{' '.join(argv)}: exit code {child.returncode}\n{said}")
    # Children that were waited for are in wait4's sum; a server that a proof starts is one of them.
    cpu_s = usage.ru_utime + usage.ru_stime - watch.servers_cpu_s
    return Cost(wall_s, max(0.0, cpu_s), machine_s, watch.peak_bytes)


@dataclass(frozen=True)
class Work:
    """What went on for a while below this process: by servers of S3, and by all else of ours."""

    wall_s: float
    cpu_s: float
    server_cpu_s: float

    def lasting(self, wall_s: float) -> "Work":
        """The same, timed by another clock."""
        return replace(self, wall_s=wall_s)


class Working:
    """Work under way; `done` when its block is left."""

    done: Work

    def __init__(self) -> None:
        self._started_s, (self._cpu_s, self._server_cpu_s) = time.monotonic(), _work_below()

    @property
    def elapsed_s(self) -> float:
        """Since it began."""
        return time.monotonic() - self._started_s

    def end(self) -> None:
        """Say what it was."""
        wall_s, (cpu_s, server_cpu_s) = self.elapsed_s, _work_below()
        self.done = Work(wall_s, cpu_s - self._cpu_s, server_cpu_s - self._server_cpu_s)


@contextlib.contextmanager
def working() -> Iterator[Working]:
    """Count the CPU seconds of all processes below this one, also of those that leave their parents.

    A process that ended without its parent, as pgBackRest's do, comes to us and is counted (Linux).
    """
    _adopt_orphans()
    found = Working()
    yield found
    found.end()


def _adopt_orphans() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _work_below() -> tuple[float, float]:
    """(all but S3's servers, S3's servers): CPU seconds of this process's descendants, dead ones too."""
    _reap_orphans()
    own = os.getpid()
    after_name = Path(f"/proc/{own}/stat").read_text().rpartition(")")[2].split()
    work, servers = sum(map(int, after_name[13:15])) / _TICKS, 0.0
    pending = _children(own)
    while pending:
        pid = pending.pop()
        if _program(pid) in S3_SERVERS:
            servers += cpu_s(pid)
        else:
            work += cpu_s(pid)
        pending += _children(pid)
    return work, servers


def _reap_orphans() -> None:
    """Take the ends of processes that are not children of our making."""
    for pid in _children(os.getpid()):
        if _program(pid) in ADOPTED:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


class _Watch(threading.Thread):
    """Looks at a tree of processes until it is stopped."""

    def __init__(self, root: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.peak_bytes = 0
        self._root = root
        self._stopping = threading.Event()
        self._servers: dict[int, float] = {}

    @property
    def servers_cpu_s(self) -> float:
        """What servers among the children took, as last seen."""
        return sum(self._servers.values())

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        while not self._stopping.is_set():
            counted, servers = tree(self._root)
            self.peak_bytes = max(self.peak_bytes, sum(pss_bytes(pid) for pid in counted))
            for pid in servers:
                self._servers[pid] = max(self._servers.get(pid, 0.0), cpu_s(pid))
            self._stopping.wait(_EVERY_S)


def tree(root: int) -> tuple[list[int], list[int]]:
    """The processes below `root`, itself included: those that count, and the topmost servers."""
    counted: list[int] = []
    servers: list[int] = []
    pending = [root]
    while pending:
        pid = pending.pop()
        if pid != root and _program(pid) in SERVERS:
            servers.append(pid)
            continue
        counted.append(pid)
        pending += _children(pid)
    return counted, servers


def pss_bytes(pid: int) -> int:
    """A process's memory, shared pages divided among their users; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of the children that it waited for; 0 when it is gone."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(ticks) for ticks in after_name[11:15]) / _TICKS
    except (OSError, ValueError, IndexError):
        return 0.0


def machine_cpu_s() -> float:
    """CPU seconds that all processors have worked since the machine started."""
    user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq))) / _TICKS


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    except (OSError, ValueError):
        pass
    return found
