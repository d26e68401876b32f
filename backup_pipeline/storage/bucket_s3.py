"""What a bucket is and can do, beyond what every place is tried for. bucket.py calls it.

Settings are only read. A server that does not know a setting, or keys that may not read it, are
answers like any other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from backup_pipeline.config import ARCHIVE_CLASSES
from backup_pipeline.storage import s3_errors
from backup_pipeline.storage.bucket import Check, ProbeResult, failed, limited, ok
from backup_pipeline.storage.s3 import S3Store
from backup_pipeline.storage.s3_clients import content_md5
from backup_pipeline.storage.store import Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def checks(store: Store, scratch: str) -> Sequence[Check]:
    """What a bucket is tried for, and asked."""
    if not isinstance(store, S3Store):
        return ()
    bucket = _Bucket(store, scratch)
    tried = (
        ("conditional writes", bucket.conditional_writes),
        ("ranged answers", bucket.ranged_answers),
        ("metadata", bucket.metadata),
        ("storage class", bucket.storage_class),
        ("versioning", bucket.versioning),
        ("object lock", bucket.object_lock),
        ("lifecycle", bucket.lifecycle),
        ("encryption at rest", bucket.encryption),
        ("unfinished uploads", bucket.unfinished),
    )
    return [
        Check(name, _told(store, name, attempt), "It is unknown what this bucket does.")
        for name, attempt in tried
    ]


def abort_uploads(store: Store, *, before: datetime) -> tuple[str, ...]:
    """See bucket.abort_uploads."""
    if not isinstance(store, S3Store):
        return ()
    aborted: list[str] = []
    try:
        for upload in _uploads(store):
            if upload.began < before:
                store.client.abort_multipart_upload(
                    Bucket=store.bucket, Key=_path(store, upload.key), UploadId=upload.upload_id
                )
                aborted.append(upload.key)
    except (ClientError, BotoCoreError) as error:
        problem = s3_errors.from_botocore(error)
        raise s3_errors.to_error(problem, doing="drop unfinished uploads", key="", where=store.url) from None
    return tuple(aborted)


@dataclass(frozen=True)
class _Upload:
    key: str
    upload_id: str
    began: datetime


def _uploads(store: S3Store) -> Iterator[_Upload]:
    """The uploads under our prefix that were begun and not completed."""
    above = _path(store, "")
    pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.bucket, Prefix=above)
    for page in pages:
        for one in page.get("Uploads", []):
            if one["Key"].startswith(above):
                yield _Upload(one["Key"].removeprefix(above), one["UploadId"], one["Initiated"])


def _path(store: S3Store, key: str) -> str:
    return f"{store.prefix}/{key}" if store.prefix else key


def _told(store: S3Store, name: str, attempt: Callable[[], ProbeResult]) -> Callable[[], ProbeResult]:
    """The attempt, with a server's "no" turned into a result."""

    def carry_out() -> ProbeResult:
        try:
            return attempt()
        except (ClientError, BotoCoreError) as error:
            problem = s3_errors.from_botocore(error)
            if problem.code == s3_errors.DENIED:
                return _unknown(name, "these credentials may not read it")
            if problem.status in (400, 404, 405, 501):
                return _unknown(name, f"the server does not tell ({problem.code})")
            raise s3_errors.to_error(problem, doing=f"ask for {name}", key="", where=store.url) from None

    return carry_out


def _unknown(name: str, why: str) -> ProbeResult:
    return limited(name, why, "Ask whoever runs the bucket.")


