"""Who is let in, and who is refused: promises in one process, with an eviction that obeys; then two fetches on a real daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modelcached.blobs import Blobs
from modelcached.errors import NoSpace
from modelcached.layout import PRIVATE_FOLDERS, Layout
from modelcached.model import Content
from modelcached.partials import Partials
from modelcached.room import Found, Limits, Room
from modelcached.spool import Spool
from modelcached.tasks import Pool

from .clients import Client
from .daemon import Daemon
from .hub import Hub, Random
from .kernel import small_tmpfs
from .saves import MIB, wired

SIZE = 100


class Node:
    """A room of SIZE bytes, and what is asked of the eviction."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.evictable = 0
        self.asked: list[tuple[int, bool]] = []

    async def make_room(self, size: int, is_save: bool) -> Found:
        self.asked.append((size, is_save))
        if size <= self.evictable:
            self.evictable -= size
            self.room.limits = self.room.limits._replace(max_size=self.room.limits.max_size + size)
        return Found(self.evictable, {"leased": 7}, {"leased": "pid 1 of uid 2"})

    async def run(self, needs: dict[Any, int], work: Callable[[], Any] | None = None, who: str = "a fetch") -> None:
        async def nothing() -> None: ...

        await self.room.run({name: partial(int, size) for name, size in needs.items()}, who, work or nothing)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    layout = Layout(tmp_path)
    for folder in PRIVATE_FOLDERS:
        (tmp_path / folder).mkdir(exist_ok=True)
    for shard in layout.shards():
        shard.mkdir()
    pool = Pool("test", 4)
    partials = Partials(layout)
    try:
        async with asyncio.TaskGroup() as group:
            blobs = Blobs(layout, pool, group)
            made: list[Node] = []
            room = Room(layout, Limits(max_size=SIZE), blobs, partials, Spool(layout), pool, lambda *asked: made[0].make_room(*asked))
            made.append(Node(room))
            yield made[0]
            blobs.close()
    finally:
        partials.close()
        pool.close()


async def test_what_fits_alone_but_not_together(node: Node) -> None:
    inside, leave = asyncio.Event(), asyncio.Event()

    async def stay() -> None:
        inside.set()
        await leave.wait()

    first = asyncio.create_task(node.run({"a": 60}, stay))
    await inside.wait()
    with pytest.raises(NoSpace, match=r"a fetch needs 0\.0 MiB more") as caught:
        await node.run({"b": 60})
    assert node.asked == [(20, False)] and caught.value.data["promised_bytes"] == 60
    assert caught.value.data["held_bytes"] == {"leased": 7} and "leased (pid 1 of uid 2)" in caught.value.message
    await node.run({"a": 60, "c": 40})  # what is promised to somebody already is promised once
    leave.set()
    await first
    await node.run({"b": 60})


async def test_a_promise_shrinks_as_its_bytes_reach_the_disk(node: Node) -> None:
    left = 60

    async def half_way() -> None:
        nonlocal left
        left = 30
        await node.run({"b": 70})
        left = 31
        with pytest.raises(NoSpace):
            await node.run({"b": 70})

    await node.room.run({"a": lambda: left}, "a fetch", half_way)


async def test_room_is_made(node: Node) -> None:
    node.evictable = 50
    await node.run({"a": 130})
    assert node.asked == [(30, False)] and node.evictable == 20
    with pytest.raises(NoSpace, match="could be evicted"):
        await node.run({"a": 160})
    assert node.evictable == 20, "nothing goes for what does not fit anyhow"


async def test_saves_may_use_what_downloads_may_not(node: Node) -> None:
    node.room.limits = Limits(min_free=1 << 60)
    with pytest.raises(NoSpace, match="min_free"):
        await node.run({"a": 1})
    node.room.limits = Limits(checkpoint_reserve=1 << 60)
    with pytest.raises(NoSpace, match="checkpoint_reserve"):
        await node.run({"a": 1})
    await node.room.admit_save(1, "a save")
    with pytest.raises(NoSpace, match="a save needs") as caught:
        await node.room.admit_save(1 << 60, "a save")
    assert "min_free" not in caught.value.message and node.asked[-1][1] is True


async def test_room_that_others_took_is_made_again(node: Node) -> None:
    """ENOSPC although there was room: once more when there is some, and the work's own words when there is none."""
    tries: list[int] = []

    async def fail(times: int) -> None:
        tries.append(1)
        if len(tries) <= times:
            raise NoSpace("the disk is full: really")

    await node.run({"a": 10}, lambda: fail(2))
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(NoSpace, match="really"):
        await node.run({"a": 10}, lambda: fail(9))
    assert len(tries) == 3
    tries.clear()

    async def fill() -> None:
        node.room.limits = Limits(min_free=1 << 60)
        await fail(9)

    with pytest.raises(NoSpace, match="really"):
        await node.run({"a": 10}, fill)
    assert len(tries) == 1


