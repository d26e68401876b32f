"""What S3 adds to the contract: credentials, buckets, limits on waiting, broken connections."""

import hashlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import pytest

from backup_pipeline.config import ARCHIVE_CLASSES, Secret, StoreConfig
from backup_pipeline.errors import (
    ConfigError,
    CopyUnsupported,
    ObjectArchived,
    ObjectExists,
    ObjectNotFound,
    StoreError,
)
from backup_pipeline.storage.s3 import S3Store, bucket_of
from backup_pipeline.storage.store import Store, open_store, read_all
from backup_pipeline_tests.servers.s3 import S3Server
from backup_pipeline_tests.storage import child, peers
from backup_pipeline_tests.storage.peers import Answer, Fault, Request

MIB = 1024 * 1024
SECRET = "a-secret-that-must-never-be-shown"


def chunks(count: int) -> Iterator[bytes]:
    return (bytes([n % 256]) * MIB for n in range(count))


def digest(stream: Iterator[bytes]) -> str:
    summed = hashlib.sha256()
    for chunk in stream:
        summed.update(chunk)
    return summed.hexdigest()


def every_verb(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.put("key/small", [b"x"]),
        lambda: store.put("key/large", chunks(9)),
        lambda: store.put_if_absent("key/absent", b"x"),
        lambda: next(store.read("key/small")),
        lambda: store.read_range("key/small", offset=0, length=1),
        lambda: store.head("key/small"),
        lambda: list(store.list("key/")),
        lambda: store.delete(["key/small"]),
        lambda: store.copy("key/small", "key/copy"),
    ]


def keys(store: Store) -> list[str]:
    return [found.key for found in store.list("")]


# What is refused


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_wrong_credentials_are_named_and_never_shown(s3_server: S3Server, wrong: str) -> None:
    key = "unknown-access-key" if wrong == "key" else s3_server.access_key_id
    store = open_store(s3_server.with_keys(key, SECRET).store("p"))
    for verb in every_verb(store):
        with pytest.raises(StoreError) as caught:
            verb()
        error = caught.value
        assert not isinstance(error, ObjectNotFound | ObjectExists)
        assert "\n" not in error.message
        assert f"s3://{s3_server.bucket}/p at {s3_server.endpoint}" in error.message
        assert "Check the access key and the secret key" in error.hint
        shown = "".join(traceback.format_exception(error))
        assert SECRET not in shown
        assert "Debug source" not in shown
    assert SECRET not in repr(store)


def test_a_missing_bucket_is_refused_and_not_created(s3_server: S3Server) -> None:
    store = open_store(replace(s3_server, bucket="no-such-bucket").store())
    for verb in every_verb(store):
        with pytest.raises(StoreError, match="NoSuchBucket") as caught:
            verb()
        assert not isinstance(caught.value, ObjectNotFound)
        assert "s3://no-such-bucket" in caught.value.message
        assert "never created" in caught.value.hint
    assert [one["Name"] for one in s3_server.client().list_buckets()["Buckets"]] == [s3_server.bucket]


def test_denied_is_not_missing() -> None:
    with peers.answering(lambda _: Answer(403, b"<Error><Code>AccessDenied</Code></Error>")) as endpoint:
        store = open_store(config(endpoint))
        for verb in every_verb(store)[:7]:
            with pytest.raises(StoreError, match="AccessDenied") as caught:
                verb()
            assert not isinstance(caught.value, ObjectNotFound)
            assert "s3:ListBucket" in caught.value.hint


def test_another_region_is_named() -> None:
    with peers.answering(lambda _: Answer(301, b"<Error><Code>PermanentRedirect</Code></Error>")) as endpoint:
        with pytest.raises(StoreError) as caught:
            open_store(config(endpoint)).put("k", [b"x"])
        assert "region" in caught.value.hint


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://bucket/a/b", "bucket", "a/b"),
        ("s3://bucket/a b/ü/", "bucket", "a b/ü"),
    ],
)
def test_urls(url: str, bucket: str, prefix: str) -> None:
    assert bucket_of(url) == (bucket, prefix)


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///prefix", "s3://b", "s3://bu cket", "s3://bucket/a//b", "s3://bucket/.."]
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        bucket_of(url)


