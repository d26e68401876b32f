"""The folder that the demo lives in: what lies where, one user at a time, and starting afresh.

Everything is below one folder, `.demo/` in the checkout; only when PostgreSQL's user cannot enter it
(root's home is closed to it) does the cluster lie elsewhere, and `postgres` there is a link. Called by
__main__.py; what is started there is in servers.py.
"""

import contextlib
import fcntl
import os
import secrets
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from backup_pipeline.engines.postgres.cluster import server_identity
from backup_pipeline.errors import Busy, ToolError

CHECKOUT = Path(__file__).resolve().parents[2]
BUCKET = "backups"
_OLD_SERVER_S = 20.0
_ELSEWHERE = "backup-demo-"


@dataclass(frozen=True)
class Place:
    """What lies where below `folder`."""

    folder: Path

    @property
    def cluster(self) -> Path:
        """PostgreSQL's folder, with its data and its log."""
        return (self.folder / "postgres").resolve()

    @property
    def is_split(self) -> bool:
        """Whether PostgreSQL's folder lies elsewhere."""
        return not self.cluster.is_relative_to(self.folder.resolve())

    @property
    def objects(self) -> Path:
        """What the S3 server serves: a folder for each bucket."""
        return self.folder / "s3"

    @property
    def dagster_home(self) -> Path:
        """Dagster's history, and the dagster.yaml that it runs by."""
        return self.folder / "dagster_home"

    @property
    def environment(self) -> Path:
        """A file for a shell to read: the variables that backups.toml names."""
        return self.folder / "env"

    @property
    def log(self) -> Path:
        """All that the product's commands said during the demo."""
        return self.folder / "demo.log"

    @property
    def receive_log(self) -> Path:
        """What the receiver of the WAL said."""
        return self.folder / "receive.log"

    @property
    def recovered(self) -> Path:
        """Where the demo recovers its cluster to: a folder with a data directory, as `cluster` is one."""
        return self.cluster.parent / "recovered"

    def secret(self, name: str) -> Path:
        """A file with a random secret that only its owner may read; made when it is missing."""
        path = self.folder / f"{name}.secret"
        if not path.exists():
            write_private(path, secrets.token_urlsafe(24))
        return path


def default_folder() -> Path:
    """`.demo/` in the checkout."""
    return CHECKOUT / ".demo"


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator[Place]:
    """The place in `folder`, for this process alone. Raises Busy, naming who has it."""
    _make(folder)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Busy(
                f"{folder} is in use: {lock.read().strip() or 'another demo is starting'}",
                hint="Wait for it to end, end it with Ctrl-C, or name another --folder.",
            ) from None
        lock.truncate(0)
        lock.write(f"`{what}`, process {os.getpid()}, since {datetime.now(UTC):%H:%M:%S} UTC\n")
        lock.flush()
        place = Place(folder)
        _await_old_server(place.cluster / "data")
        yield place


def empty(place: Place) -> None:
    """Remove all that an earlier demo left: its database, its backups, Dagster's history of them."""
    for folder in (place.cluster, place.recovered):
        shutil.rmtree(folder, ignore_errors=True)
    if place.is_split and place.cluster.parent.name.startswith(_ELSEWHERE):
        shutil.rmtree(place.cluster.parent, ignore_errors=True)
    (place.folder / "postgres").unlink(missing_ok=True)
    for folder in (place.objects, place.dagster_home):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (*place.folder.glob("*.secret"), *place.folder.glob("*.log")):
        file.unlink()


def prepare(place: Place) -> None:
    """Make the folders that are missing: where PostgreSQL may lie, the bucket, Dagster's home."""
    link = place.folder / "postgres"
    if not link.exists() and server_identity() is not None and not _may_be_entered(place.folder):
        link.unlink(missing_ok=True)
        elsewhere = Path(tempfile.mkdtemp(prefix=_ELSEWHERE, dir="/var/tmp"))
        elsewhere.chmod(0o711)
        (elsewhere / "postgres").mkdir(mode=0o700)
        link.symlink_to(elsewhere / "postgres")
    (place.objects / BUCKET).mkdir(parents=True, exist_ok=True)
    place.dagster_home.mkdir(exist_ok=True)
    shutil.copyfile(CHECKOUT / "dagster.yaml", place.dagster_home / "dagster.yaml")


def write_environment(place: Place, variables: Mapping[str, str], *, paths: Sequence[Path]) -> None:
    """Write the variables as a shell reads them, `. .demo/env`, with `paths` before its own."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines.append(f'export PATH={shlex.quote(os.pathsep.join(map(str, paths)))}:"$PATH"')
    write_private(place.environment, "\n".join([*lines, ""]))


def write_private(path: Path, text: str) -> None:
    """A file that only its owner may read, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


def shown(path: Path) -> str:
    """A path as short as it can be from where the user stands, quoted for a shell where that is needed."""
    with contextlib.suppress(ValueError):
        return shlex.quote(str(path.resolve().relative_to(Path.cwd())))
    return shlex.quote(str(path))


def sourced(path: Path) -> str:
    """The command by which a shell reads the file."""
    name = shown(path)
    return f". {name}" if "/" in name else f". ./{name}"


def _make(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o755)  # whatever the umask: PostgreSQL runs as another user when we are root
    if not os.access(folder, os.W_OK):
        raise ToolError(
            f"{folder} belongs to another user", hint="Name another folder with --folder, or remove it."
        )


def _may_be_entered(folder: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.resolve().parents))


def _await_old_server(data: Path) -> None:
    """Wait for the server of a demo that was killed: it is ending, and its data is not ours yet."""
    deadline = time.monotonic() + _OLD_SERVER_S
    while time.monotonic() < deadline:
        try:
            pid = int((data / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
            if Path(f"/proc/{pid}/cwd").resolve(strict=True) != data.resolve():
                return
        except (OSError, ValueError):
            return
        time.sleep(0.05)
    raise Busy(
        f"a PostgreSQL server still runs in {data}",
        hint="An earlier demo was killed; end the server with `kill -INT` and the pid in its postmaster.pid.",
    )
