"""What of ours runs as the server's user while a contender is measured.

    python -m benchmarks.as_server begin CONFIG SYSTEM
    python -m benchmarks.as_server fetch CONFIG SYSTEM ORDER SPOOL SOCKET

`begin` begins the archive of that system, as `wal setup --apply` does. `fetch` answers restore_command as a
recovery does, from a plan that is the names in the JSON file ORDER. Started by wal_contenders.py.
"""

import json
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from backup_pipeline.config import Config
from backup_pipeline.config_file import parse
from backup_pipeline.domain.layout import wal_key
from backup_pipeline.domain.wal import parse_wal_name
from backup_pipeline.storage.store import Store, open_store
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.identity import System, claim
from backup_pipeline.wal.listing import read_archive
from backup_pipeline.wal.prefetch import Prefetch, serving

CLUSTER = "main"
SEGMENT_BYTES = 16 * 1024 * 1024


def main(arguments: list[str]) -> int:
    """Do what is asked."""
    verb, path, system, *rest = arguments
    store = open_store(_read(Path(path)).store)
    if verb == "begin":
        claim(store, CLUSTER, System(system, SEGMENT_BYTES), at=datetime.now(UTC))
        return 0
    order, spool, listens = rest
    _fetches(store, system, json.loads(Path(order).read_text(encoding="utf-8")), Path(spool), Path(listens))
    return 0


def _read(path: Path) -> Config:
    return parse(path.read_text(encoding="utf-8"), path)


def _fetches(store: Store, system: str, order: list[str], spool: Path, listens: Path) -> None:
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    keys = {  # as the plan of a recovery has them, which opens the store's clients too
        each.segment.name(SEGMENT_BYTES): wal_key(
            CLUSTER, system, parse_wal_name(each.segment.name(SEGMENT_BYTES)), each.sha256
        )
        for found in read_archive(store, CLUSTER).segments.values()
        for each in found
    }

    def bring(name: str, path: Path) -> object:
        return fetch(store, CLUSTER, name, path, system_identifier=system, key=keys.get(name, ""))

    prefetch = Prefetch(bring, order, spool)
    with serving(prefetch, listens):
        stop.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
