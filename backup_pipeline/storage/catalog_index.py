"""The catalog's index: the bodies of all manifests and verdicts in one object, for quick listings.

The index is derived and may be dropped at any time. It is never asked what exists, nor what an
object with another etag holds: keys and etags come from a listing of the store, and only a body
whose key and etag agree is taken from here. Whatever is wrong with the index makes it empty.
Nothing is ever deleted on its word: see catalog.list_backups(fresh=True).
"""

import gzip
import json
import zlib
from collections.abc import Mapping

from backup_pipeline.domain.layout import INDEX
from backup_pipeline.errors import ObjectNotFound
from backup_pipeline.storage.store import ObjectInfo, Store, read_all

KIND = "backup-pipeline index"
VERSION = 1
MAX_BYTES = 512 * 1024 * 1024
"""No index is longer when unpacked; a longer one is not read: it would be ours or a bomb."""


class Index:
    """Bodies by key and etag."""

    def __init__(self, entries: Mapping[str, tuple[str, str]] | None = None) -> None:
        self._entries = dict(entries or {})

    def __len__(self) -> int:
        return len(self._entries)

    def body(self, info: ObjectInfo) -> bytes | None:
        """The body of this object, None when the index does not hold it as it is now."""
        etag, body = self._entries.get(info.key, ("", ""))
        return body.encode("utf-8", "replace") if etag and etag == info.etag else None


def read(store: Store) -> Index:
    """The store's index; empty when there is none, or none that can be used."""
    try:
        unpacked = _unpack(read_all(store, INDEX))
        document = json.loads(unpacked)
    except (ObjectNotFound, ValueError, RecursionError, zlib.error):
        return Index()
    if not isinstance(document, dict) or document.get("kind") != KIND or document.get("version") != VERSION:
        return Index()
    entries = document.get("entries")
    if not isinstance(entries, dict):
        return Index()
    return Index({key: (entry[0], entry[1]) for key, entry in entries.items() if _is_entry(entry)})


def write(store: Store, bodies: Mapping[ObjectInfo, bytes]) -> None:
    """Replace the store's index by these bodies."""
    entries = {info.key: [info.etag, body.decode()] for info, body in bodies.items()}
    document = {"kind": KIND, "version": VERSION, "entries": entries}
    store.put(INDEX, [gzip.compress(json.dumps(document, ensure_ascii=False).encode(), 6, mtime=0)])


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _unpack(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    unpacked = unpacker.decompress(data, MAX_BYTES)
    if not unpacker.eof:
        raise ValueError("the index is cut short, or too long")
    return unpacked
