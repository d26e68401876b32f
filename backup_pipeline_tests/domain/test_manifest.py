"""The JSON of manifests, verdicts and leases: read back equal, and believed only where it belongs."""

import hashlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup_pipeline.domain.backup import BackupId, Lease, Manifest, ObjectRole, ProofRecord, Verdict
from backup_pipeline.domain.layout import Beside, catalog_key, copy_key, data_prefix, lease_key
from backup_pipeline.domain.manifest import (
    MANIFEST_KIND,
    lease_from_json,
    lease_to_json,
    manifest_from_json,
    manifest_to_json,
    verdict_from_json,
    verdict_to_json,
)
from backup_pipeline.domain.sealed import seal
from backup_pipeline.errors import Corrupt
from backup_pipeline_tests.domain import values

FIXTURES = Path(__file__).parent / "fixtures"
MANIFEST = values.manifest()
KEY = catalog_key(MANIFEST.id)
PREFIX = data_prefix(MANIFEST.id, "daily")


def forged(change: Callable[[dict[str, Any]], object], manifest: Manifest = MANIFEST) -> bytes:
    """A manifest with a change that its seal agrees with, as only a writer of the store can make it."""
    document = json.loads(manifest_to_json(manifest))
    change(document)
    requires = document.pop("requires")
    for name in ("kind", "version", "sha256"):
        document.pop(name)
    return seal(MANIFEST_KIND, document, requires=requires)


def refused(data: bytes, key: str = KEY) -> str:
    with pytest.raises(Corrupt) as caught:
        manifest_from_json(data, key)
    assert caught.value.detail["key"] == key
    return str(caught.value.detail["reason"])


def test_a_manifest_is_read_back_equal_from_the_catalog_and_from_its_copy() -> None:
    data = manifest_to_json(MANIFEST)
    assert manifest_from_json(data, KEY) == MANIFEST
    assert manifest_from_json(data, copy_key(MANIFEST.id, "daily", Beside.MANIFEST)) == MANIFEST
    assert manifest_to_json(manifest_from_json(data, KEY)) == data


@pytest.mark.parametrize(
    "manifest",
    [
        replace(MANIFEST, scheduled_for=None),
        replace(
            MANIFEST, tier="manual", objects=values.manifest(tier="manual").objects, expires_at=values.NOW
        ),
        replace(MANIFEST, copied_from=BackupId("app", "20260301T020000Z-aaaa"), jobs=8, format="directory"),
        replace(
            MANIFEST,
            source=replace(values.SOURCE, database=replace(values.PROPERTIES, grants=None, comment=None)),
        ),
        replace(MANIFEST, source=replace(values.SOURCE, database=replace(values.PROPERTIES, grants=()))),
        replace(
            MANIFEST, source=replace(values.SOURCE, roles=("quote'\"", "new\nline", "\udcff", "-x", "é" * 31))
        ),
    ],
)
def test_every_shape_of_manifest_is_read_back_equal(manifest: Manifest) -> None:
    assert manifest_from_json(manifest_to_json(manifest), KEY) == manifest


def test_times_are_utc_with_a_z_and_never_naive() -> None:
    berlin = timezone(timedelta(hours=1))
    moved = replace(MANIFEST, started_at=datetime(2026, 3, 1, 2, 59, 59, tzinfo=berlin))
    assert json.loads(manifest_to_json(moved))["started_at"] == "2026-03-01T01:59:59Z"
    with pytest.raises(ValueError, match="time zone"):
        manifest_to_json(replace(MANIFEST, started_at=datetime(2026, 3, 1)))  # noqa: DTZ001 - the point


def test_the_seal_can_be_checked_without_this_software(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(manifest_to_json(MANIFEST))
    digest = subprocess.run(
        ["sh", "-c", 'head -n -2 "$1" | sha256sum', "sh", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[0]
    assert json.loads(path.read_bytes())["sha256"] == digest


def test_every_flipped_byte_is_found() -> None:
    data = manifest_to_json(MANIFEST)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(Corrupt):
            manifest_from_json(bytes(damaged), KEY)


def test_every_truncation_and_extension_is_found() -> None:
    data = manifest_to_json(MANIFEST)
    for length in range(0, len(data), 7):
        assert refused(data[:length])
    for tail in (b"\n", b" ", b"\0", data):
        assert refused(data + tail)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"kind": "backup-pipeline manifest", "kind": "x"}', "twice"),
        (b'{"kind": NaN}', "not a number"),
        (b'{"kind": "else"}', "it is a 'else'"),
        (b"[" * 100_000, "nested"),
        (b'{"kind": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"version": 1}', "kind is missing"),
        (b'{"kind": "backup-pipeline manifest", "version": true}', "version is not a whole number"),
    ],
)
def test_what_is_no_manifest_says_so(data: bytes, reason: str) -> None:
    assert reason in refused(data)


