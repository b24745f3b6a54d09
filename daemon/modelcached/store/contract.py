"""What every store is: the contract that tests/test_store.py runs on each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from modelcached.download import Sink
from modelcached.errors import InvalidRequest, LocalMismatch
from modelcached.model import Digest
from modelcached.spans import Origin, Span

MAX_KEY_BYTES = 900  # S3 allows 1,024 with the store's prefix
MAX_NAME_BYTES = 255  # of one part of a key: a file's name
OWN_FOLDER = ".modelcached"  # keys below it are the stores' own: probes, temporary files

Report = Callable[[int], None]  # told how many more bytes have moved


class Object(NamedTuple):
    """What a store says about one of its objects."""

    key: str
    size: int  # bytes
    modified: float  # seconds since the epoch by the store's own clock; of an answer to a put, at most seconds away from what `head` says
    etag: str  # names this content for `replace`; the same bytes may get the same one again. It is no digest: a bucket may lie


class Store(Protocol):
    """Objects by key. All methods may be called at the same time, and every one may raise StoreUnavailable (asking again may help).

    Keys are relative, "/"-separated UTF-8 (`check_key`); no key is the folder of another. An object is always whole: readers see
    the old bytes or the new ones, never a part, however a writer ends. What a writer was told of survives it. StoreProblem is what
    the store refuses for good: denied, no such bucket, full. No message holds a secret. Who opens a store closes it.
    """

    @property
    def url(self) -> str:
        """Where it is, without credentials; `open_store` takes it."""
        ...

    async def get(self, key: str, limit_bytes: int) -> bytes:
        """A small object's bytes. MissingObject; StoreProblem when it has more than `limit_bytes`."""
        ...

    def origin(self, key: str, span: Span) -> Origin:
        """The bytes of a span of an object, for a Download; positions count from the span's start.

        Its answers raise MissingObject, and StoreMismatch when the object ends before the span does.
        """
        ...

    async def read(self, key: str, span: Span, sink: Sink, report: Report = ...) -> None:
        """Fills the sink's gaps with a span of an object, in parallel ranges. What a broken connection did bring stays in the sink.

        Nothing is verified: that is the reader's part, who knows the digest.
        """
        ...

    async def put(self, key: str, data: bytes) -> Object:
        """Writes an object, over whatever is there."""
        ...

    async def put_new(self, key: str, data: bytes) -> Object:
        """Writes an object only if there is none: ObjectExists otherwise. One of many callers wins.

        `data` names its writer (a random id in it): after a lost answer the store's bytes are compared with it.
        """
        ...

    async def replace(self, key: str, data: bytes, etag: str) -> Object:
        """Writes an object only over the one of that etag: ObjectChanged or MissingObject otherwise. `data` as for `put_new`."""
        ...

    async def has_conditions(self) -> bool:
        """Whether `put_new` and `replace` keep their promises here; tried out once. If not, both may overwrite."""
        ...

    async def put_file(
        self, key: str, file: Path | int, size_bytes: int, sha256: Digest, report: Report = ..., resume: Path | None = ...
    ) -> Object:
        """Writes an object from a file (or a descriptor that is read by offset and stays open), in bounded memory.

        LocalMismatch if the file does not have that digest: the object is not written. It is confirmed only when the store has proved
        that it got these bytes; StoreMismatch if it has others. With `resume`, a small file that the caller keeps, an upload that broke off
        (`kill -9` too) goes on where it was; it is gone when there is nothing to go on with. One caller per `resume` at a time.
        """
        ...

    async def head(self, key: str) -> Object | None: ...

    def list(self, prefix: str) -> AsyncIterator[Object]:
        """Every object whose key begins with `prefix`, in no promised order. What changes meanwhile may be listed or not."""
        ...

    async def delete(self, key: str) -> None:
        """Removes an object; there need not be one."""
        ...

    async def now(self) -> float:
        """The store's own clock, to a second or two: what `modified` is to be compared with."""
        ...

    async def abort_orphans(self, older_than_seconds: float) -> int:
        """Removes what broken writers left below this store's prefix and nobody has gone on with for so long; how many."""
        ...

    async def close(self) -> None: ...


def check_key(key: str) -> str:
    """The key, or InvalidRequest naming what is wrong with it."""
    problem = _problem(key)
    if problem is not None:
        raise InvalidRequest(f"the store's key {key[:200]!r} {problem}", "keys are relative paths such as refs/name.json")
    return key


def check_prefix(prefix: str) -> str:
    """A key's beginning: empty, a key, a key and "/", or a part of one."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def check_digest(key: str, found: str, sha256: Digest) -> None:
    if found != sha256:
        raise LocalMismatch(
            f"the file for {key} is not what its SHA-256 says", "modelcache verify looks at every file; save it again", key=key
        )


def no_report(_: int) -> None:
    pass


def _problem(key: str) -> str | None:
    try:
        raw = key.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "is not a normalised relative path"
    if parts[0] == OWN_FOLDER:
        return "is one of the store's own"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in key):
        return "has a control character"
    if "\\" in key:
        return "has a backslash, which some stores list as a slash"
    if len(raw) > MAX_KEY_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return "is too long"
    return None
