"""What S3 servers and their clients say when something fails, told in our words.

s3.py and bucket.py call it. obstore's errors carry a long debug dump and botocore's the whole
request; only the status, S3's code and its sentence are kept. No client is imported here.
"""

import re
from dataclasses import dataclass

from backup_pipeline.errors import ObjectArchived, ObjectExists, ObjectNotFound, StoreError


@dataclass(frozen=True)
class Problem:
    """One failure: the HTTP status (0 when there was no answer), S3's code or ours, a sentence."""

    status: int
    code: str
    said: str


# Codes of ours, for failures without an answer.
TIMEOUT, REFUSED, NO_HOST, TLS, NO_CREDENTIALS, BROKEN = (
    "Timeout",
    "ConnectionRefused",
    "UnknownHost",
    "TlsFailure",
    "NoCredentials",
    "ConnectionBroken",
)
NO_BUCKET, NO_KEY, NOT_FOUND, DENIED = "NoSuchBucket", "NoSuchKey", "NotFound", "AccessDenied"
NO_UPLOAD = "NoSuchUpload"
_ARCHIVED = ("InvalidObjectState", "ObjectNotInActiveTierError")  # the latter: of a copy's source

_OUR_SENTENCES = {
    TIMEOUT: "the server did not answer in time",
    REFUSED: "nothing accepts connections there",
    NO_HOST: "the host is unknown or cannot be reached",
    TLS: "the server's certificate is not trusted",
    NO_CREDENTIALS: "no credentials were found",
    BROKEN: "the connection broke",
}

_KEYS_HINT = "Check the access key and the secret key of the store."
_REGION_HINT = "Set the store's region to the one that the bucket lies in."
_HINTS = {
    TIMEOUT: "Check the network and the server; where the link is slow, raise `timeout` of the store.",
    REFUSED: "Check the store's endpoint, and that the server is running.",
    NO_HOST: "Check the store's endpoint, and this machine's DNS.",
    TLS: "Name the certificate of the server's authority in AWS_CA_BUNDLE, or correct the endpoint.",
    NO_CREDENTIALS: "Set the store's keys, or give this machine a role or profile that boto3 finds.",
    BROKEN: "Check the network and the server, then run it again.",
    NO_BUCKET: "Create the bucket, or correct the store's URL; buckets are never created from here.",
    "InvalidAccessKeyId": _KEYS_HINT,
    "SignatureDoesNotMatch": _KEYS_HINT,
    "InvalidToken": "The session token is not valid; renew the credentials.",
    "ExpiredToken": "The credentials have expired; renew them.",
    "RequestTimeTooSkewed": "Set this machine's clock; the server refuses requests from another time.",
    DENIED: "Allow it to these credentials; without s3:ListBucket a missing object is also denied.",
    "PermanentRedirect": _REGION_HINT,
    "AuthorizationHeaderMalformed": _REGION_HINT,
    "InvalidStorageClass": "Choose a storage class that this server has.",
    "SlowDown": "The server asks for fewer requests; run it again later.",
    "QuotaExceeded": "Raise the quota of the bucket, or let prune delete more.",
}

_STATUS_CODES = {
    301: "PermanentRedirect",
    403: "AccessDenied",
    404: NOT_FOUND,
    412: "PreconditionFailed",
    503: "SlowDown",
}
_DEBUG = "\n\nDebug source:"
_STATUS = re.compile(r"status code: (\d{3})")
_XML_CODE = re.compile(r"<Code>([^<]{1,80})</Code>")
_XML_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>")
_REDIRECT = "redirect without LOCATION"


def from_obstore(error: BaseException) -> Problem:
    """The problem behind an exception of obstore."""
    text, _, debug = str(error).partition(_DEBUG)
    if found := _STATUS.search(text):
        status = int(found[1])
        code, said = (match[1] if (match := part.search(text)) else "" for part in (_XML_CODE, _XML_MESSAGE))
        return _answered(status, code, said)
    if _REDIRECT in text:
        return _answered(301, "", "the bucket lies in another region")
    if type(error).__name__ == "UnauthenticatedError":
        return _unanswered(NO_CREDENTIALS, text.rpartition("credential provider: ")[2])
    for code, signs in _OBSTORE_SIGNS:
        if any(sign in debug for sign in signs):
            return _unanswered(code)
    return Problem(0, type(error).__name__, _one_line(text))


_OBSTORE_SIGNS = (
    (TLS, ("InvalidCertificate", "certificate")),
    (REFUSED, ("ConnectionRefused",)),
    (NO_HOST, ("dns error", "failed to lookup", "NetworkUnreachable", "HostUnreachable")),
    (TIMEOUT, ("TimedOut", "kind: Timeout")),
    (
        BROKEN,
        (
            "ConnectionReset",
            "BrokenPipe",
            "IncompleteMessage",
            "UnexpectedEof",
            "Interrupted",
            "kind: Request",
        ),
    ),
)


def from_botocore(error: BaseException) -> Problem:
    """The problem behind an exception of boto3 or botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        told = response["Error"]
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(told.get("Code", ""))
        return _answered(status, "" if code.isdigit() else code, str(told.get("Message", "")))
    name = type(error).__name__
    code = next((code for code, names in _BOTOCORE_NAMES if name in names), "")
    if code == REFUSED and "refused" not in str(getattr(error, "kwargs", "")):
        code = NO_HOST
    if code == NO_CREDENTIALS and name != "NoCredentialsError":
        return _unanswered(code, str(error))
    return _unanswered(code) if code else Problem(0, name, _one_line(str(error)))


_BOTOCORE_NAMES = (
    (TIMEOUT, ("ReadTimeoutError", "ConnectTimeoutError")),
    (TLS, ("SSLError",)),
    (REFUSED, ("EndpointConnectionError",)),
    (BROKEN, ("ConnectionClosedError", "ResponseStreamingError", "IncompleteReadError", "ProtocolError")),
    (
        NO_CREDENTIALS,
        ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    ),
)


def to_error(problem: Problem, *, doing: str, key: str, where: str) -> StoreError:
    """The error to raise: one line with key and place, and what to do."""
    if problem.code == NO_KEY:
        return ObjectNotFound(f"no object {key} in {where}")
    if problem.code in ("PreconditionFailed", "ConditionalRequestConflict"):
        return ObjectExists(f"object {key} is already in {where}")
    if problem.code in _ARCHIVED:
        return ObjectArchived(
            f"cannot {doing} {key} in {where}: the object lies in an archive storage class, where nothing is "
            f"read at once ({problem.code})",
            hint="Have S3 restore it from there and try again; then take the store's prefix out of the "
            "lifecycle rule that moved it.",
        )
    said = f": {problem.said}" if problem.said and problem.said != problem.code else ""
    code = problem.code if problem.status else ""
    because = f"{code}{said}" if code else problem.said or problem.code
    what = f"{doing} {key}" if key else doing
    return StoreError(f"cannot {what} in {where}: {because}", hint=_HINTS.get(problem.code, ""))


def no_credentials() -> Problem:
    """The problem that neither the configuration nor boto3 has credentials."""
    return _unanswered(NO_CREDENTIALS)


def _answered(status: int, code: str, said: str) -> Problem:
    return Problem(status, code or _STATUS_CODES.get(status, f"HTTP status {status}"), _one_line(said))


def _unanswered(code: str, said: str = "") -> Problem:
    return Problem(0, code, _one_line(said) or _OUR_SENTENCES[code])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
