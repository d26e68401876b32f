"""The probe finds what each place does, whatever it answers, and leaves nothing behind."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backup_pipeline.domain import layout
from backup_pipeline.errors import ObjectExists
from backup_pipeline.storage import files
from backup_pipeline.storage.bucket import ProbeResult, Status, abort_uploads, probe
from backup_pipeline.storage.bucket_s3 import judge_lifecycle
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store, open_store
from backup_pipeline_tests.servers.s3 import S3Server, moto_s3
from backup_pipeline_tests.storage import child, peers
from backup_pipeline_tests.storage.effects import CountingStore
from backup_pipeline_tests.storage.peers import Answer

OK, LIMITED, FAILED = Status.OK, Status.LIMITED, Status.FAILED

COMMON = [
    "round trip",
    "odd keys",
    "overwriting",
    "put-if-absent",
    "long objects",
    "aborted uploads",
    "ranges",
    "copying within the store",
    "batch delete",
]


def named(results: tuple[ProbeResult, ...]) -> dict[str, ProbeResult]:
    found = {result.name: result for result in results}
    assert len(found) == len(results)
    return found


def not_ok(results: tuple[ProbeResult, ...]) -> dict[str, Status]:
    return {result.name: result.status for result in results if result.status is not OK}


def test_a_probe_leaves_nothing(store: Store) -> None:
    store.put("kept", [b"x"])
    store.put(f"{layout.SCRATCH}of another probe", [b"x"])
    results = probe(store)
    assert [result.name for result in results][: len(COMMON)] == COMMON
    assert [found.key for found in store.list("")] == ["kept", f"{layout.SCRATCH}of another probe"]
    assert all(result.found for result in results)
    assert all(result.consequence for result in results if result.status is not OK)
    assert FAILED not in {result.status for result in results}


def test_any_store_can_be_probed(tmp_path: Path) -> None:
    results = probe(CountingStore(DirectoryStore(tmp_path)))
    assert [result.name for result in results] == COMMON
    assert not_ok(results) == {}


# A directory


def test_a_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    results = named(probe(DirectoryStore(tmp_path)))
    assert results["durable folders"].status is OK
    assert results["private"].status is OK
    assert results["one file system"].status is OK
    assert "GiB are free" in results["free space"].found
    assert results["a place of its own"].status is LIMITED


def test_a_directory_with_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    store = DirectoryStore(tmp_path)
    store.put("databases/x", [b"x"])
    (tmp_path / "catalog").symlink_to(tmp_path / "databases")
    monkeypatch.setattr(files, "sync_folder", lambda _: None)
    real = os.fsync

    def refuse_folders(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(22, "Invalid argument")
        real(file)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    results = named(probe(store))
    assert results["durable folders"].status is LIMITED
    assert results["private"].status is LIMITED
    assert "755" in results["private"].found
    assert results["one file system"].status is FAILED
    assert "catalog" in results["one file system"].found


# Servers


def test_rclone(rclone: S3Server) -> None:
    found = not_ok(probe(open_store(rclone.store("probed"))))
    found.pop("put-if-absent", None)  # the look beforehand hides it from some races
    assert found == {
        "conditional writes": LIMITED,
        "ranged answers": LIMITED,
        "metadata": LIMITED,
        "versioning": LIMITED,
        "object lock": LIMITED,
        "lifecycle": LIMITED,
        "encryption at rest": LIMITED,
    }


def test_moto(moto: S3Server) -> None:
    results = probe(open_store(moto.store("probed", storage_class="STANDARD_IA")))
    assert not_ok(results) == {
        "versioning": LIMITED,
        "object lock": LIMITED,
        "lifecycle": LIMITED,
        "encryption at rest": LIMITED,
    }
    assert "STANDARD_IA" in named(results)["storage class"].found


def test_a_bucket_with_everything_on() -> None:
    with moto_s3() as server:
        client, name = server.client(), "guarded"
        client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
        client.put_object_lock_configuration(
            Bucket=name,
            ObjectLockConfiguration={
                "ObjectLockEnabled": "Enabled",
                "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 3}},
            },
        )
        client.put_bucket_encryption(
            Bucket=name,
            ServerSideEncryptionConfiguration={
                "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}]
            },
        )
        client.put_bucket_lifecycle_configuration(
            Bucket=name,
            LifecycleConfiguration={
                "Rules": [
                    {
                        "ID": "tidy",
                        "Status": "Enabled",
                        "Filter": {"Prefix": ""},
                        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 2},
                        "NoncurrentVersionExpiration": {"NoncurrentDays": 30},
                    }
                ]
            },
        )
        results = probe(open_store(replace(server, bucket=name).store("p")))
    assert not_ok(results) == {"copying within the store": LIMITED}  # moto wants a digest with copies, too
    assert named(results)["object lock"].found == "governance for 3 days"
    assert "aws:kms" in named(results)["encryption at rest"].found


def test_an_unreachable_place_is_asked_once() -> None:
    server = S3Server(peers.refusing(), "some-access-key", "some-secret-key")
    (only,) = probe(open_store(server.store(timeout_s=1)))
    assert (only.name, only.status) == ("round trip", FAILED)
    assert "nothing accepts connections" in only.found


def test_settings_that_may_not_be_read_are_answers(moto: S3Server) -> None:
    denied = ("versioning", "object-lock", "encryption")

    def fault(_: int, request: peers.Request) -> peers.Fault:
        asked = request.path.partition("?")[2].rstrip("=")
        return peers.Fault.DENIED if asked in denied else peers.Fault.NONE

    with peers.proxy(moto.endpoint, fault) as endpoint:
        place = S3Server(endpoint, moto.access_key_id, moto.secret_access_key).store("denied")
        results = named(probe(open_store(place)))
    for name in ("versioning", "object lock", "encryption at rest"):
        assert results[name].status is LIMITED
        assert "may not read" in results[name].found


def test_keys_that_may_not_delete_are_told(tmp_path: Path) -> None:
    class Undeletable(CountingStore):
        def delete(self, keys: Sequence[str]) -> dict[str, str]:
            return dict.fromkeys(keys, "AccessDenied")

    results = named(probe(Undeletable(DirectoryStore(tmp_path))))
    assert results["round trip"].status is LIMITED
    assert results["batch delete"].status is LIMITED
    assert results["cleaning up"].status is FAILED
    assert layout.SCRATCH in results["cleaning up"].consequence


# Lifecycle rules

EXPIRED = {"Expiration": {"Days": 9}}
ARCHIVED = {"Transitions": [{"Days": 5, "StorageClass": "GLACIER"}]}
COOLED = {"Transitions": [{"Days": 5, "StorageClass": "GLACIER_IR"}]}
SIZED = {"Filter": {"And": {"Prefix": "o", "ObjectSizeGreaterThan": 1}}}
TAGGED = {"Filter": {"Tag": {"Key": "k", "Value": "v"}}}
TIDYING = {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 2}}


@pytest.mark.parametrize(
    ("rule", "status", "said"),
    [
        (EXPIRED, FAILED, "'r' deletes objects after 9 days"),
        ({"Filter": None, "Prefix": "", **EXPIRED}, FAILED, "after 9 days"),
        ({"Filter": {"Prefix": "ours/"}, **EXPIRED}, FAILED, "after 9 days"),
        ({"Filter": {"Prefix": "ours/databases/"}, **EXPIRED}, FAILED, "after 9 days"),
        ({**SIZED, **EXPIRED}, FAILED, "after 9 days"),
        ({"Expiration": {"Date": "2030-01-01"}}, FAILED, "at 2030-01-01"),
        ({"Filter": {"Prefix": "logs/"}, **EXPIRED}, LIMITED, "no rule deletes"),
        ({"Status": "Disabled", **EXPIRED}, LIMITED, "no rule deletes"),
        ({**TAGGED, **EXPIRED}, LIMITED, "no rule deletes"),
        ({"Expiration": {"ExpiredObjectDeleteMarker": True}}, LIMITED, "no rule deletes"),
        ({"NoncurrentVersionExpiration": {"NoncurrentDays": 9}}, LIMITED, "no rule deletes"),
        (ARCHIVED, LIMITED, "to GLACIER after 5 days"),
        (COOLED, LIMITED, "no rule deletes"),
        (TIDYING, OK, "never completed"),
    ],
)
def test_lifecycle_rules(rule: dict[str, object], status: Status, said: str) -> None:
    whole_bucket: dict[str, object] = {"ID": "r", "Status": "Enabled", "Filter": {"Prefix": ""}}
    result = judge_lifecycle([whole_bucket | rule], "ours/")
    assert result.status is status
    assert said in result.found


# Unfinished uploads


def test_uploads_of_killed_runs_are_told_and_dropped(moto: S3Server) -> None:
    place = moto.store("unfinished")
    store = open_store(place)
    child.kill_while_hanging(place)
    child.kill_while_hanging(moto.store("unfinished-of-another"))
    found = named(probe(store))["unfinished uploads"]
    assert found.status is LIMITED
    assert found.found.startswith("1, the oldest begun at 20")
    assert abort_uploads(store, before=datetime(2000, 1, 1, tzinfo=UTC)) == ()
    assert abort_uploads(store, before=datetime.now(UTC)) == ("hung/object",)
    assert abort_uploads(store, before=datetime.now(UTC)) == ()
    left = moto.client().list_multipart_uploads(Bucket=moto.bucket, Prefix="unfinished").get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["unfinished-of-another/hung/object"]


def test_a_directory_has_no_uploads_to_drop(tmp_path: Path) -> None:
    assert abort_uploads(DirectoryStore(tmp_path), before=datetime.now(UTC)) == ()


def test_a_server_that_knows_no_conditions() -> None:
    objects: dict[str, bytes] = {}

    def answer(request: peers.Request) -> Answer:
        if request.method == "PUT" and "If-None-Match" in {name.title() for name in request.headers}:
            return Answer(501, b"<Error><Code>NotImplemented</Code></Error>")
        if request.method == "PUT":
            objects[request.path] = request.body
        if request.path not in objects:
            return Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        headers = {"ETag": '"1"', "Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT"}
        return Answer(200, objects[request.path], headers)

    with peers.answering(answer) as endpoint:
        store = open_store(S3Server(endpoint, "some-access-key", "some-secret-key", bucket="bucket").store())
        store.put_if_absent("k", b"first")
        with pytest.raises(ObjectExists):
            store.put_if_absent("k", b"second")
    assert objects == {"/bucket/k": b"first"}
