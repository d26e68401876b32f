"""What each step of archiving and fetching a segment takes of a processor, measured alone.

    python -m benchmarks.wal_shares [--segments 30] [--folder F] [--quick]

The profile behind wal.py's table: the same segments and S3 server, one step after the other in one thread.
Processor time, and not seconds: two processors that carry everything are what the drain waits for.
"""

import argparse
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.config import Secret, StoreConfig
from backup_pipeline.demo import place
from backup_pipeline.demo.place import BUCKET
from backup_pipeline.demo.servers import ACCESS_KEY
from backup_pipeline.domain.layout import wal_key
from backup_pipeline.domain.wal import parse_wal_name
from backup_pipeline.errors import BackupError
from backup_pipeline.process import Command
from backup_pipeline.storage.store import Store, open_store, read_all
from backup_pipeline.wal import client
from backup_pipeline.wal.archive import WalArchive, objects_of
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.identity import System, claim
from backup_pipeline.wal.packing import AT_ONCE_BYTES, opened, packed
from benchmarks import table
from benchmarks.measure import working
from benchmarks.wal_ground import Ground, standing
from benchmarks.wal_load import BACKLOG, SMALL

CLUSTER = "main"
Step = Callable[[Path], object]


def main() -> int:
    """Measure and print."""
    asked = _parse()
    try:
        with (
            place.held(asked.folder, "python -m benchmarks.wal_shares") as here,
            standing(here, SMALL if asked.quick else BACKLOG) as ground,
        ):
            os.environ["AWS_CA_BUNDLE"] = str(ground.authority)
            paths = [ground.wal / name for name in ground.segments[: asked.segments]]
            rows = [_client(len(paths))]
            rows += [_measure(title, step, paths) for title, step in _steps(ground, paths)]
    except BackupError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    print(f"Processor time for a segment of 16 MiB, mean of {len(paths)}\n")
    print(table.markdown(("what", "CPU ms", "S3 CPU ms"), rows))
    return 0


def _steps(ground: Ground, paths: Sequence[Path]) -> list[tuple[str, Step]]:
    store, system = _store(ground), ground.system_identifier
    archive = WalArchive(store, CLUSTER)
    archive.look()
    names = {path: parse_wal_name(path.name) for path in paths}
    with_digest = {path: _packed(path) for path in paths}
    keys = {path: wal_key(CLUSTER, system, names[path], digest) for path, (_, digest) in with_digest.items()}
    target = ground.certificates / "fetched"

    return [
        ("push: reading", lambda path: path.read_bytes()),
        ("push: reading, SHA-256", lambda path: hashlib.sha256(path.read_bytes()).digest()),
        ("push: reading, SHA-256, zstd", _packed),
        (
            "push: listing a name that is not there",
            lambda path: objects_of(store, CLUSTER, system, names[path]),
        ),
        ("push: writing the object", lambda path: store.put(keys[path], [with_digest[path][0]])),
        ("push: listing a name that is there", lambda path: objects_of(store, CLUSTER, system, names[path])),
        ("fetch: reading the object", lambda path: read_all(store, keys[path])),
        (
            "fetch: all of it",
            lambda path: fetch(store, CLUSTER, path.name, target, system_identifier=system, key=keys[path]),
        ),
        ("push again: all of it", archive.push),
    ]


def _client(times: int) -> tuple[str, str, str]:
    """What archive_command starts for each segment, from a shell, as PostgreSQL does."""
    one = shlex.join((sys.executable, "-I", "-S", client.__file__, "fetch", "--socket", "/nowhere", "a", "b"))
    script = f"for i in $(seq {times}); do ({one} 2>/dev/null || true); done"
    with working() as work:
        process.run(Command(("sh", "-c", script)), timeout_s=60.0)
    return "the client: a shell, Python, a socket", f"{1000 * work.done.cpu_s / times:.1f}", "0.0"


def _store(ground: Ground) -> Store:
    """A store in which an archive of the server was begun."""
    store = open_store(
        StoreConfig(
            f"s3://{BUCKET}/shares-{os.getpid()}",
            endpoint=ground.endpoint,
            region="us-east-1",
            access_key_id=Secret(ACCESS_KEY),
            secret_access_key=Secret(ground.secret),
        )
    )
    claim(store, CLUSTER, System(ground.system_identifier, AT_ONCE_BYTES), at=datetime.now(UTC))
    return store


def _packed(path: Path) -> tuple[bytes, str]:
    with opened(path) as file, packed(file) as (pack, digest, _):
        return pack.read(), digest


def _measure(title: str, step: Step, paths: Sequence[Path]) -> tuple[str, str, str]:
    step(paths[0])
    started_s = time.process_time()
    with working() as work:
        for path in paths:
            step(path)
    own_s = time.process_time() - started_s
    scale = 1000 / len(paths)
    return title, f"{scale * (own_s + work.done.cpu_s):.1f}", f"{scale * work.done.server_cpu_s:.1f}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wal_shares", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=place.default_folder() / "bench" / "wal")
    parser.add_argument("--segments", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="two segments: does it run at all?")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