def test_unknown_fields_are_skipped() -> None:
    data = forged(lambda document: document.update(colour="blue", more={"deep": [1, None]}))
    assert manifest_from_json(data, KEY) == MANIFEST


def test_what_a_newer_version_requires_is_refused_with_the_cure() -> None:
    data = forged(lambda document: document.update(requires=["age"]))
    with pytest.raises(Corrupt, match="a newer version wrote it: it requires age") as caught:
        manifest_from_json(data, KEY)
    assert "Upgrade" in caught.value.hint
    assert "newer version" in refused(manifest_to_json(MANIFEST).replace(b'"version": 1', b'"version": 2'))


def _object(**change: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["objects"][0].update(change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            _object(key="databases/app/dumps/daily/20260302T020000Z-3f9a1c/database.dump"),
            "does not lie below",
        ),
        (_object(key=PREFIX + "../../other/x"), "does not lie below"),
        (_object(key=PREFIX + "a//b"), "does not lie below"),
        (_object(key=PREFIX), "does not lie below"),
        (_object(key=PREFIX + "manifest.json"), "does not lie below"),
        (_object(key=PREFIX + "pin"), "does not lie below"),
        (_object(key="/etc/passwd"), "does not lie below"),
        (_object(name="../outside"), "outside of its folder"),
        (_object(name="/etc/cron.d/x"), "outside of its folder"),
        (_object(name="a\\..\\b"), "outside of its folder"),
        (_object(name="a\0b"), "outside of its folder"),
        (_object(name="globals.sql"), "the same name"),
        (_object(key=PREFIX + "globals.sql"), "the same key"),
        (_object(sha256="A" * 64), "64 hexadecimal digits"),
        (_object(sha256="0" * 63), "64 hexadecimal digits"),
        (_object(role="script"), "not known"),
        (_object(size_bytes=-1), "whole number"),
        (_object(size_bytes=1.5), "whole number"),
        (_object(size_bytes=True), "whole number"),
        (lambda document: document.update(objects=[]), "no object that is the dump"),
        (lambda document: document.update(objects={}), "not a list"),
        (lambda document: document.update(objects=[1]), "objects[0] is not an object"),
        (lambda document: document["objects"][1].pop("key"), "objects[1].key is missing"),
        (lambda document: document.update(tier="../weekly"), "tier"),
        (lambda document: document.update(jobs=0), "jobs"),
        (lambda document: document.update(id="app/20260302T020000Z-3f9a1c"), "under another backup's key"),
        (lambda document: document.update(id="app/20260231T020000Z-3f9a1c"), "not a backup id"),
        (lambda document: document.update(snapshot_at="2026-03-08T02:00:00Z"), "snapshot"),
        (lambda document: document.update(snapshot_at="2026-03-01T02:00:00"), "not a time"),
        (lambda document: document.update(snapshot_at="2026-13-01T02:00:00Z"), "not a time"),
        (lambda document: document.update(snapshot_at=1772330400), "snapshot_at is not text"),
        (lambda document: document.update(copied_from="other/20260301T020000Z-aaaa"), "another database"),
        (lambda document: document["source"].update(roles=["a", 1]), "source.roles is not a list of texts"),
        (lambda document: document["source"]["database"].update(is_template=0), "true or false"),
        (lambda document: document["source"]["database"].pop("comment"), "comment is missing"),
    ],
)
def test_a_forged_manifest_is_refused(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    assert reason in refused(forged(change))


def test_a_replayed_manifest_is_refused() -> None:
    other = values.manifest(at=datetime(2026, 3, 2, 2, tzinfo=UTC))
    assert "under another backup's key" in refused(manifest_to_json(other))
    data = manifest_to_json(MANIFEST)
    weekly = copy_key(MANIFEST.id, "weekly", Beside.MANIFEST)
    assert "tier" in refused(data, weekly)
    for key in (catalog_key(MANIFEST.id, Beside.VERDICT), "catalog/app/x.json", PREFIX + "database.dump"):
        assert "key" in refused(data, key)


@given(data=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for read in (manifest_from_json, verdict_from_json, lease_from_json):
        with pytest.raises(Corrupt):
            read(data, KEY)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_value_of_any_other_type_is_refused_or_harmless(data: st.DataObject) -> None:
    document = json.loads(manifest_to_json(MANIFEST))
    place = document
    while True:
        name = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[name], dict | list) and place[name] and data.draw(st.booleans()):
            place = place[name]
        else:
            break
    place[name] = data.draw(_JSON)
    if not all(isinstance(document.get(key), str) for key in ("kind", "sha256")):
        return
    requires = document.pop("requires", [])
    values_only = {key: value for key, value in document.items() if key not in ("kind", "version", "sha256")}
    try:
        sealed = seal(
            MANIFEST_KIND, values_only, requires=requires if isinstance(requires, list) else ["age"]
        )
    except ValueError:
        return  # JSON has no such number
    try:
        read = manifest_from_json(sealed, KEY)
    except Corrupt:
        return
    assert read.id == MANIFEST.id
    assert all(item.key.startswith(PREFIX) for item in read.objects)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("manifest-v1*.json")), ids=lambda path: path.name)
