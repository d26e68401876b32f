"""A PostgreSQL server of our own: made, started, stopped and removed on this machine.

Called by scratch.py for proofs, by the demo, and by the tests. The server is a child of ours and ends
with us. It listens on a socket that only we may open, and on TCP only when a port is asked for.
Servers that belong to someone else are never started or stopped here.
"""

import contextlib
import grp
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from psycopg.conninfo import make_conninfo

from backup_pipeline import confinement, process
from backup_pipeline.config import Secret
from backup_pipeline.confinement import Confinement
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.server_argv import (
    OURS,
    SUPERUSER,
    initdb_argv,
    postgres_argv,
    relaxed_settings,
    resetwal_argv,
)
from backup_pipeline.engines.postgres.socket_folder import make_socket_folder, remove_socket_folder
from backup_pipeline.errors import ConfigError, Refused, ServerError, ToolError
from backup_pipeline.process import Command, Completed, Identity

FREE_PORT = 0
"""As a port: any that is free."""

_INITDB_TIMEOUT_S = 120.0
_POLL_S = 0.02
_SLOWEST_POLL_S = 0.5
_PRIVATE_GIDS = range(59817, 59900)


@dataclass
class LocalCluster:
    """One cluster in `folder`: its data, its log, and, when we are root, whatever its user needs.

    `bin_dir` holds initdb and postgres. With `relaxed` it is fast and may lose everything in a crash.
    A TCP port (FREE_PORT takes any) listens on 127.0.0.1 only and asks for `password`; the socket
    lies in a folder of mode 0700 and asks for nothing. Run as root, the server runs as `nobody`,
    in a group that no one else is in.

    With `first_oid`, what is made in it is numbered from there on. `answers` says when it is ready, where
    nobody of ours may enter: a cluster that others made.

    It ends when the thread that started it ends: in order, or at once with `relaxed`. Without
    `network`, what runs in it reaches no other machine, where the system allows that: `cut_off` tells;
    with `confined`, no files but the cluster's own, those of PostgreSQL and the system to read, and what is
    `readable` and `writable` besides: `hidden` tells whether the others are out of reach. With `insists`
    it is not started where they are not.
    """

    bin_dir: str
    folder: Path
    relaxed: bool = False
    port: int | None = None
    password: Secret | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    locale: str = "C"
    first_oid: int | None = None
    network: bool = True
    confined: bool = False
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    insists: bool = False
    answers: Callable[[], bool] | None = None
    cut_off: bool = field(default=False, init=False)
    hidden: bool = field(default=False, init=False)
    _server: Popen[bytes] | None = field(default=None, init=False, repr=False)
    _socket_folder: Path | None = field(default=None, init=False, repr=False)

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    @property
    def _stop_signal(self) -> int:
        return signal.SIGQUIT if self.relaxed else signal.SIGINT

    @property
    def log(self) -> Path:
        """What the server writes to its standard error."""
        return self.folder / "server.log"

    def create(self) -> None:
        """Make the folder and, where there is none yet, the cluster. Done twice, it does nothing.

        A cluster that was half made is made anew: its data directory appears only when complete.
        """
        if self.port is not None and self.password is None:
            raise ConfigError(
                f"the cluster in {self.folder} would accept anyone on this machine by TCP",
                hint="Give a password, or no port.",
            )
        self.open()
        identity = server_identity()
        if (self.data / "PG_VERSION").exists():
            return
        unfinished = self.folder / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        password_file = self.folder / "data.password"
        try:
            password = self.password.reveal() if self.password else secrets.token_urlsafe(24)
            _write_private(password_file, password + "\n", identity)
            if identity is not None:
                os.chown(unfinished, identity.uid, identity.gid)
            initdb = self.program("initdb")
            argv = initdb_argv(initdb, unfinished, password_file, locale=self.locale, sync=not self.relaxed)
            process.run(Command(argv, identity=identity, cwd="/"), timeout_s=_INITDB_TIMEOUT_S)
            if self.first_oid is not None:
                argv = resetwal_argv(self.program("pg_resetwal"), unfinished, self.first_oid)
                process.run(Command(argv, identity=identity, cwd="/"), timeout_s=_INITDB_TIMEOUT_S)
        finally:
            password_file.unlink(missing_ok=True)
        unfinished.rename(self.data)

    def open(self) -> None:
        """Make the folder, and let the server's user pass through it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (identity := server_identity()) is not None:
            _open_to(self.folder, identity)

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Start the server and return when it answers. Raises ToolError with its last words if not."""
        if self._server is not None and self._server.poll() is None:
            return
        if self.port == FREE_PORT:
            self.port = free_port()
        await_end(self.data, timeout_s=timeout_s)
        remove_socket_folder(self.folder)
        self._socket_folder = make_socket_folder(self.folder, self.port or 5432)
        identity = server_identity()
        if identity is not None:
            os.chown(self._socket_folder, identity.uid, identity.gid)
        settings = {**OURS, **(relaxed_settings() if self.relaxed else {}), **self.settings}
        settings["listen_addresses"] = "" if self.port is None else "127.0.0.1"
        settings["port"] = str(self.port or 5432)
        settings["unix_socket_directories"] = f'"{self._socket_folder}"'
        postgres = self.program("postgres")
        try:
            place = self.kept_to(postgres)
        except Refused:
            remove_socket_folder(self.folder)
            raise
        self.hidden = place is not None
        if self.hidden:
            settings["dynamic_shared_memory_type"] = "mmap"  # in its own folder
        self.cut_off = self._can_be_cut_off(postgres)
        argv = postgres_argv(postgres, self.data, settings)
        command = Command(
            argv,
            identity=identity,
            cwd="/",
            network=not self.cut_off,
            confinement=place,
        )
        with self.log.open("ab") as log:
            self._server = process.start(command, stderr=log, parent_death_signal=self._stop_signal)
        try:
            self._await(command, self._server, timeout_s)
        except BaseException:
            self.stop()
            raise

    def run(self, name: str, *arguments: str, timeout_s: float, stdin: bytes | None = None) -> Completed:
        """Run one of PostgreSQL's programs on the stopped cluster, whatever its exit code.

        It runs as the server's user, and no less cut off than the server. Raises ToolError when it cannot
        be started, or outlives `timeout_s`.
        """
        program, identity = self.program(name), server_identity()
        command = Command(
            (program, *arguments),
            {"LC_ALL": "C"},
            identity=identity,
            cwd="/",
            network=not self._can_be_cut_off(program),
            confinement=self.kept_to(program),
        )
        return process.run(command, timeout_s=timeout_s, stdin=stdin, check=False)

    def _can_be_cut_off(self, program: str) -> bool:
        return not self.network and runs_as(Path(program), server_identity(), network=False)

    def kept_to(self, program: str) -> Confinement | None:
        """What a program of this cluster's user is kept to; None where it is not confined.

        Raises Refused when this `insists` and it cannot be.
        """
        place = self._confinement(program) if self.confined and confinement.available() else None
        # Libraries that lie elsewhere, as Nix has them, are out of reach then.
        if place is not None and runs_as(Path(program), server_identity(), confinement=place):
            return place
        if self.insists:
            raise Refused(
                f"what runs in {self.data} cannot be kept to its own files on this system",
                hint="It takes a Linux with Landlock, and a PostgreSQL whose libraries lie beside it or in "
                "the system's folders.",
            )
        return None

    def _confinement(self, postgres: str) -> Confinement:
        installed = Path(postgres).resolve().parent
        own = (self.folder.resolve(), self._socket_folder)
        return Confinement(
            readable=(
                *confinement.SYSTEM,
                *(str(installed.parent / name) for name in (installed.name, "lib", "lib64", "share")),
                *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)),
                *self.readable,
            ),
            writable=(*confinement.DEVICES, *map(str, filter(None, own)), *self.writable),
            network=self.network,
        )

    def _await(self, command: Command, server: Popen[bytes], timeout_s: float) -> None:
        deadline, pause_s = time.monotonic() + timeout_s, _POLL_S
        while True:
            if (code := server.poll()) is not None:
                raise process.failure(command, code, self._last_words())
            said = self._not_ready()
            if not said:
                return
            if time.monotonic() > deadline:
                raise ToolError(
                    f"the server in {self.data} did not answer within {timeout_s:g} s",
                    detail={"said": said, "log": self._last_words()},
                )
            time.sleep(pause_s)
            pause_s = min(_SLOWEST_POLL_S, pause_s * 1.1)  # a recovery may take hours

    def _not_ready(self) -> str:
        if self.answers is not None:
            return "" if self.answers() else "it is not ready yet"
        try:
            connect(self.endpoint()).close()
        except ServerError as error:
            return error.message
        return ""

    def _last_words(self) -> str:
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            return process.tail(log)
        return ""

    def stop(self, *, grace_s: float = 30.0) -> None:
        """Stop the server: sessions are ended and all is written; at once after `grace_s` seconds."""
        server, self._server = self._server, None
        if server is not None:
            if server.poll() is None:
                server.send_signal(self._stop_signal)
                with contextlib.suppress(TimeoutError):
                    _wait(server, grace_s)
            process.terminate(server, grace_s=5.0, signum=signal.SIGQUIT)
        remove_socket_folder(self.folder)
        self._socket_folder = None

    def remove(self) -> None:
        """Stop the server and delete the folder, data and all."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def endpoint(self, database: str = "postgres", *, user: str = SUPERUSER, tcp: bool = False) -> Endpoint:
        """How to connect while the server runs; by TCP the superuser's password comes along."""
        if self._socket_folder is None:
            raise ServerError(f"the server in {self.data} was not started")
        host = "127.0.0.1" if tcp else str(self._socket_folder)
        if tcp and self.port is None:
            raise ServerError(f"the server in {self.data} listens on no TCP port")
        dsn = make_conninfo("", host=host, port=self.port or 5432, user=user, dbname=database)
        return Endpoint(dsn, self.password if tcp and user == SUPERUSER else None)

    def program(self, name: str) -> str:
        """The program's path, from a copy where the server's user cannot run the original."""
        path = Path(self.bin_dir) / name
        identity = server_identity()
        if identity is None or runs_as(path, identity):
            return str(path)
        copy = self.folder / "postgresql"
        if not copy.exists():
            _copy_installation(Path(self.bin_dir).parent, copy, identity)
        path = copy / Path(self.bin_dir).name / name
        if not runs_as(path, identity):
            raise ToolError(
                f"user nobody cannot run {Path(self.bin_dir) / name}, nor a copy of it",
                hint="Install PostgreSQL where every user may read it, or do not run this as root.",
            )
        return str(path)


