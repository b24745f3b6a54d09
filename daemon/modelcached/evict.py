"""Evict: takes trees off this node that nobody needs now, to make room. What goes can be fetched again.

`plan` decides, and is pure: what the store has goes before what only the hub has, and the least recently used first; what exists only
here never goes. The flow looks at everything once more, on the event loop, in the step that takes a tree out of sight: nothing leased,
pinned, spooled or in flight goes (I4). Leftovers go before any tree: abandoned downloads, blobs of nobody, what was quarantined.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .blobs import Blobs
from .errors import ModelcachedError
from .holds import Holds
from .leftovers import Leftover, Leftovers
from .model import Digest, Tree, TreeId
from .room import Found, Room
from .tasks import Pool, finished
from .tenants import Tenancy, Tenants
from .trees import Trees

CHECK_SECONDS = 60.0  # the loop looks at least so often
SHARDS_AT_ONCE = 16  # counted without a look at anything else
BLOBS_AT_ONCE = 256  # taken out of sight in one step of the loop
log = logging.getLogger(__name__)


class Shared(NamedTuple):
    """A blob that other trees show too: it goes with the last of them."""

    digest: Digest
    size: int  # bytes on disk
    names: int  # that the entry's own view has for it
    of: int  # that there are in all


class Entry(NamedTuple):
    """A tree, as the plan sees it."""

    tree: TreeId
    last_used: float  # seconds since the epoch
    again: str  # where it can be fetched again: "store", "hub", or "" for nowhere
    alone: int  # bytes that go with it in any case
    shared: tuple[Shared, ...] = ()


def plan(entries: Iterable[Entry], held: Container[str], budget: int) -> list[Entry]:
    """The victims that free `budget` bytes, in order: none of them could be left out. If nothing frees so much: all that help."""
    free = [entry for entry in entries if entry.tree not in held and entry.again]
    free.sort(key=lambda entry: (entry.again != "store", entry.last_used, entry.tree))
    chosen: list[Entry] = []
    gone: Counter[Digest] = Counter()
    freed = 0
    for entry in free:
        if freed >= budget:
            break
        freed += _gain(entry, gone)
        chosen.append(entry)
    enough = min(budget, freed)
    spared: set[TreeId] = set()
    for entry in reversed(chosen):  # the one that was used last is the first to be spared
        lost = _loss(entry, gone)
        if freed - lost >= enough:
            freed -= lost
            spared.add(entry.tree)
        else:
            _gain(entry, gone)
    return [entry for entry in chosen if entry.tree not in spared]


def frees(victims: Iterable[Entry]) -> int:
    """Bytes that go with all of these."""
    gone: Counter[Digest] = Counter()
    return sum(_gain(entry, gone) for entry in victims)


def _gain(entry: Entry, gone: Counter[Digest]) -> int:
    gain = entry.alone
    for blob in entry.shared:
        gone[blob.digest] += blob.names
        gain += blob.size if gone[blob.digest] == blob.of else 0
    return gain


def _loss(entry: Entry, gone: Counter[Digest]) -> int:
    """What is not freed without it; it no longer counts among the gone."""
    loss = entry.alone
    for blob in entry.shared:
        loss += blob.size if gone[blob.digest] == blob.of else 0
        gone[blob.digest] -= blob.names
    return loss


class Evicted(NamedTuple):
    victims: list[Entry]
    leftovers: list[Leftover]
    freed: int  # bytes; of a dry run, what would be


class Evict:
    def __init__(
        self,
        blobs: Blobs,
        trees: Trees,
        tenants: Tenants,
        leftovers: Leftovers,
        holds: Holds,
        room: Room,
        pool: Pool,
        dropped: Callable[[], None],
    ) -> None:
        self._blobs = blobs
        self._trees = trees
        self._tenants = tenants
        self._leftovers = leftovers
        self._holds = holds
        self._room = room
        self._pool = pool
        self._dropped = dropped  # told after trees went
        self._turn = asyncio.Lock()
        self.evictions = 0  # trees
        self.evicted_bytes = 0

    async def run(self) -> None:
        """Counts what is here, then keeps the cache within its room as long as the daemon lives."""
        uncounted = 0
        while True:
            try:
                while uncounted < 256:
                    await self._pool.run_behind(self._count, range(uncounted, uncounted + SHARDS_AT_ONCE))
                    uncounted += SHARDS_AT_ONCE
                excess = await self._room.excess()
                if excess:
                    evicted = await self.free(excess)
                    log.log(
                        logging.INFO if evicted.freed else logging.DEBUG,
                        "the cache had outgrown its room",
                        extra={"excess": excess, "freed": evicted.freed, "trees": len(evicted.victims)},
                    )
            except (OSError, ModelcachedError) as error:  # the next round will do
                log.warning("an eviction failed", extra={"error": str(error)})
            await self._room.changed(CHECK_SECONDS)

    def _count(self, shards: Iterable[int]) -> None:
        for shard in shards:
            self._blobs.usage.count(shard)

    async def make_room(self, budget: int, is_save: bool) -> Found:
        """Frees `budget` bytes if that can be done, else nothing; a checkpoint does not wait for anybody's grace."""
        async with self._turn:
            entries, held = await self._look(is_save)
            leftovers = await self._pool.run(self._leftovers.find, budget, is_save)
            victims = plan(entries, held, max(0, budget - leftovers.size))
            evictable = frees(victims) + leftovers.size
            if evictable >= budget:
                await self._take(victims, leftovers.found, is_save)
            return Found(evictable, *_by_reason(entries, held, leftovers.kept))

    async def free(self, budget: int, dry_run: bool = False) -> Evicted:
        """Frees as much of `budget` bytes as can be."""
        async with self._turn:
            entries, held = await self._look(False)
            leftovers = await self._pool.run(self._leftovers.find, budget)
            victims = plan(entries, held, max(0, budget - leftovers.size))
            if dry_run:
                return Evicted(victims, leftovers.found, frees(victims) + leftovers.size)
            return await self._take(victims, leftovers.found, False)

    async def drop(self, name: TreeId, tree: Tree | None) -> int:
        """Takes a tree away, which is out of sight before the first await; the bytes freed. Ask whether it is held right before (I4)."""
        discard = self._trees.drop(name, lambda _: 0)
        self._dropped()
        return await finished(self._discard(discard, {file.sha256 for file in tree.files} if tree else set()))

    async def explain(self, names: Sequence[TreeId]) -> list[tuple[Entry, list[Tenancy], Tree]]:
        """Of each tree: what evicting it frees, and who holds it."""
        held = await self._tenants.all()
        found = []
        for name in names:
            tree = await self._pool.run(self._trees.load, name)
            entry = await self._pool.run(self._measure, name, held)
            if entry is not None and tree is not None:
                found.append((entry, held.get(name, []), tree))
        return found

    def statistics(self) -> dict[str, int]:
        return {"evictions": self.evictions, "evicted_bytes": self.evicted_bytes}

    async def _look(self, is_save: bool) -> tuple[list[Entry], Mapping[TreeId, list[Tenancy]]]:
        held = await self._tenants.all()
        if is_save:
            held = {name: kept for name, said in held.items() if (kept := [each for each in said if each.kind != "grace"])}
        entries = await self._pool.run(lambda: [entry for name in self._trees.names() if (entry := self._measure(name, held))])
        return entries, held

    def _measure(self, name: TreeId, held: Mapping[TreeId, object]) -> Entry | None:
        """What goes with a tree (blocks)."""
        tree = self._trees.load(name)
        if tree is None:
            return None
        alone, shared = 0, []
        for digest, names in Counter(file.sha256 for file in tree.files).items():
            links, size = self._blobs.names(digest)
            if links <= names:
                alone += size
            else:
                shared.append(Shared(digest, size, names, links))
        with contextlib.suppress(FileNotFoundError):
            return Entry(name, self._trees.last_used(name), self._tenants.again(name), alone, tuple(shared))
        return None

    async def _take(self, victims: Sequence[Entry], leftovers: Sequence[Leftover], is_save: bool) -> Evicted:
        freed = 0
        gone: list[Entry] = []
        for leftover in leftovers:
            freed += await finished(self._pool.run(self._leftovers.remove, leftover)) if self._leftovers.set_aside(leftover) else 0
        for entry in victims:
            tree = await self._pool.run(self._trees.load, entry.tree)
            # No await between this look and the drop: who comes later finds no tree, and who came before is seen (I4).
            if tree is None or self._tenants.holding(entry.tree, since=entry.last_used, is_save=is_save):
                continue
            freed += await self.drop(entry.tree, tree)
            gone.append(entry)
            log.info("evicted", extra={"tree": entry.tree, "again": entry.again, "last_used": round(time.time() - entry.last_used)})
        self.evictions += len(gone)
        self.evicted_bytes += freed
        return Evicted(gone, list(leftovers), freed)

    async def _discard(self, discard: Callable[[], object], digests: set[Digest]) -> int:
        await self._pool.run(discard)
        return await self._forget(digests)

    async def _forget(self, digests: set[Digest]) -> int:
        """Removes those of the blobs that nobody shows, or is about to show."""
        freed, names = 0, sorted(digests)
        for start in range(0, len(names), BLOBS_AT_ONCE):
            aside = []
            for digest in names[start : start + BLOBS_AT_ONCE]:
                if digest not in self._holds:
                    paths, size = self._blobs.set_aside(digest)
                    aside += paths
                    freed += size
            await self._pool.run(_unlink, aside)
        return freed

    def __repr__(self) -> str:
        return f"<Evict {self.evictions} trees, {self.evicted_bytes} bytes>"


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _by_reason(
    entries: Iterable[Entry], held: Mapping[TreeId, list[Tenancy]], nobodys: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes that can't go, by the first reason, and who that is. Blobs that held trees share count for each."""
    sizes: Counter[str] = Counter({_WORDS[reason]: size for reason, size in nobodys.items() if size})
    who: dict[str, list[str]] = {}
    for entry in entries:
        said = held.get(entry.tree, [])
        reason = said[0].kind if said else "" if entry.again else "only here"
        if reason:
            sizes[_WORDS.get(reason, reason)] += entry.alone + sum(blob.size for blob in entry.shared)
            names = who.setdefault(_WORDS.get(reason, reason), [])
            names += [each.who for each in said[:3] if each.who and each.kind == reason and each.who not in names]
    return dict(sizes), {kind: _listed(names) for kind, names in who.items()}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_WORDS = {
    "lease": "leased",
    "pin": "pinned",
    "spool": "on its way to the store",
    "flight": "being fetched",
    "grace": "used a moment ago (grace)",
    "ended": "left by downloads that ended (grace)",
    "quarantine": "in quarantine (grace)",
}