def test_manifests_of_every_version_stay_readable(path: Path) -> None:
    data = path.read_bytes()
    backup = BackupId.parse(json.loads(data)["id"])
    manifest = manifest_from_json(data, catalog_key(backup))
    assert manifest.id == backup
    assert manifest.of_role(ObjectRole.DUMP)


def test_the_bytes_of_a_manifest_do_not_change_unnoticed() -> None:
    """A rebuilt or copied manifest must equal the old one: a new form gets a new fixture."""
    assert manifest_to_json(MANIFEST) == (FIXTURES / "manifest-v1-lc-monetary.json").read_bytes()


def test_verdicts_are_read_back_equal_and_only_under_their_key() -> None:
    for latest in (None, values.proof(Verdict.NOT_PROVABLE)):
        record = ProofRecord(values.proof(), latest)
        data = verdict_to_json(MANIFEST.id, record)
        assert verdict_from_json(data, catalog_key(MANIFEST.id, Beside.VERDICT)) == record
        assert verdict_from_json(data, copy_key(MANIFEST.id, "daily", Beside.VERDICT)) == record
        other = BackupId("app", "20260302T020000Z-3f9a1c")
        for key in (catalog_key(other, Beside.VERDICT), KEY):
            with pytest.raises(Corrupt):
                verdict_from_json(data, key)
    path = FIXTURES / "verdict-v1.json"
    assert verdict_to_json(MANIFEST.id, ProofRecord(values.proof())) == path.read_bytes()


def test_leases_are_read_back_equal_and_only_under_their_key() -> None:
    lease = Lease(MANIFEST.id, "00ff", "restore", values.NOW)
    data = lease_to_json(lease)
    assert lease_from_json(data, lease_key(lease.id, "00ff")) == lease
    for key in (lease_key(lease.id, "00fe"), lease_key(BackupId("b", lease.id.stamp), "00ff"), "leases/x"):
        with pytest.raises(Corrupt):
            lease_from_json(data, key)


def test_a_record_of_one_kind_is_no_other() -> None:
    verdict = verdict_to_json(MANIFEST.id, ProofRecord(values.proof()))
    assert "it is a 'backup-pipeline verdict'" in refused(verdict)


@pytest.mark.parametrize("huge", ["1e400", "9" * 400, "-1", '"1"'])
def test_seconds_are_believable(huge: str) -> None:
    data = verdict_to_json(MANIFEST.id, ProofRecord(values.proof()))
    body = data[: data.rindex(b'  "sha256"')].replace(b'"restore_s": 12.5', f'"restore_s": {huge}'.encode())
    resealed = body + f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
    with pytest.raises(Corrupt, match="seconds"):
        verdict_from_json(resealed, catalog_key(MANIFEST.id, Beside.VERDICT))
