"""The tar that PostgreSQL writes, taken apart while it streams in, and nothing else.

Called by unpack.py. Regular files and directories come out, with their names as they are; every other kind
of entry, and every header that does not add up, is Corrupt. Where a file goes is decided elsewhere.

Source: POSIX, "ustar Interchange Format"; PostgreSQL, `tarCreateHeader`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from backup_pipeline.errors import Corrupt

BLOCK_BYTES = 512
_FILE = (b"0", b"\0")
_FOLDER = b"5"


@dataclass(frozen=True)
class Entry:
    """One entry; the `data` of a file is read to its end before the next entry."""

    name: bytes
    is_folder: bool
    size_bytes: int
    data: Iterator[memoryview]


@dataclass
class _Source:
    """Bytes in any amount, from chunks of any size."""

    name: str
    chunks: Iterator[bytes]
    rest: memoryview = field(default_factory=lambda: memoryview(b""))

    def some(self, limit_bytes: int) -> memoryview:
        """Up to `limit_bytes`, at least one; Corrupt when there is none."""
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                raise Corrupt(f"{self.name}: the tar is cut short")
            self.rest = memoryview(chunk)
        given, self.rest = self.rest[:limit_bytes], self.rest[limit_bytes:]
        return given

    def block(self) -> bytes:
        """The next block."""
        gathered = b""
        while len(gathered) < BLOCK_BYTES:
            gathered += bytes(self.some(BLOCK_BYTES - len(gathered)))
        return gathered


def entries(chunks: Iterable[bytes], name: str) -> Iterator[Entry]:
    """The entries of the tar `name`, one after the other. Raises Corrupt; not before its end is it whole."""
    source = _Source(name, iter(chunks))
    while any(header := source.block()):
        found, is_folder, size_bytes = _header(header, name)
        left = [size_bytes]
        yield Entry(found, is_folder, size_bytes, _data(source, left))
        if left[0]:
            raise Corrupt(f"{name}: {found!r} was not read to its end")
    if any(source.block()):
        raise Corrupt(f"{name}: the tar does not end with two empty blocks")
    if any(source.rest) or any(map(any, source.chunks)):
        raise Corrupt(f"{name}: something follows the tar")


def _data(source: _Source, left: list[int]) -> Iterator[memoryview]:
    padding = -left[0] % BLOCK_BYTES
    while left[0]:
        piece = source.some(left[0])
        left[0] -= len(piece)
        if not left[0]:
            while padding:
                padding -= len(source.some(padding))
        yield piece


def _header(block: bytes, tar: str) -> tuple[bytes, bool, int]:
    """(name, whether it is a folder, size) of an entry."""
    if block[257:262] != b"ustar" or _number(block[148:156], tar) != _checksum(block):
        raise Corrupt(f"{tar}: a header of the tar is damaged")
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    name = name.removeprefix(b"./")  # as PostgreSQL names the folders in pg_wal
    kind, size_bytes = block[156:157], _number(block[124:136], tar)
    if kind == _FOLDER and size_bytes == 0:
        return name.rstrip(b"/"), True, 0
    if kind not in _FILE or name.endswith(b"/"):
        raise Corrupt(
            f"{tar}: {name!r} is neither a file nor a folder, but of kind {kind!r}",
            hint="PostgreSQL writes no such entry: do not use this backup; look for who changed it.",
        )
    return name, False, size_bytes


def _checksum(block: bytes) -> int:
    return sum(block[:148]) + sum(b" " * 8) + sum(block[156:])


def _number(digits: bytes, tar: str) -> int:
    """Octal, or, where that is too short, the bytes of the number after 0x80."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        return int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        raise Corrupt(f"{tar}: a number in a header of the tar is damaged") from None
