"""What `rm` takes away, and what it leaves to those who come while it goes: real state on a disk, and the evictor's own way of dropping."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from modelcached.blobs import Blobs
from modelcached.durable import MTIME_NS
from modelcached.errors import InUse
from modelcached.evict import Evict
from modelcached.holds import Holds
from modelcached.leases import Leases
from modelcached.leftovers import Leftovers
from modelcached.model import Caller, Commit, Digest, Repo, Tree, TreeFile, TreeId
from modelcached.partials import Partials
from modelcached.pins import Pins
from modelcached.repos import Repos, Selected
from modelcached.room import Found, Limits, Room
from modelcached.root import open_root
from modelcached.spool import Spool
from modelcached.tasks import Pool
from modelcached.tenants import Tenants
from modelcached.trees import Trees
from modelcached.upkeep import Upkeep

CALLER = Caller(1001, 1001, 1)
REPO = Repo("https://hub.example", "model", "org/name")
THREADS = 4
SHARED, FIRST, SECOND = b"shared", b"first", b"second"

Came = Callable[[TreeId], None]


class Node:
    """Two trees of one repo. `came` is called after a tree was dropped, before the next one is looked at."""

    def __init__(self, root: Path, pool: Pool, group: asyncio.TaskGroup) -> None:
        layout, self.lock = open_root(root, private=True)
        self.blobs = Blobs(layout, pool, group)
        self.layout, self.pool = layout, pool
        self.partials = Partials(layout)
        self.trees, self.repos, self.leases = Trees(layout, self.blobs.path), Repos(layout), Leases(layout)
        self.holds, self.pins, spool = Holds(), Pins(layout), Spool(layout)

        async def make_room(size: int, is_save: bool) -> Found:
            return await self.evict.make_room(size, is_save)

        room = Room(layout, Limits(), self.blobs, self.partials, spool, pool, make_room)
        tenants = Tenants(layout, self.trees, self.repos, self.leases, self.pins, spool, self.holds, pool, 0.0, False, lambda _: False)
        leftovers = Leftovers(layout, self.blobs, self.trees, self.holds, 0.0, lambda _: False)
        self.evict = Evict(self.blobs, self.trees, tenants, leftovers, self.holds, room, pool, lambda: self.dropped())
        self.came: Came = lambda _: None
        self.dropped: Callable[[], None] = lambda: None  # called when a tree is out of sight
        self.is_running = False
        self.upkeep = Upkeep(self.blobs, self.trees, self.repos, self.leases, self.pins, self.holds, pool, self._drop)

    async def _drop(self, name: TreeId, tree: Tree | None) -> int:
        freed = await self.evict.drop(name, tree)
        self.came(name)
        return freed

    async def show(self, *contents: bytes) -> TreeId:
        digests = [Digest(hashlib.sha256(content).hexdigest()) for content in contents]
        for content, digest in zip(contents, digests, strict=True):
            await self.blobs.add(content, digest)
        files = (TreeFile(f"{number}.bin", len(contents[number]), digest) for number, digest in enumerate(digests))
        tree = Tree(tuple(files))
        name = self.trees.save(tree)
        self.trees.mend(name, tree)
        self.repos.set_visibility(REPO, False, False)
        self.repos.set_shown(REPO, name, Selected(Commit(name[:40]), None, None, None))
        return name

    def remove(self) -> Awaitable[object]:
        return self.upkeep.remove(REPO, None, lambda: self.is_running)

    def has(self, content: bytes) -> bool:
        return self.blobs.has(Digest(hashlib.sha256(content).hexdigest()), len(content))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    pool = Pool("test", THREADS)
    try:
        async with asyncio.TaskGroup() as group:
            node = Node(tmp_path / "root", pool, group)
            yield node
            node.blobs.close()
            node.partials.close()
            os.close(node.lock)
    finally:
        pool.close()


async def test_a_tree_that_is_out_of_sight_goes_though_nobody_waits_for_it(node: Node) -> None:
    """Who asked for the room leaves while every thread is busy; nothing would find the view, or miss its bytes, later."""
    name = await node.show(SHARED, FIRST)
    tree = node.trees.load(name)
    busy = threading.Event()
    threads = [asyncio.create_task(node.pool.run(busy.wait, 10)) for _ in range(THREADS)]
    dropping = asyncio.create_task(node.evict.drop(name, tree))
    await asyncio.sleep(0)
    dropping.cancel()
    await asyncio.sleep(0)
    busy.set()
    await asyncio.gather(*threads)
    with pytest.raises(asyncio.CancelledError):
        await dropping
    assert os.listdir(node.layout.tmp) == [] and not node.has(SHARED) and not node.has(FIRST)


@pytest.mark.parametrize("how", ["lease", "pin", "hand", "fetch"])
async def test_who_comes_while_it_goes_keeps_his_tree(node: Node, how: str) -> None:
    """I4: everything is asked again in the step that takes a tree away."""
    names = {await node.show(SHARED, FIRST), await node.show(SHARED, SECOND)}
    held: list[int] = []
    hand = node.holds.hand()

    def come(gone: TreeId) -> None:
        (other,) = names - {gone}
        if how == "lease":
            held.append(node.leases.grant(other, CALLER, "a test"))
        elif how == "pin":
            node.pins.put("kept", "org/name", (other,), CALLER, None)
        elif how == "hand":
            hand.__enter__().add([other])
        else:
            node.is_running = True

    node.came = come
    words = {"lease": "held by pid 1 of uid 1001", "pin": "pinned: 'kept' of uid 1001"}.get(how, "is being fetched")
    with pytest.raises(InUse, match=words):
        await node.remove()
    (left,) = node.trees.names()
    assert list(node.repos.shown(REPO)) == [left], "what is still here is still known"
    assert (node.trees.view(left) / "0.bin").read_bytes() == SHARED and node.has(FIRST) != node.has(SECOND)

    node.came, node.is_running = lambda _: None, False
    if how == "lease":
        os.close(held.pop())
    elif how == "pin":
        node.pins.remove("kept", CALLER)()
    elif how == "hand":
        hand.__exit__(None, None, None)
    await node.remove()
    assert node.trees.names() == [] and not any(map(node.has, (SHARED, FIRST, SECOND))) and not node.repos.shown(REPO)


async def test_a_fetch_that_begins_at_the_end_keeps_what_is_known(node: Node) -> None:
    await node.show(FIRST)

    def come(_: TreeId) -> None:
        node.is_running = True

    node.came = come
    with pytest.raises(InUse, match="is being fetched"):
        await node.remove()
    assert node.trees.names() == [] and node.repos.visibility(REPO) is not None


async def test_a_blob_that_somebody_takes_in_hand_meanwhile_stays(node: Node) -> None:
    """A flow that names a thing before it looks can't lose it, whatever `rm` is doing just then (I4)."""
    await node.show(SHARED, FIRST)
    digest = hashlib.sha256(SHARED).hexdigest()
    with ExitStack() as flow:

        def come() -> None:
            """The view is gone, and its blobs are not yet."""
            assert node.trees.names() == [] and node.has(SHARED)
            flow.enter_context(node.holds.hand(digest))

        node.dropped = come
        await node.remove()
        assert node.has(SHARED) and not node.has(FIRST)


