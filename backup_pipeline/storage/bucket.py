"""What the place of a store is and can do, found out by trying it on scratch keys.

`backup-pipeline probe` shows it. Nothing is assumed from a server's name or its answers: an
effect is read back. What only S3 has is in bucket_s3.py, what only a directory has in
bucket_directory.py. Nothing here decides how backups are made.
"""

import contextlib
import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from backup_pipeline.domain import layout
from backup_pipeline.errors import CopyUnsupported, ObjectExists, ObjectNotFound, StoreError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store, read_all

MIB = 1024 * 1024
RACERS = 8


class Status(StrEnum):
    """How well the place does one thing."""

    OK = "ok"
    LIMITED = "limited"
    FAILED = "failed"


@dataclass(frozen=True)
class ProbeResult:
    """One thing that was tried: what was found, and what follows from it ("" when nothing does)."""

    name: str
    status: Status
    found: str
    consequence: str = ""


def ok(name: str, found: str, consequence: str = "") -> ProbeResult:
    """A result as it should be."""
    return ProbeResult(name, Status.OK, found, consequence)


def limited(name: str, found: str, consequence: str) -> ProbeResult:
    """A result to know of."""
    return ProbeResult(name, Status.LIMITED, found, consequence)


def failed(name: str, found: str, consequence: str) -> ProbeResult:
    """A result to act on."""
    return ProbeResult(name, Status.FAILED, found, consequence)


@dataclass(frozen=True)
class Check:
    """One thing to try; `attempt` may raise StoreError, which is then what was found."""

    name: str
    attempt: Callable[[], ProbeResult]
    if_failed: str


def probe(store: Store) -> tuple[ProbeResult, ...]:
    """Try the place and say what it does. Its scratch keys are gone afterwards.

    When not even one small object can be kept, that is the only result: each further check
    would wait for the same failure.
    """
    scratch = f"{layout.SCRATCH}{secrets.token_hex(8)}/"
    results: list[ProbeResult] = []
    try:
        for check in _checks(store, scratch):
            results.append(_carry_out(check))
            if len(results) == 1 and results[0].status is Status.FAILED:
                break
    finally:
        left = _clean(store, scratch)
    if left and results[0].status is not Status.FAILED:
        results.append(failed("cleaning up", left, f"Delete what lies under {scratch}."))
    return tuple(results)


def abort_uploads(store: Store, *, before: datetime) -> tuple[str, ...]:
    """Drop the parts of uploads that began before a time and were never completed; their keys.

    A killed process leaves such parts: they are in no listing, but they are billed. A place
    without such uploads, as a directory is, has none.
    """
    if not store.url.startswith("s3://"):
        return ()
    from backup_pipeline.storage import bucket_s3  # boto3 costs 0.6 s

    return bucket_s3.abort_uploads(store, before=before)


def _checks(store: Store, scratch: str) -> Iterator[Check]:
    yield from _common(store, scratch)
    if isinstance(store, DirectoryStore):
        from backup_pipeline.storage import bucket_directory

        yield from bucket_directory.checks(store)
    elif store.url.startswith("s3://"):
        from backup_pipeline.storage import bucket_s3  # boto3 costs 0.6 s

        yield from bucket_s3.checks(store, scratch)


def _carry_out(check: Check) -> ProbeResult:
    try:
        return check.attempt()
    except StoreError as error:
        found = error.message.rstrip(".") + (f". {error.hint}" if error.hint else "")
        return failed(check.name, found, check.if_failed)


def _clean(store: Store, scratch: str) -> str:
    """Delete the scratch keys; what was left, and why."""
    try:
        refused = store.delete([found.key for found in store.list(scratch)])
    except StoreError as error:
        return error.message
    return "; ".join(f"{key}: {why}" for key, why in refused.items())


def _common(store: Store, scratch: str) -> Sequence[Check]:
    """What every place is tried for."""
    return (
        Check("round trip", lambda: _round_trip(store, scratch), "No backup can be kept here."),
        Check("odd keys", lambda: _odd_keys(store, scratch), "Some keys come back as others."),
        Check("overwriting", lambda: _overwriting(store, scratch), "Verdicts and leases may be read stale."),
        Check("put-if-absent", lambda: _put_if_absent(store, scratch), _NOT_CONDITIONAL),
        Check("long objects", lambda: _long_objects(store, scratch), "Dumps cannot be kept here."),
        Check("aborted uploads", lambda: _aborted(store, scratch), "A dump may look complete and be half."),
        Check("ranges", lambda: _ranges(store, scratch), "Archives can only be read from their beginning."),
        Check("copying within the store", lambda: _copying(store, scratch), _COPIES_STREAM),
        Check("batch delete", lambda: _batch_delete(store, scratch), "Retention cannot delete."),
    )


_NOT_CONDITIONAL = (
    "Two processes that write one key at the same moment can both believe they were first; the random part "
    "or the digest in keys keeps backups and WAL from overwriting each other."
)
_COPIES_STREAM = "When one dump serves two tiers, its bytes pass through this machine a second time."


def _round_trip(store: Store, scratch: str) -> ProbeResult:
    key, data = f"{scratch}round-trip", secrets.token_bytes(1000)
    store.put(key, [data])
    if read_all(store, key) != data or store.head(key).size_bytes != len(data):
        return failed("round trip", "what was read is not what was written", "No backup can be kept here.")
    if [found.key for found in store.list(scratch)] != [key]:
        return failed("round trip", "what was written is not listed", "Backups would not be found.")
    if refused := store.delete([key]):
        return limited(
            "round trip",
            f"written, read and listed, but not deleted: {refused[key]}",
            "Prune needs credentials that may delete.",
        )
    try:
        store.head(key)
    except ObjectNotFound:
        return ok("round trip", f"written, read, listed and deleted in {store.url}")
    return failed("round trip", "a deleted object is still there", "Retention cannot delete.")


