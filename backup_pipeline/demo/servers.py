"""The demo's two servers, PostgreSQL and S3, on loopback; and the variables by which backups.toml finds them.

Both are children of ours and end with us. Called by story.py, dev.py, the benchmarks and the tests.
"""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.config import CONFIG_VARIABLE, Secret
from backup_pipeline.demo import filler
from backup_pipeline.demo.place import CHECKOUT, Place, prepare, write_environment
from backup_pipeline.engines.postgres.cluster import LocalCluster, free_port
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server_argv import SUPERUSER, relaxed_settings
from backup_pipeline.engines.postgres.tools import SERVER, Tools, find_tools
from backup_pipeline.errors import ToolError

MAJOR = 17
ACCESS_KEY = "demo-access-key"
CLUSTER = "main"
_ANNOUNCED = rb"server on \[(https?://[0-9.:]+)/\]"
_S3_WITHIN_S = 30.0
_RECEIVES_WITHIN_S = 30.0
_RECEIVER_GRACE_S = 15.0


@dataclass(frozen=True)
class Servers:
    """Both servers while they run. `variables` are those that backups.toml names."""

    postgres: LocalCluster
    tools: Tools
    s3_endpoint: str
    variables: Mapping[str, str] = field(repr=False)

    def database(self, name: str = filler.DATABASE) -> Endpoint:
        """A database of the server, as its superuser, on its private socket."""
        return self.postgres.endpoint(name)

    def application(self, name: str = filler.DATABASE) -> Endpoint:
        """The same as the application reaches it."""
        return self.postgres.endpoint(name, user=filler.APPLICATION)


@contextlib.contextmanager
def running(place: Place, *, durable: bool = False) -> Iterator[Servers]:
    """Start what is in `place`, making what is missing, and write the variables to its `env` file.

    The database need not outlive a crash of the machine, and is faster so, unless it is `durable`.
    """
    tools = find_tools(exactly=MAJOR, needs=SERVER)
    prepare(place)
    port = preferred_port(place, 0)
    password = place.secret("postgres")
    cluster = LocalCluster(
        tools.bin_dir,
        place.cluster,
        port=port,
        password=Secret(file=str(password), key="the demo's password"),
        settings=_settings(durable),
    )
    with contextlib.ExitStack() as stack:
        s3_secret = place.secret("s3").read_text(encoding="utf-8")
        address = f"127.0.0.1:{preferred_port(place, 1)}"
        endpoint = stack.enter_context(s3_server(place.objects, ACCESS_KEY, s3_secret, address=address))
        cluster.create()
        stack.callback(cluster.stop)
        cluster.start()
        variables = {
            "DEMO_DSN": f"postgresql://{SUPERUSER}@127.0.0.1:{port}/{filler.DATABASE}",
            "DEMO_CLUSTER_DSN": f"postgresql://{SUPERUSER}@127.0.0.1:{port}/postgres",
            "DEMO_PASSWORD": password.read_text(encoding="utf-8"),
            "DEMO_S3_ENDPOINT": endpoint,
            "DEMO_S3_ACCESS_KEY_ID": ACCESS_KEY,
            "DEMO_S3_SECRET_ACCESS_KEY": s3_secret,
            CONFIG_VARIABLE: str(CHECKOUT / "backups.toml"),
            "DAGSTER_HOME": str(place.dagster_home),
        }
        write_environment(place, variables, paths=[Path(sys.prefix) / "bin", Path(tools.bin_dir)])
        yield Servers(cluster, tools, endpoint, variables)


@contextlib.contextmanager
def receiving(place: Place, running: Servers) -> Iterator[None]:
    """`backup-pipeline wal receive main` over the servers; what it says is in `receive.log`.

    Raises ToolError when it does not begin to receive.
    """
    argv = (sys.executable, "-m", "backup_pipeline.cli", "wal", "receive", CLUSTER)
    command = process.Command(argv, running.variables)
    with place.receive_log.open("w+b") as log:
        child = process.start(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + _RECEIVES_WITHIN_S
            while b"receiving " not in os.pread(log.fileno(), 65536, 0):
                if child.poll() is not None or time.monotonic() > deadline:
                    raise process.failure(
                        command, child.poll(), process.tail(log), timeout_s=_RECEIVES_WITHIN_S
                    )
                time.sleep(0.05)
            yield
        finally:
            process.terminate(child, grace_s=_RECEIVER_GRACE_S)


def preferred_port(place: Place, which: int) -> int:
    """A free port of 127.0.0.1; the same one each time for the same folder, unless it is taken."""
    digest = hashlib.sha256(f"{place.folder.resolve()}".encode()).digest()
    port = 20000 + int.from_bytes(digest[:4], "big") % 1000 * 10 + which  # below what systems hand out
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return port
    return free_port()


@contextlib.contextmanager
def s3_server(
    folder: Path,
    access_key_id: str,
    secret_access_key: str,
    *,
    address: str = "127.0.0.1:0",
    options: Sequence[str] = (),
) -> Iterator[str]:
    """`rclone serve s3` over `folder`, in which a folder is a bucket; yields its endpoint.

    Raises ToolError when it is not installed, or does not start.
    """
    argv = (
        program("rclone"),
        "serve",
        "s3",
        "--config",
        os.devnull,
        "--addr",
        address,
        *options,
        str(folder),
    )
    # The keys go by the environment, as CSV: the arguments of a process can be read by everybody.
    command = process.Command(argv, {"RCLONE_AUTH_KEY": f'"{access_key_id},{secret_access_key}"'})
    with tempfile.TemporaryFile() as output:
        child = process.start(command, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + _S3_WITHIN_S
            # pread: the child writes through the same file position
            while not (found := re.search(_ANNOUNCED, os.pread(output.fileno(), 65536, 0))):
                if child.poll() is not None or time.monotonic() > deadline:
                    raise process.failure(command, child.poll(), process.tail(output), timeout_s=_S3_WITHIN_S)
                time.sleep(0.01)
            yield found[1].decode()
        finally:
            process.terminate(child, grace_s=5.0)


def program(name: str) -> str:
    """The path of a program that is installed beside our Python, or on PATH. Raises ToolError."""
    beside = Path(sys.prefix) / "bin" / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ToolError(f"{name} is not installed", hint="`make` installs it.")
    return found


def _settings(durable: bool) -> dict[str, str]:
    shared_memory = "dynamic_shared_memory_type"
    return {
        **({} if durable else {"fsync": "off", "synchronous_commit": "off"}),
        "max_wal_size": "2GB",
        "log_min_messages": "fatal",
        **{name: value for name, value in relaxed_settings().items() if name == shared_memory},
    }