class _Bucket:
    """One bucket, and what it is asked."""

    def __init__(self, store: S3Store, scratch: str) -> None:
        self._store = store
        self._scratch = scratch
        self._bucket = store.bucket

    @property
    def _client(self) -> "S3Client":
        return self._store.client

    def _key(self, name: str) -> str:
        return _path(self._store, self._scratch + name)

    def _put(self, key: str, data: bytes, **more: Any) -> None:
        self._client.put_object(Bucket=self._bucket, Key=key, Body=data, ContentMD5=content_md5(data), **more)

    # Tried

    def conditional_writes(self) -> ProbeResult:
        """If-None-Match on a key that is taken, asked of the server alone."""
        name, key = "conditional writes", self._key("conditional")
        self._put(key, b"first")
        try:
            self._put(key, b"second", IfNoneMatch="*")
        except ClientError as error:
            problem = s3_errors.from_botocore(error)
            if problem.status == 412:
                return ok(name, "a write over an existing object is refused when asked for")
            if problem.status == 501:
                return failed(name, "the server refuses conditional writes", _NO_CONDITION)
            raise
        body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        did = "said that it wrote, but did not" if body == b"first" else "overwrote the first object"
        return limited(name, f"the server ignored the condition: it {did}", _NO_CONDITION)

    def ranged_answers(self) -> ProbeResult:
        """Whether a ranged GET is answered as HTTP asks for, which lets broken downloads go on."""
        name, key = "ranged answers", self._key("ranged")
        self._put(key, b"0123456789")
        answer = self._client.get_object(Bucket=self._bucket, Key=key, Range="bytes=3-6")
        status, body = answer["ResponseMetadata"]["HTTPStatusCode"], answer["Body"].read()
        if status == 206 and body == b"3456":
            return ok(name, "a ranged request is answered by 206 and the range")
        what = "the range" if body == b"3456" else "the whole object"
        return limited(
            name,
            f"a ranged request is answered by {status} and {what}",
            "Ranges are read more slowly.",
        )

    def metadata(self) -> ProbeResult:
        """Content type and user metadata."""
        name, key = "metadata", self._key("metadata")
        self._put(key, b"x", ContentType="application/x-probe", Metadata={"probe": "kept"})
        found = self._client.head_object(Bucket=self._bucket, Key=key)
        kept = [
            what
            for what, same in (
                ("content type", found.get("ContentType") == "application/x-probe"),
                ("user metadata", found.get("Metadata", {}).get("probe") == "kept"),
            )
            if same
        ]
        if len(kept) == 2:
            return ok(name, "content type and user metadata are kept")
        found_kept = f"only the {kept[0]} is kept" if kept else "no content type or user metadata is kept"
        return limited(name, found_kept, "Nothing: all facts of a backup lie in its manifest.")

    def storage_class(self) -> ProbeResult:
        """The store's own class, if it has one."""
        name, wanted = "storage class", self._store.storage_class
        if not wanted:
            return ok(name, "none is configured: objects get the bucket's own")
        self._store.put(f"{self._scratch}class", [b"x"])
        found = self._client.head_object(Bucket=self._bucket, Key=self._key("class"))
        given = found.get("StorageClass", "STANDARD")
        if given == wanted:
            return ok(name, f"objects are kept as {wanted}")
        return limited(
            name,
            f"{wanted} was asked for and {given} given",
            "Objects cost what that class costs.",
        )

    # Asked

    def versioning(self) -> ProbeResult:
        """Whether what is overwritten or deleted can be had back."""
        state = str(self._client.get_bucket_versioning(Bucket=self._bucket).get("Status", ""))
        if state == "Enabled":
            return ok(
                "versioning",
                "on: what is overwritten or deleted can be had back",
                "Let a lifecycle rule expire old versions some days after prune, or they are kept for ever.",
            )
        return limited(
            "versioning",
            "suspended" if state else "off",
            "What is overwritten or deleted, by mistake or by an attacker, is gone at once.",
        )

    def object_lock(self) -> ProbeResult:
        """Whether objects can be deleted before their time."""
        name = "object lock"
        try:
            answer: Mapping[str, Any] = self._client.get_object_lock_configuration(Bucket=self._bucket)
        except ClientError as error:
            if s3_errors.from_botocore(error).code == "ObjectLockConfigurationNotFoundError":
                return limited(name, "off", _NO_LOCK)
            raise
        if "ObjectLockConfiguration" not in answer:
            return _unknown(name, "the server does not tell")
        rule = answer["ObjectLockConfiguration"].get("Rule", {}).get("DefaultRetention", {})
        if not rule:
            return limited(name, "possible, but without a default for new objects", _NO_LOCK)
        time = f"{rule['Days']} days" if "Days" in rule else f"{rule.get('Years', '?')} years"
        return ok(
            name,
            f"{rule.get('Mode', '?').lower()} for {time}",
            "A lock that outlasts the retention makes prune meet denials, which it tells and tolerates.",
        )

    def lifecycle(self) -> ProbeResult:
        """Rules that act on our objects behind our back."""
        try:
            answer: Mapping[str, Any] = self._client.get_bucket_lifecycle_configuration(Bucket=self._bucket)
        except ClientError as error:
            if s3_errors.from_botocore(error).code != "NoSuchLifecycleConfiguration":
                raise
            answer = {"Rules": []}
        if "Rules" not in answer:  # the answer to another question: this one was not understood
            return _unknown("lifecycle", "the server does not tell")
        return judge_lifecycle(answer["Rules"], _path(self._store, ""))

    def encryption(self) -> ProbeResult:
        """What the bucket encrypts with, which protects against nobody who may read the bucket."""
        name = "encryption at rest"
        try:
            answer: Mapping[str, Any] = self._client.get_bucket_encryption(Bucket=self._bucket)
        except ClientError as error:
            if s3_errors.from_botocore(error).code != "ServerSideEncryptionConfigurationNotFoundError":
                raise
            return limited(name, "off", "Whoever takes the server's disks reads what lies there.")
        rules = answer.get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
        if not rules:
            return _unknown(name, "the server does not tell")
        used = {rule.get("ApplyServerSideEncryptionByDefault", {}).get("SSEAlgorithm", "?") for rule in rules}
        return ok(name, f"on, with {', '.join(sorted(used))}")

    def unfinished(self) -> ProbeResult:
        """Parts of uploads that were never completed."""
        uploads = list(_uploads(self._store))
        if not uploads:
            return ok("unfinished uploads", "none")
        oldest = min(upload.began for upload in uploads)
        return limited(
            "unfinished uploads",
            f"{len(uploads)}, the oldest begun at {oldest:%Y-%m-%d %H:%M} UTC",
            "Those of killed runs are in no listing, but they are billed until they are dropped.",
        )


