"""Scrub: hashes blobs again that nobody uses now, slowly, each once in `scrub_interval`. Disks lie; better to hear of it early.

It reads at idle I/O priority, at most at `scrub_rate`, and takes out of the page cache what it read. A blob that lies goes to quarantine,
and is brought again (I10). How far a round is stands in `scrubbed`, so a restart goes on there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from . import durable
from .blobs import UNREADABLE, Blobs
from .errors import ModelcachedError
from .layout import Layout
from .leases import Leases
from .model import Digest, TreeId, is_digest
from .tasks import Pool
from .trees import Trees

PIECE_BYTES = 1 << 20
PAUSE_SECONDS = 60.0  # after what went wrong
IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # the system call's number; where it is not known, the rate has to do
IDLE_CLASS, WHO_THREAD = 3 << 13, 1
NICEST = 19
log = logging.getLogger(__name__)


class _Round(msgspec.Struct):
    """How far it is: the shards before this one are done."""

    began: float  # seconds since the epoch
    shard: int = 0


class _Found(NamedTuple):
    digest: Digest
    executable: bool
    size: int  # bytes, as it lies there


_round_json = msgspec.json.Decoder(_Round)


class Scrub:
    """`_round` is this node's place in its round; only `run` touches it."""

    def __init__(
        self,
        layout: Layout,
        blobs: Blobs,
        trees: Trees,
        leases: Leases,
        pool: Pool,
        rate: int,
        interval_seconds: float,
        note_damaged: Callable[[Digest], None],
        bring: Callable[[Digest], Awaitable[bool]],
    ) -> None:
        self._layout = layout
        self._blobs = blobs
        self._trees = trees
        self._leases = leases
        self._pool = pool
        self._rate = rate  # bytes a second
        self._interval_seconds = interval_seconds
        self._note_damaged = note_damaged
        self._bring = bring
        self._idle = ThreadPoolExecutor(1, thread_name_prefix="scrub", initializer=_become_idle)
        self._shards = layout.shards()
        self._round = self._read()
        self.scrubbed = {"blobs": 0, "bytes": 0, "damaged": 0, "repaired": 0}

    async def run(self) -> None:
        """Goes round, as long as the daemon lives."""
        while self._rate:
            try:
                await self._finish_round()
                rest = self._round.began + self._interval_seconds - time.time()
                await asyncio.sleep(min(max(rest, 1.0), self._interval_seconds))
                self._round = _Round(time.time())
            except (OSError, ModelcachedError) as error:
                log.warning("a scrub failed, and goes on later", extra={"error": str(error)})
                await asyncio.sleep(PAUSE_SECONDS)

    def statistics(self) -> dict[str, float]:
        return {**self.scrubbed, "began": self._round.began, "shard": self._round.shard, "shards": len(self._shards)}

    def close(self) -> None:
        self._idle.shutdown(wait=False, cancel_futures=True)

    async def _finish_round(self) -> None:
        while self._round.shard < len(self._shards):
            self._round.shard, cold = await self._pool.run(self._next)
            for found in cold:
                await self._check(*found)
            self._round.shard += 1
            await self._pool.run(self._write)

    async def _check(self, digest: Digest, executable: bool, size: int) -> None:
        """Hashes one blob, and mends it if it lies. Between two pieces it rests as long as the rate says."""
        sha256, path = hashlib.sha256(), self._blobs.path(digest, executable)
        loop = asyncio.get_running_loop()
        for start in range(0, size, PIECE_BYTES):
            began = loop.time()
            try:
                count = await loop.run_in_executor(self._idle, _read_piece, path, start, sha256.update)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
                break  # what was hashed so far is not the blob
            if count is None:
                return  # it went meanwhile
            self.scrubbed["bytes"] += count
            await asyncio.sleep(max(0.0, count / self._rate - (loop.time() - began)))
        self.scrubbed["blobs"] += 1
        if sha256.hexdigest() == digest or not path.exists():
            return
        # The answer of the disk itself: not what was in memory for a moment.
        if await self._pool.run(self._blobs.check, digest, executable):
            return
        self.scrubbed["damaged"] += 1
        log.error("a blob is damaged", extra={"blob": path.name, "bytes": size})
        self._note_damaged(digest)
        if await self._bring(digest):
            self.scrubbed["repaired"] += 1

    def _next(self) -> tuple[int, list[_Found]]:
        """The next shard that is not empty, and which of its blobs nobody uses; or the last one (blocks)."""
        number = self._round.shard
        while not (found := _listed(self._shards[number])) and number + 1 < len(self._shards):
            number += 1
        hot = self._hot() if found else ()
        return number, [each for each in found if each.digest not in hot]

    def _hot(self) -> set[Digest]:
        """What is in use: whoever reads it now should find it in memory, and the disk free (blocks)."""
        hot: set[Digest] = set()
        for name in self._leases.held():
            tree = self._trees.load(TreeId(name))
            hot.update(file.sha256 for file in tree.files) if tree else None
        return hot

    def _read(self) -> _Round:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return _round_json.decode(self._layout.scrubbed.read_bytes())
        return _Round(time.time())

    def _write(self) -> None:
        durable.record(self._layout.scrubbed, msgspec.json.encode(self._round), self._layout.fresh("scrubbed"))


def _listed(shard: Path) -> list[_Found]:
    found = []
    with os.scandir(shard) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                name = file.name.removesuffix(".x")
                if is_digest(name):
                    found.append(_Found(Digest(name), name != file.name, file.stat(follow_symlinks=False).st_size))
    return sorted(found)


def _read_piece(path: Path, start: int, hashed: Callable[[bytes], None]) -> int | None:
    """Hashes one piece; its length, None if the file is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        piece = os.pread(handle, PIECE_BYTES, start)
        hashed(piece)
        os.posix_fadvise(handle, start, len(piece), os.POSIX_FADV_DONTNEED)
        return len(piece)
    finally:
        os.close(handle)


def _become_idle() -> None:
    """Makes this thread one that gets what nobody else wants. A sandbox may refuse; then there is still the rate."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICEST)
    number = IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, WHO_THREAD, 0, IDLE_CLASS)