def test_one_key_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="only one of"):
        open_store(StoreConfig("s3://bucket", access_key_id=Secret("key")))


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"neither s3://.* nor file://"):
        open_store(StoreConfig("gs://bucket"))


# Limits on waiting


def config(endpoint: str, *, timeout_s: float = 2.0) -> StoreConfig:
    return StoreConfig(
        "s3://bucket/p",
        endpoint=endpoint,
        access_key_id=Secret("some-access-key"),
        secret_access_key=Secret(SECRET),
        timeout_s=timeout_s,
    )


@pytest.mark.parametrize("verb", range(9))
def test_a_silent_server_is_given_up_in_time(verb: int) -> None:
    with peers.silent() as endpoint:
        store = open_store(config(endpoint))
        began = time.monotonic()
        with pytest.raises(StoreError, match="did not answer in time") as caught:
            every_verb(store)[verb]()
        assert time.monotonic() - began < 12
        assert endpoint in caught.value.message
        assert "s3://bucket/p" in caught.value.message
        assert "timeout" in caught.value.hint


def test_an_upload_that_the_server_forgot_is_not_taken_for_complete(moto: S3Server) -> None:
    """The same answer as after a lost one, but nothing, or something older, lies there."""

    def fault(_: int, request: Request) -> Fault:
        if request.method == "POST" and "uploadId=" in request.path:
            upload = request.path.partition("uploadId=")[2]
            moto.client().abort_multipart_upload(Bucket=moto.bucket, Key="forgot/k", UploadId=upload)
        return Fault.NONE

    plain = open_store(moto.store("forgot"))
    with peers.proxy(moto.endpoint, fault) as endpoint:
        store = open_store(replace(moto, endpoint=endpoint).store("forgot"))
        for present in (False, True):
            if present:
                plain.put("k", chunks(20))
            with pytest.raises(StoreError, match="NoSuchUpload"):
                store.put("k", (b"new" + chunk[3:] for chunk in chunks(20)))
    assert digest(plain.read("k")) == digest(chunks(20))


def test_a_server_that_falls_silent_in_mid_upload_is_given_up(moto: S3Server) -> None:
    def fault(_: int, request: Request) -> Fault:
        return Fault.SILENT if "partNumber=2" in request.path else Fault.NONE

    with peers.proxy(moto.endpoint, fault) as endpoint:
        store = open_store(replace(moto, endpoint=endpoint).store("silent", timeout_s=2))
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"cannot write k in .* did not answer in time"):
            store.put("k", chunks(30))
        assert time.monotonic() - began < 12
    assert keys(open_store(moto.store("silent"))) == []
    assert "Uploads" not in moto.client().list_multipart_uploads(Bucket=moto.bucket, Prefix="silent/")


def test_a_server_that_falls_silent_in_mid_download_is_given_up(moto: S3Server) -> None:
    open_store(moto.store("stalled")).put("k", chunks(10))

    def fault(_: int, request: Request) -> Fault:
        return Fault.STALLED if request.method == "GET" else Fault.NONE

    with peers.proxy(moto.endpoint, fault) as endpoint:
        store = open_store(replace(moto, endpoint=endpoint).store("stalled", timeout_s=2))
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"cannot read k in .* did not answer in time"):
            list(store.read("k"))
        assert time.monotonic() - began < 12


@pytest.mark.parametrize("verb", range(9))
def test_nothing_listens(verb: int) -> None:
    endpoint = peers.refusing()
    with pytest.raises(StoreError, match="nothing accepts connections there") as caught:
        every_verb(open_store(config(endpoint)))[verb]()
    assert endpoint in caught.value.message
    assert "endpoint" in caught.value.hint


@pytest.mark.parametrize("verb", [0, 6])
def test_an_unknown_host(verb: int) -> None:
    with pytest.raises(StoreError, match="the host is unknown"):
        every_verb(open_store(config("http://no-such-host.invalid")))[verb]()


