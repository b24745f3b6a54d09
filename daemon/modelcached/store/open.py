"""From an URL to a store: `file:///path` or `s3://bucket/prefix`. An URL never carries credentials, and no error repeats any."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from modelcached.download import Limits
from modelcached.errors import InvalidRequest
from modelcached.rates import Rate
from modelcached.tasks import Pool

from .contract import Store, check_key

SUPPORTED = "file:///path or s3://bucket/prefix"
NOT_YET = ("gs", "gcs", "az", "azure", "abfs", "abfss", "wasb", "wasbs")
LIMITS = Limits(connections=8, piece_bytes=512 << 10, range_bytes=32 << 20)
STALL_SECONDS = 60.0
THREADS = 8  # of a store in a folder
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def open_store(
    url: str, pool: Pool, limits: Limits = LIMITS, stall_seconds: float = STALL_SECONDS, rate: Rate | None = None
) -> Store:
    """The store of that URL. Nothing is asked yet, and for S3 nothing imported: that happens at the first use.

    No byte for `stall_seconds` breaks a connection. `rate` counts the bytes of objects, in both directions.
    """
    scheme, place, path = _parse(url)
    if scheme == "file":
        from .file import FileStore

        return FileStore(Path(path), Pool("store", THREADS), limits, rate or Rate())
    from .s3 import S3Store

    return S3Store(place, path, pool, limits, stall_seconds, rate or Rate())


def check_url(url: str) -> str:
    """The one spelling of a store's URL; InvalidRequest says what is wrong with it."""
    scheme, place, path = _parse(url)
    return f"file://{quote(path)}" if scheme == "file" else f"s3://{place}/{quote(path)}".rstrip("/")


def _parse(url: str) -> tuple[str, str, str]:
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator:
        raise InvalidRequest("a store is named by an URL", SUPPORTED)
    if scheme in NOT_YET:
        raise InvalidRequest(f"{scheme}:// is not supported yet", f"a store is {SUPPORTED}")
    if scheme not in ("file", "s3"):
        raise InvalidRequest(f"{scheme[:20]!r} is no kind of store", f"a store is {SUPPORTED}")
    try:
        parts = urlsplit(f"//{rest}", scheme)
    except ValueError:
        raise InvalidRequest(f"this {scheme}:// URL can't be read", f"a store is {SUPPORTED}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidRequest(
            f"a store's URL has a bucket and a path only, and this {scheme}:// URL has more",
            "credentials and endpoints come from the environment or a profile, as for the AWS tools",
        )
    path = unquote(parts.path, errors="surrogateescape")
    return _parse_file(parts.netloc, path) if scheme == "file" else _parse_s3(parts.netloc, path)


def _parse_file(host: str, path: str) -> tuple[str, str, str]:
    if host not in ("", "localhost") or not path.startswith("/"):
        raise InvalidRequest("a file:// store is an absolute path on this node", "three slashes: file:///path")
    parts = [part for part in path.split("/") if part]
    if not parts or any(part in (".", "..") for part in parts) or "\0" in path:
        raise InvalidRequest(f"{path[:200]!r} is no folder for a store", "an absolute path without '..'")
    return "file", "", "/" + "/".join(parts)


def _parse_s3(bucket: str, path: str) -> tuple[str, str, str]:
    if not _BUCKET.fullmatch(bucket):
        raise InvalidRequest("an s3:// URL begins with the name of a bucket", SUPPORTED)
    prefix = path.strip("/")
    if prefix:
        check_key(prefix)
    return "s3", bucket, prefix
