"""An object that unpacks to more than any segment has: it fills no disk, whatever its key says."""

import hashlib
from pathlib import Path

import pytest

from backup_pipeline.errors import Corrupt
from backup_pipeline.wal import unpacking
from backup_pipeline.zstd import compressor
from backup_pipeline_tests.storage.memory import MemoryStore

MIB = 1 << 20


def test_what_comes_to_more_than_a_segment_is_not_written_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plain, packer = MemoryStore(), bytes(9 * MIB), compressor()
    store.put("key", [packer.compress(plain, packer.FLUSH_FRAME)])
    monkeypatch.setattr(unpacking, "_MAX_PLAIN_BYTES", 2 * MIB)
    with pytest.raises(Corrupt, match="longer than any segment"):
        unpacking.unpack(store, "key", tmp_path / "segment", hashlib.sha256(plain).hexdigest())
    assert (tmp_path / "segment").stat().st_size <= 4 * MIB
