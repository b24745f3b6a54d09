"""Conversion: an old artifact's bytes become blobs, and what it is a tree; once for everybody who asks for it.

Its bytes have no checksums. So the listing has to be the same before and after they were read; and which tree a key turned out to be is
remembered, and believed as long as the artifact's record is, byte for byte, the one it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Hashable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import msgspec

from . import durable, legacy
from .blobs import Blobs, hash_bytes
from .errors import IncompatibleReference, InvalidRequest, MissingObject, StoreMismatch, StoreUnavailable, UnsafePath, disk_errors
from .flights import SMALL_BYTES, BlobFlights
from .holds import Hand, Holds
from .layout import Layout
from .legacy import Found
from .meter import Meter, Report, ticking
from .model import Content, Digest, Tree, TreeFile, TreeId, check_links, check_paths, is_digest
from .partials import Partial, Partials
from .places import Memory
from .room import Left, Room
from .singleflight import Flight, Flights
from .spans import Span
from .store import Object, Store
from .tars import Member, TarReader
from .tasks import Pool, each
from .trees import Trees

FILES_AT_ONCE = 16
RUNS_AT_ONCE = 2  # of small members of a tar; each is held in memory
RUN_FILES = 512  # they are published as one batch
RUN_BYTES = 4 << 20


class Converted(NamedTuple):
    reference: dict[str, Any]
    name: TreeId
    tree: Tree
    store_bytes: int  # that came while the caller waited


class _Remembered(msgspec.Struct):
    record: str
    tree: str


_remembered_json = msgspec.json.Decoder(_Remembered)


class Conversion(Flight[Tree]):
    """One old artifact on its way here."""

    def __init__(self, converter: Converter, store: Store, found: Found) -> None:
        super().__init__(lambda: converter.work(self))
        self.store = store
        self.found = found
        self.meter = Meter()
        self.meter.parts.add(self)
        self.done_bytes = 0
        self.hand: Hand | None = None  # what it has brought so far

    def hold(self, digest: Digest) -> None:
        assert self.hand is not None
        self.hand.add([digest])

    def received(self, count: int) -> None:
        self.done_bytes += count
        self.meter.receive(count, "store")


class Converter:
    def __init__(
        self,
        layout: Layout,
        blobs: Blobs,
        trees: Trees,
        partials: Partials,
        blob_flights: BlobFlights,
        pool: Pool,
        group: asyncio.TaskGroup,
        room: Room,
        holds: Holds,
        store_of: Callable[[str], Awaitable[Store]],
    ) -> None:
        self._layout = layout
        self._blobs = blobs
        self._trees = trees
        self._partials = partials
        self._counted = blob_flights.bytes
        self._pool = pool
        self._room = room
        self._holds = holds
        self._store_of = store_of
        self._flights: Flights[tuple[str, str], Conversion, Tree] = Flights(group)

    async def has(self, key: str, store_url: str) -> bool:
        """Whether the datastore that this store belongs to has an old artifact of that key."""
        return await legacy.find(await self._store_of(legacy.datastore(store_url)), key) is not None

    async def listed(self, prefix: str, store_url: str, is_wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
        """The references of old artifacts in the datastore that this store belongs to."""
        return await legacy.listed(await self._store_of(legacy.datastore(store_url)), prefix, is_wanted)

    async def get(self, key: str, store_url: str, report: Report) -> Converted | None:
        """The artifact's tree, every file of it a blob; None if there is none of that key."""
        store = await self._store_of(legacy.datastore(store_url))
        while (found := await legacy.find(store, key)) is not None:
            converted = await self._brought(store, found, report)
            if converted is not None:
                return converted
        return None

    async def folder(self, name: str, store_url: str, report: Report) -> Converted:
        """The tree of a folder that is nobody's artifact. ReferenceNotFound when nothing lies there."""
        store = await self._store_of(store_url)
        while True:
            converted = await self._brought(store, await legacy.folder(store, name), report)
            if converted is not None:
                return converted

    async def _brought(self, store: Store, found: Found, report: Report) -> Converted | None:
        """None if somebody saved over it, and the flight that was under way brought what was there before."""
        flight = self._board(store, found)
        meter, before = flight.meter, flight.meter.received_bytes
        meter.reports.append(report)
        try:
            tree = await self._flights.wait((store.url, found.key), flight)
        finally:
            meter.reports.remove(report)
        if flight.found.record != found.record:
            return None
        return Converted(found.reference, await self._pool.run(tree.tree_id), tree, meter.received_bytes - before)

    def _board(self, store: Store, found: Found) -> Conversion:
        return self._flights.board((store.url, found.key), lambda: Conversion(self, store, found))

    async def work(self, flight: Conversion) -> Tree:
        """A conversion's work."""
        with self._holds.hand() as flight.hand:
            return await self._convert(flight)

    async def _convert(self, flight: Conversion) -> Tree:
        tree = await self._pool.run(self._remembered, flight)
        if tree is None:
            async with ticking(flight.meter):
                with _complaints(flight):
                    tree = await self._bring(flight)
            with disk_errors(f"writing down what {flight.found.key} is"):
                name = await self._pool.run(self._trees.save, tree)
                await self._pool.run(self._remember, flight, name)
        return tree

    async def _bring(self, flight: Conversion) -> Tree:
        store, found, meter = flight.store, flight.found, flight.meter
        objects = await legacy.payload(store, found)
        wanted = [each for each in objects if not legacy.is_bookkeeping(found, each)]
        size = sum(each.size for each in wanted)
        meter.start(size, len(wanted), 0, 0)
        meter.phase, meter.source = "download", "store"

        async def bring() -> Tree:
            return await (self._unpack(flight, wanted[0]) if found.is_tar else self._fetch(flight, wanted))

        need: dict[Hashable, Left] = {("artifact", store.url, found.key): lambda: max(0, size - flight.done_bytes)}
        tree = await self._room.run(need, found.key, bring)
        if await legacy.payload(store, found) != objects:
            raise StoreUnavailable(f"{found.key} was saved again while it was read", "load it again", key=found.key)
        check_paths([*(file.path for file in tree.files), *(path for path, _ in tree.links), *tree.folders], found.key)
        check_links(tree.links)
        return tree

    async def _fetch(self, flight: Conversion, objects: list[Object]) -> Tree:
        files: list[TreeFile] = []

        async def take(source: Object) -> None:
            fetch = self._small if source.size <= SMALL_BYTES else self._large
            digest = await fetch(flight, source, (0, source.size))
            files.append(TreeFile(source.key.removeprefix(f"{flight.found.key}/"), source.size, digest))
            flight.meter.finish(0)  # its bytes have been counted as they came

        await each(objects, take, FILES_AT_ONCE)
        return Tree(tuple(files))

    async def _unpack(self, flight: Conversion, tar: Object) -> Tree:
        reader = TarReader(tar.size, lambda span: self._read(flight, tar, span))
        turn = asyncio.Lock()
        members: list[Member] = []
        digests: dict[str, Digest] = {}

        async def next_run() -> list[tuple[Member, bytes]] | None:
            """The small files up to the next large one, which is fetched then and there: it has all connections for itself."""
            run: list[tuple[Member, bytes]] = []
            size = 0
            while len(run) < RUN_FILES and size < RUN_BYTES:
                member = await reader.next()
                if member is None:
                    return run or None
                members.append(member)
                if member.kind == "file" and member.size > SMALL_BYTES:
                    span = (member.offset, member.offset + member.size)
                    digests[member.path] = await self._large(flight, tar, span, reader.known(member))
                    break
                if member.kind == "file":
                    run.append((member, await reader.data(member)))
                    size += member.size
            return run

        async def add(item: tuple[Member, bytes]) -> None:
            digests[item[0].path] = await self._add(flight, item[1])

        async def unpack(_: int) -> None:
            while True:
                async with turn:
                    run = await next_run()
                if run is None:
                    return
                await each(run, add, RUN_FILES)

        await each(range(RUNS_AT_ONCE), unpack, RUNS_AT_ONCE)
        return _tree(members, digests)

    async def _small(self, flight: Conversion, source: Object, span: Span) -> Digest:
        return await self._add(flight, await self._read(flight, source, span) if source.size else b"")

    async def _add(self, flight: Conversion, data: bytes) -> Digest:
        digest = await self._pool.run(hash_bytes, data)
        flight.hold(digest)
        if not self._blobs.has(digest, len(data)):
            await self._blobs.add(data, digest)
        return digest

    async def _read(self, flight: Conversion, source: Object, span: Span) -> bytes:
        sink = Memory(span[1] - span[0])
        await flight.store.read(source.key, span, sink, flight.received)
        self._counted["store"] += span[1] - span[0]
        return sink.data()

    async def _large(self, flight: Conversion, source: Object, span: Span, known: bytes = b"") -> Digest:
        """A span as a blob; `known` are its first bytes. After a `kill -9` it goes on where it was."""
        size = span[1] - span[0]
        place = f"{flight.store.url}\0{source.key}\0{source.etag}\0{span[0]}"
        with disk_errors(f"downloading a part of {flight.found.key}"):
            content = Content("object", hashlib.sha256(place.encode()).hexdigest(), size)
            async with self._partials.opened(content, self._pool) as partial:
                flight.done_bytes += partial.done_bytes
                await self._pool.run(_put_first, partial, known)
                missing = size - partial.done_bytes
                await flight.store.read(source.key, span, partial, flight.received)
                self._counted["store"] += missing
                digest = await self._pool.run(partial.finish)
                if digest is None:
                    raise StoreMismatch(f"{source.key} came in part only", "load it again", key=source.key)
                flight.hold(digest)
                await self._blobs.adopt(partial.path, digest)
                await self._pool.run(partial.forget_map)
        return digest

    def _remembered(self, flight: Conversion) -> Tree | None:
        """The tree, if the same record was read before and nothing of it has gone since (blocks)."""
        try:
            read = _remembered_json.decode(self._layout.legacy(flight.store.url, flight.found.key).read_bytes())
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        is_known = read.record == flight.found.record and is_digest(read.tree)
        tree = self._trees.load(TreeId(read.tree)) if is_known else None
        return tree if tree is not None and all(self._blobs.has(file.sha256, file.size) for file in tree.files) else None

    def _remember(self, flight: Conversion, name: TreeId) -> None:
        raw = msgspec.json.encode(_Remembered(flight.found.record, name))
        durable.record(self._layout.legacy(flight.store.url, flight.found.key), raw, self._layout.fresh("legacy"))


