"""Kinds of values that a configuration holds, and how each is written: in the file, in the environment, as a flag."""

from __future__ import annotations

import grp
import ipaddress
import math
import pwd
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from .errors import InvalidRequest
from .model import check_repo, check_revision

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MAX_ID = (1 << 32) - 2  # of a user or group


class Space(NamedTuple):
    """Room on a filesystem: so many bytes, or a share of the whole."""

    size_bytes: int = 0
    share: float = 0.0

    def of(self, total_bytes: int) -> int:
        return self.size_bytes or int(total_bytes * self.share)

    def __str__(self) -> str:
        return f"{self.share * 100:g}%" if self.share else str(self.size_bytes)


class Kind(NamedTuple):
    """How values of a field are written. `read` gets what TOML gave, or text; ValueError when it makes no sense."""

    allowed: str
    read: Callable[[Any], Any]
    toml: tuple[type, ...]  # what the file may hold


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": KIB, "mi": MIB, "gi": GIB, "ti": 1 << 40}
_SECONDS = {"": 1, "s": 1, "ms": 0.001, "m": 60, "h": 3600, "d": 86400}


def _read_path(raw: str) -> Path:
    path = Path(raw)
    if not path.is_absolute() or "\0" in raw:
        raise ValueError(f"{raw!r} is not an absolute path")
    return path


def _read_size(raw: int | str) -> int:
    if isinstance(raw, int):
        return raw
    match = _SIZE.fullmatch(raw.strip())
    if match is None:
        raise ValueError(f"{raw!r} is not a size")
    unit = _UNITS[match[2].lower().rstrip("b")]
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def _read_space(raw: int | str) -> Space:
    if isinstance(raw, str) and raw.strip().endswith("%"):
        percent = float(raw.strip()[:-1])
        if not 0 <= percent < 100:
            raise ValueError(f"{raw!r} is no share of a filesystem")
        return Space(share=percent / 100)
    size_bytes = _read_size(raw)
    if size_bytes < 0:
        raise ValueError(f"{raw!r} is negative")
    return Space(size_bytes)


def _read_duration(raw: float | str) -> float:
    if isinstance(raw, str):
        match = _DURATION.fullmatch(raw.strip())
        if match is None:
            raise ValueError(f"{raw!r} is not a duration")
        return float(match[1]) * _SECONDS[match[2].lower()]
    if not math.isfinite(raw):
        raise ValueError(f"{raw!r} is not a duration")
    return float(raw)


def _read_idle(raw: float | str) -> float | None:
    return None if raw == "never" else _read_duration(raw)


def _read_count(raw: int | str) -> int:
    try:
        return msgspec.convert(raw, int, strict=False)
    except msgspec.ValidationError:
        raise ValueError(f"{raw!r} is not a whole number") from None


def _read_flag(raw: bool | str) -> bool:
    spelled = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    answer = raw if isinstance(raw, bool) else spelled.get(raw.strip().lower())
    if answer is None:
        raise ValueError(f"{raw!r} is neither true nor false")
    return answer


def _read_url(raw: str) -> str:
    url = urlsplit(raw.strip())  # ValueError for a broken IPv6 host
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError(f"{raw!r} is no endpoint")
    if "@" in url.netloc:
        raise ValueError("an endpoint holds no user or password")  # without showing it
    return raw.strip().rstrip("/")


def _read_urls(raw: list[str] | str) -> tuple[str, ...]:
    parts = re.split(r"[,\s]+", raw.strip()) if isinstance(raw, str) else raw
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{raw!r} is not a list of endpoints")
    return tuple(dict.fromkeys(_read_url(part) for part in parts if part))


def _read_store(raw: str) -> str:
    if raw and not raw.startswith(("file:///", "s3://")):
        raise ValueError(f"{raw.partition('://')[0]!r} is no kind of store")
    if "@" in raw:
        raise ValueError("a store's address holds no credentials")  # without showing it
    if raw.startswith("s3://") and not urlsplit(raw).netloc:
        raise ValueError(f"{raw!r} names no bucket")
    return raw.rstrip("/")


