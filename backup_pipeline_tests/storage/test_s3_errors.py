"""What S3's clients say, as they said it, and what is told of it."""

import pytest

from backup_pipeline.errors import ObjectArchived, ObjectExists, ObjectNotFound, StoreError
from backup_pipeline.storage import s3_errors
from backup_pipeline.storage.s3_errors import Problem

SAID = "Error performing PUT http://host/bucket/k in 1.2ms - Server returned non-2xx status code:"
DEBUG = "\n\nDebug source:\nGeneric {\n    secret dump\n}"


class UnauthenticatedError(Exception):
    """Named as obstore's."""


class ReadTimeoutError(Exception):
    """Named as botocore's."""


class ClientError(Exception):
    """Shaped as botocore's."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__("a long request")
        error = {"Code": code, "Message": message}
        self.response = {"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            f"{SAID} 403: <Error><Code>InvalidAccessKeyId</Code><Message>No\nsuch  key</Message></Error>",
            Problem(403, "InvalidAccessKeyId", "No such key"),
        ),
        (f"{SAID} 403 Forbidden: ", Problem(403, "AccessDenied", "")),
        (f"{SAID} 404 Not Found: ", Problem(404, "NotFound", "")),
        (f"{SAID} 418 I'm a teapot: ", Problem(418, "HTTP status 418", "")),
        (
            "Received redirect without LOCATION, this normally indicates an incorrectly configured region",
            Problem(301, "PermanentRedirect", "the bucket lies in another region"),
        ),
        ("Something else\nhappened", Problem(0, "RuntimeError", "Something else happened")),
    ],
)
def test_from_obstore(text: str, problem: Problem) -> None:
    assert s3_errors.from_obstore(RuntimeError(text + DEBUG)) == problem


@pytest.mark.parametrize(
    ("debug", "code"),
    [
        ("kind: ConnectionRefused,", s3_errors.REFUSED),
        ("source: TimedOut,", s3_errors.TIMEOUT),
        ("error: InvalidCertificate(UnknownIssuer)", s3_errors.TLS),
        ('"dns error", Custom {', s3_errors.NO_HOST),
        ("kind: ConnectionReset,", s3_errors.BROKEN),
    ],
)
def test_failures_without_an_answer(debug: str, code: str) -> None:
    error = RuntimeError(f"HTTP error: error sending request\n\nDebug source:\n{debug}")
    assert s3_errors.from_obstore(error).code == code


def test_a_credential_provider_that_failed() -> None:
    error = UnauthenticatedError("for path External AWS credential provider: RuntimeError: no role" + DEBUG)
    assert s3_errors.from_obstore(error) == Problem(0, s3_errors.NO_CREDENTIALS, "RuntimeError: no role")


def test_from_botocore() -> None:
    assert s3_errors.from_botocore(ClientError(403, "AccessDenied", "No.")) == Problem(
        403, "AccessDenied", "No."
    )
    assert s3_errors.from_botocore(ClientError(404, "404", "Not Found")).code == s3_errors.NOT_FOUND
    assert s3_errors.from_botocore(ReadTimeoutError()).code == s3_errors.TIMEOUT
    assert s3_errors.from_botocore(RuntimeError("what\nelse")) == Problem(0, "RuntimeError", "what else")


@pytest.mark.parametrize(
    ("problem", "kind", "message"),
    [
        (Problem(404, "NoSuchKey", ""), ObjectNotFound, "no object k in s3://b"),
        (Problem(412, "PreconditionFailed", "x"), ObjectExists, "object k is already in s3://b"),
        (Problem(403, "AccessDenied", "No."), StoreError, "cannot read k in s3://b: AccessDenied: No."),
        (Problem(0, "Timeout", "it is silent"), StoreError, "cannot read k in s3://b: it is silent"),
        (
            Problem(403, "InvalidObjectState", "The operation is not valid for the object's storage class"),
            ObjectArchived,
            "cannot read k in s3://b: the object lies in an archive storage class, where nothing is read at "
            "once (InvalidObjectState)",
        ),
    ],
)
def test_errors(problem: Problem, kind: type[StoreError], message: str) -> None:
    error = s3_errors.to_error(problem, doing="read", key="k", where="s3://b")
    assert type(error) is kind
    assert error.message == message
