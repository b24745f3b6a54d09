"""Hashing: behind the answer, a save's files become blobs by a second link, and their tree is written down.

From then on this node can load them; who loads before waits for it, and until somebody does, hashing gives way to the node's tasks. What
was hashed before is looked at again whenever the tree is asked for: a blob or the tree itself may have gone with something else that
shared it, and is made again from the spool.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from .blobs import HASH_BYTES, Blobs, hash_bytes
from .errors import ModelcachedError, SaveDamaged, disk_errors
from .holds import Hand, Holds
from .meter import Meter, Report, ticking
from .model import Digest, Tree, TreeFile, TreeId
from .room import Left, Room
from .singleflight import Flight, Flights
from .spool import Entry, SavedFile, Spool
from .tasks import Pool, each
from .trees import Trees

FILES_AT_ONCE = 8  # large ones, of one save
RUNS_AT_ONCE = 2  # of small ones, of one save
RUN_FILES = 512
RUN_BYTES = 16 << 20
PIECE_BYTES = 8 << 20  # of a large file, hashed in one go: who begins to wait does not wait long for threads that give way
SAVES_AT_ONCE = 2  # without anybody waiting for them
log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Hashed(NamedTuple):
    name: TreeId
    tree: Tree


class HashFlight(Flight[Hashed]):
    """One save being hashed; ahead of its turn it leaves room to those that are on their way to the store."""

    def __init__(self, hashing: Hashing, entry: Entry, is_ahead: bool) -> None:
        super().__init__(lambda: hashing.work(self))
        self.entry = entry
        self.is_ahead = is_ahead
        self.meter = Meter()


class Hashing:
    """`_seen` are the entries that were hashed in the background, or are being; only the event loop touches it."""

    def __init__(self, spool: Spool, blobs: Blobs, trees: Trees, pool: Pool, group: asyncio.TaskGroup, holds: Holds, room: Room) -> None:
        self._spool = spool
        self._blobs = blobs
        self._trees = trees
        self._pool = pool
        self._holds = holds
        self._room = room
        self._flights: Flights[str, HashFlight, Hashed] = Flights(group)
        self._seen: set[str] = set()

    async def run(self) -> None:
        """Hashes what comes into the spool, as long as the daemon lives."""
        async with asyncio.TaskGroup() as group:
            for _ in range(SAVES_AT_ONCE):
                group.create_task(self._hash_new())

    async def tree(self, entry: Entry, report: Report | None = None, is_ahead: bool = False) -> Hashed:
        """The save's tree, as soon as its files are hashed and all of them lie under blobs/. SaveDamaged if that can't be."""
        flight = self._flights.board(entry.id, lambda: HashFlight(self, entry, is_ahead))
        reports = flight.meter.reports
        if report is not None:
            reports.append(report)
        try:
            return await self._flights.wait(entry.id, flight)
        finally:
            if report is not None:
                reports.remove(report)

    async def work(self, flight: HashFlight) -> Hashed:
        with self._holds.hand() as hand:
            return await self._hash(flight.entry, flight.meter, hand, flight.is_ahead)

    async def _hash(self, entry: Entry, meter: Meter, hand: Hand, is_ahead: bool) -> Hashed:
        """From a save's files to blobs, a tree and its view: blobs without one would belong to nobody."""
        with disk_errors(f"hashing {entry.key}"):
            known = await self._pool.run(self._spool.tree, entry)
            tree = None if known is None else await self._pool.run(self._trees.load, known)
            if known is not None and tree is not None:
                hand.add((known, *(file.sha256 for file in tree.files)))
            if known is not None and tree is not None and await self._pool.run(self._has_all, tree):
                await self._pool.run(self._show, known, tree)
                return Hashed(known, tree)
            meter.phase, meter.source = "hash", "disk"
            meter.start(entry.size, len(entry.files), 0, 0)
            async with ticking(meter):
                tree = await self._publish(entry, meter, hand, is_ahead)
                if known is not None and known != await self._pool.run(tree.tree_id):
                    raise SaveDamaged(
                        f"what was saved as {entry.key} has been changed since", "root wrote through a view, or the disk failed"
                    )
                name = await self._pool.run(tree.tree_id)
                hand.add([name])
                await self._pool.run(self._show, name, tree)
                if known is None:
                    await self._pool.run(self._spool.set_tree, entry, name)
        return Hashed(name, tree)

    async def _hash_new(self) -> None:
        while True:
            entry = next((entry for entry in self._spool.entries if entry.id not in self._seen), None)
            if entry is None:
                await self._spool.until(lambda: any(entry.id not in self._seen for entry in self._spool.entries))
                continue
            self._seen.add(entry.id)
            try:
                await self.tree(entry, is_ahead=True)
            except (ModelcachedError, OSError) as error:  # the upload tries again, and says so in `status`
                log.error("a save can't be hashed", extra={"save": entry.id, "key": entry.key, "error": str(error)})
            except Exception:
                log.exception("a save can't be hashed", extra={"save": entry.id, "key": entry.key})
            self._seen = {entry.id for entry in self._spool.entries} & self._seen

    def _show(self, name: TreeId, tree: Tree) -> None:
        self._trees.save(tree)
        if not self._trees.view(name).exists():
            self._trees.mend(name, tree)

    async def _publish(self, entry: Entry, meter: Meter, hand: Hand, is_ahead: bool) -> Tree:
        digests: dict[str, Digest] = {}
        copies = sum(map(_copied, entry.files))  # bytes that are still to come onto the disk (I6)
        needs: dict[Hashable, Left] = {("hashing", entry.id): lambda: copies} if copies else {}

        async def compute(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
            run = self._pool.run if meter.reports else self._pool.run_behind
            return await run(work, *args, **kwargs)

        async def take_run(run: list[SavedFile]) -> None:
            """Small files that the client sent one after another."""
            bodies = await compute(_read_run, self._spool.source(entry, run[0]), run)
            await each(zip(run, bodies, strict=True), add, RUN_FILES)

        async def add(item: tuple[SavedFile, tuple[Digest, bytes]]) -> None:
            file, (digest, data) = item
            hand.add([digest])
            if not self._blobs.has(digest, file.size):
                await self._blobs.add(data, digest)
            await took(file, digest)

        async def take(file: SavedFile) -> None:
            source = self._spool.source(entry, file)
            sha256 = hashlib.sha256()
            for start in range(0, max(1, file.size), PIECE_BYTES):
                await compute(_hash_piece, source, file, start, sha256.update)
            digest = Digest(sha256.hexdigest())
            hand.add([digest])
            await self._blobs.share(source, digest)
            await took(file, digest)

        async def took(file: SavedFile, digest: Digest) -> None:
            if file.executable:
                await self._pool.run(self._blobs.make_executable, digest)
            nonlocal copies
            copies -= _copied(file)
            digests[file.path] = digest
            meter.finish(file.size)

        try:
            leaving = 1.0 if is_ahead else 0.5  # the upload's packs need room after it
            async with self._room.reserved(needs, f"the hashing of {entry.key}", is_save=True, leaving=leaving):
                await each(_runs(file for file in entry.files if file.is_packed), take_run, RUNS_AT_ONCE)
                await each([file for file in entry.files if not file.is_packed], take, FILES_AT_ONCE)
        except (FileNotFoundError, EOFError) as error:
            raise SaveDamaged(
                f"not everything of {entry.key} is on the disk as it was captured: {error}", "the disk failed, or was tampered with"
            ) from error
        files = tuple(TreeFile(file.path, file.size, digests[file.path], file.executable) for file in entry.files)
        return Tree(files, tuple(entry.links), tuple(entry.folders))

    def _has_all(self, tree: Tree) -> bool:
        return all(self._blobs.has(file.sha256, file.size) for file in tree.files)


def _copied(file: SavedFile) -> int:
    """Bytes that its blob takes beside it: a large file becomes the blob itself, and what is executable is there twice."""
    return file.size * (file.is_packed + file.executable)


def _runs(files: Iterable[SavedFile]) -> Iterator[list[SavedFile]]:
    """Files in the order of their bytes, cut where another pack begins or enough are together to be published as one batch."""
    run: list[SavedFile] = []
    size = 0
    for file in sorted(files, key=lambda file: (file.source, file.offset)):
        if run and (file.source != run[0].source or len(run) == RUN_FILES or size + file.size > RUN_BYTES):
            yield run
            run, size = [], 0
        run.append(file)
        size += file.size
    if run:
        yield run


def _read_run(path: Path, run: list[SavedFile]) -> list[tuple[Digest, bytes]]:
    found = []
    with open(path, "rb", buffering=0) as pack:
        for file in run:
            data = os.pread(pack.fileno(), file.size, file.offset)
            if len(data) != file.size:
                raise EOFError(f"{file.path!r} is shorter than it was")
            found.append((hash_bytes(data), data))
    return found


def _hash_piece(path: Path, file: SavedFile, start: int, hashed: Callable[[memoryview], None]) -> None:
    buffer, position, end = memoryview(bytearray(HASH_BYTES)), start, min(start + PIECE_BYTES, file.size)
    with open(path, "rb", buffering=0) as source:
        is_whole = os.fstat(source.fileno()).st_size == file.size
        while is_whole and position < end:
            count = os.preadv(source.fileno(), [buffer[: end - position]], position)
            hashed(buffer[:count])
            position, is_whole = position + count, count > 0
    if not is_whole:
        raise EOFError(f"{file.path!r} is not as long as it was")
