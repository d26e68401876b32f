"""zstd as streams: what goes in comes out, in bounded pieces; whatever is damaged, cut or added is found."""

import itertools
import random
import shutil
import subprocess

import pytest

from backup_pipeline.errors import Corrupt
from backup_pipeline.zstd import CHUNK_BYTES, compressed, decompressed

PLAIN = [random.Random(1).randbytes(70_000) + bytes(200_000), b"", b"end"] * 20


def unpacked(pieces: list[bytes]) -> bytes:
    return b"".join(decompressed(pieces, "it"))


@pytest.mark.parametrize("size_bytes", [1, 4096, 1 << 30])
def test_what_goes_in_comes_out_however_it_is_cut(size_bytes: int) -> None:
    whole = b"".join(compressed(PLAIN if size_bytes > 1 else PLAIN[1:3]))
    cut = [whole[at : at + size_bytes] for at in range(0, len(whole), size_bytes)]
    assert unpacked(cut) == b"".join(PLAIN if size_bytes > 1 else PLAIN[1:3])


def test_nothing_is_a_frame_too() -> None:
    assert unpacked(list(compressed([]))) == b""


def test_a_small_object_that_unpacks_to_a_huge_one_comes_in_bounded_pieces() -> None:
    bomb = list(compressed(itertools.repeat(bytes(CHUNK_BYTES), 300)))
    assert sum(map(len, bomb)) < CHUNK_BYTES
    sizes = [len(piece) for piece in decompressed(bomb, "it")]
    assert max(sizes) <= CHUNK_BYTES
    assert sum(sizes) == 300 * CHUNK_BYTES


def test_the_zstd_program_reads_it() -> None:
    program = shutil.which("zstd")
    if program is None:
        pytest.skip("needs zstd: apt-get install zstd")
    found = subprocess.run(
        [program, "-dc"], input=b"".join(compressed(PLAIN)), capture_output=True, check=True
    )
    assert found.stdout == b"".join(PLAIN)


def test_whatever_is_wrong_is_found() -> None:
    whole = b"".join(compressed([random.Random(2).randbytes(5000) + bytes(5000)]))
    for length in range(0, len(whole), 97):
        with pytest.raises(Corrupt, match="it: the compressed data is"):
            unpacked([whole[:length]])
    for position in range(4, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        with pytest.raises(Corrupt, match="it: "):
            unpacked([bytes(damaged)])
    for tail in (b"x", whole):
        for pieces in ([whole + tail], [whole, tail]):
            with pytest.raises(Corrupt, match="something follows"):
                unpacked(pieces)
