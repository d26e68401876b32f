"""The clients that speak to S3: one set of credentials, endpoint, region and limits for both.

s3.py uses obstore's client for bytes and boto3's for control; bucket.py asks boto3's what only it
can. boto3 is imported when it is first needed: it costs 0.6 s, and bytes with keys that were
given need none of it.
"""

import base64
import hashlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obstore.store import S3Store as ByteStore

from backup_pipeline.config import StoreConfig
from backup_pipeline.errors import ConfigError, StoreError
from backup_pipeline.storage import s3_errors

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Credential

_RETRIES = 6
_CREDENTIALS_TTL = timedelta(minutes=10)  # obstore asks anew when less than five minutes are left
_DEFAULT_REGION = "us-east-1"


class S3Clients:
    """Makes clients of one bucket and keeps them. Safe to use from several threads."""

    def __init__(self, config: StoreConfig, bucket: str) -> None:
        self._config, self._bucket = config, bucket
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._controls: dict[float, S3Client] = {}
        self._bytes: dict[float, ByteStore] = {}
        key, secret = config.access_key_id, config.secret_access_key
        if (key is None) != (secret is None):
            raise ConfigError(
                f"store {config.url} has only one of access_key_id and secret_access_key",
                hint="Set both, or neither to use the credentials that boto3 finds.",
            )
        self._keys = (key.reveal(), secret.reveal()) if key and secret else None

    @property
    def endpoint(self) -> str:
        """The address that requests go to."""
        return self._config.endpoint or self.control(self._config.timeout_s).meta.endpoint_url

    def reveals(self, text: str) -> bool:
        """Whether a text holds the secret key."""
        return self._keys is not None and self._keys[1] in text

    def bytes(self, attempt_s: float) -> ByteStore:
        """obstore's client. An attempt is given up after `attempt_s` without an answer.

        No further attempt begins when half of the configured timeout has passed.
        """
        with self._lock:
            if attempt_s not in self._bytes:
                self._bytes[attempt_s] = self._new_bytes(attempt_s)
            return self._bytes[attempt_s]

    def _new_bytes(self, attempt_s: float) -> ByteStore:
        endpoint = self.endpoint
        # All that obstore would otherwise take from the environment, where it even outranks us:
        # AWS_ENDPOINT_URL_S3 alone would send the backups elsewhere.
        config: S3Config = {
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,
            "region": self._region,
            "skip_signature": False,
            "virtual_hosted_style_request": False,
        }
        if (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
            # Needed where a bucket has a lock. Some other servers refuse it.
            config["checksum_algorithm"] = "SHA256"
        options: ClientConfig = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=min(10.0, attempt_s)),
            "read_timeout": timedelta(seconds=attempt_s),
            "timeout": timedelta(days=30),  # of a whole object; the one above finds a stall
        }
        if authority := os.environ.get("AWS_CA_BUNDLE"):  # as boto3 does
            try:
                options["root_certificate"] = Path(authority).read_bytes()
            except OSError as error:
                raise ConfigError(f"cannot read AWS_CA_BUNDLE, {authority}: {error.strerror}") from error
        retry: RetryConfig = {
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(seconds=self._config.timeout_s / 2),
            "backoff": {
                "init_backoff": timedelta(milliseconds=200),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        }
        return ByteStore(
            self._bucket,
            config=config,
            client_options=options,
            retry_config=retry,
            credential_provider=self._credentials(),
        )

    def _credentials(self) -> "Callable[[], S3Credential]":
        """What obstore signs with: our keys, or those that boto3 finds and renews."""
        if self._keys:
            key, secret = self._keys
            return lambda: {
                "access_key_id": key,
                "secret_access_key": secret,
                "token": None,
                "expires_at": None,
            }
        from obstore.auth.boto3 import Boto3CredentialProvider  # boto3 costs 0.6 s

        try:
            return Boto3CredentialProvider(self._boto3_session(), ttl=_CREDENTIALS_TTL)
        except ValueError:
            raise self._failed(s3_errors.no_credentials()) from None

    def _failed(self, problem: s3_errors.Problem) -> StoreError:
        return s3_errors.to_error(problem, doing="sign requests", key="", where=self._config.url)

    @property
    def _region(self) -> str:
        if self._config.region:
            return self._config.region
        if self._keys and self._config.endpoint:
            return _DEFAULT_REGION
        return str(self._boto3_session().region_name or _DEFAULT_REGION)

    def _boto3_session(self) -> "Session":
        with self._lock:
            if self._session is None:
                from boto3.session import Session  # it costs 0.6 s

                key, secret = self._keys or (None, None)
                region = self._config.region or None
                try:
                    self._session = Session(key, secret, region_name=region)
                except Exception as error:
                    raise self._failed(s3_errors.from_botocore(error)) from None
            return self._session

    def control(self, attempt_s: float) -> "S3Client":
        """boto3's client. Of three attempts each is given up after `attempt_s` without an answer."""
        with self._lock:
            if attempt_s not in self._controls:
                self._controls[attempt_s] = self._new_control(attempt_s)
            return self._controls[attempt_s]

    def _new_control(self, attempt_s: float) -> "S3Client":
        from botocore.config import Config  # boto3 costs 0.6 s

        client: S3Client = self._boto3_session().client(
            "s3",
            endpoint_url=self._config.endpoint or None,
            region_name=self._region,
            config=Config(
                connect_timeout=min(10.0, self._config.timeout_s / 4),
                read_timeout=attempt_s,
                retries={"mode": "standard", "total_max_attempts": 3},
                s3={"addressing_style": "path"},
                # Checksums as trailers are refused by servers other than AWS's.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        # Servers older than S3's newer checksums insist on this one.
        client.meta.events.register("before-sign.s3.DeleteObjects", _add_content_md5)
        return client


def content_md5(data: bytes) -> str:
    """The digest that S3's Content-MD5 header holds."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _add_content_md5(request: Any, **_: object) -> None:
    request.headers["Content-MD5"] = content_md5(request.body)
