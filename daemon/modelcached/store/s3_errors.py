"""What S3, botocore and the connection say, as errors with names. Messages are made here, of codes and numbers: nothing that
botocore or a server words is repeated, for an URL, a header or a configuration in it may hold a secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from modelcached.errors import (
    MissingObject,
    ModelcachedError,
    ObjectChanged,
    StoreClockSkew,
    StoreDenied,
    StoreFull,
    StoreMismatch,
    StoreMissingBucket,
    StoreProblem,
    StoreSlow,
    StoreUnavailable,
)
from modelcached.spans import Again

_MISSING = {"NoSuchKey", "NoSuchVersion"}
_BUCKETS = {"NoSuchBucket", "InvalidBucketName"}
_CREDENTIALS = {
    "InvalidAccessKeyId": "the access key is unknown there",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session has expired",
    "ExpiredTokenException": "the session has expired",
    "InvalidToken": "the session token is not valid",
    "TokenRefreshRequired": "the session token is not valid",
}
_SKEWED = {"RequestTimeTooSkewed", "RequestExpired"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage", "StorageFull"}
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict"}
_WRONG_BYTES = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
_KEYS_HINT = "the daemon finds credentials as the AWS tools do: AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws, an instance's role"


class StoreNoCredentials(StoreDenied):
    """Nobody has given any yet. For callers the same as any others that are denied."""


class Place:
    """What an error names: the store's URL and, once it is known, the endpoint's address."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.endpoint = "its endpoint"


@contextmanager
def translated(place: Place, key: str | None = None) -> Iterator[None]:
    """Gives every error of a request a name. The original is cut off: a traceback would print it."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise from_response(place, error.response, key) from None
    except exceptions.BotoCoreError as error:
        raise from_client(place, error) from None
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise StoreUnavailable(
            f"{place.url}: the connection to {place.endpoint} broke ({type(error).__name__})", "try again later"
        ) from None


@contextmanager
def broken_connections() -> Iterator[None]:
    """What a connection may do to an answer's body: Again. The disk's errors pass: they are no ConnectionError."""
    try:
        yield
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise Again(f"the connection broke ({type(error).__name__})") from None


def code_of(error: Exception) -> str:
    """S3's own word for the condition, kept for whoever has to tell them apart."""
    return str(error.data.get("code", "")) if isinstance(error, ModelcachedError) else ""


def from_response(place: Place, response: dict[str, Any], key: str | None) -> ModelcachedError:
    """The error that an answer of S3 stands for."""
    metadata = response.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode") or 0)
    code = str(response.get("Error", {}).get("Code", ""))[:60]
    data: dict[str, Any] = {"code": code, "status": status}
    if key is not None:
        data["key"] = key
    if code in _MISSING or (status == 404 and code in ("404", "NotFound", "")):
        return MissingObject(f"{key} is not in {place.url}", "it was deleted, or belongs to another store", **data)
    if code in _BUCKETS:
        return StoreMissingBucket(
            f"{place.url}: there is no such bucket at {place.endpoint}", "make it, or correct the store's URL", **data
        )
    if code in _SKEWED:
        return StoreClockSkew(
            f"{place.url}: the store refuses this node's time of day{_skew(metadata)}", "set the clock: is NTP running here?", **data
        )
    if code in _CREDENTIALS:
        return StoreDenied(f"{place.url}: {place.endpoint} does not accept the credentials: {_CREDENTIALS[code]}", _KEYS_HINT, **data)
    if status in (401, 403):
        return StoreDenied(
            f"{place.url}: {place.endpoint} refuses the request{f' for {key}' if key else ''}",
            "they need s3:GetObject, PutObject, DeleteObject, AbortMultipartUpload, ListMultipartUploadParts; on the bucket ListBucket",
            **data,
        )
    if code in _CONFLICTS or status == 412:
        return ObjectChanged(f"{key} is not what it was", "look at it again", **data)
    if code in _FULL or status == 507:
        return StoreFull(f"{place.url} is full", "free space there, or collect garbage: modelcache gc-store", **data)
    if code in _WRONG_BYTES:
        return StoreMismatch(f"{place.url}: bytes change on their way to {place.endpoint}", "look for a proxy that alters them", **data)
    if status == 416 or code == "InvalidRange":
        return StoreMismatch(f"{key} in {place.url} is shorter than it was", "save it again", **data)
    if status >= 500 or status == 429 or code in ("RequestTimeout", "SlowDown"):
        return StoreUnavailable(f"{place.url}: {place.endpoint} answers HTTP {status} {code}", "try again later", **data)
    return StoreProblem(
        f"{place.url}: {place.endpoint} answers HTTP {status} {code}", "is this an S3 server, and the right region?", **data
    )


def from_client(place: Place, error: Exception) -> ModelcachedError:
    """The error that botocore's own exception stands for."""
    from botocore import exceptions

    kind = type(error).__name__
    if isinstance(error, exceptions.ConnectTimeoutError | exceptions.ReadTimeoutError):
        return StoreSlow(f"{place.url}: {place.endpoint} does not answer in time", "look at the network, or try again later")
    if isinstance(error, exceptions.SSLError):
        return StoreUnavailable(f"{place.url}: no safe connection to {place.endpoint}", "look at its certificate, and at AWS_CA_BUNDLE")
    if isinstance(error, exceptions.ProxyConnectionError):
        return StoreUnavailable(f"{place.url}: the HTTP proxy can't be reached", "look at HTTPS_PROXY and NO_PROXY")
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return StoreUnavailable(
            f"{place.url}: {place.endpoint} can't be reached ({kind})", "look at the network, and at AWS_ENDPOINT_URL_S3"
        )
    if isinstance(error, exceptions.ProfileNotFound | exceptions.ConfigParseError | exceptions.ConfigNotFound):
        return StoreDenied(f"{place.url}: the AWS configuration can't be used ({kind})", "look at AWS_PROFILE and ~/.aws/config")
    if isinstance(error, exceptions.NoCredentialsError):
        return StoreNoCredentials(f"{place.url}: there are no credentials", _KEYS_HINT)
    if "Credential" in kind or "Token" in kind or "SSO" in kind or "Metadata" in kind:
        return StoreDenied(f"{place.url}: there are no usable credentials ({kind})", _KEYS_HINT)
    return StoreProblem(f"{place.url}: the request can't be made ({kind})", "look at ~/.aws/config, and is this an S3 server?")


def _skew(metadata: dict[str, Any]) -> str:
    try:
        said = parsedate_to_datetime(metadata["HTTPHeaders"]["date"])
    except (KeyError, TypeError, ValueError):
        return ""
    from datetime import datetime

    seconds = (datetime.now(UTC) - said).total_seconds()
    return f", which is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} its own"
