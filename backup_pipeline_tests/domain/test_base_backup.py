"""The record of a base backup: read back equal, believed where it belongs, and what it asks of the WAL."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.base_backup import (
    BASE_KIND,
    BaseManifest,
    WalPoint,
    base_from_json,
    base_to_json,
    is_base_record,
)
from backup_pipeline.domain.layout import COPY_NAMES, Beside, base_prefix, catalog_key
from backup_pipeline.domain.manifest import manifest_to_json
from backup_pipeline.domain.sealed import seal
from backup_pipeline.domain.wal import Lsn, TimelineHistory, TimelineSwitch
from backup_pipeline.errors import Corrupt
from backup_pipeline_tests.domain import values

FIXTURE = Path(__file__).parent / "fixtures" / "base-backup-v1.json"
MANIFEST = values.base_manifest()
KEY = catalog_key(MANIFEST.id)
COPY = base_prefix(MANIFEST.id) + COPY_NAMES[Beside.MANIFEST]


def refused(data: bytes, key: str = KEY) -> str:
    with pytest.raises(Corrupt) as caught:
        base_from_json(data, key)
    assert caught.value.detail["key"] == key
    return str(caught.value.detail["reason"])


def forged(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(base_to_json(MANIFEST))
    change(document)
    requires = document.pop("requires")
    for name in ("kind", "version", "sha256"):
        document.pop(name)
    return seal(BASE_KIND, document, requires=requires)


def test_it_is_read_back_equal_from_the_catalog_and_from_its_copy() -> None:
    data = base_to_json(MANIFEST)
    assert base_from_json(data, KEY) == base_from_json(data, COPY) == MANIFEST
    assert base_to_json(base_from_json(data, KEY)) == data


def test_what_the_first_version_wrote_can_always_be_read() -> None:
    data = FIXTURE.read_bytes()
    assert base_from_json(data, KEY) == MANIFEST
    assert base_to_json(MANIFEST) == data


def test_it_is_told_from_a_dumps_manifest_by_its_first_lines() -> None:
    assert is_base_record(base_to_json(MANIFEST))
    assert not is_base_record(manifest_to_json(values.manifest()))
    assert "not a 'backup-pipeline base backup'" in refused(manifest_to_json(values.manifest()))


def test_every_flipped_byte_and_every_cut_is_found() -> None:
    data = base_to_json(MANIFEST)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        refused(bytes(damaged))
        if position % 7 == 0:
            refused(data[:position])


@pytest.mark.parametrize(
    "key",
    [
        catalog_key(BackupId("main", "20260301T020000Z-aaaa")),
        catalog_key(BackupId("other", MANIFEST.id.stamp)),
        catalog_key(MANIFEST.id, Beside.VERDICT),
        base_prefix(MANIFEST.id) + "backup_manifest",
        "elsewhere.json",
    ],
)
def test_it_is_believed_only_under_its_own_key(key: str) -> None:
    assert refused(base_to_json(MANIFEST), key)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: it["objects"][0].update(key="databases/app/x"), "does not lie below"),
        (lambda it: it["objects"][0].update(name="../base.tar.zst"), "outside of its folder"),
        (lambda it: it["objects"].pop(0), "not the data directory"),
        (lambda it: it["tablespaces"].pop(), "not the data directory"),
        (lambda it: it["tablespaces"][0].update(oid=0), "whole number from 1"),
        (lambda it: it["objects"][0].update(role="dump"), "not the data directory"),
        (lambda it: it["objects"][0].update(role="dinner"), "not known here"),
        (lambda it: it["end"].update(lsn="0/1"), "before it starts"),
        (lambda it: it["end"].update(lsn="here"), "not an LSN"),
        (lambda it: it["start"].update(timeline=9), "before it starts"),
        (lambda it: it.update(segment_bytes=5), "segment size"),
        (lambda it: it.update(system_identifier="../.."), "system identifier"),
        (lambda it: it.update(started_at="2026-03-01T02:00:09Z"), "not when its id"),
        (lambda it: it.update(page_checksums="yes"), "true or false"),
    ],
)
def test_a_forged_record_is_refused(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    assert reason in refused(forged(change))


def test_what_a_newer_version_requires_is_refused() -> None:
    assert "requires deltas" in refused(base_to_json(MANIFEST, requires=["deltas"]))


def segments(manifest: BaseManifest, history: TimelineHistory) -> list[str]:
    return [item.name(manifest.segment_bytes) for item in manifest.needed_segments(history)]


def test_the_segments_that_it_needs() -> None:
    one = TimelineHistory(1)
    assert segments(MANIFEST, one) == ["000000010000000000000005", "000000010000000000000006"]
    exact = replace(MANIFEST, end=WalPoint(1, Lsn.parse("0/6000000")))
    assert segments(exact, one) == ["000000010000000000000005"]
    switched = TimelineHistory(2, (TimelineSwitch(1, Lsn.parse("0/5800000")),))
    across = replace(MANIFEST, end=WalPoint(2, Lsn.parse("0/6000100")))
    assert segments(across, switched) == ["000000020000000000000005", "000000020000000000000006"]


def test_its_size_and_duration() -> None:
    assert MANIFEST.size_bytes == sum(item.size_bytes for item in MANIFEST.objects)
    assert MANIFEST.duration_s == 60.0
    assert MANIFEST.id.taken_at == datetime(2026, 3, 1, 2, tzinfo=UTC)


PARENT = BackupId("main", "20260228T020000Z-3f9a1c")


def test_an_incremental_one_names_its_parent_and_older_versions_refuse_it() -> None:
    child = replace(MANIFEST, parent=PARENT, cluster_bytes=60_000_000)
    data = base_to_json(child)
    assert base_from_json(data, KEY) == child
    assert json.loads(data)["requires"] == ["incremental"]
    assert "pg_combinebackup" in json.loads(data)["about"]
    assert child.combined_bytes == 60_000_000
    whole = json.loads(base_to_json(MANIFEST))
    assert "parent" not in whole
    assert "pg_combinebackup" not in whole["about"]
    assert MANIFEST.combined_bytes == MANIFEST.source_bytes


@pytest.mark.parametrize(
    ("parent", "reason"),
    [
        ("other/20260228T020000Z-3f9a1c", "another cluster's"),
        ("main/20260302T020000Z-3f9a1c", "younger than itself"),
        (str(MANIFEST.id), "names itself as its parent"),
        ("main", "not a backup id"),
    ],
)
def test_a_parent_that_cannot_be_one_is_refused(parent: str, reason: str) -> None:
    assert reason in refused(
        forged(lambda document: document.update(parent=parent, cluster_bytes=1, requires=["incremental"]))
    )
