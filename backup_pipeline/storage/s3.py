"""S3, and what speaks its protocol, as a store.

Opened through store.open_store. Bytes go through obstore, which streams in little memory and
publishes nothing when the producer fails; control (list, delete, copy) through boto3, imported
when it is first needed. Both use the same credentials, endpoint and region. What a bucket is and
can do is found out by bucket.py.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import obstore
from obstore.store import S3Store as ByteStore

from backup_pipeline.config import StoreConfig
from backup_pipeline.errors import BackupError, ConfigError, CopyUnsupported, ObjectExists, StoreError
from backup_pipeline.storage import s3_errors
from backup_pipeline.storage.s3_clients import S3Clients, content_md5
from backup_pipeline.storage.s3_errors import Problem
from backup_pipeline.storage.s3_stream import MIB, PART_BYTES, Source, plan_parts
from backup_pipeline.storage.store import ObjectInfo, check_key, check_prefix

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

READ_BYTES = 4 * MIB
SINGLE_COPY_BYTES = 5 * 1024 * MIB  # S3's limit
COPY_PART_BYTES = 512 * MIB
PAGE = 1000
_COPIES_IN_FLIGHT = 8
_COPY_BYTES_PER_S = 16 * MIB  # the slowest copying within a store that is waited for
_NO_BATCHES = ("NotImplemented", "MethodNotAllowed", "AccessDenied", "InvalidRequest", "MalformedXML")
_BUCKET_URL = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(?P<prefix>.*))?", re.DOTALL)


class S3Store:
    """A Store in a bucket that exists, under a prefix.

    No request is made before the first use. Waiting is bounded by `config.timeout_s` for one
    request with its retries; a part of an upload that grew with its size hint may take as much
    longer as it is larger, and a copy within the store one second more for each 16 MiB.
    """

    def __init__(
        self,
        config: StoreConfig,
        *,
        single_copy_bytes: int = SINGLE_COPY_BYTES,
        copy_part_bytes: int = COPY_PART_BYTES,
    ) -> None:
        self.bucket, self.prefix = bucket_of(config.url)
        self.storage_class = config.storage_class
        self._timeout_s = config.timeout_s
        self._endpoint = config.endpoint
        self._clients = S3Clients(config, self.bucket)
        self._single_copy_bytes, self._copy_part_bytes = single_copy_bytes, copy_part_bytes
        self._ranges_ignored = self._md5_wanted = False  # learned from the server

    @property
    def url(self) -> str:
        """Bucket and prefix, as s3://bucket/prefix."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def client(self) -> "S3Client":
        """boto3's client, for what a Store cannot do."""
        return self._clients.control(self._timeout_s / 4)

    @property
    def _reading(self) -> ByteStore:
        return self._clients.bytes(self._timeout_s / 3)

    # Bytes

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        """See Store. Up to 8 MiB as one request; longer by parts, aborted when `chunks` raises.

        Without a hint, a stream is refused past 78 GiB, the end of 10,000 parts.
        """
        path, plan = self._path(key), plan_parts(size_hint_bytes)
        source = Source(chunks, limit_bytes=plan.limit_bytes)
        whole = source.gather(PART_BYTES)
        if whole is not None:
            self._put_whole(key, whole, storage_class=storage_class)
            return
        before = self._etag(path, key)
        try:
            obstore.put(
                self._clients.bytes(self._timeout_s * plan.slowness),
                path,
                iter(source),
                attributes=self._attributes(storage_class),
                use_multipart=True,
                chunk_size=plan.part_bytes,
                max_concurrency=plan.in_flight,
            )
        except BaseException as error:
            if source.raised is error or not isinstance(error, Exception):
                raise
            if source.raised is not None:
                raise source.raised from source.raised.__cause__
            problem = _problem(error)
            if problem.code == s3_errors.NO_UPLOAD and self._arrived(key, source, before):
                return
            raise self._failed("write", key, problem) from None

    def _put_whole(self, key: str, data: bytes, *, storage_class: str = "", if_absent: bool = False) -> None:
        """Write an object by one request."""
        if not self._md5_wanted:
            try:
                obstore.put(
                    self._clients.bytes(self._timeout_s),
                    self._path(key),
                    data,
                    attributes=self._attributes(storage_class),
                    mode="create" if if_absent else "overwrite",
                    use_multipart=False,
                )
                return
            except Exception as error:
                problem = _problem(error)
                if if_absent and problem.status == 501:  # a server that knows no conditions
                    self._put_whole(key, data, storage_class=storage_class)
                    return
                if not _lacks_md5(problem):
                    raise self._failed("write", key, problem) from None
                self._md5_wanted = True
        # Buckets with a lock may insist on a digest that obstore does not send.
        name = storage_class or self.storage_class
        extra: Any = ({"StorageClass": name} if name else {}) | ({"IfNoneMatch": "*"} if if_absent else {})
        with self._controlling("write", key) as client:
            client.put_object(
                Bucket=self.bucket, Key=self._path(key), Body=data, ContentMD5=content_md5(data), **extra
            )

    def _attributes(self, storage_class: str) -> Any:
        chosen = storage_class or self.storage_class
        return {"Storage-Class": chosen} if chosen else None

    def _arrived(self, key: str, source: Source, before: str) -> bool:
        """Whether an upload is complete whose completion, asked for again, is no longer known.

        The first answer was lost, then; the object is there with the length that was sent.
        """
        if not source.exhausted:
            return False
        with contextlib.suppress(StoreError):
            found = self.head(key)
            return found.size_bytes == source.total_bytes and found.etag != before
        return False

    def put_if_absent(self, key: str, data: bytes) -> None:
        """See Store. Looks first, so that only racing writers can meet a server without the condition."""
        if self._etag(self._path(key), key):
            raise ObjectExists(f"object {key} is already in {self._where}")
        self._put_whole(key, data, if_absent=True)

    def settle(self, key: str) -> None:
        """See Store. What is visible in a bucket is durable."""
        check_key(key)

    def _etag(self, path: str, key: str) -> str:
        """The ETag of what lies there; "" when nothing does, or when the server will not say."""
        try:
            return (obstore.head(self._reading, path)["e_tag"] or "?").strip('"')
        except Exception as error:
            problem = _problem(error)
            if problem.status in (403, 404):
                return ""
            raise self._failed("look at", key, problem) from None

    def read(self, key: str) -> Iterator[bytes]:
        """See Store. A connection that breaks is resumed where it broke."""
        path = self._path(key)
        with self._telling("read", key):
            stream = iter(obstore.get(self._reading, path).stream(min_chunk_size=READ_BYTES))
        while True:
            with self._telling("read", key):
                chunk = next(stream, None)
            if chunk is None:
                return
            if len(chunk):
                yield bytes(chunk)

    def read_range(self, key: str, *, offset: int, length: int) -> bytes:
        """See Store."""
        path = self._path(key)
        if length <= 0:
            self.head(key)
            return b""
        if not self._ranges_ignored:
            try:
                return bytes(obstore.get_range(self._reading, path, start=offset, length=length))
            except Exception as error:
                if "non-partial response" not in str(error):
                    problem = _problem(error)
                    if problem.status == 416:
                        return b""
                    raise self._failed("read", key, problem) from None
            self._ranges_ignored = True
        return self._read_range_leniently(key, path, offset, length)

    def _read_range_leniently(self, key: str, path: str, offset: int, length: int) -> bytes:
        """A range from a server that answers 200, with the range or with the whole object."""
        with self._controlling("read", key) as client:
            try:
                answer = client.get_object(
                    Bucket=self.bucket, Key=path, Range=f"bytes={offset}-{offset + length - 1}"
                )
            except client.exceptions.ClientError as error:
                if s3_errors.from_botocore(error).status == 416:
                    return b""
                raise
            with contextlib.closing(answer["Body"]) as body:
                skip = 0 if answer.get("ContentRange", "").startswith(f"bytes {offset}-") else offset
                while skip > 0 and (skipped := body.read(min(skip, MIB))):
                    skip -= len(skipped)
                return body.read(length)

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        with self._telling("look at", key):
            found = obstore.head(self._reading, self._path(key))
        return ObjectInfo(
            key=key,
            size_bytes=found["size"],
            etag=(found["e_tag"] or "").strip('"'),
            modified_at=found["last_modified"],
        )

    # Control

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store."""
        check_prefix(prefix)
        above = f"{self.prefix}/" if self.prefix else ""
        with self._controlling("list", prefix) as client:
            pages = iter(
                client.get_paginator("list_objects_v2").paginate(
                    Bucket=self.bucket, Prefix=above + prefix, PaginationConfig={"PageSize": PAGE}
                )
            )
        while True:
            with self._controlling("list", prefix):
                page = next(pages, None)
            if page is None:
                return
            for one in page.get("Contents", []):
                yield ObjectInfo(
                    key=one["Key"].removeprefix(above),
                    size_bytes=one["Size"],
                    etag=one["ETag"].strip('"'),
                    modified_at=one["LastModified"].astimezone(UTC).replace(microsecond=0),  # as in head
                )

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """See Store. In batches; one by one where the server has no batches or denies them."""
        paths = {self._path(key): key for key in keys}
        refused: dict[str, str] = {}
        todo = list(paths)
        for start in range(0, len(todo), PAGE):
            batch = todo[start : start + PAGE]
            refused |= {paths[path]: why for path, why in self._delete_batch(batch).items()}
        return refused

    def _delete_batch(self, paths: Sequence[str]) -> dict[str, str]:
        with self._controlling("delete objects", "") as client:
            try:
                answer = client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": path} for path in paths], "Quiet": True}
                )
            except client.exceptions.ClientError as error:
                problem = s3_errors.from_botocore(error)
                if problem.code == s3_errors.NO_BUCKET or problem.code not in _NO_BATCHES:
                    raise
                return self._delete_singly(client, paths)
        return {
            one["Key"]: f"{one.get('Code', '')}: {one.get('Message', '')}".strip(": ")
            for one in answer.get("Errors", [])
            if one.get("Code") != s3_errors.NO_KEY
        }

    def _delete_singly(self, client: "S3Client", paths: Sequence[str]) -> dict[str, str]:
        refused: dict[str, str] = {}
        for path in paths:
            try:
                client.delete_object(Bucket=self.bucket, Key=path)
            except client.exceptions.ClientError as error:
                problem = s3_errors.from_botocore(error)
                if problem.code == s3_errors.NO_BUCKET:
                    raise
                if problem.code != s3_errors.NO_KEY:
                    refused[path] = f"{problem.code}: {problem.said}".strip(": ")
        return refused

    def copy(self, source: str, target: str, *, storage_class: str = "") -> None:
        """See Store. By parts above 5 GiB, where the server can; the size of the copy is compared."""
        original = self.head(source)
        from boto3.s3.transfer import TransferConfig  # boto3 costs 0.6 s

        chosen = storage_class or self.storage_class
        extra = {"StorageClass": chosen} if chosen else {}
        one_request = min(original.size_bytes, self._single_copy_bytes)
        with self._controlling("copy to", target, attempt_s=self._copying_s(one_request)) as client:
            try:
                client.copy(
                    {"Bucket": self.bucket, "Key": self._path(source)},
                    self.bucket,
                    self._path(target),
                    ExtraArgs=extra,
                    Config=TransferConfig(
                        multipart_threshold=self._single_copy_bytes,
                        multipart_chunksize=self._copy_part_bytes,
                        max_concurrency=_COPIES_IN_FLIGHT,
                        preferred_transfer_client="classic",
                    ),
                )
            except KeyError as error:  # from boto3, when the answer to a part holds no ETag
                raise self._no_copy(source, f"it answered without {error}") from None
            except client.exceptions.ClientError as error:
                problem = s3_errors.from_botocore(error)
                if problem.status in (405, 501) or _lacks_md5(problem):
                    raise self._no_copy(source, problem.code) from None
                raise
        if self.head(target).size_bytes != original.size_bytes:
            self.delete([target])
            raise self._no_copy(source, "the copy had another size")

    def _copying_s(self, size_bytes: int) -> float:
        """How long a server may take to copy this much before it answers, in steps."""
        step_s = self._timeout_s / 4
        return step_s * (1 + int(size_bytes / (_COPY_BYTES_PER_S * step_s)))

    # Errors

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self.prefix}/{key}" if self.prefix else key

    @property
    def _where(self) -> str:
        endpoint = self._endpoint
        return f"{self.url} at {_without_user(endpoint)}" if endpoint else self.url

    @contextlib.contextmanager
    def _telling(self, doing: str, key: str) -> Iterator[None]:
        """Turn obstore's errors into ours. Nothing but calls of obstore belongs in it."""
        try:
            yield
        except Exception as error:
            raise self._failed(doing, key, _problem(error)) from None

    @contextlib.contextmanager
    def _controlling(self, doing: str, key: str, *, attempt_s: float = 0.0) -> "Iterator[S3Client]":
        """boto3's client, whose errors are turned into ours."""
        try:
            yield self._clients.control(attempt_s or self._timeout_s / 4)
        except BackupError:
            raise
        except Exception as error:
            raise self._failed(doing, key, s3_errors.from_botocore(error)) from None

    def _failed(self, doing: str, key: str, problem: Problem) -> StoreError:
        bare = problem.code in (s3_errors.NOT_FOUND, s3_errors.DENIED) and not problem.said
        if bare and doing in ("look at", "read"):
            problem = self._explained(problem, key)
        error = s3_errors.to_error(problem, doing=doing, key=key, where=self._where)
        if self._clients.reveals(str(error)):
            return StoreError(f"cannot {doing} in {self._where}: {problem.code}", hint=error.hint)
        return error

    def _explained(self, problem: Problem, key: str) -> Problem:
        """What was not found (object or bucket), or why it was denied: a HEAD's answer has no body."""
        try:
            obstore.get(self._reading, self._path(key))
        except Exception as error:
            found = _problem(error)
            if found.status == problem.status and found.said:
                return found
        return replace(problem, code=s3_errors.NO_KEY) if problem.code == s3_errors.NOT_FOUND else problem

    def _no_copy(self, source: str, why: str) -> CopyUnsupported:
        return CopyUnsupported(f"{self._where} cannot copy {source} by itself: {why}")


def bucket_of(url: str) -> tuple[str, str]:
    """(bucket, prefix) of an s3:// URL. Raises ConfigError."""
    match = _BUCKET_URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"store URL {url!r} is not s3://bucket/prefix")
    prefix = (match["prefix"] or "").strip("/")
    if prefix:
        check_key(prefix)
    return match["bucket"], prefix


def _problem(error: Exception) -> Problem:
    """What obstore failed with; an error of ours, as of missing credentials, is raised again."""
    if isinstance(error, BackupError):
        raise error
    return s3_errors.from_obstore(error)


def _lacks_md5(problem: Problem) -> bool:
    """Whether a bucket, most likely one with a lock, wants a digest with every object."""
    return problem.status == 400 and "Content-MD5" in problem.said


def _without_user(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
