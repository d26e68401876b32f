"""The one place that runs child processes.

Everything that calls pg_dump, pg_restore, initdb or postgres comes through here: argv lists,
never a shell; a minimal environment; a deadline on whatever can hang; children that die with
their parent; and an error that shows the command (it holds no secrets), its code and its last
stderr lines, without what stderr.py keeps back. What to run is decided elsewhere.
"""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from backup_pipeline import confinement
from backup_pipeline.confinement import Confinement
from backup_pipeline.errors import ToolError
from backup_pipeline.stderr import from_a_message_on, without_values

CHUNK_BYTES = 1024 * 1024
_TAIL_BYTES = 4096
_READ_BYTES = 256 * 1024  # a statement in it, that is left out, may be longer than all else
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Identity:
    """The user that a child runs as; PostgreSQL's server refuses to run as root."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Command:
    """One child process to be: argv, what it adds to the environment, and who runs it.

    Secrets travel in `environment` (PGPASSWORD) or in files, never in `argv`, because argv is
    shown in errors and in process lists. Nothing of our own environment is handed on but PATH,
    HOME, locale and the like: a planted PGOPTIONS or PGSSLMODE must not change a backup.

    Without `network` it reaches nothing but Unix sockets. That takes Linux, and a kernel that lets
    this user make namespaces. With a `confinement` it touches no other files, which takes Landlock.
    Where the kernel cannot do what is asked, the child is not started.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    identity: Identity | None = None
    cwd: str | None = None
    network: bool = True
    confinement: Confinement | None = None

    def __str__(self) -> str:
        return shlex.join(self.argv)


@dataclass(frozen=True)
class Completed:
    """What a finished child left: exit code and both outputs, decoded leniently."""

    returncode: int
    stdout: str
    stderr: str


def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):
        return ctypes.CDLL(None, use_errno=True)
    return None


def _before_exec(signum: int, *, network: bool, ruleset: int | None) -> Callable[[], None] | None:
    """A hook for the forked child: ask the kernel for `signum` when our thread ends (Linux).

    It comes after everything that changes credentials, because the kernel forgets the request then;
    `ruleset` is confinement's, and comes last.
    """
    libc = _libc()
    if libc is None:
        return None
    prctl, parent = libc.prctl, os.getpid()

    def ask() -> None:
        if not network:
            _leave_network(libc)
        prctl(_PR_SET_PDEATHSIG, signum)
        if os.getppid() != parent:
            os._exit(127)
        if ruleset is not None:
            confinement.enter(libc, ruleset)

    return ask


def _leave_network(libc: ctypes.CDLL) -> None:
    """Move this process into a network namespace of its own, with not even a loopback that is up."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    libc.prctl(_PR_SET_DUMPABLE, 1)  # after a change of user, /proc/self would belong to root
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        handle = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(handle, text.encode())
        os.close(handle)


def start(
    command: Command,
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    parent_death_signal: int = signal.SIGKILL,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command`; it dies when the calling thread dies. The caller waits for it.

    Raises ToolError when the program cannot be started.
    """
    if not command.network and _libc() is None:
        raise ToolError(f"{command.argv[0]} cannot be cut off from the network on this system")
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment.update(command.environment)
    identity = command.identity
    child: subprocess.Popen[bytes] | None = None
    try:
        with contextlib.ExitStack() as stack:
            confined = command.confinement
            ruleset = stack.enter_context(confinement.prepared(confined)) if confined else None
            hook = _before_exec(parent_death_signal, network=command.network, ruleset=ruleset)
            stack.enter_context(_interrupts_held())
            child = subprocess.Popen(
                list(command.argv),
                env=environment,
                cwd=command.cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=tuple(pass_fds),
                user=identity.uid if identity else None,
                group=identity.gid if identity else None,
                extra_groups=[] if identity else None,
                preexec_fn=hook,  # noqa: PLW1509 - a few system calls, and no lock of Python's own
            )
    except subprocess.SubprocessError as error:
        raise ToolError(
            f"cannot start {command.argv[0]} cut off from the network or from files",
            hint="This kernel, or the container's rules, let this user make no network namespace.",
        ) from error
    except OSError as error:
        raise ToolError(
            f"cannot start {command.argv[0]}: {error.strerror}",
            hint="Check that the program is installed and that this user may run it.",
        ) from error
    except BaseException:
        if child is not None:  # an interrupt came while it was started: nobody will ever wait for it
            child.kill()
            child.wait()
        raise
    else:
        return child


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back while a child is forked, and deliver them at the end.

    Python drops what a signal's handler raises in the hooks that it runs around a fork: a Ctrl-C, or a
    termination in Dagster's UI, would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    came: list[int] = []
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    heard = {signum: handler for signum, handler in handlers.items() if callable(handler)}
    try:
        for signum in heard:
            signal.signal(signum, lambda number, _: came.append(number))
        yield
    finally:
        for signum, handler in heard.items():
            signal.signal(signum, handler)
        for number in came:
            signal.raise_signal(number)


