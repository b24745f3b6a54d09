"""Blobs, leases, pins, the spool and eviction against a model that is a dict: whatever happens in whatever order, what is held is whole.

Invariants that are checked after every step: a tree that is in the model shows exactly its files (I1, I2); an eviction took only what
nobody held and what can be had again (I4); no blob is left of what went; what is counted is what lies there.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from modelcached.blobs import Blobs
from modelcached.evict import Evict
from modelcached.hashing import Hashing
from modelcached.holds import Holds
from modelcached.leases import Leases
from modelcached.leftovers import Leftovers
from modelcached.model import Caller, Commit, Digest, Repo, Tree, TreeFile, TreeId
from modelcached.partials import Partials
from modelcached.pins import Pins
from modelcached.repos import Repos, Selected
from modelcached.room import Found, Limits, Room
from modelcached.root import open_root
from modelcached.spool import Entry, SavedFile, Spool
from modelcached.tasks import Pool
from modelcached.tenants import Tenants
from modelcached.trees import Trees

T = TypeVar("T")
CALLER = Caller(1001, 1001, 1)
REPO = Repo("https://hub.example", "model", "org/name")
CONTENTS = [bytes([number]) * size for number, size in enumerate((0, 1, 5000, 40_000, 40_001, 300_000, 300_001))]
DIGESTS = [Digest(hashlib.sha256(content).hexdigest()) for content in CONTENTS]
FILES = st.dictionaries(st.sampled_from(("a", "b", "in/c", "in/d")), st.sampled_from(range(len(CONTENTS))), min_size=1)
BUDGET = st.sampled_from((1, 40_000, 300_000, 10_000_000))


class Known(NamedTuple):
    """What the model knows of a tree: its files, by number of content, and where it can be had again."""

    files: dict[str, int]
    again: str


class Loop:
    """An event loop in a thread: the machine's steps are synchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Machine(RuleBasedStateMachine):
    trees = Bundle("trees")
    leased = Bundle("leased")
    pinned = Bundle("pinned")
    spooled = Bundle("spooled")
    hands = Bundle("hands")

    @initialize(target=trees, several=st.lists(FILES, min_size=2, max_size=4))
    def start(self, several: list[dict[str, int]]) -> Any:
        self.folder = Path(tempfile.mkdtemp(prefix="modelcached-room-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.loop = Loop()
        self.pool = Pool("machine", 4)
        self.now = 1_000_000.0
        self.numbers = itertools.count()
        self.model: dict[TreeId, Known] = {}
        self.held: list[TreeId] = []  # once for each lease, and each entry of the spool
        self.in_hand: dict[ExitStack, TreeId] = {}
        self.pins_of: dict[str, tuple[TreeId, float]] = {}
        self.nobodys: set[Digest] = set()  # blobs that may lie there although no tree shows them
        self.stack = ExitStack()
        self.open()
        return multiple(*map(self.bring, several))

    def open(self) -> None:
        """As a daemon begins: everything in memory comes from the disk (I11)."""
        layout, self.lock = open_root(self.folder / "root", private=True)
        self.layout, self.group = layout, asyncio.TaskGroup()
        self.stop, self.living = asyncio.Event(), threading.Event()

        async def live() -> None:
            async with self.group:
                self.living.set()
                await self.stop.wait()

        self.life = asyncio.run_coroutine_threadsafe(live(), self.loop._loop)
        assert self.living.wait(20)
        self.blobs = Blobs(layout, self.pool, self.group)
        self.partials = Partials(layout)
        self.store = Trees(layout, self.blobs.path)
        self.repos, self.leases, self.holds = Repos(layout), Leases(layout), Holds()
        self.pins = Pins(layout, lambda: self.now)
        self.spool = Spool(layout)
        self.spool.recover()

        async def make_room(size: int, is_save: bool) -> Found:
            return await self.evict.make_room(size, is_save)

        room = Room(layout, Limits(), self.blobs, self.partials, self.spool, self.pool, make_room)
        self.hashing = Hashing(self.spool, self.blobs, self.store, self.pool, self.group, self.holds, room)
        tenants = Tenants(
            layout, self.store, self.repos, self.leases, self.pins, self.spool, self.holds, self.pool, 0.0, False, lambda _: False
        )
        leftovers = Leftovers(layout, self.blobs, self.store, self.holds, -1.0, lambda _: False)
        self.evict = Evict(self.blobs, self.store, tenants, leftovers, self.holds, room, self.pool, lambda: None)
        for shard in range(256):
            self.blobs.usage.count(shard)

    def shut(self) -> None:
        self.loop._loop.call_soon_threadsafe(self.stop.set)
        self.life.result(20)
        self.blobs.close()
        self.partials.close()
        os.close(self.lock)

    def teardown(self) -> None:
        assert {path.name for path in self.layout.blobs.rglob("*") if path.is_file()} <= set(DIGESTS)
        self.stack.close()
        self.shut()
        self.pool.close()
        self.loop.close()
        shutil.rmtree(self.folder)

    # ---- trees come

    @rule(target=trees, several=st.lists(FILES, min_size=1, max_size=3))
    def fetch(self, several: list[dict[str, int]]) -> Any:
        return multiple(*map(self.bring, several))

    def bring(self, files: dict[str, int]) -> TreeId:
        """As an assembly does it: held, published, shown, noted down."""
        tree = Tree(tuple(TreeFile(path, len(CONTENTS[number]), DIGESTS[number]) for path, number in sorted(files.items())))
        name = tree.tree_id()

        async def work() -> None:
            with self.holds.hand(name, *(file.sha256 for file in tree.files)):
                for number in set(files.values()):
                    if not self.blobs.has(DIGESTS[number], len(CONTENTS[number])):
                        await self.blobs.add(CONTENTS[number], DIGESTS[number])
                await self.pool.run(self.store.save, tree)
                await self.pool.run(self.store.mend, name, tree)
                self.repos.set_visibility(REPO, False, False)
                self.repos.set_shown(REPO, name, Selected(Commit("0" * 40), None, None, None))

        self.loop.run(work())
        self.model[name] = Known(files, "hub")
        return name

    @rule(target=spooled, files=FILES)
    def save(self, files: dict[str, int]) -> tuple[TreeId, str]:
        """As a client does it, and the hashing behind it."""
        key = f"models/{next(self.numbers)}"

        def make(name: str) -> Entry:
            paths = enumerate(sorted(files.items()))
            saved = [SavedFile(path, len(CONTENTS[number]), False, f"files/{at}") for at, (path, number) in paths]
            return Entry(name, CALLER.uid, self.now, {"key": key}, "files", "file:///store", False, False, saved, [], [])

        async def keep() -> TreeId:
            save, alive = self.spool.begin(make, 0)
            os.close(alive)
            for file in save.entry.files:
                (save.folder / file.source).write_bytes(CONTENTS[files[file.path]])
            self.spool.forget(save)
            await self.pool.run(self.spool.keep, save)
            self.spool.add_kept(save.entry)
            self.saved = save.entry.id
            return (await self.hashing.tree(save.entry)).name

        name = self.loop.run(keep())
        known = self.model.get(name)
        self.model[name] = known or Known(files, "store")
        self.held.append(name)
        return name, self.saved

    @rule(target=trees, spooled=consumes(spooled))
    def upload(self, spooled: tuple[TreeId, str]) -> TreeId:
        """The store has it: it leaves the spool, and may go from here."""
        name, entry_id = spooled
        entry = next(entry for entry in self.spool.entries if entry.id == entry_id)
        self.spool.remove(entry)
        self.loop.run(self.forget(entry))
        self.held.remove(name)
        return name

    @rule(spooled=consumes(spooled))
    def set_aside(self, spooled: tuple[TreeId, str]) -> None:
        """A save that can't be sent any more exists only here, and stays for good."""
        entry = next(entry for entry in self.spool.entries if entry.id == spooled[1])
        self.spool.set_aside(entry)
        self.loop.run(self.forget(entry))

    async def forget(self, entry: Entry) -> None:
        self.spool.forget_kept(entry)

    # ---- and are held

    @rule(target=leased, name=trees)
    def lease(self, name: TreeId) -> Any:
        if name not in self.model:
            return multiple()
        self.store.touch(name)
        descriptor = self.leases.grant(name, CALLER, "test")
        self.stack.callback(lambda: _close(descriptor))
        self.held.append(name)
        return name, descriptor

    @rule(lease=consumes(leased))
    def give_back(self, lease: tuple[TreeId, int]) -> None:
        os.close(lease[1])
        self.held.remove(lease[0])

    @rule(target=pinned, name=trees, pin=st.sampled_from("xyz"), seconds=st.sampled_from((None, 10.0, 1000.0)))
    def pin(self, name: TreeId, pin: str, seconds: float | None) -> Any:
        if name not in self.model:
            return multiple()
        self.pins.put(pin, "org/name", (name,), CALLER, seconds)[1]()
        self.pins_of[pin] = (name, float("inf") if seconds is None else self.now + seconds)
        return pin

    @rule(pin=consumes(pinned))
    def unpin(self, pin: str) -> None:
        if self.pins_of.pop(pin, ("", 0.0))[1] > self.now:
            self.pins.remove(pin, CALLER)()

    @rule(seconds=st.sampled_from((5.0, 20.0, 2000.0)))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.pins.sweep()()

    @rule(target=hands, name=trees, contents=st.sets(st.sampled_from(range(len(CONTENTS)))))
    def take_in_hand(self, name: TreeId, contents: set[int]) -> Any:
        """A flow is at this tree, or at these blobs."""
        if name not in self.model:
            return multiple()
        hand = ExitStack()
        hand.enter_context(self.holds.hand(name, *(DIGESTS[number] for number in contents)))
        self.in_hand[hand] = name
        self.nobodys |= {DIGESTS[number] for number in contents}
        return hand

    @rule(hand=consumes(hands))
    def let_go(self, hand: ExitStack) -> None:
        hand.close()
        self.in_hand.pop(hand, None)  # a restart may have been faster

    # ---- and go

    @rule(budget=BUDGET)
    def free(self, budget: int) -> None:
        before = self.disk()
        evicted = self.loop.run(self.evict.free(budget))
        gone = {victim.tree for victim in evicted.victims}
        self.went(gone)
        files = sum(each.size for each in evicted.leftovers if each.kind != "blob")
        assert evicted.freed - files == before - self.disk()
        if evicted.freed < budget:
            assert not [name for name in self.model if name not in self.kept() and self.frees(name)], "something could have gone"

    @rule(name=trees, how=st.sampled_from(("lease", "pin", "hand")))
    def all_but_one_go(self, name: TreeId, how: str) -> None:
        if name not in self.model:
            return
        with ExitStack() as holding:
            if how == "lease":
                holding.callback(os.close, self.leases.grant(name, CALLER, "test"))
            elif how == "pin":
                self.pins.put("one", "org/name", (name,), CALLER, None)[1]()
                holding.callback(lambda: self.pins.remove("one", CALLER)())
            else:
                holding.enter_context(self.holds.hand(name))
            self.held.append(name)
            self.free(10_000_000)
            self.held.remove(name)

    @rule(budget=BUDGET)
    def make_room(self, budget: int) -> None:
        """For a save; if it can't be enough, nothing goes."""
        before, names = self.disk(), set(self.store.names())
        found = self.loop.run(self.evict.make_room(budget, True))
        gone = names - set(self.store.names())
        if found.evictable < budget:
            assert not gone and self.disk() == before
        self.went(gone)

    @rule(number=st.sampled_from(range(len(CONTENTS))))
    def leave_a_blob(self, number: int) -> None:
        """As a kill in the wrong moment does."""
        self.loop.run(self.blobs.add(CONTENTS[number], DIGESTS[number]))
        self.nobodys.add(DIGESTS[number])

    @rule()
    def leave_a_download(self) -> None:
        (self.layout.partials / f"{next(self.numbers):064x}").write_bytes(bytes(10_000))

    @precondition(lambda self: self.model)
    @rule()
    def restart(self) -> None:
        """Flows end; leases, pins and the spool stay."""
        self.in_hand.clear()
        self.shut()
        self.open()

    # ---- what holds at any time

    def kept(self) -> set[TreeId]:
        return {*self.held, *self.in_hand.values(), *(name for name, until in self.pins_of.values() if until > self.now), *self.aside()}

    def aside(self) -> set[TreeId]:
        return {TreeId((self.layout.corrupt / name / "tree").read_text()) for name in os.listdir(self.layout.corrupt)}

    def frees(self, name: TreeId) -> int:
        others = {number for other, known in self.model.items() if other != name for number in known.files.values()}
        alone = set(self.model[name].files.values()) - others
        return sum(len(CONTENTS[number]) for number in alone if DIGESTS[number] not in self.nobodys)

    def went(self, gone: set[TreeId]) -> None:
        assert not gone & self.kept(), "somebody held it (I4)"
        for name in gone:
            del self.model[name]
            assert not self.store.view(name).exists() and not self.layout.tree(name).exists()

    def disk(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.blob_files())

    def blob_files(self) -> list[Path]:
        """Of the few contents that there are; `teardown` looks for others."""
        return [path for digest in DIGESTS if (path := self.layout.blob(digest)).exists()]

    @invariant()
    def every_tree_is_whole(self) -> None:
        if not hasattr(self, "model"):
            return
        assert set(self.store.names()) == set(self.model)
        for name, known in self.model.items():
            view = self.store.view(name)
            shown = {str(path.relative_to(view)): path for path in view.rglob("*") if path.is_file()}
            assert {path: file.read_bytes() for path, file in shown.items()} == {p: CONTENTS[n] for p, n in known.files.items()}

    @invariant()
    def blobs_are_those_of_trees(self) -> None:
        if not hasattr(self, "model"):
            return
        wanted = {DIGESTS[number] for known in self.model.values() for number in known.files.values()}
        found = {Digest(path.name) for path in self.blob_files()}
        assert wanted <= found <= wanted | self.nobodys
        for path in self.blob_files():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert self.blobs.usage.size_bytes == self.disk()
        assert os.listdir(self.layout.tmp) == []


def _close(descriptor: int) -> None:
    with suppress(OSError):
        os.close(descriptor)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("examples", "steps"), [(8, 40), pytest.param(60, 80, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_what_is_held_is_whole(examples: int, steps: int) -> None:
    checks = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=checks)
