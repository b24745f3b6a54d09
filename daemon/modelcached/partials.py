"""Downloads on their way: `partial/<name>` and its map, one line per piece (offset, length, CRC-32), written after the data.

A piece counts only if the bytes on disk have its CRC, so a `kill -9` costs what was on the wire, and a power cut costs what had
not reached the disk, never correctness. The digest is taken from the first byte on, by whichever thread has just
written at its front; it is checked before the bytes get a name (I1).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from . import durable
from .layout import Layout
from .model import Content, Digest
from .tasks import Pool

READ_BYTES = 1 << 20
FLUSH_BYTES = 32 << 20  # so much goes to the disk while more is coming, instead of all of it at the publication
FLUSH_THREADS = 2  # they wait for the disk
MAX_BUFFERS = os.sysconf("SC_IOV_MAX")  # a slow line brings many small chunks


class Partial:
    """One download in progress. At most one exists per content (I5). All methods block: call them from a pool's thread.

    `_pieces`, `_unflushed` and `_flushing` belong to whoever holds `_lock`; `_hashing` says that a thread owns the front and its hashes.
    """

    def __init__(self, path: Path, content: Content, flusher: Executor | None = None) -> None:
        self.path = path
        self.content = content
        self._flusher = flusher
        self._flushing: Future[None] | None = None
        self._unflushed = 0  # bytes
        self._map = path.with_name(path.name + ".map")
        self._lock = threading.Lock()
        self._hashing = False
        self._start_over()
        with contextlib.suppress(FileNotFoundError):
            os.chmod(path, 0o600)  # a daemon that was killed while it published left it read-only
        self._data = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._recover()
            self._lines = os.open(self._map, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self._data)
            raise

    @property
    def done_bytes(self) -> int:
        return self._done

    def missing(self) -> list[tuple[int, int]]:
        """The gaps, as half-open byte ranges in order."""
        with self._lock:
            gaps, position = [], 0
            for offset in sorted(self._pieces):
                if offset > position:
                    gaps.append((position, offset))
                position = max(position, offset + self._pieces[offset])
            if position < self.content.size:
                gaps.append((position, self.content.size))
            return gaps

    def write(self, offset: int, chunks: Sequence[bytes]) -> None:
        """Keeps one piece that starts at `offset`: the data first, then its line in the map."""
        length, crc = 0, 0
        for chunk in chunks:
            crc = zlib.crc32(chunk, crc)
            length += len(chunk)
        _write_all(self._data, chunks, offset, length)
        line = b"%d %d %08x\n" % (offset, length, crc)
        _write_all(self._lines, [line], None, len(line))
        with self._lock:
            self._pieces[offset] = length
            self._done += length
            self._unflushed += length
            if self._flusher and self._unflushed >= FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
                self._check_flush()
                self._unflushed = 0
                self._flushing = self._flusher.submit(durable.sync_data, self._data)
        self._extend_front(offset, chunks)

    def finish(self) -> Digest | None:
        """The SHA-256 of the whole content, or None when the bytes are not what their name says."""
        self._extend_front()
        self._check_flush()
        if self._front != self.content.size:
            return None
        digest = self._sha256.hexdigest()
        if self.content.algorithm == "object":  # nobody knows what it should be
            return Digest(digest)
        named = digest if self._git is None else self._git.hexdigest()
        return Digest(digest) if named == self.content.hex else None

    def reset(self) -> None:
        """Forgets everything: the bytes lied."""
        os.ftruncate(self._lines, 0)
        os.ftruncate(self._data, 0)
        self._start_over()

    def close(self) -> None:
        """Keeps what is there for the next time. Does not wait for the disk."""
        os.close(self._lines)
        if self._flushing is None:
            os.close(self._data)
        else:
            self._flushing.add_done_callback(lambda _: os.close(self._data))

    def forget_map(self) -> None:
        """After the publication: the data has moved on."""
        self._map.unlink(missing_ok=True)

    def _start_over(self) -> None:
        self._pieces: dict[int, int] = {}
        self._done = 0
        self._front = 0  # bytes from the start that are in the hashes
        self._sha256 = hashlib.sha256()
        self._git = None
        if self.content.algorithm == "git-sha1":
            self._git = hashlib.sha1(b"blob %d\0" % self.content.size, usedforsecurity=False)

    def _recover(self) -> None:
        """Believes what the map says as far as the bytes agree, and replaces the map by one that says just that."""
        try:
            said = self._map.read_bytes()
        except FileNotFoundError:
            return
        kept: list[bytes] = []
        end = 0
        for offset, length, crc in sorted(_claims(said, self.content.size)):
            if offset < end or not self._holds(offset, length, crc):
                continue
            end = offset + length
            self._pieces[offset] = length
            self._done += length
            kept.append(b"%d %d %08x\n" % (offset, length, crc))
        if len(said) != sum(map(len, kept)):  # also when the last line is torn: the next one must not continue it
            durable.record(self._map, b"".join(kept), self._map.with_suffix(".new"))

    def _holds(self, offset: int, length: int, crc: int) -> bool:
        """Whether the bytes on disk have this CRC; those that continue the front go into the hashes in the same pass."""
        sha256, git = self._sha256.copy(), self._git.copy() if self._git else None
        found = 0
        try:
            for chunk in self._read(offset, length):
                found = zlib.crc32(chunk, found)
                sha256.update(chunk)
                if git is not None:
                    git.update(chunk)
        except _TooShort:
            return False
        if found != crc:
            return False
        if offset == self._front:
            self._sha256, self._git, self._front = sha256, git, offset + length
        return True

    def _read(self, offset: int, length: int) -> Iterator[bytes]:
        end = offset + length
        while offset < end:
            chunk = os.pread(self._data, min(READ_BYTES, end - offset), offset)
            if not chunk:
                raise _TooShort(errno.EIO, f"a piece of a download ends at {offset}, and not at {end}", str(self.path))
            yield chunk
            offset += len(chunk)

    def _extend_front(self, offset: int = -1, chunks: Sequence[bytes] = ()) -> None:
        """Hashes on from the front as far as pieces are there; `chunks` is the piece at `offset`, for it need not be read then.

        One thread at a time; the others leave it to that one.
        """
        while True:
            with self._lock:
                length = self._pieces.get(self._front, 0)
                if self._hashing or not length:
                    return
                self._hashing = True
            try:
                for chunk in chunks if self._front == offset else self._read(self._front, length):
                    self._sha256.update(chunk)
                    if self._git is not None:
                        self._git.update(chunk)
                    self._front += len(chunk)
            finally:
                with self._lock:
                    self._hashing = False

    def _check_flush(self) -> None:
        """Waits for the flush. Its error is final: the kernel tells it once, and what it could not write looks written from then on."""
        if self._flushing is not None:
            try:
                self._flushing.result()
            except OSError:
                os.ftruncate(self._lines, 0)
                raise

    def __repr__(self) -> str:
        return f"<Partial {self.path.name} {self._done}/{self.content.size}>"


class _TooShort(OSError):
    """The file ends before a piece that should be in it."""


class Partials:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._flusher = ThreadPoolExecutor(FLUSH_THREADS, thread_name_prefix="flush")

    @contextlib.asynccontextmanager
    async def opened(self, content: Content, pool: Pool) -> AsyncIterator[Partial]:
        """A partial file while the block runs; opening one reads all that it has."""
        found: list[Partial] = []  # filled by the thread: a caller who is cancelled meanwhile closes it all the same
        try:
            await pool.run(lambda: found.append(self.open(content)))
            yield found[0]
        finally:
            for partial in found:
                partial.close()

    def open(self, content: Content) -> Partial:
        return Partial(self._layout.partial(content), content, self._flusher)

    def size_bytes(self) -> int:
        """What unfinished downloads take on disk."""
        total = 0
        with os.scandir(self._layout.partials) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # it was published meanwhile, or given up
                    total += file.stat().st_blocks * 512
        return total

    def close(self) -> None:
        self._flusher.shutdown(wait=False)


def _claims(raw: bytes, size: int) -> list[tuple[int, int, int]]:
    """The map's lines that make sense; the last one may be torn."""
    claims = []
    for line in raw.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            offset, length, crc = line.split()
            claim = (int(offset), int(length), int(crc, 16))
            if 0 <= claim[0] and 0 < claim[1] and claim[0] + claim[1] <= size:
                claims.append(claim)
    return claims


def _write_all(handle: int, chunks: Sequence[bytes], offset: int | None, length: int) -> None:
    """All of `chunks` at `offset` (None: appended). A short write is finished, however the kernel cut it."""
    if len(chunks) > MAX_BUFFERS:
        chunks = [b"".join(chunks)]
    written = os.writev(handle, chunks) if offset is None else os.pwritev(handle, chunks, offset)
    if written == length:
        return
    rest = memoryview(b"".join(chunks))[written:]
    while rest:
        count = os.write(handle, rest) if offset is None else os.pwrite(handle, rest, offset + length - len(rest))
        rest = rest[count:]