def run(command: Command, *, timeout_s: float, stdin: bytes | None = None, check: bool = True) -> Completed:
    """Run `command` to its end and return its outputs.

    Raises ToolError when it fails (unless `check` is false) or outlives `timeout_s`.
    """
    process = start(
        command,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise failure(command, None, err.decode(errors="replace"), timeout_s=timeout_s) from None
        except BaseException:
            process.kill()
            raise
    done = Completed(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
    if check and done.returncode != 0:
        raise failure(command, done.returncode, done.stderr)
    return done


@contextlib.contextmanager
def stream(command: Command, *, stall_s: float) -> Iterator[Iterator[bytes]]:
    """Run `command` and yield its standard output as it comes, in chunks of at most 1 MiB.

    The iterator ends only after the child has ended with exit code 0; otherwise it raises
    ToolError, so a consumer that publishes on exhaustion never publishes a truncated stream.
    A child that writes nothing for `stall_s` seconds counts as hung. Leaving the context ends
    the child, whatever happened.
    """
    with tempfile.TemporaryFile() as errors:
        process = start(command, stdout=subprocess.PIPE, stderr=errors)
        try:
            yield _read(command, process, errors, stall_s)
        finally:
            terminate(process, grace_s=2.0)
            if process.stdout:
                process.stdout.close()


def _read(
    command: Command, process: subprocess.Popen[bytes], errors: IO[bytes], stall_s: float
) -> Iterator[bytes]:
    import select

    pipe = process.stdout
    if pipe is None:
        raise ToolError(f"{command.argv[0]} was started without a pipe")
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    while True:
        if not poll.poll(stall_s * 1000):
            process.kill()
            raise failure(command, None, tail(errors), timeout_s=stall_s)
        chunk = os.read(pipe.fileno(), CHUNK_BYTES)
        if not chunk:
            break
        yield chunk
    try:
        code = process.wait(timeout=stall_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise failure(command, None, tail(errors), timeout_s=stall_s) from None
    if code != 0:
        raise failure(command, code, tail(errors))


def terminate(process: subprocess.Popen[bytes], *, grace_s: float, signum: int = signal.SIGTERM) -> None:
    """End a child: `signum`, then SIGKILL after `grace_s` seconds; return when it is gone."""
    if process.poll() is not None:
        return
    process.send_signal(signum)
    deadline = time.monotonic() + grace_s
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
        return
    process.kill()
    process.wait()


def tail(file: IO[bytes]) -> str:
    """The last 4 KiB of a file that a child writes its errors to, without statements and values."""
    start = max(0, file.seek(0, os.SEEK_END) - _READ_BYTES)
    file.seek(start)
    said = file.read().decode(errors="replace")
    return without_values(from_a_message_on(said) if start else said)[-_TAIL_BYTES:]


def failure(command: Command, code: int | None, stderr: str, *, timeout_s: float = 0.0) -> ToolError:
    """The error for a child that failed: its command, its code, the last lines that it wrote.

    Statements and the values of rows are left out: an error is logged, mailed and stored.
    """
    program = os.path.basename(command.argv[0])
    lines = [line for line in without_values(stderr).strip().splitlines() if line.strip()][-6:]
    if code is None:
        ending = f"did not answer within {timeout_s:g} s and was ended"
    elif code < 0:
        ending = f"was killed by {signal.Signals(-code).name}"
    else:
        ending = f"ended with exit code {code}"
    said = f": {lines[-1]}" if lines else ""
    return ToolError(
        f"{program} {ending}{said}",
        detail={"command": str(command), **({"stderr": "\n    ".join(lines)} if lines else {})},
    )