# Connections that break


class Faults:
    """The given faults for the first requests that `when` picks, one each; then none."""

    def __init__(self, *kinds: Fault, when: Callable[[Request], bool]) -> None:
        self.left, self._when = list(kinds), when

    def __call__(self, _: int, request: Request) -> Fault:
        return self.left.pop(0) if self.left and self._when(request) else Fault.NONE


@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.LOST, Fault.BUSY])
@pytest.mark.parametrize("step", ["POST uploads=", "PUT partNumber=2", "POST uploadId="])
def test_a_long_upload_outlives_broken_requests(s3_server: S3Server, fault: Fault, step: str) -> None:
    method, part = step.split()
    breaking = Faults(fault, fault, when=lambda request: request.method == method and part in request.path)
    prefix = f"broken-{fault.name}-{part.strip('=')}"
    with peers.proxy(s3_server.endpoint, breaking) as endpoint:
        open_store(replace(s3_server, endpoint=endpoint).store(prefix)).put("k", chunks(20))
    assert breaking.left == []
    assert digest(open_store(s3_server.store(prefix)).read("k")) == digest(chunks(20))


@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.LOST, Fault.BUSY])
def test_a_short_upload_outlives_broken_requests(s3_server: S3Server, fault: Fault) -> None:
    breaking = Faults(fault, fault, when=lambda request: request.method == "PUT")
    with peers.proxy(s3_server.endpoint, breaking) as endpoint:
        open_store(replace(s3_server, endpoint=endpoint).store(f"short-{fault.name}")).put("k", [b"x"])
    assert breaking.left == []
    assert read_all(open_store(s3_server.store(f"short-{fault.name}")), "k") == b"x"


@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.CUT, Fault.BUSY])
def test_a_download_outlives_broken_connections(s3_server: S3Server, fault: Fault) -> None:
    open_store(s3_server.store("download")).put("k", chunks(20))
    breaking = Faults(fault, fault, when=lambda request: request.method == "GET")
    with peers.proxy(s3_server.endpoint, breaking) as endpoint:
        store = open_store(replace(s3_server, endpoint=endpoint).store("download"))
        assert digest(store.read("k")) == digest(chunks(20))
    assert breaking.left == []


def test_an_object_replaced_in_mid_download_is_never_mixed(s3_server: S3Server) -> None:
    """The connection breaks, the object is replaced, and the rest would come from the new one."""
    plain = open_store(s3_server.store("replaced"))
    plain.put("k", [b"a" * MIB] * 20)

    def fault(_: int, request: Request) -> Fault:
        if request.method == "GET" and "Range" not in {name.title() for name in request.headers}:
            return Fault.CUT
        plain.put("k", [b"b" * MIB] * 20)
        return Fault.NONE

    with peers.proxy(s3_server.endpoint, fault) as endpoint:
        store = open_store(replace(s3_server, endpoint=endpoint).store("replaced"))
        with pytest.raises(StoreError, match="cannot read k"):
            list(store.read("k"))


def test_control_outlives_a_third_of_busy_answers(s3_server: S3Server) -> None:
    plain = open_store(s3_server.store("busy"))
    for n in range(5):
        plain.put(f"{n}", [b"x"])
    with peers.proxy(s3_server.endpoint, lambda n, _: Fault.BUSY if n % 3 == 0 else Fault.NONE) as endpoint:
        store = open_store(replace(s3_server, endpoint=endpoint).store("busy"))
        assert keys(store) == ["0", "1", "2", "3", "4"]
        store.copy("0", "copy")
        assert store.delete(["0", "1"]) == {}
    assert keys(plain) == ["2", "3", "4", "copy"]


