"""What the daemon is told before it starts, and where each value came from.

One TOML file, the environment (`MODELCACHED_<FIELD>`) and the flags of `serve`, in rising precedence. Everything is
checked here, once, before anything is opened; all that is wrong is reported together (`ConfigError`), because a
node that starts with half a configuration is found out much later. `Config` is the only list of fields: flags,
`--help`, `check-config` and the checks below are derived from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

DEFAULT_FILE = Path("/etc/modelcached/modelcached.toml")  # read when it is there; a private daemon reads only what --config names
NODE_ROOT = Path("/var/lib/modelcached")
NODE_SOCKET = Path("/run/modelcached/modelcached.sock")
PRIVATE_IDLE_EXIT_SECONDS = 600.0
DEFAULT_HUB = "https://huggingface.co"
ENVIRONMENT_PREFIX = "MODELCACHED_"
MAX_SOCKET_PATH_BYTES = 107  # sun_path less its NUL

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


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


def _setting(kind: str, default: Any, doc: str, low: float = 0, high: float = math.inf, flag: bool = True) -> Any:
    metadata = {"kind": kind, "doc": doc, "low": low, "high": high, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Sizes are bytes, durations are seconds. `origins` says for each field where its value came from."""

    root: Path = _setting("path", NODE_ROOT, "folder of the cache, on one local filesystem")
    socket: Path | None = _setting("path", NODE_SOCKET, "Unix socket to listen on, unless one is passed in (LISTEN_FDS)")
    store: str = _setting("store", "", "store shared by nodes: file:///path or s3://bucket/prefix; empty = file store below the root")
    stores: tuple[str, ...] = _setting("stores", (), "further stores that requests may name")
    store_grace: float = _setting("duration", 7 * 86400.0, "age below which gc-store deletes nothing, by the store's clock", low=1)
    store_repo_expiry: float = _setting("duration", 30 * 86400.0, "repos that no node used for so long are collected by gc-store", low=1)
    store_repos: bool = _setting("flag", True, "put repos from the hub into `store`, and look there before asking the hub")
    store_claim_seconds: float = _setting("duration", 30.0, "another node that brings no byte for so long loses its turn", low=1, high=3600)
    hub_endpoint: str = _setting("url", DEFAULT_HUB, "hub that is asked when a request names none; HF_ENDPOINT is its default")
    hub_endpoints: tuple[str, ...] = _setting("urls", (), "further hubs that requests may name")
    min_free: Space = _setting("space", Space(GIB), "room on the root's filesystem that downloads leave free")
    fresh_seconds: float = _setting("duration", 60.0, "how long a hub's answer about a branch or tag is believed; 0 = always ask")
    verdict_seconds: float = _setting("duration", 60.0, "how long an accepted token is remembered for a private or gated repo")
    hub_connections: int = _setting("count", 8, "connections to the hub for file bytes, whole node", low=1, high=256)
    hub_piece: int = _setting("size", 512 * KIB, "unit of resume: bytes under one checksum", low=64 * KIB, high=64 * MIB)
    hub_range: int = _setting("size", 32 * MIB, "bytes of one request to the hub", low=64 * KIB, high=16 * GIB)
    hub_attempts: int = _setting("count", 6, "how often a request to the hub is tried", low=1, high=100)
    hub_backoff_seconds: float = _setting("duration", 0.5, "first pause before another try; doubles, at most 30", low=0.001, high=30)
    stall_seconds: float = _setting("duration", 30.0, "a download without one byte for so long is tried again", low=0.1, high=3600)
    offline: bool = _setting("flag", False, "never ask the hub; HF_HUB_OFFLINE is its default")
    idle_exit: float | None = _setting("duration or never", None, "end after so long without client or save to send; private: 600", low=0.1)
    shutdown_seconds: float = _setting("duration", 10.0, "what running requests get at SIGTERM", high=3600)
    max_connections: int = _setting("count", 4096, "clients at the same time", low=1, high=1_000_000)
    private: bool = _setting("flag", False, "a user's own daemon (set by --private only)", flag=False)
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The hubs this daemon talks to, the default first (I8)."""
        return tuple(dict.fromkeys((self.hub_endpoint, *self.hub_endpoints)))


class Problem(NamedTuple):
    field: str
    origin: str
    message: str

    def __str__(self) -> str:
        return f"{self.field} ({self.origin}): {self.message}"


class ConfigError(Exception):
    """Everything that is wrong with the configuration, not just the first of it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


SETTINGS: Mapping[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config) if f.metadata.get("flag")}


def allowed(field: dataclasses.Field[Any]) -> str:
    """What a field accepts, in words."""
    low, high = field.metadata["low"], field.metadata["high"]
    words = KINDS[field.metadata["kind"]].allowed
    if low or high != math.inf:
        words += f", from {_spelt(field, low)}" + (f" to {_spelt(field, high)}" if high != math.inf else "")
    return words


