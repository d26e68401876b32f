"""A file of pg_wal compressed: of which bytes the digest is, whatever was packed before or is beside it."""

import hashlib
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from backup_pipeline.errors import Refused
from backup_pipeline.wal.packing import AT_ONCE_BYTES, opened, packed, read

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def content(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes of which half compress."""
    return random.Random(seed).randbytes(size_bytes // 2).ljust(size_bytes, b"w")


def pack(path: Path) -> tuple[bytes, str, int]:
    with opened(path) as file, packed(file) as (made, digest, plain_bytes):
        return made.read(), digest, plain_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "000000010000000000000001"


@pytest.mark.parametrize("size_bytes", [0, 1000, AT_ONCE_BYTES, AT_ONCE_BYTES + 1000])
def test_what_was_packed_is_the_file_and_so_is_the_digest(path: Path, size_bytes: int) -> None:
    path.write_bytes(b"x" * AT_ONCE_BYTES)
    pack(path)  # what a thread has packed before leaves no trace
    plain = content(size_bytes)
    path.write_bytes(plain)
    made, digest, plain_bytes = pack(path)
    assert zstd.decompress(made) == plain
    assert digest == hashlib.sha256(plain).hexdigest()
    assert plain_bytes == size_bytes


def test_threads_pack_each_their_own(tmp_path: Path) -> None:
    plains = [content(4 * 1024 * 1024, seed) for seed in range(4)]
    together = Barrier(len(plains))

    def one(seed: int) -> bool:
        path = tmp_path / str(seed)
        path.write_bytes(plains[seed])
        together.wait(20)
        packs = [pack(path) for _ in range(4)]
        digest = hashlib.sha256(plains[seed]).hexdigest()
        return all((zstd.decompress(made), told) == (plains[seed], digest) for made, told, _ in packs)

    with ThreadPoolExecutor(len(plains)) as pool:
        assert list(pool.map(one, range(len(plains)))) == [True] * len(plains)


@pytest.mark.parametrize("size_bytes", [1000, AT_ONCE_BYTES, AT_ONCE_BYTES + 1000])
@pytest.mark.parametrize("change", ["written to", "longer", "shorter"])
def test_a_file_that_changed_meanwhile_is_refused(
    path: Path, size_bytes: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(content(size_bytes))
    whole, readv = path.stat(), os.readv

    def and_changed(handle: int, buffers: list[memoryview]) -> int:
        got = readv(handle, buffers)
        with path.open("r+b") as other:
            if change != "written to":
                other.truncate(size_bytes + (1 if change == "longer" else -1))
            other.write(b"other")
        later_ns = whole.st_mtime_ns if change == "shorter" else whole.st_mtime_ns + 1_000_000
        os.utime(path, ns=(later_ns, later_ns))
        return got

    monkeypatch.setattr("backup_pipeline.wal.packing.os.readv", and_changed)
    with pytest.raises(Refused, match="changed while it was read"):
        pack(path)


def test_no_more_is_read_than_asked_for(path: Path) -> None:
    path.write_bytes(b"0123456789")
    with opened(path) as file:
        assert [read(file, 4), read(file, 4), read(file, 4), read(file, 4)] == [b"0123", b"4567", b"89", b""]