def test_a_server_that_stays_busy_fails_cleanly() -> None:
    asked: list[Request] = []

    def busy(request: Request) -> Answer:
        asked.append(request)
        return Answer(503, b"<Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>")

    with peers.answering(busy) as endpoint:
        store = open_store(config(endpoint))
        with pytest.raises(StoreError, match="SlowDown: Slow down"):
            store.put("k", [b"x"])
        assert len(asked) <= 7
        asked.clear()
        with pytest.raises(StoreError, match="SlowDown"):
            keys(store)
        assert len(asked) == 3


# What is left behind


def test_a_failed_producer_leaves_no_upload(moto: S3Server) -> None:
    def produce() -> Iterator[bytes]:
        yield from chunks(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(moto.store("aborted")).put("k", produce())
    assert "Uploads" not in moto.client().list_multipart_uploads(Bucket=moto.bucket, Prefix="aborted/")


def test_killed_in_mid_put_nothing_is_listed(s3_server: S3Server) -> None:
    place = s3_server.store("killed")
    child.kill_while_hanging(place)
    store = open_store(place)
    assert keys(store) == []
    with pytest.raises(ObjectNotFound):
        store.head("hung/object")
    store.put("hung/object", [b"again"])
    assert read_all(store, "hung/object") == b"again"


# Deleting


def deleting(answer: Callable[[Request], Answer]) -> tuple[list[Request], Callable[[Request], Answer]]:
    """The requests that were made, and a server that answers batches by `answer`."""
    asked: list[Request] = []

    def respond(request: Request) -> Answer:
        asked.append(request)
        return answer(request) if request.method == "POST" else Answer(204)

    return asked, respond


def test_what_could_not_be_deleted_is_told_per_key() -> None:
    refusal = (
        b"<DeleteResult>"
        b"<Error><Key>p/locked</Key><Code>AccessDenied</Code><Message>under a lock</Message></Error>"
        b"<Error><Key>p/gone</Key><Code>NoSuchKey</Code><Message>gone</Message></Error></DeleteResult>"
    )
    asked, respond = deleting(lambda _: Answer(200, refusal))
    with peers.answering(respond) as endpoint:
        refused = open_store(config(endpoint)).delete(["fine", "locked", "gone"])
    assert refused == {"locked": "AccessDenied: under a lock"}
    (batch,) = asked
    assert "Content-MD5" in batch.headers
    assert b"<Key>p/fine</Key>" in batch.body


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (403, "AccessDenied"), (405, "MethodNotAllowed")]
)
def test_without_batches_keys_are_deleted_one_by_one(status: int, code: str) -> None:
    asked, respond = deleting(lambda _: Answer(status, f"<Error><Code>{code}</Code></Error>".encode()))
    with peers.answering(respond) as endpoint:
        assert open_store(config(endpoint)).delete(["one", "two"]) == {}
    single = [request.path for request in asked if request.method == "DELETE"]
    assert single == ["/bucket/p/one", "/bucket/p/two"]


def test_more_keys_than_a_batch_holds(moto: S3Server) -> None:
    asked: list[Request] = []

    def look(_: int, request: Request) -> Fault:
        asked.append(request)
        return Fault.NONE

    with peers.proxy(moto.endpoint, look) as endpoint:
        store = open_store(replace(moto, endpoint=endpoint).store("batches"))
        assert store.delete([f"absent/{n}" for n in range(2001)]) == {}
    assert len(asked) == 3


# Storage classes


def class_of(server: S3Server, key: str) -> str:
    return server.client().head_object(Bucket=server.bucket, Key=key).get("StorageClass", "STANDARD")


def test_the_storage_class_is_set_by_every_writer(moto: S3Server) -> None:
    store = open_store(moto.store("classes", storage_class="STANDARD_IA"))
    store.put("small", [b"x"])
    store.put("large", chunks(9))
    store.put_if_absent("absent", b"x")
    store.copy("small", "copy")
    for key in ("small", "large", "absent", "copy"):
        assert class_of(moto, f"classes/{key}") == "STANDARD_IA"
    store.put("other", chunks(9), storage_class="GLACIER_IR")
    store.copy("other", "cold", storage_class="ONEZONE_IA")
    assert class_of(moto, "classes/other") == "GLACIER_IR"
    assert class_of(moto, "classes/cold") == "ONEZONE_IA"