def load(
    flags: Mapping[str, str],
    environment: Mapping[str, str],
    *,
    private: bool = False,
    file: Path | None = None,
    default_file: Path = DEFAULT_FILE,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """The checked configuration; ConfigError names all problems.

    `file` must exist; without it `default_file` is read if it is there (never by a private daemon). `defaults` replaces
    built-in ones: a private daemon's root and socket depend on the user and on filesystems, which are looked at elsewhere.
    """
    problems: list[Problem] = []
    values: dict[str, Any] = {name: field.default for name, field in SETTINGS.items()} | {"private": private}
    origins = dict.fromkeys(values, "default")
    if private:
        values["idle_exit"] = PRIVATE_IDLE_EXIT_SECONDS
        origins["private"] = "flag --private"
    values |= defaults or {}

    for name, origin, raw in (
        *_from_hub_environment(environment),
        *_from_file(file, None if private else default_file, problems),
        *_from_environment(environment, problems),
        *((name, "flag --" + name.replace("_", "-"), text) for name, text in flags.items()),
    ):
        try:
            values[name], origins[name] = _read(SETTINGS[name], raw), origin
        except ValueError as error:
            problems.append(Problem(name, origin, f"{error}; allowed: {allowed(SETTINGS[name])}"))

    if values["hub_range"] < values["hub_piece"]:
        problems.append(Problem("hub_range", origins["hub_range"], f"less than hub_piece ({values['hub_piece']}, {origins['hub_piece']})"))
    is_passed_in = "LISTEN_FDS" in environment  # then nobody binds the path
    if values["socket"] is not None and not is_passed_in and len(bytes(values["socket"])) > MAX_SOCKET_PATH_BYTES:
        message = f"a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes: {values['socket']}"
        problems.append(Problem("socket", origins["socket"], message))
    if problems:
        raise ConfigError(problems)
    return Config(**values, origins=origins)


def as_plain(value: Any) -> Any:
    """A value as JSON holds it: sizes in bytes, durations in seconds."""
    if isinstance(value, Space):
        return str(value) if value.share else value.size_bytes
    return "never" if value is None else str(value) if isinstance(value, Path) else value


def as_toml(field: dataclasses.Field[Any], value: Any) -> str:
    """A value as the configuration file holds it."""
    plain = as_plain(value)
    return msgspec.json.encode(_spelt(field, plain) if isinstance(plain, int) and not isinstance(plain, bool) else plain).decode()


def _spelt(field: dataclasses.Field[Any], number: float) -> Any:
    """Sizes in the largest unit that needs no fraction."""
    if field.metadata["kind"] in ("size", "space"):
        for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if number and number % factor == 0:
                return f"{number // factor:g}{unit}"
    return number


# ---- where values come from: (field, origin, raw value)

_Source = Iterable[tuple[str, str, Any]]


def _from_hub_environment(environment: Mapping[str, str]) -> _Source:
    """huggingface_hub's own variables are only defaults: the daemon's configuration wins over them."""
    if environment.get("HF_ENDPOINT"):
        yield "hub_endpoint", "environment HF_ENDPOINT", environment["HF_ENDPOINT"]
    if environment.get("HF_HUB_OFFLINE"):
        yield "offline", "environment HF_HUB_OFFLINE", environment["HF_HUB_OFFLINE"]


def _from_file(file: Path | None, default_file: Path | None, problems: list[Problem]) -> _Source:
    path = file or default_file
    if path is None:
        return
    try:
        table = msgspec.toml.decode(path.read_bytes())
    except FileNotFoundError:
        if file is not None:
            problems.append(Problem("config", str(path), "there is no such file"))
        return
    except OSError as error:
        problems.append(Problem("config", str(path), f"can't be read: {error.strerror}"))
        return
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problems.append(Problem("config", str(path), f"is not TOML: {error}"))
        return
    for name, raw in table.items():
        origin = f"file {path}"
        if name not in SETTINGS:
            problems.append(Problem(name, origin, _unknown(name)))
        elif type(raw) not in KINDS[SETTINGS[name].metadata["kind"]].toml:
            problems.append(Problem(name, origin, f"{raw!r} is of the wrong type; allowed: {allowed(SETTINGS[name])}"))
        else:
            yield name, origin, raw


def _from_environment(environment: Mapping[str, str], problems: list[Problem]) -> _Source:
    for variable in sorted(environment):
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or not environment[variable] or name == "config":
            continue
        if name in SETTINGS:
            yield name, f"environment {variable}", environment[variable]
        elif _nearest(name, cutoff=0.75):  # others are not ours: Kubernetes sets MODELCACHED_PORT and the like for a service of that name
            problems.append(Problem(name, f"environment {variable}", _unknown(name)))


def _unknown(name: str) -> str:
    if name == "private":
        return "can only be asked for with the flag --private"
    nearest = _nearest(name)
    return f"no such field; did you mean {nearest}?" if nearest else f"no such field; there are: {', '.join(SETTINGS)}"


def _nearest(name: str, cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), SETTINGS, 1, cutoff)), None)


# ---- kinds of values

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": KIB, "mi": MIB, "gi": GIB, "ti": 1 << 40}
_SECONDS = {"": 1, "s": 1, "ms": 0.001, "m": 60, "h": 3600, "d": 86400}


def _read(field: dataclasses.Field[Any], raw: Any) -> Any:
    value = KINDS[field.metadata["kind"]].read(raw)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not field.metadata["low"] <= value <= field.metadata["high"]:
        raise ValueError(f"{raw!r} is out of bounds")
    return value


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


KINDS: Mapping[str, Kind] = {
    "path": Kind("an absolute path", _read_path, (str,)),
    "url": Kind("http:// or https:// with a host, no user and no query", _read_url, (str,)),
    "urls": Kind("a list of http:// or https:// addresses", _read_urls, (list, str)),
    "store": Kind("file:///path or s3://bucket/prefix", _read_store, (str,)),
    "stores": Kind("a list of file:///path or s3://bucket/prefix", _read_stores, (list, str)),
    "size": Kind('a size: bytes, "512KiB", "10GB"', _read_size, (int, str)),
    "space": Kind('a size ("10GB", "512MiB") or a share of the filesystem ("5%")', _read_space, (int, str)),
    "duration": Kind('a duration: seconds, "500ms", "90s", "10m", "1h"', _read_duration, (int, float, str)),
    "duration or never": Kind('a duration ("90s", "10m", "1h") or "never"', _read_idle, (int, float, str)),
    "count": Kind("a whole number", _read_count, (int,)),
    "flag": Kind("true or false", _read_flag, (bool,)),
}
