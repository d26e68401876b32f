"""What may become of an archive: a segment in the middle gone, cut, changed, exchanged, or there twice."""

from backup_pipeline.domain.layout import parse_wal_key
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import read_all


def segments(store: DirectoryStore) -> list[str]:
    """The keys of the segments after the base backup's, in order."""
    keys = [info.key for info in store.list("clusters/main/wal-archive/") if parse_wal_key(info.key)]
    return sorted(key for key in keys if key.endswith(".zst") and ".backup" not in key)[-4:]


def remove(store: DirectoryStore) -> None:
    store.delete([segments(store)[1]])


def truncate(store: DirectoryStore) -> None:
    key = segments(store)[1]
    store.put(key, [read_all(store, key)[:-10]])


def flip(store: DirectoryStore) -> None:
    key = segments(store)[1]
    data = bytearray(read_all(store, key))
    data[len(data) // 2] ^= 1
    store.put(key, [bytes(data)])


def swap(store: DirectoryStore) -> None:
    one, other = segments(store)[1:3]
    store.put(one, [read_all(store, other)])


def double(store: DirectoryStore) -> None:
    key = segments(store)[1]
    store.put(key.replace(key[-10:-4], "abcdef"), [read_all(store, key)])