_NO_CONDITION = "Of two writers that race for one key both believe they were first; no safety rests on it."
_NO_LOCK = "Whoever holds keys that may delete can delete every backup."


def judge_lifecycle(rules: Sequence[Mapping[str, Any]], prefix: str) -> ProbeResult:
    """What a bucket's lifecycle rules, as S3 gives them, do to objects whose keys begin with `prefix`."""
    ours = [rule for rule in rules if rule.get("Status") == "Enabled" and _concerns(rule, prefix)]
    for rule in ours:
        expiry = rule.get("Expiration", {})
        if when := _when(expiry):
            return failed(
                "lifecycle",
                f"rule {_named(rule)} deletes objects {when}",
                "Backups vanish behind the retention's back: exclude the store's prefix from the rule.",
            )
    for rule in ours:
        for move in rule.get("Transitions", []):
            if move.get("StorageClass") in ARCHIVE_CLASSES:
                return limited(
                    "lifecycle",
                    f"rule {_named(rule)} moves objects to {move['StorageClass']} {_when(move)}",
                    "What lies there cannot be restored or proven until it was thawed, which takes hours: "
                    "exclude the store's prefix, or move to GLACIER_IR instead.",
                )
    if not any("AbortIncompleteMultipartUpload" in rule for rule in ours):
        return limited(
            "lifecycle",
            "no rule deletes backups, and none drops uploads that were never completed",
            "Add a rule that aborts incomplete multipart uploads after some days.",
        )
    return ok("lifecycle", "uploads never completed are dropped; no rule deletes backups")


def _concerns(rule: Mapping[str, Any], prefix: str) -> bool:
    """Whether a rule can meet our objects: they have no tags, and any size."""
    chosen = rule.get("Filter") or {}
    both = chosen.get("And", {})
    if "Tag" in chosen or both.get("Tags"):
        return False
    begins = str(chosen.get("Prefix") or both.get("Prefix") or rule.get("Prefix") or "")
    return begins.startswith(prefix) or prefix.startswith(begins)


def _when(action: Mapping[str, Any]) -> str:
    if "Days" in action:
        return f"after {action['Days']} days"
    return f"at {action['Date']}" if "Date" in action else ""


def _named(rule: Mapping[str, Any]) -> str:
    return repr(rule.get("ID", "without a name"))
