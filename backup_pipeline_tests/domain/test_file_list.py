"""PostgreSQL's backup_manifest, as 15 and 17 write it, and as nobody does."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from backup_pipeline.domain.base_backup import WalPoint
from backup_pipeline.domain.file_list import ListedFile, WalRange, parse_file_list
from backup_pipeline.domain.wal import Lsn
from backup_pipeline.errors import Corrupt

EMPTY = hashlib.sha256(b"").hexdigest()


def document() -> dict[str, Any]:
    return {
        "PostgreSQL-Backup-Manifest-Version": 2,
        "System-Identifier": 7312345678901234567,
        "Files": [
            {"Path": "PG_VERSION", "Size": 3, "Checksum-Algorithm": "SHA256", "Checksum": "ab" * 32},
            {"Encoded-Path": "ff41", "Size": 0, "Checksum-Algorithm": "SHA256", "Checksum": EMPTY},
        ],
        "WAL-Ranges": [{"Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000120"}],
    }


def written(found: dict[str, Any], *, checksum: str = "") -> bytes:
    """As the server writes it: the checksum is of all lines but the last."""
    body = (json.dumps(found, indent=1).removesuffix("\n}") + ",\n").encode()
    return body + f'"Manifest-Checksum": "{checksum or hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def test_it_is_read() -> None:
    found = parse_file_list(written(document()))
    assert found.files == {
        b"PG_VERSION": ListedFile(3, bytes.fromhex("ab" * 32)),
        b"\xffA": ListedFile(0, bytes.fromhex(EMPTY)),
    }
    assert found.wal_ranges == (WalRange(WalPoint(1, Lsn.parse("0/2000028")), Lsn.parse("0/2000120")),)
    assert found.system_identifier == "7312345678901234567"


def test_older_servers_name_no_system() -> None:
    older = document() | {"PostgreSQL-Backup-Manifest-Version": 1}
    older.pop("System-Identifier")
    assert parse_file_list(written(older)).system_identifier == ""


def test_every_flipped_byte_and_every_cut_is_found() -> None:
    data = written(document())
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        for wrong in (bytes(damaged), data[:position]):
            with pytest.raises(Corrupt, match="backup_manifest is not one that PostgreSQL wrote"):
                parse_file_list(wrong)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda it: it.update({"PostgreSQL-Backup-Manifest-Version": 3}), "version is 3"),
        (lambda it: it.pop("Files"), "Files"),
        (lambda it: it["Files"].append(it["Files"][0]), "twice"),
        (lambda it: it["Files"][0].update(Size=-1), "size"),
        (lambda it: it["Files"][0].update(Size=True), "size"),
        (lambda it: it["Files"][0].pop("Checksum"), "no SHA256"),
        (lambda it: it["Files"][0].update({"Checksum-Algorithm": "CRC32C"}), "no SHA256"),
        (lambda it: it["Files"][0].update(Checksum="AB"), "SHA256"),
        (lambda it: it["Files"][1].update({"Encoded-Path": "zz"}), "hex"),
        (lambda it: it["WAL-Ranges"][0].update(Timeline="1"), "timeline"),
        (lambda it: it["WAL-Ranges"][0].update({"End-LSN": "x"}), "LSN"),
    ],
)
def test_what_no_server_writes_is_refused(change: Callable[[dict[str, Any]], object], said: str) -> None:
    forged = document()
    change(forged)
    with pytest.raises(Corrupt, match=said):
        parse_file_list(written(forged))
    with pytest.raises(Corrupt, match="checksum"):
        parse_file_list(written(document(), checksum="0" * 64))
