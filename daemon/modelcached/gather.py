"""Gather: from a tree's record in a store to blobs on this disk.

Large files come by themselves, each a flight that everybody who needs it shares; small ones out of their packs, neighbours together.
Every byte is checked before it gets a name (I1).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .blobs import Blobs, hash_bytes
from .errors import ContentMismatch
from .flights import SMALL_BYTES, WRONG_BYTES_TRIES, BlobFlights
from .meter import Meter
from .model import Content, Tree, TreeFile
from .packs import Pack, Packed, spans
from .places import StorePlace
from .store import Store
from .tasks import Pool, each

FILES_AT_ONCE = 16
RUNS_AT_ONCE = 6  # each is held in memory
ADDED_AT_ONCE = 512  # files of a run: they are published as one batch
log = logging.getLogger(__name__)


class Gather:
    def __init__(self, blobs: Blobs, flights: BlobFlights, pool: Pool) -> None:
        self._blobs = blobs
        self._flights = flights
        self._pool = pool

    def missing(self, tree: Tree) -> list[TreeFile]:
        """What of a tree is not on this disk (blocks). Equal files are named once."""
        return list({file.sha256: file for file in tree.files if not self._blobs.has(file.sha256, file.size)}.values())

    async def bring(self, store: Store, missing: list[TreeFile], packs: Sequence[Pack], meter: Meter) -> None:
        """Every missing file becomes a blob."""
        wanted = {file.path: file for file in missing}
        alone = {file.path: StorePlace(store, file.sha256) for file in missing}
        runs: list[tuple[Pack, list[Packed]]] = []
        for pack in packs:
            small = []
            for file in pack.files:
                if file.path in wanted and file.size > SMALL_BYTES:
                    alone[file.path] = StorePlace(store, pack.sha256, file.offset)
                elif alone.pop(file.path, None) is not None:
                    small.append(file)
            runs += [(pack, run) for run in spans(small)]

        async def fetch(path: str) -> None:
            file = wanted[path]
            await self._flights.join(Content("sha256", file.sha256, file.size), alone[path], meter)
            meter.finish(file.size)

        async def unpack(run: tuple[Pack, list[Packed]]) -> None:
            files = [wanted[file.path] for file in run[1]]
            bodies = await self._read_run(store, *run, files, meter)
            await each(zip(files, bodies, strict=True), add, ADDED_AT_ONCE)

        async def add(item: tuple[TreeFile, bytes]) -> None:
            file, data = item
            await self._blobs.add(data, file.sha256)
            meter.finish(file.size)

        await each(runs, unpack, RUNS_AT_ONCE)  # small ones first: config and tokenizer are there early
        await each(alone, fetch, FILES_AT_ONCE)

    async def _read_run(self, store: Store, pack: Pack, run: list[Packed], files: list[TreeFile], meter: Meter) -> list[bytes]:
        """The bytes of neighbours in a pack, each checked. Wrong ones are asked for again."""
        start = run[0].offset
        size = run[-1].offset + run[-1].size - start
        place = StorePlace(store, pack.sha256, start)
        wrong = files[0]
        for _ in range(WRONG_BYTES_TRIES):
            data = await place.whole(size, lambda count: meter.receive(count, place.tier)) if size else b""
            self._flights.bytes[place.tier] += size
            bodies = [data[file.offset - start : file.offset - start + file.size] for file in run]
            found = await self._pool.run(_first_wrong, files, bodies)
            if found is None:
                return bodies
            wrong = found
            self._flights.mismatches += 1
            log.warning("wrong bytes", extra={"place": place.label, "path": wrong.path})
        raise ContentMismatch(
            f"{wrong.path!r} is not what it was when it was stored: the pack {place.label} does not hold its bytes",
            "something changed the object in the store; save it again",
            **place.data,
        )


def _first_wrong(files: list[TreeFile], bodies: list[bytes]) -> TreeFile | None:
    return next((file for file, data in zip(files, bodies, strict=True) if hash_bytes(data) != file.sha256), None)