@pytest.mark.parametrize("storage_class", ARCHIVE_CLASSES)
def test_what_a_lifecycle_rule_put_into_the_ice_says_so(moto: S3Server, storage_class: str) -> None:
    store = open_store(moto.store("ice"))
    moto.client().put_object(
        Bucket=moto.bucket, Key="ice/old", Body=b"x", StorageClass=cast("Any", storage_class)
    )
    reads: tuple[Callable[[], object], ...] = (
        lambda: list(store.read("old")),
        lambda: store.read_range("old", offset=0, length=1),
        lambda: store.copy("old", "new"),
    )
    for verb in reads:
        with pytest.raises(ObjectArchived, match="in an archive storage class, where nothing") as caught:
            verb()
        assert "lifecycle rule" in caught.value.hint
        assert not caught.value.retryable
    assert store.head("old").size_bytes == 1


# Copies by parts


def copying_by_parts(server: S3Server, prefix: str) -> S3Store:
    return S3Store(server.store(prefix), single_copy_bytes=6 * MIB, copy_part_bytes=5 * MIB)


def test_a_long_copy_is_made_by_parts(moto: S3Server) -> None:
    store = copying_by_parts(moto, "parts")
    store.put("k", chunks(20))
    store.copy("k", "copy", storage_class="STANDARD_IA")
    assert digest(store.read("copy")) == digest(chunks(20))
    assert class_of(moto, "parts/copy") == "STANDARD_IA"


def test_a_server_that_cannot_copy_by_parts_says_so(rclone: S3Server) -> None:
    store = copying_by_parts(rclone, "no-parts")
    store.put("k", chunks(20))
    with pytest.raises(CopyUnsupported, match="cannot copy k by itself"):
        store.copy("k", "copy")
    assert keys(store) == ["k"]
    assert "Uploads" not in rclone.client().list_multipart_uploads(Bucket=rclone.bucket, Prefix="no-parts/")


def test_a_server_that_cannot_copy_says_so(moto: S3Server) -> None:
    def answer(request: Request) -> Answer:
        if request.method == "HEAD":
            return Answer(200, b"x", {"ETag": '"1"', "Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT"})
        return Answer(501, b"<Error><Code>NotImplemented</Code><Message>no copies</Message></Error>")

    with peers.answering(answer) as endpoint, pytest.raises(CopyUnsupported, match="NotImplemented"):
        open_store(config(endpoint)).copy("k", "copy")


# Conditions


def test_put_if_absent_without_the_right_to_look() -> None:
    """Without s3:ListBucket a HEAD of a missing object is denied; the write must go ahead."""
    written: list[Request] = []

    def answer(request: Request) -> Answer:
        if request.method == "HEAD":
            return Answer(403)
        written.append(request)
        return Answer(headers={"ETag": '"1"'})

    with peers.answering(answer) as endpoint:
        open_store(config(endpoint)).put_if_absent("k", b"x")
    assert [(request.method, request.path.rpartition("/")[2], request.body) for request in written] == [
        ("PUT", "k", b"x")
    ]


def test_ranges_from_a_server_that_ignores_them() -> None:
    whole = b"0123456789" * 300_000

    def answer(request: Request) -> Answer:
        return Answer(200, whole, {"ETag": '"1"', "Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT"})

    with peers.answering(answer) as endpoint:
        store = open_store(config(endpoint))
        for offset in (0, 3, 2_500_007):
            assert store.read_range("k", offset=offset, length=7) == whole[offset : offset + 7]
        assert store.read_range("k", offset=2_999_999, length=7) == b"9"
        assert store.read_range("k", offset=4_000_000, length=7) == b""


def test_an_etag_belongs_to_the_bytes(s3_server: S3Server) -> None:
    store = open_store(s3_server.store("etags"))
    store.put("one", chunks(9))
    store.put("two", islice(chunks(10), 1, 10))
    one, two = store.list("")
    assert one.etag != two.etag
    assert '"' not in one.etag
