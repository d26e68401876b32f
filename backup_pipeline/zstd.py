"""zstd as streams: compressed and decompressed as the chunks come, in bounded memory.

The only module that imports the library, which has another name from Python 3.14 on. Called by actions/ and
wal/; what is compressed, and where it goes, does not belong here.
"""

import sys
from collections.abc import Generator, Iterable, Iterator

from backup_pipeline.errors import Corrupt

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, ZstdCompressor, ZstdDecompressor, ZstdError
else:
    from backports.zstd import CompressionParameter, ZstdCompressor, ZstdDecompressor, ZstdError

__all__ = ["LEVEL", "ZstdDecompressor", "ZstdError", "compressed", "compressor", "decompressed"]

LEVEL = 1  # 28 ms for 16 MiB of WAL; level 3 saves little and costs twice as much
CHUNK_BYTES = 1024 * 1024
_WORKERS = 1


def compressor(*, workers: int = 0, hash_log: int = 0) -> ZstdCompressor:
    """For one frame, with a checksum; with `workers`, threads of the library compress while ours goes on.

    `hash_log` is of the table of what was seen before, 0 for the level's own (14).
    """
    parameters: dict[int, int] = {
        CompressionParameter.compression_level: LEVEL,
        CompressionParameter.nb_workers: workers,
        CompressionParameter.checksum_flag: 1,
        CompressionParameter.hash_log: hash_log,
    }
    return ZstdCompressor(options=parameters)


def compressed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """One zstd frame of all chunks, in pieces that are never empty; another thread compresses."""
    packer = compressor(workers=_WORKERS)
    for chunk in chunks:
        if piece := packer.compress(chunk):
            yield piece
    yield packer.flush()


def decompressed(chunks: Iterable[bytes], name: str) -> Generator[bytes, None, None]:
    """The plain bytes of one zstd frame, in pieces of at most CHUNK_BYTES.

    Raises Corrupt, naming `name`, when the frame is damaged or cut, or when something follows it.
    """
    decompressor = ZstdDecompressor()
    try:
        for chunk in chunks:
            given = chunk
            while True:
                if given and decompressor.eof:
                    raise Corrupt(f"{name}: something follows the compressed data")
                if piece := decompressor.decompress(given, CHUNK_BYTES):
                    yield piece
                given = b""
                if decompressor.eof and decompressor.unused_data:
                    raise Corrupt(f"{name}: something follows the compressed data")
                if decompressor.eof or decompressor.needs_input:
                    break
    except ZstdError as error:
        raise Corrupt(f"{name}: the compressed data is damaged: {error}") from error
    if not decompressor.eof:
        raise Corrupt(f"{name}: the compressed data is cut short")
