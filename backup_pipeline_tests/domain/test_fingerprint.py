"""Fingerprints as JSON: everything is kept, and what cannot be read is refused."""

import json
from dataclasses import replace

import pytest

from backup_pipeline.domain.fingerprint import (
    fingerprint_from_json,
    fingerprint_to_json,
)
from backup_pipeline.errors import Corrupt, NotProvable
from backup_pipeline_tests.domain.fingerprints import SOURCE, VIEW


def test_json_keeps_everything() -> None:
    strange = replace(SOURCE, schema_after=(VIEW,), notes=("\udcff", "é\n"), properties=None)
    unread = replace(SOURCE, schema_in_snapshot=True, schema_read_after=False)
    for fingerprint in (SOURCE, strange, unread):
        assert fingerprint_from_json(fingerprint_to_json(fingerprint), "k") == fingerprint


def test_json_holds_an_unchanged_schema_once() -> None:
    assert json.loads(fingerprint_to_json(SOURCE))["schema_after"] is None


def test_json_of_a_later_version() -> None:
    values = json.loads(fingerprint_to_json(SOURCE))
    values["colour"] = "blue"
    values["tables"][0]["weight"] = 3
    del values["newest"], values["extensions"]
    del values["schema_in_snapshot"], values["schema_read_after"]  # as an older version wrote it
    found = fingerprint_from_json(json.dumps(values).encode(), "k")
    assert found == replace(SOURCE, newest=(), extensions=())
    assert (found.schema_in_snapshot, found.schema_read_after) == (False, True)
    values["format"] = 2
    with pytest.raises(NotProvable, match="the fingerprint k was written by a newer version") as caught:
        fingerprint_from_json(json.dumps(values).encode(), "k")
    assert caught.value.hint == "Upgrade backup-pipeline here."


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["tables"], None),
        (["tables", 0, "rows"], "1"),
        (["tables", 0, "rows"], True),
        (["tables", 0], []),
        (["properties", "settings", 0], ["only one"]),
        (["large_objects", "groups"], {}),
        (["server_version"], 17.1),
        (["kind"], "manifest"),
        (["format"], None),
    ],
)
def test_json_of_another_form_is_refused(path: list[str | int], value: object) -> None:
    values = json.loads(fingerprint_to_json(SOURCE))
    place = values
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(Corrupt, match="the fingerprint k cannot be read"):
        fingerprint_from_json(json.dumps(values).encode(), "k")


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"kind": 1, "format": 1}'])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt, match="the fingerprint k cannot be read"):
        fingerprint_from_json(data, "k")