def server_identity() -> Identity | None:
    """Who the server runs as: None for ourselves, and `nobody` when we are root, which it refuses.

    The group is one that no account is in, so that other processes of `nobody` cannot enter the
    folder that the cluster lies in.
    """
    if os.getuid() != 0:
        return None
    try:
        uid = pwd.getpwnam("nobody").pw_uid
    except KeyError:
        raise ToolError(
            "PostgreSQL does not run as root, and there is no user nobody to run it as",
            hint="Run this as a user other than root.",
        ) from None
    taken = {group.gr_gid for group in grp.getgrall()}
    return Identity(uid, next(gid for gid in _PRIVATE_GIDS if gid not in taken))


def is_nobodys(owner: Identity) -> bool:
    """Whether `owner` is whom servers of ours may run as when we are root, and no user of its own."""
    with contextlib.suppress(KeyError):
        if owner.uid == pwd.getpwnam("nobody").pw_uid:
            return True
    return owner.gid in _PRIVATE_GIDS


def runs_as(
    program: Path,
    identity: Identity | None,
    *,
    network: bool = True,
    confinement: Confinement | None = None,
) -> bool:
    """Whether `identity` can run `program`, with the libraries that it needs; without network; confined."""
    with contextlib.suppress(ToolError):
        argv = (str(program), "--version")
        command = Command(argv, identity=identity, cwd="/", network=network, confinement=confinement)
        return process.run(command, timeout_s=20.0, check=False).returncode == 0
    return False


