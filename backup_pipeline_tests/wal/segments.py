"""Data directories with WAL as PostgreSQL names and begins it, small and made in no time."""

import random
import struct
from pathlib import Path

from backup_pipeline.domain.wal import WalSegment

MIB = 1024 * 1024
SEGMENT_BYTES = MIB  # PostgreSQL's smallest
SYSTEM = "7123456789012345678"
OTHER = "7999999999999999999"


def segment(
    number: int,
    *,
    timeline: int = 1,
    seed: int = 0,
    system: str = SYSTEM,
    size_bytes: int = SEGMENT_BYTES,
) -> bytes:
    """The bytes of a segment: its header, something that compresses, and something that does not."""
    header = struct.pack(
        "<HHIQI4xQII", 0xD116, 2, timeline, number * size_bytes, 0, int(system), size_bytes, 8192
    )
    noise = random.Random(f"{number} {timeline} {seed}").randbytes(size_bytes // 8)
    return (header + noise).ljust(size_bytes, b"\0")


class DataDirectory:
    """What the archive looks at in a data directory."""

    def __init__(self, path: Path, system: str = SYSTEM) -> None:
        self.path, self.wal = path, path / "pg_wal"
        self.ready = self.wal / "archive_status"
        self.ready.mkdir(parents=True)
        (path / "global").mkdir()
        self.belong_to(system)

    def belong_to(self, system: str) -> None:
        """Be another cluster's."""
        (self.path / "global" / "pg_control").write_bytes(struct.pack("<Q", int(system)) + bytes(8184))

    def put(self, name: str, content: bytes, *, ready: bool = False) -> Path:
        """Write a file of pg_wal."""
        path = self.wal / name
        path.write_bytes(content)
        if ready:
            (self.ready / f"{name}.ready").touch()
        return path

    def segment(self, number: int, *, timeline: int = 1, seed: int = 0, ready: bool = False) -> Path:
        """Write a segment."""
        name = WalSegment(timeline, number).name(SEGMENT_BYTES)
        return self.put(name, segment(number, timeline=timeline, seed=seed), ready=ready)
