"""Repair: brings a blob that was damaged again, without anybody asking for it, and puts the good one into every view that shows it (I10).
Of one whose executable copy alone was damaged, another copy is made.

Best effort: a private repo needs its caller's token, and a small file of a save lies in a pack. Those come again when they are next
asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from .blobs import Blobs
from .errors import ModelcachedError
from .flights import BlobFlights, Place
from .hub import Source
from .meter import Meter
from .model import Commit, Content, Digest, ListedFile, Repo, TreeFile
from .places import HubPlace, StorePlace
from .repos import Repos
from .room import Room
from .store import Store
from .tasks import Pool
from .transfer import Transfer
from .trees import Trees

log = logging.getLogger(__name__)


class Repair:
    def __init__(
        self,
        blobs: Blobs,
        trees: Trees,
        repos: Repos,
        flights: BlobFlights,
        transfer: Transfer,
        room: Room,
        pool: Pool,
        store: Callable[[], Awaitable[Store]],
        is_offline: bool,
    ) -> None:
        self._blobs = blobs
        self._trees = trees
        self._repos = repos
        self._flights = flights
        self._transfer = transfer
        self._room = room
        self._pool = pool
        self._store = store
        self._is_offline = is_offline

    async def bring(self, digest: Digest) -> bool:
        """Whether the blob is here again, and every view shows it."""
        shown = await self._pool.run(lambda: list(self._shown(digest)))
        if not shown:
            return False  # nobody needs it
        if not self._blobs.has(digest, shown[0].size) and not await self._fetch(digest, shown[0].size):
            return False
        if any(file.executable for file in shown):
            await self._pool.run(self._blobs.make_executable, digest)
        await self._pool.run(self._trees.relink, digest)
        return True

    async def _fetch(self, digest: Digest, size: int) -> bool:
        places: list[tuple[Content, Place]] = []
        if not self._is_offline:
            named = await self._pool.run(lambda: list(self._of_hub(digest)))
            places += [
                (self._repos.content(repo, file), HubPlace(self._transfer, Source(repo, commit, file.path))) for repo, commit, file in named
            ]
        places.append((Content("sha256", digest, size), StorePlace(await self._store(), digest)))
        for content, place in places:
            fetch = partial(self._flights.join, content, place, Meter())
            try:
                await self._room.run(dict([self._room.content(content)]), place.label, fetch)
            except ModelcachedError as error:
                log.info("not brought again", extra={"place": place.label, "error": str(error)})
                continue
            return True
        return False

    def _shown(self, digest: Digest) -> Iterator[TreeFile]:
        """As which files trees have it: what lies on the disk tells nothing, not even its size (blocks)."""
        for tree in map(self._trees.load, self._trees.names()):
            yield from (file for file in tree.files if file.sha256 == digest) if tree else ()

    def _of_hub(self, digest: Digest) -> Iterator[tuple[Repo, Commit, ListedFile]]:
        """Files of public repos that have these bytes (blocks)."""
        for repo, seen in self._repos.known():
            for name, selected in self._repos.shown(repo).items() if seen.is_public else ():
                tree = self._trees.load(name)
                path = next((file.path for file in tree.files if file.sha256 == digest), None) if tree else None
                listing = self._repos.listing(repo, Commit(selected.commit)) if path else None
                yield from ((repo, Commit(selected.commit), file) for file in (listing.files if listing else ()) if file.path == path)
