"""What storage tests run in a process of its own: to measure it, or to kill it.

python -m backup_pipeline_tests.storage.child measure|hang URL ENDPOINT [KEY SECRET]
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.config import Secret, StoreConfig
from backup_pipeline.storage.store import open_store

MIB = 1024 * 1024


def command(verb: str, place: StoreConfig) -> process.Command:
    """The process that does `verb` to a store."""
    keys = [secret.reveal() for secret in (place.access_key_id, place.secret_access_key) if secret]
    argv = (
        sys.executable,
        "-m",
        "backup_pipeline_tests.storage.child",
        verb,
        place.url,
        place.endpoint,
        *keys,
    )
    return process.Command(argv, {"PYTHONPATH": ":".join(sys.path)})


def run(verb: str, place: StoreConfig, *, timeout_s: float) -> str:
    """Run it to its end; what it wrote."""
    return process.run(command(verb, place), timeout_s=timeout_s).stdout


def kill_while_hanging(place: StoreConfig) -> None:
    """Have it put 20 MiB of an object that would be longer, then kill it with SIGKILL."""
    started = process.start(command("hang", place), stdout=subprocess.PIPE)
    try:
        if started.stdout is None or started.stdout.readline() != b"hanging\n":
            raise AssertionError("the child ended before it hung")
    finally:
        started.kill()
        started.communicate()


def chunks(count: int, *, then_hang: bool = False) -> Iterator[bytes]:
    """A MiB at a time, like a pipe; then, if asked, a line on standard output and nothing more."""
    for number in range(count):
        yield bytes([number % 256]) * MIB
    if then_hang:
        sys.stdout.write("hanging\n")
        sys.stdout.flush()
        time.sleep(3600)


def peak_mib() -> float:
    """The most memory that this process has held (getrusage counts what its parent held, too)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def main(verb: str, url: str, endpoint: str, *keys: str) -> None:
    """Measure how memory grows with a long stream, both ways; or hang in the middle of a put."""
    access, secret = (Secret(key) for key in keys) if keys else (None, None)
    store = open_store(StoreConfig(url, endpoint=endpoint, access_key_id=access, secret_access_key=secret))
    if verb == "hang":
        store.put("hung/object", chunks(20, then_hang=True))
        return
    store.put("warm", chunks(1))
    before = peak_mib()
    store.put("long", chunks(300))
    read = sum(len(chunk) for chunk in store.read("long"))
    if read != 300 * MIB:
        sys.exit(f"read {read} bytes")
    sys.stdout.write(f"{peak_mib() - before}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
