"""Room: what still fits. Bytes are promised before the first of them moves, and what can't fit is refused at once (I6).

A promise is for contents, each counted once however many fetches wait for it, and shrinks as their bytes reach the disk. Downloads leave
`min_free` and `checkpoint_reserve` alone, and stay within `max_size`; saves may use what is free but for a small part: without it, a disk
that is full of saves could never bring them to their stores, for that takes room as well. What is missing is asked of the eviction,
which takes nothing away unless that is enough.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from .blobs import Blobs
from .errors import NoSpace
from .filesystems import gib
from .kinds import Space
from .layout import Layout
from .model import Content, Digest
from .partials import Partials
from .spool import Spool
from .tasks import Pool, within

T = TypeVar("T")
Left = Callable[[], int]  # how many bytes of something are still to come onto the disk (blocks)

SAVE_HINT = "wait for earlier saves to be in the store (modelcache flush), end what holds the rest, or give the cache a larger disk"
FETCH_HINT = "end what holds the rest (modelcache explain, modelcache rm), ask for fewer files by patterns, or use a larger disk"
DRAIN_SHARE, MAX_DRAIN_BYTES = 1 / 64, 128 << 20  # of the disk, for what brings saves to their stores: hashing small files, making packs
TRIES = 3  # of a fetch that somebody else's bytes took the room from


class Limits(NamedTuple):
    """In bytes."""

    max_size: int = 0  # of blobs and unfinished downloads; 0: what the filesystem has
    min_free: int = 0
    checkpoint_reserve: int = 0
    high: Space = Space(share=0.95)  # of the cache's room: above, an eviction begins
    low: Space = Space(share=0.85)  # and ends below that one


class Disk(NamedTuple):
    """All in bytes."""

    free: int
    used: int  # blobs and unfinished downloads
    promised: int  # to fetches and saves that are under way, and not written yet
    drain: int  # for what brings saves to their stores


class Found(NamedTuple):
    """What an eviction could free, and what it can't: bytes by the reason, with a few words on who."""

    evictable: int
    held: Mapping[str, int]
    who: Mapping[str, str]


