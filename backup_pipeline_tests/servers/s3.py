"""Real S3 servers on loopback, each started on a free port and gone with its context.

`rclone_s3` is quick, checks signatures and keeps objects as files in a folder; `moto_s3` is in
memory and knows what rclone does not: conditional writes, versions, lock, lifecycle, policies.
Any test may use them; the fixtures of the storage tests are built on them.
"""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from backup_pipeline import process
from backup_pipeline.config import Secret, StoreConfig
from backup_pipeline.demo.servers import program, s3_server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "backups"
START_WITHIN_S = 60.0
_ALLOWED = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}'


@dataclass(frozen=True)
class S3Server:
    """A running server: where it listens, who may speak to it, and a bucket that exists."""

    endpoint: str
    access_key_id: str
    secret_access_key: str
    bucket: str = BUCKET
    region: str = "us-east-1"

    def store(self, prefix: str = "", *, storage_class: str = "", timeout_s: float = 20.0) -> StoreConfig:
        """The configuration of a store in the bucket."""
        return StoreConfig(
            url=f"s3://{self.bucket}/{prefix}" if prefix else f"s3://{self.bucket}",
            endpoint=self.endpoint,
            region=self.region,
            storage_class=storage_class,
            access_key_id=Secret(self.access_key_id),
            secret_access_key=Secret(self.secret_access_key),
            timeout_s=timeout_s,
        )

    def client(self) -> "S3Client":
        """A boto3 client, to look at the server from the side."""
        client: S3Client = self._client("s3")
        return client

    def with_keys(self, access_key_id: str, secret_access_key: str) -> "S3Server":
        """The same server, seen by someone else."""
        return replace(self, access_key_id=access_key_id, secret_access_key=secret_access_key)

    def assume_role(self, name: str) -> dict[str, Any]:
        """Keys with a token, for a new role that may do anything (moto)."""
        iam = self._client("iam")
        role = iam.create_role(RoleName=name, AssumeRolePolicyDocument=_ALLOWED)["Role"]
        iam.put_role_policy(RoleName=name, PolicyName="all", PolicyDocument=_ALLOWED)
        keys = self._client("sts").assume_role(RoleArn=role["Arn"], RoleSessionName="backup")["Credentials"]
        return {**keys, "Token": keys["SessionToken"]}

    def _client(self, service: str) -> Any:
        return boto3.client(  # type: ignore[call-overload]
            service,
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"total_max_attempts": 2},
            ),
        )


@contextlib.contextmanager
def rclone_s3(folder: Path, *, cert: Path | None = None, key: Path | None = None) -> Iterator[S3Server]:
    """`rclone serve s3` over `folder`, in which the bucket becomes a folder."""
    access_key_id, secret_access_key = "rclone-access-key", "rclone-secret-key"
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    options = ("--cert", str(cert), "--key", str(key)) if cert and key else ()
    with s3_server(folder, access_key_id, secret_access_key, options=options) as endpoint:
        yield S3Server(endpoint, access_key_id, secret_access_key)


@contextlib.contextmanager
def moto_s3(*, authorized: bool = False) -> Iterator[S3Server]:
    """`moto_server` with an empty bucket; with `authorized`, wrong credentials are refused."""
    setup = S3Server("", "moto-access-key", "moto-secret-key")
    # Four calls are free: the three that make a user, and the one that makes the bucket.
    environment = {"INITIAL_NO_AUTH_ACTION_COUNT": "4"} if authorized else {}
    argv = [program("moto_server"), "-H", "127.0.0.1", "-p", "0"]
    with _running(argv, rb"Running on (http://[0-9.:]+)", environment) as endpoint:
        server = replace(setup, endpoint=endpoint)
        if authorized:
            server = _with_user(server)
        setup = replace(setup, endpoint=endpoint)
        setup.client().create_bucket(Bucket=BUCKET)
        yield server


def _with_user(server: S3Server) -> S3Server:
    """The same server as seen by a new user who may do anything."""
    iam = server._client("iam")
    iam.create_user(UserName="backup")
    iam.put_user_policy(UserName="backup", PolicyName="all", PolicyDocument=_ALLOWED)
    key = iam.create_access_key(UserName="backup")["AccessKey"]
    return server.with_keys(key["AccessKeyId"], key["SecretAccessKey"])


@contextlib.contextmanager
def _running(
    argv: Sequence[str], announced: bytes, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """Run a server; yield the address that it announces in what it writes."""
    command = process.Command(tuple(argv), environment or {})
    with tempfile.TemporaryFile() as output:
        child = process.start(command, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + START_WITHIN_S
            # pread: the child writes through the same file position
            while not (found := re.search(announced, os.pread(output.fileno(), 65536, 0))):
                if child.poll() is not None or time.monotonic() > deadline:
                    raise process.failure(
                        command, child.poll(), process.tail(output), timeout_s=START_WITHIN_S
                    )
                time.sleep(0.01)
            yield found[1].decode()
        finally:
            process.terminate(child, grace_s=5.0)
