"""Load: a caller asks for what was saved, by its key, and gets the view of its tree.

The story: is it in this node's spool (then wait for the hashing, nothing moves)? else the store's reference names a tree, and the
tree's record says which packs hold its small files. What the disk lacks is gathered. Then the view, as for a repo.
What has no reference here may be an old artifact: it is converted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

from .blobs import Blobs
from .convert import Converter
from .errors import IncompatibleReference, MissingObject, ReferenceNotFound, SaveDamaged, StoreMismatch, disk_errors
from .gather import Gather
from .holds import Hand, Holds
from .meter import Meter, Report, Spent, ticking
from .model import Caller, Content, Tree, TreeFile, TreeId
from .packs import Pack
from .references import References
from .room import Room
from .singleflight import Flight, Flights
from .spool import Entry
from .store import Store
from .tasks import Pool
from .trees import Trees

SPENT = ("lookup", "others", "store", "verify", "view")  # what the time of a load goes to
log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    name: TreeId
    tree: Tree
    reference: dict[str, Any]
    store_bytes: int  # that came while the caller waited
    spent: Mapping[str, float] = MappingProxyType({})  # seconds, for the log


class Assembly(Flight[Tree]):
    """One tree being brought from a store."""

    def __init__(self, loader: Loader, name: TreeId, store: Store) -> None:
        super().__init__(lambda: loader.work(self))
        self.name = name
        self.store = store
        self.meter = Meter()


class Loader:
    def __init__(
        self,
        blobs: Blobs,
        trees: Trees,
        gather: Gather,
        converter: Converter,
        pool: Pool,
        group: asyncio.TaskGroup,
        room: Room,
        holds: Holds,
        store_of: Callable[[str], Awaitable[Store]],
        pending: Callable[[str, str, Caller], Entry | None],
        hides: Callable[[str, Caller], bool],
        tree_of: Callable[[Entry, Report], Awaitable[tuple[TreeId, Tree]]],
    ) -> None:
        self._blobs = blobs
        self._trees = trees
        self._gather = gather
        self._converter = converter
        self._pool = pool
        self._room = room
        self._holds = holds
        self._store_of = store_of
        self._pending = pending
        self._hides = hides
        self._tree_of = tree_of
        self._assemblies: Flights[tuple[TreeId, str], Assembly, Tree] = Flights(group)
        self.tiers = {"disk": 0, "store": 0}  # of what was handed out, the farthest that had to be asked

    async def get(self, key: str, store_url: str, caller: Caller, report: Report) -> Loaded:
        """The view of what was saved under `key`, every byte of it checked."""
        loaded = await self._get(key, store_url, caller, report)
        self.tiers["store" if loaded.store_bytes else "disk"] += 1
        return loaded

    async def _get(self, key: str, store_url: str, caller: Caller, report: Report) -> Loaded:
        entry = self._pending(key, store_url, caller)
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
            kept = await References(store).get_late(key, lambda save: self._hides(save, caller))
        place = (kept.tree, store_url)
        assembly = self._assemblies.board(place, lambda: Assembly(self, kept.tree, store))
        meter, before, spent = assembly.meter, assembly.meter.received_bytes, Spent()
        is_mine = not meter.reports
        if is_mine:
            meter.spent = spent
        meter.reports.append(report)
        try:
            with nullcontext() if is_mine else spent.during("others"):
                tree = await self._assemblies.wait(place, assembly)
        finally:
            meter.reports.remove(report)
        return Loaded(kept.tree, tree, kept.reference, meter.received_bytes - before, spent.seconds(SPENT))

    def activities(self) -> list[dict[str, Any]]:
        """What is being brought from stores now."""
        return [each.meter.activity(f"tree {each.name[:12]}") for each in self._assemblies.running()]

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

    async def work(self, assembly: Assembly) -> Tree:
        with self._holds.hand(assembly.name) as hand:
            return await self._assemble(assembly, hand)

    async def _assemble(self, assembly: Assembly, hand: Hand) -> Tree:
        """From a tree's name to its view. Its blobs are in its hand before it looks which of them are here."""
        name, store, meter = assembly.name, assembly.store, assembly.meter
        async with ticking(meter):
            with meter.spent.during("lookup"):
                tree = await self._pool.run(self._trees.load, name)
                packs: tuple[Pack, ...] = ()
                missing: list[TreeFile] = []
                if tree is not None:
                    hand.add(file.sha256 for file in tree.files)
                    missing = await self._pool.run(self._gather.missing, tree)
                if tree is None or missing:
                    tree, packs = await References(store).record(name, self._pool)
                    hand.add(file.sha256 for file in tree.files)
                    missing = await self._pool.run(self._gather.missing, tree)
            if missing:
                size = sum(file.size for file in missing)
                meter.start(tree.size, len(tree.files), tree.size - size, len(tree.files) - len(missing))
                meter.phase, meter.source = "download", "store"
                whole = tree

                async def bring() -> None:
                    await self._gather.bring(store, await self._pool.run(self._gather.missing, whole), packs, meter)

                needs = dict(self._room.content(Content("sha256", file.sha256, file.size)) for file in missing)
                try:
                    await self._room.run(needs, f"the save with tree {name[:12]}", bring)
                except (MissingObject, StoreMismatch) as error:
                    raise IncompatibleReference(
                        f"a part of what was saved is no longer in {store.url}: {error.message}", "save it again", tree=name
                    ) from error
            meter.phase, meter.source = "publish", "disk"
            with meter.spent.during("view"):
                await self._pool.run(self._trees.save, tree)
                await self._show(name, tree)
        return tree

    async def _show(self, name: TreeId, tree: Tree) -> None:
        with self._holds.hand(name, *(file.sha256 for file in tree.files)), disk_errors("building a view"):
            for digest in {file.sha256 for file in tree.files if file.executable}:
                await self._pool.run(self._blobs.make_executable, digest)
            await self._pool.run(self._trees.mend, name, tree)