def _odd_keys(store: Store, scratch: str) -> ProbeResult:
    keys = sorted(f"{scratch}odd/{name}" for name in ("two  spaces", "a+b%41", "q?x#y&z=", "ü日本"))
    for key in keys:
        store.put(key, [key.encode()])
    if [found.key for found in store.list(f"{scratch}odd/")] != sorted(keys, key=str.encode):
        return failed("odd keys", "keys are listed in another order or form", "Listings cannot be trusted.")
    if any(read_all(store, key) != key.encode() for key in keys):
        return failed("odd keys", "a key led to another object", "Some keys come back as others.")
    return ok("odd keys", "spaces, signs and letters of any script, listed in order")


def _overwriting(store: Store, scratch: str) -> ProbeResult:
    key, stale = f"{scratch}overwritten", 0
    for length in range(1, 11):
        data = secrets.token_bytes(length)
        store.put(key, [data])
        listed = next(store.list(key)).size_bytes
        stale += read_all(store, key) != data or store.head(key).size_bytes != length or listed != length
    if stale:
        return limited(
            "overwriting",
            f"{stale} of 10 times an older object was seen after a newer one was written",
            "Verdicts, pins and leases may be read stale for a while.",
        )
    return ok("overwriting", "each write was seen at once, by reading and by listing")


def _put_if_absent(store: Store, scratch: str) -> ProbeResult:
    """As backups use it; bucket_s3 asks the server alone, without the look beforehand."""
    key, barrier = f"{scratch}race", threading.Barrier(RACERS)

    def race(number: int) -> bool:
        barrier.wait()
        try:
            store.put_if_absent(key, b"%d" % number)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        won = [number for number, first in enumerate(pool.map(race, range(RACERS))) if first]
    winner = int(read_all(store, key))
    try:
        store.put_if_absent(key, b"late")
    except ObjectExists:
        late = False
    else:
        late = True
    if late:
        return limited("put-if-absent", "a second writer overwrote the first", _NOT_CONDITIONAL)
    if won == [winner]:
        return ok("put-if-absent", f"of {RACERS} racing writers one succeeded")
    found = f"{len(won)} of {RACERS} racing writers were told that they succeeded"
    return limited("put-if-absent", found, _NOT_CONDITIONAL)


def _long_objects(store: Store, scratch: str) -> ProbeResult:
    key, sent = f"{scratch}long", hashlib.sha256()

    def stream() -> Iterator[bytes]:
        for _ in range(20):
            chunk = secrets.token_bytes(MIB)
            sent.update(chunk)
            yield chunk

    store.put(key, stream())
    received = hashlib.sha256()
    for chunk in store.read(key):
        received.update(chunk)
    if received.digest() != sent.digest():
        return failed("long objects", "20 MiB came back changed", "Dumps cannot be kept here.")
    return ok("long objects", "20 MiB of unknown length, written by parts, came back equal")


class _Stop(Exception):
    """Raised by a producer of ours, to see what becomes of its object."""


def _aborted(store: Store, scratch: str) -> ProbeResult:
    key = f"{scratch}aborted"

    def stream() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(MIB)
        raise _Stop

    with contextlib.suppress(_Stop):
        store.put(key, stream())
    if list(store.list(key)):
        return failed(
            "aborted uploads", "an upload that was broken off is listed", "A broken dump looks complete."
        )
    return ok("aborted uploads", "an upload that is broken off is never seen")


def _ranges(store: Store, scratch: str) -> ProbeResult:
    key = f"{scratch}ranges"
    store.put(key, [b"0123456789"])
    if (
        store.read_range(key, offset=3, length=4) != b"3456"
        or store.read_range(key, offset=8, length=9) != b"89"
    ):
        return failed("ranges", "a range of an object came back wrong", "Do not use this place.")
    return ok("ranges", "a part of an object can be read")


def _copying(store: Store, scratch: str) -> ProbeResult:
    source, target = f"{scratch}copy-source", f"{scratch}copy-target"
    store.put(source, [b"first"])
    try:
        store.copy(source, target)
    except CopyUnsupported as error:
        return limited("copying within the store", error.message, _COPIES_STREAM)
    store.put(source, [b"changed"])
    if read_all(store, target) != b"first":
        return failed("copying within the store", "a copy changed with its source", "Do not use this place.")
    return ok("copying within the store", "the store makes copies by itself")


def _batch_delete(store: Store, scratch: str) -> ProbeResult:
    keys = [f"{scratch}batch/{number}" for number in range(3)]
    for key in keys:
        store.put(key, [b"x"])
    refused = store.delete([*keys, f"{scratch}batch/absent"])
    left = [found.key for found in store.list(f"{scratch}batch/")]
    if refused:
        return limited(
            "batch delete",
            f"{len(refused)} of 4 were refused: {next(iter(refused.values()))}",
            "Prune needs credentials that may delete.",
        )
    if left:
        return failed("batch delete", f"{len(left)} of 3 objects are still there", "Retention cannot delete.")
    return ok("batch delete", "several objects, and absent ones, are deleted at once")