async def test_what_is_pinned_is_not_removed_but_what_was_pulled_is(node: Node) -> None:
    name = await node.show(FIRST)
    node.pins.put("pulled org/name@main", "org/name", (name,), CALLER, 86_400)
    node.pins.put("my model", "org/name", (name,), CALLER, 86_400)
    with pytest.raises(InUse, match="org/name is pinned: 'my model' of uid 1001") as caught:
        await node.remove()
    assert caught.value.hint == "modelcache unpin 'my model', then remove it again" and node.has(FIRST)
    node.pins.remove("my model", CALLER)()
    await node.remove()
    assert node.trees.names() == [] and not node.has(FIRST)


async def test_verify_looks_at_executable_copies_too(node: Node) -> None:
    """Same size, same mtime: only the bytes tell. What the copy is made of is good still, and stays."""
    await node.show(FIRST)
    digest = Digest(hashlib.sha256(FIRST).hexdigest())
    node.blobs.make_executable(digest)
    copy = node.blobs.path(digest, executable=True)
    copy.write_bytes(SHARED[: len(FIRST)])
    os.utime(copy, ns=(MTIME_NS, MTIME_NS))
    assert (await node.upkeep.verify(None, lambda _: None)).damaged == [digest] and node.has(FIRST) and not copy.exists()
    node.blobs.make_executable(digest)
    assert (await node.upkeep.verify(None, lambda _: None)).damaged == [] and copy.read_bytes() == FIRST


async def test_a_last_use_in_the_future_holds_nothing(node: Node, tmp_path: Path) -> None:
    """The node was up with a clock that was wrong."""
    name = await node.show(FIRST)
    later = time.time() + 10 * 365 * 86400
    os.utime(tmp_path / f"root/trees/{name}.json", (later, later))
    assert (await node.evict.make_room(1, False)).evictable > 0 and not node.has(FIRST)
