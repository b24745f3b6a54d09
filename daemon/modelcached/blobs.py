"""Blobs: immutable bytes named by their SHA-256. A name here is complete, verified and read-only, and never changes (I1).

There is no index: existence is a stat. What lies is moved to quarantine/ and counts as missing (I10).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import durable
from .errors import disk_errors
from .layout import Layout
from .model import Digest, is_digest
from .tasks import Pool
from .usage import Usage, on_disk

SYNC_THREADS = 8  # fsyncs of a batch in flight: they wait for the disk, not for a core
BATCH_FILES = 512
HASH_BYTES = 1 << 20
UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)  # a bad sector, or what the filesystem's own checksums say is damaged


class Blobs:
    def __init__(self, layout: Layout, pool: Pool, group: asyncio.TaskGroup) -> None:
        self._layout = layout
        self.usage = Usage(layout)
        self._pool = pool
        self._group = group
        self._syncing = ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="sync")
        self._queue: list[tuple[bytes, Digest, asyncio.Future[None]]] = []  # small blobs that wait for the running batch to end
        self._publishing = False
        self._unsynced: dict[Path, Digest] = {}  # captured files whose fsync failed, and what they held before; only `_seal` touches it
        self.quarantined = 0

    def has(self, digest: Digest, size: int, executable: bool = False) -> bool:
        """Whether the blob is here and looks as it was published. One stat: may be called on the loop."""
        try:
            found = os.stat(self._layout.blob(digest, executable))
        except FileNotFoundError:
            return False
        return found.st_size == size and found.st_mtime_ns == durable.MTIME_NS

    def path(self, digest: Digest, executable: bool = False) -> Path:
        return self._layout.blob(digest, executable)

    async def adopt(self, source: Path, digest: Digest) -> None:
        """Publishes a complete, verified private file; `source` is gone afterwards."""
        with disk_errors(f"publishing {digest[:12]}"):
            await self._pool.run(self._publish, {digest: source})

    async def add(self, data: bytes, digest: Digest) -> None:
        """Publishes small verified bytes. Calls that come while a batch is being synced make up the next one."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((data, digest, done))
        if not self._publishing:
            self._publishing = True
            self._group.create_task(self._publish_queue())
        await asyncio.shield(done)

    async def _publish_queue(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue[:BATCH_FILES], self._queue[BATCH_FILES:]
                await self._publish_batch(batch)
        finally:
            self._publishing = False
            for *_, done in self._queue:
                done.cancel()

    async def _publish_batch(self, batch: list[tuple[bytes, Digest, asyncio.Future[None]]]) -> None:
        try:
            with disk_errors("publishing small files"):
                await self._pool.run(self._write_batch, {digest: data for data, digest, _ in batch})
        except Exception as error:
            for *_, done in batch:
                if not done.done():
                    done.set_exception(error)
                    done.exception()  # retrieved: the caller may have left
        except BaseException:
            for *_, done in batch:
                done.cancel()
            raise
        else:
            for *_, done in batch:
                if not done.done():
                    done.set_result(None)

    def _write_batch(self, batch: dict[Digest, bytes]) -> None:
        sources = {digest: self._layout.fresh("blob") for digest in batch}
        try:
            for digest, data in batch.items():
                sources[digest].write_bytes(data)
            self._publish(sources)
        except BaseException:
            for source in sources.values():
                source.unlink(missing_ok=True)
            raise

    def _publish(self, sources: dict[Digest, Path]) -> None:
        for digest, source in sources.items():
            if not self.has(digest, source.stat().st_size):
                self.check(digest)  # a blob that lies must not keep the good one from its name (I10)
        self._give_names([durable.Staged(source, self._layout.blob(digest)) for digest, source in sources.items()])

    def _give_names(self, batch: list[durable.Staged]) -> None:
        new = [staged.target for staged in batch if not staged.target.exists()]
        try:
            durable.publish(batch, self._syncing.map)
        finally:
            for path in new:
                with contextlib.suppress(FileNotFoundError):
                    self.usage.note(path, on_disk(os.stat(path)))

    async def share(self, source: Path, digest: Digest) -> None:
        """Makes a captured file and its blob one: the file becomes the blob, or a second name of the one that is here."""
        with disk_errors(f"publishing {digest[:12]}"):
            await self._pool.run(self._share, source, digest)

    def _share(self, source: Path, digest: Digest) -> None:
        path = self._layout.blob(digest)
        if not self.has(digest, source.stat().st_size):
            self.check(digest)
            self._seal(source, digest)
            try:
                is_linked = durable.link(source, path)
            except FileExistsError:  # an equal file was faster
                pass
            else:
                if not is_linked:
                    raise OSError(errno.EMLINK, os.strerror(errno.EMLINK), str(source))
                self.usage.note(path, on_disk(os.stat(path)))
                return durable.sync_folders([path.parent])
        if not path.samefile(source):
            second = self._layout.fresh("second")
            if durable.link(path, second):
                durable.rename(second, source)
        durable.sync_folders([path.parent])

    def _seal(self, source: Path, digest: Digest) -> None:
        """An fsync error is final for its file: the next one could succeed and mean nothing. A copy takes its place if it can."""
        if source not in self._unsynced:
            try:
                return durable.seal(source)
            except OSError:
                self._unsynced[source] = digest
        copy = self._layout.fresh("again")
        try:
            shutil.copyfile(source, copy)
            if not hash_file(copy) == digest == self._unsynced[source]:
                raise EOFError(f"{source.name} could not be written, and its bytes are lost")
            durable.seal(copy)
            durable.rename(copy, source)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        del self._unsynced[source]

    def make_executable(self, digest: Digest) -> None:
        """The same bytes once more, executable: modes belong to the file, not to its name (blocks)."""
        plain, target = self._layout.blob(digest), self._layout.blob(digest, executable=True)
        if not self.has(digest, plain.stat().st_size, executable=True) and not self.check(digest, executable=True):
            source = self._layout.fresh("blob")
            try:
                shutil.copyfile(plain, source)
            except BaseException:
                source.unlink(missing_ok=True)
                raise
            self._give_names([durable.Staged(source, target, executable=True)])

    def check(self, digest: Digest, executable: bool = False) -> bool:
        """Re-hashes a blob, or its executable copy (blocks). False: it lied or can't be read and is in quarantine, or was not here."""
        path = self._layout.blob(digest, executable)
        found = None
        try:
            found = hash_file(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
        if found == digest:
            if os.stat(path).st_mtime_ns != durable.MTIME_NS:
                durable.seal(path, executable)
            return True
        self._quarantine([path] if executable else [path, self._layout.blob(digest, executable=True)])
        return False

    def _quarantine(self, paths: list[Path]) -> None:
        """A blob that lies is never served again, and kept for whoever wants to know why. The executable copy was made of it."""
        for path in paths:
            if path.exists():
                self.usage.note(path, -on_disk(os.stat(path)))
                os.utime(path)  # views that still show these bytes are seen to lie too, also by the next daemon
                durable.rename(path, self._layout.quarantine / path.name)
                self.quarantined += 1

    def names(self, digest: Digest) -> tuple[int, int]:
        """How many names a blob has beside its own, and the bytes that it takes on the disk: a view's links, and a save's."""
        found = self._look(digest)
        return sum(status.st_nlink - 1 for _, status in found), sum(on_disk(status) for _, status in found)

    def set_aside(self, digest: Digest) -> tuple[list[Path], int]:
        """Moves a blob out of sight that has no other name: where it lies now, and its bytes. Nothing, if somebody shows it."""
        found = self._look(digest)
        if any(status.st_nlink > 1 for _, status in found):
            return [], 0
        aside = []
        for path, status in found:
            aside.append(self._layout.fresh("forgotten"))
            durable.rename(path, aside[-1])
            self.usage.note(path, -on_disk(status))
        return aside, sum(on_disk(status) for _, status in found)

    def forget(self, digest: Digest) -> int:
        """Removes a blob that no view shows any more; the bytes freed (0: somebody still shows it)."""
        aside, freed = self.set_aside(digest)
        for path in aside:
            path.unlink(missing_ok=True)
        return freed

    def _look(self, digest: Digest) -> list[tuple[Path, os.stat_result]]:
        """The blob's files: its own, and the executable one."""
        found = []
        for path in (self._layout.blob(digest), self._layout.blob(digest, executable=True)):
            with contextlib.suppress(FileNotFoundError):
                found.append((path, os.stat(path)))
        return found

    def walk(self) -> Iterator[tuple[Digest, int]]:
        """Every blob and its size in bytes (blocks)."""
        for shard in self._layout.shards():
            with os.scandir(shard) as files:
                for file in files:
                    if is_digest(file.name):
                        yield Digest(file.name), file.stat().st_size

    def close(self) -> None:
        self._syncing.shutdown(wait=False)


def hash_file(path: Path) -> Digest:
    """The SHA-256 of a file (blocks)."""
    sha256 = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASH_BYTES):
            sha256.update(chunk)
    return Digest(sha256.hexdigest())


def hash_bytes(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())
