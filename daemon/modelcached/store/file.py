"""A store in a folder, which several nodes may share (NFS): keys are paths below it.

A name appears by rename or exclusive link, so readers see whole objects only; writers of one key take turns by flock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import secrets
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from modelcached import durable
from modelcached.download import Download, Limits, Sink
from modelcached.errors import (
    InvalidRequest,
    MissingObject,
    ModelcachedError,
    ObjectChanged,
    ObjectExists,
    StoreDenied,
    StoreFull,
    StoreMismatch,
    StoreMissingBucket,
    StoreProblem,
    StoreUnavailable,
)
from modelcached.model import Digest
from modelcached.rates import Rate
from modelcached.spans import Again, Body, Origin, Span
from modelcached.tasks import Pool

from .contract import OWN_FOLDER, Object, Report, check_digest, check_key, check_prefix, no_report
from .local import READ_BYTES, opened, scan

COPY_BYTES = 8 << 20
_REFUSED = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EFBIG, errno.ENXIO, errno.ELOOP)  # asking again does not help
_Scanned = tuple[list[Object], list[str]]  # objects, and folders below


class FileStore:
    def __init__(self, root: Path, pool: Pool, limits: Limits, rate: Rate | None = None) -> None:
        """`pool` is this store's own, and closed with it: calls to a server that is away hang in its threads, and in nobody else's."""
        self._root = root
        self._pool = pool
        self._limits = limits
        self._rate = rate or Rate()
        self._temporary = root / OWN_FOLDER / "tmp"
        self._locks = root / OWN_FOLDER / "locks"

    @property
    def url(self) -> str:
        return f"file://{quote(str(self._root))}"

    async def get(self, key: str, limit_bytes: int) -> bytes:
        def read() -> bytes:
            with self._translated(key), open(self._path(key), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit_bytes:
                    raise StoreProblem(
                        f"{key} has {size} bytes, more than the {limit_bytes} it may have", "it was written by something else"
                    )
                return file.read()

        return await self._pool.abandon(read)

    def origin(self, key: str, span: Span) -> Origin:
        return _FileOrigin(self, key, span)

    async def read(self, key: str, span: Span, sink: Sink, report: Report = no_report) -> None:
        size = span[1] - span[0]
        await Download(self.origin(key, span), self._pool, self._limits, size, sink, report).run()

    async def put(self, key: str, data: bytes) -> Object:
        return await self._pool.run(self._write, key, lambda: self._stage(data), lambda path: True)

    async def put_new(self, key: str, data: bytes) -> Object:
        def check(path: Path) -> bool:
            if path.exists():
                self._refuse_existing(key)
            return False

        return await self._pool.run(self._write, key, lambda: self._stage(data), check)

    async def replace(self, key: str, data: bytes, etag: str) -> Object:
        def check(path: Path) -> bool:
            if _describe(key, os.stat(path)).etag != etag:
                raise ObjectChanged(f"{key} is not what it was", "look at it again", key=key)
            return True

        return await self._pool.run(self._write, key, lambda: self._stage(data), check)

    async def has_conditions(self) -> bool:
        return True

    async def put_file(
        self, key: str, file: Path | int, size_bytes: int, sha256: Digest, report: Report = no_report, resume: Path | None = None
    ) -> Object:
        """`resume` is not needed: a copy that broke off starts over."""
        check_key(key)
        temporary = await self._pool.run(self._stage, b"")
        try:
            digest = hashlib.sha256()
            async with opened(self._pool, file) as source:
                for position in range(0, size_bytes, COPY_BYTES):
                    length = min(COPY_BYTES, size_bytes - position)
                    await self._rate.passed(length)
                    await self._pool.run(self._copy, key, source, position, length, temporary, digest.update)
                    report(length)
            check_digest(key, digest.hexdigest(), sha256)
            return await self._pool.run(self._write, key, lambda: temporary, lambda path: True)
        finally:
            _drop(temporary)

    async def head(self, key: str) -> Object | None:
        path = self._path(key)

        def look() -> Object | None:
            with contextlib.suppress(MissingObject), self._translated(key):
                found = os.stat(path)
                return _describe(key, found) if stat.S_ISREG(found.st_mode) else None
            return None

        return await self._pool.abandon(look)

    async def list(self, prefix: str) -> AsyncIterator[Object]:
        folders = [check_prefix(prefix).rpartition("/")[0]]
        while folders:
            objects, below = await self._pool.abandon(self._scan, folders.pop(), prefix)
            folders += below
            for found in objects:
                yield found

    async def delete(self, key: str) -> None:
        path = self._path(key)

        def remove() -> None:
            with contextlib.suppress(MissingObject), self._translated(key):
                os.lstat(path)  # where nothing is, no folder to lock in need be
                with self._turn(key):
                    path.unlink()
                    durable.sync_folders([path.parent])

        await self._pool.run(remove)

    async def now(self) -> float:
        def look() -> float:
            temporary = self._fresh("the clock")
            try:
                with self._translated("the clock", is_writing=True):
                    temporary.touch()
                    return temporary.stat().st_mtime
            finally:
                _drop(temporary)

        return await self._pool.abandon(look)

    async def abort_orphans(self, older_than_seconds: float) -> int:
        oldest = await self.now() - older_than_seconds

        def remove() -> int:
            removed = 0
            with self._translated("the temporary files", is_writing=True), os.scandir(self._temporary) as files:
                for file in files:
                    with contextlib.suppress(FileNotFoundError):
                        if file.stat().st_mtime < oldest:
                            os.unlink(file.path)
                            removed += 1
            return removed

        return await self._pool.run(remove)

    async def close(self) -> None:
        self._pool.close()

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _fresh(self, key: str) -> Path:
        """A new temporary file's name, on the store's own filesystem."""
        with self._translated(key, is_writing=True):
            durable.make_folders(self._temporary)
        return self._temporary / secrets.token_hex(12)

    def _stage(self, data: bytes) -> Path:
        temporary = self._fresh("a temporary file")
        try:
            with self._translated("a temporary file", is_writing=True):
                temporary.write_bytes(data)
        except BaseException:
            _drop(temporary)
            raise
        return temporary

    def _copy(self, key: str, source: int, position: int, length: int, target: Path, hashed: Callable[[memoryview], None]) -> None:
        with self._translated(key, is_writing=True), open(target, "ab", buffering=0) as file:

            def append(chunk: memoryview) -> None:
                while chunk:
                    chunk = chunk[file.write(chunk) :]

            scan(source, position, length, hashed, append)

    def _write(self, key: str, stage: Callable[[], Path], may_replace: Callable[[Path], bool]) -> Object:
        """Publishes what `stage` made, if `may_replace` (asked when it is this writer's turn) does not object."""
        path = self._path(key)
        with self._translated(key, is_writing=True):
            temporary = stage()
            try:
                _stamp(temporary)
                found = _describe(key, os.stat(temporary))
                with self._turn(key):
                    if path.is_dir():
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                    with self._translated(key):  # what is not there is the caller's news
                        replace = may_replace(path)
                    durable.make_folders(path.parent)
                    try:
                        durable.place(temporary, path, replace)
                    except FileExistsError:
                        self._refuse_existing(key)
                return found
            finally:
                _drop(temporary)

    def _refuse_existing(self, key: str) -> NoReturn:
        raise ObjectExists(f"{key} is there already", "somebody else was first", key=key)

    @contextlib.contextmanager
    def _turn(self, key: str) -> Iterator[None]:
        """Writers of one key, in every process and on every node whose filesystem passes locks on, one after the other."""
        durable.make_folders(self._locks)
        name = hashlib.sha256(key.encode()).hexdigest()[:2]
        handle = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _scan(self, folder: str, prefix: str) -> _Scanned:
        """The objects of one folder, and the folders below it, as far as they can begin with `prefix`."""
        objects, below = [], []
        with contextlib.suppress(MissingObject), self._translated(folder), os.scandir(self._root / folder) as entries:
            for entry in entries:
                key = f"{folder}/{entry.name}" if folder else entry.name
                if not _is_key(key):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                        below.append(key)
                elif key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat()
                        if stat.S_ISREG(found.st_mode):
                            objects.append(_describe(key, found))
        return objects, below

    @contextlib.contextmanager
    def _translated(self, key: str, is_writing: bool = False) -> Iterator[None]:
        """What the folder's filesystem says about an object, as an error with a name."""
        try:
            yield
        except OSError as error:
            raise self._named(error, key, is_writing) from None

    def _named(self, error: OSError, key: str, is_writing: bool) -> ModelcachedError:
        what = os.strerror(error.errno or errno.EIO)
        if error.errno == errno.ENOTDIR and not self._is_folder():
            return StoreMissingBucket(f"{self.url}: a part of this path is a file", "make the folder, or correct the store's URL")
        if error.errno == errno.EISDIR or (error.errno in (errno.ENOTDIR, errno.EEXIST) and is_writing):
            return StoreProblem(f"{key}: it, or a part of it, is a folder here and an object there", "no key is the folder of another")
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not is_writing:
            return MissingObject(f"{key} is not in {self.url}", "it was deleted, or belongs to another store", key=key)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFull(f"{self.url} is full", "free space there, or collect garbage: modelcache gc-store")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return StoreDenied(f"{self.url}: {what} ({key})", "the daemon's user needs to read and write this folder")
        if error.errno in _REFUSED:
            return StoreProblem(f"{self.url} can't hold {key}: {what}", "look at what its filesystem allows")
        return StoreUnavailable(f"{self.url}: {what} ({key})", "look at the filesystem it lies on; is it mounted?")

    def _is_folder(self) -> bool:
        """Whether the store is where it should be, or nothing is: then the first object makes it."""
        try:
            return stat.S_ISDIR(os.stat(self._root).st_mode)
        except FileNotFoundError:
            return True
        except OSError:
            return False


class _FileOrigin:
    """A span of a file, as spans of it are asked for."""

    def __init__(self, store: FileStore, key: str, span: Span) -> None:
        self._store = store
        self._key = key
        self._span = span

    @contextlib.asynccontextmanager
    async def answer(self, span: Span | None) -> AsyncIterator[Body]:
        store, key = self._store, self._key
        start, end = self._span if span is None else (self._span[0] + span[0], self._span[0] + span[1])

        def begin() -> int:
            with store._translated(key):
                handle = os.open(store._path(key), os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(handle).st_size < end:
                os.close(handle)
                raise StoreMismatch(f"{key} in {store.url} is shorter than it was", "save it again", key=key)
            return handle

        async with opened(store._pool, begin) as handle:
            yield _Reader(store, key, handle, start, end)

    async def after(self, again: Again, failures: int) -> None:
        raise StoreUnavailable(f"{self._store.url}: {again.reason} ({self._key})", "look at the filesystem it lies on")


class _Reader:
    def __init__(self, store: FileStore, key: str, handle: int, position: int, end: int) -> None:
        self._store = store
        self._key = key
        self._handle = handle
        self._position = position
        self._end = end

    async def readany(self) -> bytes:
        def read() -> bytes:
            with self._store._translated(self._key):
                return os.pread(self._handle, min(READ_BYTES, self._end - self._position), self._position)

        chunk = await self._store._pool.run(read)
        await self._store._rate.passed(len(chunk))
        self._position += len(chunk)
        return chunk


def _drop(temporary: Path) -> None:
    """Removes a temporary file; what can't go now is an orphan (`abort_orphans`)."""
    with contextlib.suppress(OSError):
        temporary.unlink()


def _stamp(path: Path) -> None:
    """Makes the modification time name the content: below its milliseconds it is random, for inodes are used again at once."""
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns // 10**6 * 10**6 + random.randrange(10**6)))


def _describe(key: str, found: os.stat_result) -> Object:
    return Object(key, found.st_size, found.st_mtime_ns / 1e9, f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}")


def _is_key(key: str) -> bool:
    """Whether it can be one of ours: a folder may hold other things too."""
    try:
        check_key(key)
    except InvalidRequest:
        return False
    return True
