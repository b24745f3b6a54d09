"""Load: a caller asks for what was saved, by its key, and gets the view of its tree.

The story: is it in this node's spool (then wait for the hashing, nothing moves)? else the store's reference names a tree, and the
tree's record says which packs hold its small files. What the disk lacks is gathered. Then the view, as for a repo.
What has no reference here may be an old artifact: it is converted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from .blobs import Blobs
from .convert import Converter
from .errors import IncompatibleReference, MissingObject, ReferenceNotFound, SaveDamaged, StoreMismatch, disk_errors
from .filesystems import require_room
from .gather import Gather
from .layout import Layout
from .meter import Meter, Report, ticking
from .model import Tree, TreeId
from .packs import Pack
from .references import References
from .singleflight import Flight, Flights
from .spool import Entry
from .store import Store
from .tasks import Pool
from .trees import Trees

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    name: TreeId
    tree: Tree
    reference: dict[str, Any]
    store_bytes: int  # that came while the caller waited


class Assembly(Flight[Tree]):
    """One tree being brought from a store."""

    def __init__(self, loader: Loader, name: TreeId, store: Store) -> None:
        super().__init__(lambda: loader.assemble(self))
        self.name = name
        self.store = store
        self.meter = Meter()


class Loader:
    def __init__(
        self,
        layout: Layout,
        blobs: Blobs,
        trees: Trees,
        gather: Gather,
        converter: Converter,
        pool: Pool,
        group: asyncio.TaskGroup,
        min_free: int,
        store_of: Callable[[str], Awaitable[Store]],
        pending: Callable[[str, str], Entry | None],
        tree_of: Callable[[Entry, Report], Awaitable[tuple[TreeId, Tree]]],
    ) -> None:
        self._layout = layout
        self._blobs = blobs
        self._trees = trees
        self._gather = gather
        self._converter = converter
        self._pool = pool
        self._min_free = min_free
        self._store_of = store_of
        self._pending = pending
        self._tree_of = tree_of
        self._assemblies: Flights[tuple[TreeId, str], Assembly, Tree] = Flights(group)

    async def get(self, key: str, store_url: str, report: Report) -> Loaded:
        """The view of what was saved under `key`, every byte of it checked."""
        entry = self._pending(key, store_url)
        lost: SaveDamaged | None = None
        if entry is not None:
            try:
                name, tree = await self._tree_of(entry, report)
                await self._show(name, tree)
                return Loaded(name, tree, entry.reference, 0)
            except SaveDamaged as error:
                lost = error  # unless it was sent meanwhile, and has left the spool: then the store has it
        store = await self._store_of(store_url)
        try:
            kept = await References(store).get(key)
        except ReferenceNotFound:
            if lost is not None:
                raise lost from None
            old = await self._converter.get(key, store_url, report)
            if old is not None:
                await self._show(old.name, old.tree)
                return Loaded(old.name, old.tree, old.reference, old.store_bytes)
            kept = await References(store).get_late(key)
        place = (kept.tree, store_url)
        assembly = self._assemblies.board(place, lambda: Assembly(self, kept.tree, store))
        meter, before = assembly.meter, assembly.meter.received_bytes
        meter.reports.append(report)
        try:
            tree = await self._assemblies.wait(place, assembly)
        finally:
            meter.reports.remove(report)
        return Loaded(kept.tree, tree, kept.reference, meter.received_bytes - before)

    async def get_folder(self, name: str, store_url: str, report: Report) -> Loaded:
        """The view of a folder in a store that no save made: what came is checked by its size alone."""
        found = await self._converter.folder(name, store_url, report)
        await self._show(found.name, found.tree)
        return Loaded(found.name, found.tree, found.reference, found.store_bytes)

    async def old(self, prefix: str, store_url: str, is_wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
        """The references of artifacts that are not ours, in no order."""
        return await self._converter.listed(prefix, store_url, is_wanted)

    async def is_old(self, key: str, store_url: str) -> bool:
        """Whether the key is that of an artifact which is not ours."""
        return await self._converter.has(key, store_url)

    async def assemble(self, assembly: Assembly) -> Tree:
        """An assembly's work: from a tree's name to its view."""
        name, store, meter = assembly.name, assembly.store, assembly.meter
        async with ticking(meter):
            tree = await self._pool.run(self._trees.load, name)
            packs: tuple[Pack, ...] = ()
            missing = [] if tree is None else await self._pool.run(self._gather.missing, tree)
            if tree is None or missing:
                tree, packs = await References(store).record(name, self._pool)
                missing = await self._pool.run(self._gather.missing, tree)
            if missing:
                size = sum(file.size for file in missing)
                require_room(self._layout.root, size, self._min_free, f"the save with tree {name[:12]}")
                meter.start(tree.size, len(tree.files), tree.size - size, len(tree.files) - len(missing))
                meter.phase, meter.source = "download", "store"
                try:
                    await self._gather.bring(store, missing, packs, meter)
                except (MissingObject, StoreMismatch) as error:
                    raise IncompatibleReference(
                        f"a part of what was saved is no longer in {store.url}: {error.message}", "save it again", tree=name
                    ) from error
            await self._pool.run(self._trees.save, tree)
            meter.phase, meter.source = "publish", "disk"
            await self._show(name, tree)
        return tree

    async def _show(self, name: TreeId, tree: Tree) -> None:
        with disk_errors("building a view"):
            for digest in {file.sha256 for file in tree.files if file.executable}:
                await self._pool.run(self._blobs.make_executable, digest)
            await self._pool.run(self._trees.mend, name, tree)