async def test_who_leaves_leaves_no_promise(node: Node) -> None:
    inside = asyncio.Event()

    async def stay() -> None:
        inside.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(node.run({"a": 90}, stay))
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.room.statistics()["promises"] == 0
    await node.run({"b": 90})


async def test_what_is_on_its_way_counts_less(node: Node, tmp_path: Path) -> None:
    content = Content("sha256", "ab" * 32, 10_000)
    name, left = node.room.content(content)
    assert name == content and left() == 10_000
    (tmp_path / "partial" / content.hex).write_bytes(bytes(4096))
    assert left() == 10_000 - 4096
    (tmp_path / "blobs" / "sha256" / "ab" / content.hex).touch()
    assert left() == 0


async def test_what_has_no_name_yet_counts_until_it_is_here(node: Node) -> None:
    """A git id: no file that could be looked at is named by it."""
    here: set[str] = set()
    _, left = node.room.content(Content("git-sha1", "ab" * 20, 10_000, "scope"), lambda: "a" in here)
    assert left() == 10_000
    here.add("a")
    assert left() == 0


async def test_what_a_save_needs_may_be_what_downloads_leave(node: Node, tmp_path: Path) -> None:
    free = (await node.room.disk()).free
    node.room.limits = Limits(min_free=2 * free)
    path = tmp_path / "pack"
    needs = dict([node.room.file(path, 10_000)])
    with pytest.raises(NoSpace):
        async with node.room.reserved(needs, "a fetch"):
            pass
    async with node.room.reserved(needs, "an upload", is_save=True):
        assert (await node.room.disk()).promised == 10_000
        path.write_bytes(bytes(4096))
        assert (await node.room.disk()).promised == 10_000 - 4096
    async with node.room.reserved({}, "what needs nothing"):
        pass
    assert node.room.statistics()["promises"] == 0


async def test_downloads_that_were_promised_room_are_named(node: Node) -> None:
    """Who looks for something to take away leaves them alone: less there is more still to come."""
    content = Content("sha256", "ab" * 32, 10)
    names: set[str] = set()

    async def look() -> None:
        names.update(node.room.promised_downloads())

    await node.run({content: 10, "something else": 1}, look)
    assert names == {content.hex} and node.room.promised_downloads() == set()


def test_two_fetches_that_do_not_fit_together(tmp_path: Path, hub: Hub) -> None:
    for name in ("one", "two"):
        hub.commit(f"org/{name}", {"model.safetensors": Random(name, 20 * MIB)})
    hub.reset_log()
    with (
        small_tmpfs(tmp_path / "disk", "32m") as disk,
        Daemon.start(disk / "root", hub, min_free="0", checkpoint_reserve="0", grace="0") as daemon,
        Client.of(daemon) as second,
        wired(daemon.socket) as wire,
    ):
        with Client.of(daemon) as first:
            hub.misbehave("slow", rate=4 * MIB)
            first.begin("fetch", repo_id="org/one")
            first.progress(lambda progress: progress["done_bytes"] > MIB)
            refused = second.refused("fetch", repo_id="org/two")
            assert refused.is_error("NoSpaceError") and refused.value["promised_bytes"] > 0
            hub.calm()
            first.good()
            assert second.refused("fetch", repo_id="org/two").is_error("NoSpaceError"), "the other one has its lease"
        assert second.fetch("org/two")["size_bytes"] == 20 * MIB
        assert [each["repo_id"] for each in wire.request("ls")["repos"]] == ["org/two"]


def test_what_has_arrived_is_not_promised_any_more(tmp_path: Path, hub: Hub) -> None:
    """Small files of a repo, which git ids name: they count as used while the rest still comes, and only as that."""
    small = {f"{number}.json": Random(str(number), 1_000_000) for number in range(10)}
    hub.commit("org/many", {**small, "model.safetensors": Random("m", 4 * MIB)})
    with (
        small_tmpfs(tmp_path / "disk", "36m") as disk,
        Daemon.start(disk / "root", hub, min_free="0", checkpoint_reserve="0") as daemon,
        Client.of(daemon) as task,
        wired(daemon.socket) as wire,
    ):
        hub.misbehave("stall", match="safetensors", after=1000)
        task.begin("fetch", repo_id="org/many")
        task.progress(lambda progress: progress["done_files"] == len(small))
        wire.open("save", 18 * MIB).let_go()
        hub.calm()
        task.good()
