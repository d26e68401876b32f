"""What the WAL benchmarks stand on: a server with a backlog of real WAL, and an S3 server that speaks TLS.

Both stand in the bench's folder; how the WAL is made is in wal_load.py. Called by wal.py and base.py; who is
measured is in wal_contenders.py.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from psycopg import sql

from backup_pipeline import process
from backup_pipeline.demo.place import BUCKET, Place, prepare
from backup_pipeline.demo.servers import ACCESS_KEY, MAJOR, program, s3_server
from backup_pipeline.engines.postgres.cluster import LocalCluster, runs_as, server_identity
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.tools import SERVER, find_tools
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command, Identity
from backup_pipeline.wal.identity import read_system_identifier
from benchmarks.tls import make_certificates
from benchmarks.wal_load import Size, change, make, segments_of

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")

_WITHIN_S = 120.0
_SETTINGS = {
    "archive_mode": "on",
    "wal_level": "replica",
    "wal_keep_size": "32GB",  # what was archived stays, to be archived again by the next
    "max_wal_size": "512MB",  # some checkpoints in the load, and full pages behind them
    "checkpoint_timeout": "1h",
    "shared_buffers": "512MB",
    "autovacuum": "off",
    "log_checkpoints": "off",
}
_PYTHON = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Ground:
    """A server that runs, the segments that wait in it, and an S3 server.

    `folder` belongs to the server's user, who also runs what is measured. `template` is the data directory
    before the load, without WAL: a recovery that begins there replays `segments`.
    """

    folder: Path
    cluster: LocalCluster
    segments: tuple[str, ...]
    endpoint: str
    certificates: Path
    secret: str = field(repr=False)
    identity: Identity | None = None

    @property
    def template(self) -> Path:
        """The data directory before the load."""
        return self.folder / "template"

    @property
    def bucket(self) -> Path:
        """Where the S3 server keeps what it was given."""
        return self.certificates.parent / "s3" / BUCKET

    @property
    def authority(self) -> Path:
        """The certificate that the S3 server's is trusted by."""
        return self.folder / "ca.crt"

    @property
    def wal(self) -> Path:
        """The server's pg_wal."""
        return self.cluster.data / "pg_wal"

    @property
    def version(self) -> str:
        """PostgreSQL's, in words."""
        return self.run([f"{self.cluster.bin_dir}/postgres", "--version"]).stdout.strip()

    @property
    def system_identifier(self) -> str:
        """The server's."""
        return read_system_identifier(self.cluster.data)

    @property
    def python(self) -> str:
        """A Python that the server's user can run."""
        found = next((path for path in (sys.executable, _PYTHON) if runs_as(Path(path), self.identity)), "")
        if not found:
            raise ToolError(
                f"the server's user can run neither {sys.executable} nor {_PYTHON}",
                hint="Run the benchmarks as a user other than root.",
            )
        return found

    def environment(self) -> Mapping[str, str]:
        """What our own programs need besides."""
        packages = [path for path in sys.path if path.endswith("site-packages")]
        ours = str(Path(__file__).resolve().parents[1])
        path = {} if self.python == sys.executable else {"PYTHONPATH": os.pathsep.join([ours, *packages])}
        return {"AWS_CA_BUNDLE": str(self.authority), "AWS_EC2_METADATA_DISABLED": "true", **path}

    def write(self, name: str, text: str) -> Path:
        """A file that the server's user alone may read."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")
        self.give(path)
        return path

    def made(self, name: str) -> Path:
        """An empty folder of the server's user."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        self.give(path)
        return path

    def give(self, path: Path) -> None:
        """Have it belong to the server's user."""
        if self.identity is not None:
            os.chown(path, self.identity.uid, self.identity.gid)

    def run(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> process.Completed:
        """Run a command as the server's user."""
        command = Command(tuple(argv), environment or {}, identity=self.identity, cwd=str(self.folder))
        return process.run(command, timeout_s=600.0)

    @property
    def size_bytes(self) -> int:
        """All databases of the server."""
        with contextlib.closing(connect(self.cluster.endpoint())) as session:
            query = "SELECT sum(pg_catalog.pg_database_size(oid)) FROM pg_catalog.pg_database"
            row = session.execute(query.encode()).fetchone()
        return int(str(row[0])) if row else 0

    def change(self) -> None:
        """Write to some thousand rows, here and there."""
        change(self.cluster)

    def sync(self) -> None:
        """Have the disk done with what was written before: it is nobody's turn."""
        process.run(Command(("sync",)), timeout_s=600.0)

    def last_words(self) -> str:
        """The end of the server's log."""
        return self.cluster.log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def is_waiting(self, names: Sequence[str]) -> None:
        """Have `names` wait to be archived, and nothing else."""
        self.archive_by("")
        for path in list((self.wal / "archive_status").iterdir()):
            path.rename(path.with_suffix(".ready" if path.stem in names else ".done"))

    def await_archived(self) -> None:
        """Wait until nothing waits to be archived. Raises ToolError."""
        deadline = time.monotonic() + _WITHIN_S
        while any((self.wal / "archive_status").glob("*.ready")):
            if time.monotonic() > deadline:
                raise ToolError("WAL was not archived", detail={"log": self.last_words()})
            time.sleep(0.02)

    def forget(self, turn: str) -> None:
        """Remove what a turn has stored, and kept beside it."""
        for folder in (self.bucket / turn, *self.folder.glob(f"{turn}*")):
            shutil.rmtree(folder, ignore_errors=True)

    def archive_by(self, command: str) -> None:
        """Set archive_command and have the server read it."""
        with contextlib.closing(connect(self.cluster.endpoint())) as session:
            session.execute(sql.SQL("ALTER SYSTEM SET archive_command = {}").format(sql.Literal(command)))
            session.execute("SELECT pg_reload_conf()")


@contextlib.contextmanager
def standing(place: Place, size: Size, *, newest: bool = False) -> Iterator[Ground]:
    """Start both servers, making the cluster and its WAL when they are not there yet.

    PostgreSQL is Debian's 15 where it is installed, which Debian's pgBackRest can back up; else, and the
    `newest`, our 17, which summarizes its WAL.
    """
    prepare(place)
    is_debians = (DEBIAN_15 / "postgres").exists() and not newest
    installed = str(DEBIAN_15) if is_debians else find_tools(exactly=MAJOR, needs=SERVER).bin_dir
    settings = {**_SETTINGS, **({} if is_debians else {"summarize_wal": "on"})}
    certificates = place.folder / "tls"
    certificates.mkdir(exist_ok=True)
    make_certificates(certificates)
    cluster = LocalCluster(installed, place.cluster, settings=settings)
    secret = place.secret("s3").read_text(encoding="utf-8")
    # What S3 knows of an object without reading it, rclone reads the object for: an MD5 as its ETag.
    options = (
        "--etag-hash",
        "",
        "--cert",
        str(certificates / "server.crt"),
        "--key",
        str(certificates / "server.key"),
    )
    try:
        make(cluster, size)
        shutil.copyfile(certificates / "ca.crt", cluster.folder / "ca.crt")
        (cluster.folder / "ca.crt").chmod(0o644)
        with s3_server(place.objects, ACCESS_KEY, secret, options=options) as endpoint:
            cluster.start()
            names = tuple(path.name for path in segments_of(cluster.data))[: size.segments]
            yield Ground(cluster.folder, cluster, names, endpoint, certificates, secret, server_identity())
    finally:
        cluster.stop()


def installed_pgbackrest() -> str:
    """Debian's pgBackRest; "" where it is not installed."""
    return shutil.which("pgbackrest") or ""


def aws() -> str:
    """AWS's own command line."""
    return program("aws")