def _tree(members: list[Member], digests: dict[str, Digest]) -> Tree:
    files: list[TreeFile] = []
    first: dict[str, TreeFile] = {}
    for member in members:
        if member.kind == "file":
            file = TreeFile(member.path, member.size, digests[member.path], member.executable)
        elif member.kind == "second name" and member.target in first:
            file = TreeFile(member.path, first[member.target].size, first[member.target].sha256, member.executable)
        elif member.kind == "second name":
            raise UnsafePath(f"{member.path[:200]!r} is a second name of {member.target[:200]!r}, which is not in the tar", "save it again")
        else:
            continue
        first[member.path] = file
        files.append(file)
    links = [(member.path, member.target) for member in members if member.kind == "link"]
    occupied = {str(folder) for member in members for folder in PurePosixPath(member.path).parents}
    folders = {member.path for member in members if member.kind == "folder" and member.path} - occupied
    return Tree(tuple(files), tuple(links), tuple(folders))


def _put_first(partial: Partial, known: bytes) -> None:
    """Bytes that have come already, where none are yet."""
    gaps = partial.missing()
    if known and gaps and gaps[0][0] == 0:
        partial.write(0, [known[: gaps[0][1]]])


@contextlib.contextmanager
def _complaints(flight: Conversion) -> Iterator[None]:
    """Whatever is wrong with an artifact, as one error that names it."""
    key = flight.found.key
    name = f"{key}, saved by {legacy.PACKAGE}," if "key" in flight.found.reference else f"the folder {key}"
    try:
        yield
    except (MissingObject, StoreMismatch, UnsafePath, InvalidRequest) as error:
        raise IncompatibleReference(
            f"{name} can't be loaded from {flight.store.url}: {error.message}",
            "it was deleted, changed or never complete: save it again",
            key=key,
        ) from error
