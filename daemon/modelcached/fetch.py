"""Fetch: a caller asks for files of a repo and gets the view of a tree.

The story: which commit is it, may this caller have it, is the view here and sound? If not, one *assembly* for this selection
brings the missing blobs (each its own flight, shared with every other assembly that needs it, small files first), writes the
tree down and builds the view. Nothing is visible before every byte was checked (I1, I2).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from .blobs import Blobs
from .errors import ModelcachedError, Storage, disk_errors
from .flights import BlobFlights
from .holds import Hand, Holds
from .hub import Hub, Source
from .layout import Layout
from .lookup import Lookup, Warn
from .meter import TICK_SECONDS, Meter, Report, Spent, ticking
from .model import Commit, Digest, ListedFile, Repo, Tree, TreeFile, TreeId
from .places import HubPlace
from .recent import Recent
from .repos import Repos, Selected
from .room import Room
from .selection import Ask, Selection, incomplete, selected
from .sharing import Brought, Sharing, is_small
from .singleflight import Flight, Flights
from .tasks import Pool, behind, each
from .transfer import Transfer
from .trees import Trees

WORKERS = 192  # files of one assembly under way: connections are bounded elsewhere, and a batch to publish is made of these
BRING_TIMES = 3  # what was brought may be taken away before it is in the hand; it is brought again
COMPARED_AT_ONCE = 64  # files whose size and mtime are compared on the loop: 2 us each
COMPARED_BEFORE = 1000  # above, the comparison runs behind the hand-out
SPENT = ("lookup", "others", "hub", "store", "verify", "view")  # what the time of a fetch goes to
log = logging.getLogger(__name__)


class Shown(NamedTuple):
    """A tree and its view, as an assembly leaves them."""

    name: TreeId
    tree: Tree


class Got(NamedTuple):
    shown: Shown
    commit: Commit
    is_private: bool
    hub_bytes: int  # that came while the caller waited
    store_bytes: int = 0  # the same, from what other nodes have shared
    spent: Mapping[str, float] = MappingProxyType({})  # seconds, for the log


class Assembly(Flight[Shown]):
    """One selection being put together."""

    def __init__(self, fetch: Fetch, selection: Selection, ask: Ask) -> None:
        super().__init__(lambda: fetch.work(self))
        self.selection = selection
        self.ask = ask
        self.meter = Meter()


AssemblyKey = tuple[Selection, str | None, bool, bool]


class Fetch:
    """`_shown` and `_damaged` remember what can be seen on disk anyway; only the event loop touches them."""

    def __init__(
        self,
        layout: Layout,
        blobs: Blobs,
        trees: Trees,
        repos: Repos,
        lookup: Lookup,
        hub: Hub,
        transfer: Transfer,
        flights: BlobFlights,
        pool: Pool,
        group: asyncio.TaskGroup,
        room: Room,
        holds: Holds,
        sharing: Sharing | None = None,
    ) -> None:
        self._layout = layout
        self._blobs = blobs
        self._trees = trees
        self._repos = repos
        self._lookup = lookup
        self._hub = hub
        self._transfer = transfer
        self._flights = flights
        self._pool = pool
        self._group = group
        self._room = room
        self._holds = holds
        self._sharing = sharing
        self._shown: Recent[Selection, Shown] = Recent(50_000, lambda shown: 1 + len(shown.tree.files))
        self._damaged: set[Digest] = set()
        self._tiers = {"disk": 0, "store": 0, "hub": 0}  # of what was handed out, the farthest that had to be asked
        self._comparing: set[TreeId] = set()
        self._assemblies: Flights[AssemblyKey, Assembly, Shown] = Flights(group)
        self._showing: Flights[TreeId, Flight[TreeId], TreeId] = Flights(group)

    async def get(self, ask: Ask, report: Report, warn: Warn) -> Got:
        """The view of what was asked for, every byte of it checked."""
        start = time.monotonic()
        with self._told_of_pauses(ask.repo, report):
            selection, is_private = await self._select(ask, warn)
        looked_up = time.monotonic() - start
        shown = self._shown.get(selection)
        if shown is not None and not ask.force and await self._is_as_published(selection, shown):
            self._tiers["disk"] += 1
            return Got(shown, selection.commit, is_private, 0, 0, {"lookup_seconds": round(looked_up, 6)})
        key = (selection, ask.token, ask.force, ask.local)  # one bad token spoils nobody else's fetch
        spent = Spent()
        spent.add("lookup", looked_up)
        joined = self._assemblies.joined
        assembly = self._assemblies.board(key, lambda: Assembly(self, selection, ask))
        meter = assembly.meter
        is_mine = self._assemblies.joined == joined
        if is_mine:
            meter.spent = spent
        before, store_before = meter.received_bytes, meter.store_bytes
        meter.reports.append(report)
        report(meter.progress())
        try:
            with nullcontext() if is_mine else spent.during("others"):
                shown = await self._assemblies.wait(key, assembly)
        finally:
            meter.reports.remove(report)
        if not shown.tree.files and (ask.allow or ask.ignore):
            warn(f"no file of {ask.repo} matches the patterns")
        store_bytes = meter.store_bytes - store_before
        hub_bytes = meter.received_bytes - before - store_bytes
        self._tiers["hub" if hub_bytes else "store" if store_bytes else "disk"] += 1
        return Got(shown, selection.commit, is_private, hub_bytes, store_bytes, spent.seconds(SPENT))

    async def plan(self, ask: Ask, warn: Warn) -> tuple[Commit, list[tuple[ListedFile, bool]]]:
        """What `get` would show, and which of it is here."""
        selection, _ = await self._select(ask, warn)
        files, _ = await self._files(selection, ask)
        here = await self._pool.run(self._here, ask.repo, files)
        return selection.commit, [(file, file.path in here) for file in files]

    def forget(self) -> None:
        """After trees were removed: nothing of them is remembered."""
        self._shown.clear()

    def is_running(self, repo: Repo) -> bool:
        """Whether files of this repo are being put together."""
        return any(assembly.selection.repo == repo for assembly in self._assemblies.running())

    def note_damaged(self, digest: Digest) -> None:
        """A blob went to quarantine: when it is here again, every view that shows it gets the good one (I10)."""
        self._damaged.add(digest)
        self._shown.clear()

    def activities(self, is_visible: Callable[[Repo], bool]) -> list[dict[str, Any]]:
        """What is being put together now."""
        running = [each for each in self._assemblies.running() if is_visible(each.selection.repo)]
        return [each.meter.activity(f"{each.selection.repo}@{each.selection.commit[:8]}") for each in running]

    def statistics(self) -> dict[str, Any]:
        assemblies = self._assemblies
        return {"running": len(assemblies), "started": assemblies.started, "joined": assemblies.joined, "tiers": dict(self._tiers)}

    async def work(self, assembly: Assembly) -> Shown:
        with self._holds.hand() as hand:
            return await self._assemble(assembly, hand)

    async def _assemble(self, assembly: Assembly, hand: Hand) -> Shown:
        """From a selection to a view. What it will show is in its hand before it looks whether it is here."""
        selection, ask, meter = assembly.selection, assembly.ask, assembly.meter
        async with ticking(meter, lambda: self._pause(selection.repo)):
            meter.phase = "list"
            with meter.spent.during("lookup"):
                files, is_whole = await self._files(selection, ask)
            hand.add(await self._pool.run(self._known, selection.repo, files))
            here = {} if ask.force else await self._pool.run(self._here, selection.repo, files)
            if await self._verify(selection.repo, [file for file in files if file.path not in here], meter):
                here = await self._pool.run(self._here, selection.repo, files)
            await self._complete(assembly, files, here, hand)
            meter.phase, meter.source = "publish", "disk"
            tree = Tree(tuple(TreeFile(file.path, file.size, here[file.path]) for file in files))
            with meter.spent.during("view"), disk_errors(f"building the view of {selection.repo}"):
                name = await self._show(tree)
                selected = Selected(*selection[1:])
                self._repos.set_shown(selection.repo, name, selected)
            if self._sharing is not None and is_whole and not ask.local:
                self._sharing.publish(Brought(selection.repo, selection.commit, ask.revision, selected, name, tree))
        return self._shown.put(selection, Shown(name, tree)) if is_whole else Shown(name, tree)

    async def _select(self, ask: Ask, warn: Warn) -> tuple[Selection, bool]:
        commit = await self._lookup.commit(ask.repo, ask.revision, ask.token, warn, ask.force, ask.local)
        is_private = await self._lookup.permit(ask.repo, ask.revision, ask.token, ask.local)
        return Selection(ask.repo, commit, ask.allow, ask.ignore, ask.filename), is_private

    async def _files(self, selection: Selection, ask: Ask) -> tuple[list[ListedFile], bool]:
        """The files that were asked for, and whether it is the hub that says so: what another cache had may be less."""
        listing = await self._lookup.listing(selection.repo, selection.commit, ask.token, ask.local)
        return await self._pool.run(selected, selection, listing.files), listing.is_whole

    def _known(self, repo: Repo, files: Sequence[ListedFile]) -> set[Digest]:
        """The blobs of these files, as far as their names are known (blocks)."""
        return {digest for file in files if (digest := self._repos.digest(repo, file)) is not None}

    def _here(self, repo: Repo, files: Sequence[ListedFile]) -> dict[str, Digest]:
        """Which of the files are on disk, and as which blob (blocks)."""
        here = {}
        for file in files:
            digest = self._repos.digest(repo, file)
            if digest is not None and self._blobs.has(digest, file.size):
                here[file.path] = digest
        return here

    async def _complete(self, assembly: Assembly, files: list[ListedFile], here: dict[str, Digest], hand: Hand) -> None:
        """Brings what is not `here`, and enters it there once it was seen on the disk while in the hand (I4).

        The blob of a git id can't be in the hand before its bytes are known: until then anybody may take it away.
        """
        selection, ask = assembly.selection, assembly.ask
        size = sum(file.size for file in files)
        for tries in range(BRING_TIMES + 1):
            missing = [file for file in files if file.path not in here]
            assembly.meter.start(size, len(files), size - sum(file.size for file in missing), len(files) - len(missing))
            if not missing:
                return
            if ask.local:
                raise incomplete(selection, missing)
            if tries == BRING_TIMES:
                raise Storage(
                    f"{missing[0].path!r} of {selection.repo} was fetched {tries} times, and was gone from the disk each time",
                    "something else removes files from the cache, or the disk fails: look at the kernel log, then run: modelcache doctor",
                )
            await self._bring_missing(assembly, missing, hand)
            here.update(await self._pool.run(self._here, selection.repo, missing))

    async def _bring_missing(self, assembly: Assembly, missing: list[ListedFile], hand: Hand) -> None:
        selection = assembly.selection
        brought: dict[str, Digest] = {}

        async def bring() -> None:
            left = [file for file in missing if file.path not in brought]
            await self._bring(selection, assembly.ask.token, left, brought, assembly.meter, hand)

        contents = ((self._repos.content(selection.repo, file), partial(brought.__contains__, file.path)) for file in missing)
        needs = dict(self._room.content(content, is_here) for content, is_here in contents)
        await self._room.run(needs, str(selection.repo), bring)

    async def _bring(
        self, selection: Selection, token: str | None, missing: list[ListedFile], here: dict[str, Digest], meter: Meter, hand: Hand
    ) -> None:
        """Every missing file becomes a blob in the hand, small ones first: config and tokenizer are there early."""
        meter.phase, meter.source = "download", "hub"

        async def bring(file: ListedFile) -> None:
            async def from_hub(sent: str | None) -> Digest:
                place = HubPlace(self._transfer, Source(selection.repo, selection.commit, file.path, sent))
                return await self._flights.join(self._repos.content(selection.repo, file), place, meter)

            digest = await self._lookup.with_token(selection.repo, token, from_hub)
            hand.add([digest])
            await self._mend(digest)
            meter.finish(file.size)
            here[file.path] = digest

        async def bring_large() -> None:
            large = [file for file in missing if not is_small(file)]
            random.shuffle(large)  # every node begins with others
            await each(large, bring, WORKERS)

        if self._sharing is None:
            await each(sorted(missing, key=lambda file: file.size), bring, min(WORKERS, len(missing)))
        else:
            sharing = self._sharing

            async def bring_small() -> None:
                small = [file for file in missing if is_small(file)]
                await sharing.bring_small(selection.repo, selection.commit, small, here, meter, hand, bring)
                for file in small:
                    await self._mend(here[file.path])

            await each((bring_small, bring_large), lambda bring_these: bring_these(), 2)

    async def _mend(self, digest: Digest) -> None:
        """The good blob into every view that shows a bad one (I10)."""
        if digest in self._damaged:
            self._damaged.discard(digest)
            await self._pool.run(self._trees.relink, digest)

    async def _verify(self, repo: Repo, files: list[ListedFile], meter: Meter) -> bool:
        """Hashes what is here of the files; what lies goes to quarantine. False: there was nothing to hash."""
        present = await self._pool.run(self._present, repo, files)
        if present:
            meter.phase, meter.source = "verify", "disk"
            meter.start(sum(present.values()), len(present), 0, 0)
        with meter.spent.during("verify"):
            for digest, size in present.items():
                if not await self._pool.run(self._blobs.check, digest):
                    self.note_damaged(digest)
                meter.finish(size)
        return bool(present)

    def _present(self, repo: Repo, files: Sequence[ListedFile]) -> dict[Digest, int]:
        """The blobs of these files that are on disk, whatever they look like, and their sizes (blocks)."""
        known = {self._repos.digest(repo, file): file.size for file in files}
        return {digest: size for digest, size in known.items() if digest is not None and self._blobs.path(digest).exists()}

    async def _show(self, tree: Tree) -> TreeId:
        """Writes the tree down and makes its view what it should be; once, when several selections turn out to show the same files."""

        def work() -> TreeId:
            name = self._trees.save(tree)
            self._trees.mend(name, tree)
            return name

        name = await self._pool.run(tree.tree_id)
        with self._holds.hand(name):
            return await self._showing.join(name, lambda: Flight(lambda: self._pool.run(work)))

    async def _is_as_published(self, selection: Selection, shown: Shown) -> bool:
        """Compares the view's files with what was published (I1). A file that differs is hashed, and the next assembly mends the view."""
        files = shown.tree.files
        if len(files) <= COMPARED_AT_ONCE:
            return not await self._doubt([*self._trees.suspects(shown.name, files)])
        if len(files) <= COMPARED_BEFORE or not self._trees.view(shown.name).exists():
            return await self._compare(shown)
        if shown.name not in self._comparing:
            self._comparing.add(shown.name)
            behind(self._group, self._compare_behind(shown))
        return True

    async def _compare(self, shown: Shown) -> bool:
        return not await self._doubt(await self._pool.run(lambda: [*self._trees.suspects(shown.name, shown.tree.files)]))

    async def _compare_behind(self, shown: Shown) -> None:
        try:
            if not await self._compare(shown):
                await self._show(shown.tree)
        except (OSError, ModelcachedError) as error:  # a blob is gone: the next caller's assembly fetches it
            log.warning("a view could not be mended", extra={"tree": shown.name, "error": str(error)})
        finally:
            self._comparing.discard(shown.name)

    async def _doubt(self, suspects: list[TreeFile]) -> bool:
        """Whether there was anything to doubt. Blobs that lie are in quarantine afterwards (I10)."""
        for file in suspects:
            if not await self._pool.run(self._blobs.check, file.sha256):
                self.note_damaged(file.sha256)
        if suspects:
            self._shown.clear()
        return bool(suspects)

    @contextmanager
    def _told_of_pauses(self, repo: Repo, report: Report) -> Iterator[None]:
        """The same for one caller during a look-up. A timer instead of a task: nearly every look-up is answered from memory."""
        loop = asyncio.get_running_loop()
        ticking: asyncio.TimerHandle

        def tick() -> None:
            nonlocal ticking
            meter = Meter()
            meter.reports.append(report)
            meter.show(self._pause(repo))
            ticking = loop.call_later(TICK_SECONDS, tick)

        ticking = loop.call_later(TICK_SECONDS, tick)
        try:
            yield
        finally:
            ticking.cancel()

    def _pause(self, repo: Repo) -> str:
        """Why nothing happens right now, in words; empty if there is no reason."""
        seconds = self._hub.pauses.remaining(repo.endpoint)
        return f"the hub asks to wait {seconds:.0f} s more" if seconds else ""