class Room:
    """`_promises` and `_counts` are touched by the event loop only; `_turn` is held while somebody is admitted."""

    def __init__(
        self,
        layout: Layout,
        limits: Limits,
        blobs: Blobs,
        partials: Partials,
        spool: Spool,
        pool: Pool,
        make_room: Callable[[int, bool], Awaitable[Found]],
    ) -> None:
        self._layout = layout
        self.limits = limits
        self._blobs = blobs
        self._partials = partials
        self._spool = spool
        self._pool = pool
        self._make_room = make_room
        self._promises: dict[Hashable, Left] = {}
        self._counts: Counter[Hashable] = Counter()
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self.refusals = 0

    async def run(self, needs: Mapping[Hashable, Left], who: str, work: Callable[[], Awaitable[T]]) -> T:
        """Does `work` with room for all of `needs`. If others take that room meanwhile, it is made again and the work goes on."""
        async with self.reserved(needs, who):
            for _ in range(TRIES - 1):
                try:
                    return await work()
                except NoSpace as error:
                    try:
                        async with self._turn:
                            await self._admit({}, who, is_save=False)
                    except NoSpace:
                        raise error from None
            return await work()

    @asynccontextmanager
    async def reserved(
        self, needs: Mapping[Hashable, Left], who: str, is_save: bool = False, leaving: float = 1.0
    ) -> AsyncIterator[None]:
        """Room for all of `needs` as long as the block runs. `leaving`: the share of what is for bringing saves away that stays free."""
        async with self._turn:
            if needs:
                await self._admit(needs, who, is_save, leaving)
            self._promises.update(needs)
            self._counts.update(needs.keys())
        try:
            yield
        finally:
            self._counts.subtract(needs.keys())
            for name in needs:
                if not self._counts[name]:
                    del self._counts[name], self._promises[name]
            self._changed.set()

    async def admit_save(self, size: int, who: str) -> None:
        """Returns when so many bytes are free that nobody else was promised. The spool counts them from there on, in the same step."""
        async with self._turn:
            await self._admit({"save": lambda: size}, who, is_save=True)

    def content(self, content: Content, is_here: Callable[[], bool] = lambda: False) -> tuple[Hashable, Left]:
        """A need for bytes that come as a blob. `is_here` says so of one whose name is not known beforehand."""
        return content, lambda: 0 if is_here() else _left(self._layout, content)

    def file(self, path: Path, size: int) -> tuple[Hashable, Left]:
        """A need for a file that is going to be written there."""
        return path, lambda: _left_of(path, size)

    def promised_downloads(self) -> set[str]:
        """Names in partial/ that bytes were promised to: taking one of them away frees nothing."""
        return {self._layout.partial(name).name for name in list(self._promises) if isinstance(name, Content)}

    async def disk(self) -> Disk:
        return await self._pool.run(self._look, list(self._promises.values()))

    async def excess(self, at_once: bool = False) -> int:
        """By how many bytes the cache has outgrown its low watermark; 0 while it is below the high one, unless `at_once`."""
        disk = await self.disk()
        room = self._room(disk)
        is_over = at_once or disk.used > self.limits.high.of(room) or disk.free < self.limits.min_free
        return max(0, disk.used - self.limits.low.of(room)) if is_over else 0

    async def changed(self, seconds: float) -> None:
        """Returns when a promise has ended, or after so long."""
        self._changed.clear()
        await within(seconds, self._changed.wait())

    def _room(self, disk: Disk) -> int:
        """What the cache may take in all."""
        room = max(0, disk.used + disk.free - self.limits.min_free - self.limits.checkpoint_reserve)
        return min(room, self.limits.max_size) if self.limits.max_size else room

    async def _admit(self, needs: Mapping[Hashable, Left], who: str, is_save: bool, leaving: float = 1.0) -> None:
        """Returns when it fits beside all that is promised; NoSpace says why it can't. Call it in `_turn`."""
        new = [left for name, left in needs.items() if name not in self._promises]
        needed = await self._pool.run(lambda: sum(left() for left in new))
        disk = await self.disk()
        shortage = self._shortage(needed, disk, is_save, leaving)
        if shortage <= 0:
            return
        found = await self._make_room(shortage, is_save)
        disk = await self.disk()
        shortage = self._shortage(needed, disk, is_save, leaving)
        if shortage > 0:
            self.refusals += 1
            raise self._refusal(needed, disk, found, who, is_save)

    def _shortage(self, needed: int, disk: Disk, is_save: bool, leaving: float) -> int:
        limits = self.limits
        shortage, drain = needed + disk.promised - disk.free, int(disk.drain * leaving)
        if is_save:
            return shortage + drain
        shortage += max(limits.min_free + limits.checkpoint_reserve, drain)
        return max(shortage, needed + disk.promised + disk.used - limits.max_size) if limits.max_size else shortage

    def _look(self, lefts: list[Left]) -> Disk:
        """What was promised is looked at first: what is written meanwhile counts twice then, and never not at all."""
        promised = sum(left() for left in lefts) + self._spool.reserved_bytes
        disk = os.statvfs(self._layout.root)
        drain = min(int(disk.f_blocks * disk.f_frsize * DRAIN_SHARE), MAX_DRAIN_BYTES)
        return Disk(disk.f_bavail * disk.f_frsize, self._blobs.usage.size_bytes + self._partials.size_bytes(), promised, drain)

    def _refusal(self, needed: int, disk: Disk, found: Found, who: str, is_save: bool) -> NoSpace:
        limits = self.limits
        words = [f"{self._layout.root} has {gib(disk.free)} free"]
        if disk.promised:
            words.append(f"{gib(disk.promised)} of it are promised to others")
        if is_save:
            words.append(f"{gib(disk.drain)} are for bringing saves to the store")
        if not is_save and limits.min_free:
            words.append(f"it keeps {gib(limits.min_free)} free (min_free)")
        if not is_save and limits.checkpoint_reserve:
            words.append(f"{gib(limits.checkpoint_reserve)} are for saves (checkpoint_reserve)")
        if not is_save and limits.max_size:
            words.append(f"the cache has {gib(disk.used)} of {gib(limits.max_size)} (max_size)")
        words.append(f"{gib(found.evictable)} could be evicted")
        held = [f"{gib(size)} {kind}" + (f" ({found.who[kind]})" if found.who.get(kind) else "") for kind, size in found.held.items()]
        if held:
            words.append(f"the rest is held: {', '.join(held)}")
        return NoSpace(
            f"{who} needs {gib(needed)}{'' if is_save else ' more'}; {', '.join(words)}",
            SAVE_HINT if is_save else FETCH_HINT,
            needed_bytes=needed,
            free_bytes=disk.free,
            min_free_bytes=limits.min_free,
            promised_bytes=disk.promised,
            evictable_bytes=found.evictable,
            held_bytes=dict(found.held),
        )

    def statistics(self) -> dict[str, int | bool]:
        return {
            "used_bytes": self._blobs.usage.size_bytes + self._partials.size_bytes(),
            "is_counted": self._blobs.usage.is_counted,
            "promises": len(self._promises),
            "max_size_bytes": self.limits.max_size,
            "checkpoint_reserve_bytes": self.limits.checkpoint_reserve,
            "refusals": self.refusals,
        }

    def __repr__(self) -> str:
        return f"<Room {len(self._promises)} promises>"


def _left(layout: Layout, content: Content) -> int:
    """What a content still needs: nothing once it is a blob, and less while a download goes on."""
    if content.algorithm == "sha256" and layout.blob(Digest(content.hex)).exists():
        return 0
    return _left_of(layout.partial(content), content.size)


def _left_of(path: Path, size: int) -> int:
    """What a file of that size still needs."""
    try:
        here = os.stat(path).st_blocks * 512
    except FileNotFoundError:
        here = 0
    return max(0, size - here)