def server_in(data: Path) -> int | None:
    """The server that works in `data`, if any: its pid file may be old, and the pid another program's."""
    try:
        pid = int((data / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
        return pid if Path(f"/proc/{pid}/cwd").resolve(strict=True) == data.resolve() else None
    except (OSError, ValueError):
        return None


def await_end(data: Path, *, timeout_s: float) -> None:
    """Wait until a server that lost its parent has ended. Raises ToolError when it goes on."""
    deadline = time.monotonic() + timeout_s
    while (pid := server_in(data)) is not None:
        if time.monotonic() > deadline:
            raise ToolError(f"a server runs in {data} already, as process {pid}", hint="Stop it first.")
        time.sleep(_POLL_S)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _open_to(folder: Path, identity: Identity) -> None:
    """Let the server's user pass through `folder`. Raises ToolError when a parent keeps it out."""
    os.chown(folder, 0, identity.gid)
    folder.chmod(0o710)
    for parent in folder.resolve().parents:
        if not parent.stat().st_mode & stat.S_IXOTH:
            raise ToolError(
                f"a cluster in {folder} cannot be used: its user nobody may not enter {parent}",
                hint="Set TMPDIR to a folder that every user may enter, or do not run this as root.",
            )


def _copy_installation(prefix: Path, target: Path, identity: Identity) -> None:
    """Copy a PostgreSQL that finds its libraries beside itself to where the server's user may read it."""
    if not (prefix / "share").is_dir():
        raise ToolError(
            f"user nobody cannot run the programs below {prefix}",
            hint="Install PostgreSQL where every user may read it, or do not run this as root.",
        )
    shutil.copytree(prefix, target, symlinks=True)
    for path in (target, *target.rglob("*")):
        if not path.is_symlink():
            os.chown(path, 0, identity.gid)
            path.chmod(path.stat().st_mode | (0o050 if path.is_dir() else (path.stat().st_mode & 0o500) >> 3))


def _write_private(path: Path, text: str, identity: Identity | None) -> None:
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        if identity is not None:
            os.fchown(handle, identity.uid, identity.gid)
        file.write(text)


def _wait(server: Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while server.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_POLL_S)