def _read_stores(raw: list[str] | str) -> tuple[str, ...]:
    parts = re.split(r"[,\s]+", raw.strip()) if isinstance(raw, str) else raw
    return tuple(dict.fromkeys(_read_store(part) for part in parts if part))


def _read_users(raw: list[str | int] | str | int) -> tuple[str, ...]:
    return _read_names(raw, "user", pwd.getpwnam)


def _read_groups(raw: list[str | int] | str | int) -> tuple[str, ...]:
    return _read_names(raw, "group", grp.getgrnam)


def _read_names(raw: list[str | int] | str | int, what: str, look_up: Callable[[str], object]) -> tuple[str, ...]:
    """Names that this machine knows, and ids, as they were written."""
    parts = re.split(r"[,\s]+", raw.strip()) if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
    names = tuple(dict.fromkeys(str(part) for part in parts if part != ""))
    for name in names:
        if name.isascii() and name.isdecimal() and int(name) <= MAX_ID:
            continue
        try:
            look_up(name)
        except (KeyError, ValueError):
            raise ValueError(f"this machine has no {what} {name[:80]!r}") from None
    return names


def _read_listen(raw: str) -> str:
    if not raw:
        return raw
    if raw.startswith("unix:"):
        return f"unix:{_read_path(raw.removeprefix('unix:'))}"
    host, _, port = raw.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise ValueError(f"{raw!r} has no port")
    if host != "localhost" and not ipaddress.ip_address(host.strip("[]")).is_loopback:  # ValueError for what is no address
        raise ValueError(f"{raw!r} is not on this host alone")
    return raw


def _read_rate(raw: int | str) -> int:
    """A size, with or without "/s" behind it."""
    return _read_size(raw.strip().removesuffix("/s") if isinstance(raw, str) else raw)


def _read_repos(raw: list[str] | str) -> tuple[str, ...]:
    repos = _read_globs(raw)
    for repo in repos:
        name, at, revision = repo.partition("@")
        first, _, rest = name.partition("/")
        try:
            check_repo("", "model", rest if rest and first in ("datasets", "spaces") else name)
            check_revision(revision if at else "main")
        except InvalidRequest as error:
            raise ValueError(error.message) from None
    return repos


def _read_globs(raw: list[str] | str) -> tuple[str, ...]:
    parts = re.split(r"[,\s]+", raw.strip()) if isinstance(raw, str) else raw
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{raw!r} is not a list of globs")
    return tuple(dict.fromkeys(part for part in parts if part))


KINDS: Mapping[str, Kind] = {
    "path": Kind("an absolute path", _read_path, (str,)),
    "url": Kind("http:// or https:// with a host, no user and no query", _read_url, (str,)),
    "urls": Kind("a list of http:// or https:// addresses", _read_urls, (list, str)),
    "store": Kind("file:///path or s3://bucket/prefix", _read_store, (str,)),
    "stores": Kind("a list of file:///path or s3://bucket/prefix", _read_stores, (list, str)),
    "size": Kind('a size: bytes, "512KiB", "10GB"', _read_size, (int, str)),
    "space": Kind('a size ("10GB", "512MiB") or a share of the filesystem ("5%")', _read_space, (int, str)),
    "rate": Kind('bytes a second: 1000000, "50MB/s", "1GiB/s"', _read_rate, (int, str)),
    "globs": Kind('a list of globs: "org/*", "datasets/org/name"', _read_globs, (list, str)),
    "repos": Kind('a list of repos: "org/name@revision", "datasets/org/name"', _read_repos, (list, str)),
    "duration": Kind('a duration: seconds, "500ms", "90s", "10m", "1h"', _read_duration, (int, float, str)),
    "duration or never": Kind('a duration ("90s", "10m", "1h") or "never"', _read_idle, (int, float, str)),
    "listen": Kind("a loopback host:port (127.0.0.1:9464), or unix:/path", _read_listen, (str,)),
    "users": Kind("a list of user names or ids", _read_users, (list, str, int)),
    "groups": Kind("a list of group names or ids", _read_groups, (list, str, int)),
    "count": Kind("a whole number", _read_count, (int,)),
    "flag": Kind("true or false", _read_flag, (bool,)),
}
