"""Who is measured: what a team would write into cron, the floor that pg_dump itself sets, and ours.

Each contender is a list of commands as a shell would run them, one after the other, every one a fresh
process. Ours are the commands of `backup-pipeline`, configured by a file that is made here.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline.demo import servers
from backup_pipeline.demo.place import BUCKET
from backup_pipeline.demo.servers import ACCESS_KEY, Servers

COUNTED = "counted"
COMPARED = "compared"
RESTORED = "bench_restored"

_CONFIG = """
[store]
url = "s3://{bucket}/ours"
endpoint = {{ env = "DEMO_S3_ENDPOINT" }}
region = "us-east-1"
access_key_id = {{ env = "DEMO_S3_ACCESS_KEY_ID" }}
secret_access_key = {{ env = "DEMO_S3_SECRET_ACCESS_KEY" }}

[defaults]
dsn = {{ env = "BENCH_DSN" }}
password = {{ env = "DEMO_PASSWORD" }}
restore_dsn = {{ env = "BENCH_DSN" }}
restore_password = {{ env = "DEMO_PASSWORD" }}

[databases.{counted}]
proof = "counts"

[databases.{compared}]
"""


@dataclass(frozen=True)
class Contender:
    """One line of the table. `commands` are made anew for each run; `size` reads what it left."""

    key: str
    title: str
    commands: Callable[[], list[list[str]]]
    size: Callable[[], int]


@dataclass(frozen=True)
class Bench:
    """One database under measurement, and the folder for what is written on the way."""

    running: Servers
    database: str
    folder: Path

    @property
    def environment(self) -> Mapping[str, str]:
        """What every contender finds in its environment."""
        config = self.folder / "backups.toml"
        config.write_text(_CONFIG.format(bucket=BUCKET, counted=COUNTED, compared=COMPARED), encoding="utf-8")
        own = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        dsn = self.running.variables["DEMO_DSN"].rpartition("/")[0] + f"/{self.database}"
        return {
            **own,
            **self.running.variables,
            "BENCH_DSN": dsn,
            "BACKUP_PIPELINE_CONFIG": str(config),
            "PGPASSWORD": self.running.variables["DEMO_PASSWORD"],
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.running.variables["DEMO_S3_SECRET_ACCESS_KEY"],
            "AWS_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def cron(self) -> Contender:
        """pg_dump's custom format at gzip's best level into a file, then `aws s3 cp`."""
        file = self.folder / "cron.dump"
        return Contender(
            "cron",
            "pg_dump -Fc -Z9 to a file, then aws s3 cp",
            lambda: [
                [*self._pg_dump("--compress=9"), f"--file={file}"],
                [*self._aws("cp"), "--only-show-errors", str(file), f"s3://{BUCKET}/cron.dump"],
            ],
            lambda: file.stat().st_size,
        )

    def pipe(self) -> Contender:
        """The best that a shell can do: zstd, and no file in between."""
        dump, copy = self._pg_dump("--compress=zstd:1"), [*self._aws("cp"), "-", f"s3://{BUCKET}/pipe.dump"]
        script = '"${@:2:$1}" | "${@:2+$1}"'
        return Contender(
            "pipe",
            "pg_dump -Fc -Z zstd:1 piped into aws s3 cp",
            lambda: [["bash", "-o", "pipefail", "-c", script, "bash", str(len(dump)), *dump, *copy]],
            lambda: self._stored("pipe.dump"),
        )

    def floor(self) -> Contender:
        """What pg_dump needs to read the database, with nothing done to the bytes."""
        return Contender(
            "floor", "pg_dump -Fc -Z0 to nowhere", lambda: [self._pg_dump("--compress=0")], lambda: 0
        )

    def compressed(self) -> Contender:
        """The floor once more, with the compression that ours chooses, and the bytes thrown away."""
        command = self._pg_dump("--compress=zstd:1")
        return Contender("compressed", "pg_dump -Fc -Z zstd:1 to nowhere", lambda: [command], lambda: 0)

    def backup(self, name: str) -> Contender:
        """Our dump of this database: with its fingerprint, or with counts alone."""
        key, what = ("ours", "with fingerprint") if name == COMPARED else ("counts", "without fingerprint")
        return Contender(
            key,
            f"backup-pipeline backup, {what}",
            lambda: [self._ours("backup", name, "--no-prove")],
            lambda: self._newest(name),
        )

    def prove(self) -> Contender:
        """Restored into a scratch server, and the fingerprint taken again."""
        return Contender("prove", "backup-pipeline prove", lambda: [self._ours("prove", COMPARED)], lambda: 0)

    def restore(self) -> Contender:
        """Restored beside the live database, and compared."""
        command = ("restore", COMPARED, "--backup", "latest", "--into", RESTORED)
        return Contender("restore", "backup-pipeline restore", lambda: [self._ours(*command)], lambda: 0)

    def idle(self) -> list[str]:
        """Our program with nothing to do: what it holds before it moves a byte."""
        return [sys.executable, "-c", "import time, backup_pipeline.cli; time.sleep(1.0)"]

    def _ours(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "backup_pipeline.cli", "--quiet", *arguments]

    def _pg_dump(self, *options: str) -> list[str]:
        dsn = self.running.variables["DEMO_DSN"].rpartition("/")[0] + f"/{self.database}"
        return [self.running.tools.path("pg_dump"), "--format=custom", *options, f"--dbname={dsn}"]

    def _aws(self, verb: str) -> list[str]:
        return [servers.program("aws"), "--endpoint-url", self.running.s3_endpoint, "s3", verb]

    def _stored(self, key: str) -> int:
        return (self.folder / "s3" / BUCKET / key).stat().st_size

    def _newest(self, name: str) -> int:
        dumps = (self.folder / "s3" / BUCKET / "ours" / "databases" / name).rglob("database.dump")
        return max(dumps, key=lambda path: path.stat().st_mtime).stat().st_size
