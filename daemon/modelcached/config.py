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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .errors import EndpointNotAllowed
from .kinds import GIB, KIB, KINDS, MIB, Space

DEFAULT_FILE = Path("/etc/modelcached/modelcached.toml")  # read when it is there; a private daemon reads only what --config names
NODE_ROOT = Path("/var/lib/modelcached")
NODE_SOCKET = Path("/run/modelcached/modelcached.sock")
PRIVATE_IDLE_EXIT_SECONDS = 600.0
PRIVATE_MIN_FREE = Space(share=0.10)  # a user's disk has other uses; max_size is 60 % of what is free at the first start
DEFAULT_HUB = "https://huggingface.co"
ENVIRONMENT_PREFIX = "MODELCACHED_"
MAX_SOCKET_PATH_BYTES = 107  # sun_path less its NUL


def _setting(
    kind: str, default: Any, doc: str, low: float = 0, high: float = math.inf, flag: bool = True, reload: bool = False
) -> Any:
    """`reload`: a change counts for a daemon that runs, when it is told to read its configuration again (SIGHUP)."""
    metadata = {"kind": kind, "doc": doc, "low": low, "high": high, "flag": flag, "reload": reload}
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
    max_size: Space = _setting("space", Space(), "what the cache may take, in blobs and unfinished downloads; 0 = all there is")
    min_free: Space = _setting("space", Space(GIB), "room on the root's filesystem that downloads leave free")
    checkpoint_reserve: Space = _setting("space", Space(share=0.02), "further room that only saves may take")
    high_watermark: Space = _setting("space", Space(share=0.95), "so much of its room the cache may fill before it evicts")
    low_watermark: Space = _setting("space", Space(share=0.85), "so much of it is left when it has evicted")
    grace: float = _setting("duration", 3600.0, "what was used within this time is evicted only if a save needs its room")
    scrub_rate: int = _setting("rate", 10 * MIB, "bytes a second at which what nobody uses is hashed again; 0 = never")
    scrub_interval: float = _setting("duration", 30 * 86400.0, "how often every blob is hashed again", low=1)
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
    hub_rate: int = _setting("rate", 0, "bytes a second from hubs, whole node; 0 = no limit; SIGHUP changes it", reload=True)
    store_rate: int = _setting("rate", 0, "bytes a second to and from stores, whole node; 0 = no limit; SIGHUP changes it", reload=True)
    allowed_repos: tuple[str, ...] = _setting("globs", (), "repos that are handed out; empty = all; SIGHUP changes it", reload=True)
    denied_repos: tuple[str, ...] = _setting("globs", (), "repos that are not, whatever is allowed; SIGHUP changes it", reload=True)
    keep: tuple[str, ...] = _setting("repos", (), "public repos that are fetched when the daemon starts, and pinned")
    metrics: str = _setting("listen", "", "where Prometheus finds metrics: loopback host:port, or unix:/path; empty = nowhere")
    max_connections: int = _setting("count", 4096, "clients at the same time", low=1, high=1_000_000)
    allow_users: tuple[str, ...] = _setting("users", (), "who may connect; with allow_groups empty too: everybody on the node")
    allow_groups: tuple[str, ...] = _setting("groups", (), "whose members may connect, supplementary groups count")
    max_connections_per_user: int = _setting("count", 2048, "of one uid but root and the daemon's own; 0 = no limit", high=1_000_000)
    max_spool_per_user: Space = _setting(
        "space", Space(), "saves of one uid that wait for their store, but root's and the daemon's own; 0 = no limit"
    )
    private: bool = _setting("flag", False, "a user's own daemon (set by --private only)", flag=False)
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The hubs this daemon talks to, the default first (I8)."""
        return tuple(dict.fromkeys((self.hub_endpoint, *self.hub_endpoints)))

    def endpoint(self, asked: str | None) -> str:
        """The one that a request means; it may name no other (I8)."""
        endpoint = (asked or self.hub_endpoint).rstrip("/")
        if endpoint not in self.endpoints:
            raise EndpointNotAllowed(
                f"this daemon does not talk to {asked}",
                f"it talks to {', '.join(self.endpoints)}: unset HF_ENDPOINT, or add it to hub_endpoints in the daemon's config",
            )
        return endpoint


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
        values["min_free"] = PRIVATE_MIN_FREE
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

    if values["high_watermark"].of(GIB) < values["low_watermark"].of(GIB):
        problems.append(Problem("low_watermark", origins["low_watermark"], f"more than high_watermark ({values['high_watermark']})"))
    if values["hub_range"] < values["hub_piece"]:
        problems.append(Problem("hub_range", origins["hub_range"], f"less than hub_piece ({values['hub_piece']}, {origins['hub_piece']})"))
    is_passed_in = "LISTEN_FDS" in environment  # then nobody binds the path
    if values["socket"] is not None and not is_passed_in and len(bytes(values["socket"])) > MAX_SOCKET_PATH_BYTES:
        message = f"a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes: {values['socket']}"
        problems.append(Problem("socket", origins["socket"], message))
    if problems:
        raise ConfigError(problems)
    return Config(**values, origins=origins)


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Fields that differ: those that count at once, and those that need a restart."""
    changed = [name for name in SETTINGS if getattr(old, name) != getattr(new, name)]
    at_once = [name for name in changed if SETTINGS[name].metadata["reload"]]
    return at_once, [name for name in changed if name not in at_once]


def reloaded(old: Config, new: Config) -> Config:
    """What counts after a reload: the old configuration with those fields of the new one that can be changed while the daemon runs."""
    at_once, _ = changes(old, new)
    origins = {**old.origins, **{name: new.origins[name] for name in at_once}}
    return dataclasses.replace(old, **{name: getattr(new, name) for name in at_once}, origins=origins)


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


def _read(field: dataclasses.Field[Any], raw: Any) -> Any:
    value = KINDS[field.metadata["kind"]].read(raw)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not field.metadata["low"] <= value <= field.metadata["high"]:
        raise ValueError(f"{raw!r} is out of bounds")
    return value
