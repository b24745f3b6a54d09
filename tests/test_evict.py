"""The plan of an eviction, which is pure, against its own definition; and what the flow does with it, on a real daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcached.blobs import Blobs
from modelcached.evict import Entry, Shared, frees, plan
from modelcached.holds import Holds
from modelcached.leftovers import Leftovers
from modelcached.model import Digest, TreeId
from modelcached.root import open_root
from modelcached.tasks import Pool
from modelcached.trees import Trees

from .clients import Client
from .daemon import Daemon
from .hub import Hub, Random
from .kernel import small_tmpfs
from .saves import MIB, Wire, key_of, until, wired


class World(NamedTuple):
    """Blobs by number with their sizes, and trees: which blobs each shows."""

    sizes: dict[int, int]
    trees: dict[str, frozenset[int]]
    entries: list[Entry]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    sizes = draw(st.dictionaries(st.integers(0, 9), st.integers(0, 50), min_size=1))
    shown = draw(st.dictionaries(st.sampled_from("abcdefgh"), st.frozensets(st.sampled_from(sorted(sizes)), min_size=0)))
    links = Counter(blob for blobs in shown.values() for blob in blobs)
    entries = [
        Entry(
            TreeId(name),
            draw(st.integers(0, 5)),
            draw(st.sampled_from(("store", "hub", ""))),
            sum(sizes[blob] for blob in blobs if links[blob] == 1),
            tuple(Shared(Digest(str(blob)), sizes[blob], 1, links[blob]) for blob in sorted(blobs) if links[blob] > 1),
        )
        for name, blobs in shown.items()
    ]
    return World(sizes, shown, entries)


def really_freed(world: World, victims: set[str]) -> int:
    """Bytes of the blobs that no tree shows when these are gone."""
    before = {blob for blobs in world.trees.values() for blob in blobs}
    after = {blob for name, blobs in world.trees.items() if name not in victims for blob in blobs}
    return sum(world.sizes[blob] for blob in before - after)


@given(worlds(), st.frozensets(st.sampled_from("abcdefgh")), st.integers(0, 300))
def test_the_plan_is_what_it_says(world: World, held: frozenset[str], budget: int) -> None:
    victims = plan(world.entries, held, budget)
    names = {str(victim.tree) for victim in victims}
    free = {str(entry.tree) for entry in world.entries if entry.again} - held
    assert names <= free, "what is held, or exists only here, never goes"
    assert frees(victims) == really_freed(world, names)
    possible = really_freed(world, free)
    assert frees(victims) >= min(budget, possible), "it frees what is asked for, if that can be"
    for victim in victims:
        assert really_freed(world, names - {victim.tree}) < min(budget, possible), "and takes nothing that could stay"
    assert victims == sorted(victims, key=lambda each: (each.again != "store", each.last_used, each.tree))
    assert plan(list(reversed(world.entries)), held, budget) == victims, "whatever the order it hears of them"


def entry(name: str, last_used: float, again: str = "hub", size: int = 10) -> Entry:
    return Entry(TreeId(name), last_used, again, size)


@pytest.mark.parametrize(
    ("entries", "budget", "victims"),
    [
        ([entry("new", 2), entry("old", 1)], 5, "old"),
        ([entry("old at the hub", 1), entry("new in the store", 2, "store")], 5, "new in the store"),
        ([entry("old", 1), entry("older", 0)], 15, "older, old"),
        ([entry("only here", 0, ""), entry("new", 9)], 5, "new"),
        ([entry("small", 0, size=1), entry("large", 1, size=100)], 100, "large"),  # the small one could stay
        ([entry("a", 0)], 0, ""),
        ([], 5, ""),
    ],
)
def test_who_goes_first(entries: list[Entry], budget: int, victims: str) -> None:
    assert ", ".join(each.tree for each in plan(entries, frozenset(), budget)) == victims


def test_a_shared_blob_goes_with_the_last_who_shows_it() -> None:
    shared = (Shared(Digest("s"), 100, 1, 2),)
    entries = [Entry(TreeId("a"), 0, "hub", 1, shared), Entry(TreeId("b"), 1, "hub", 1, shared)]
    assert [each.tree for each in plan(entries, frozenset(), 50)] == ["a", "b"]
    assert plan(entries, {"b"}, 50) == entries[:1] and frees(entries[:1]) == 1


# ---- the flow


@pytest.fixture
def repos(hub: Hub) -> Hub:
    """Four repos of 4 MiB; two of them share half of their bytes."""
    for name in ("one", "two"):
        hub.commit(f"org/{name}", {"config.json": name.encode(), "model.safetensors": Random(name, 4 * MIB)})
    for name in ("half", "other"):
        hub.commit(f"org/{name}", {"shared.bin": Random("shared", 2 * MIB), "own.bin": Random(name, 2 * MIB)})
    return hub


def on_disk(daemon: Daemon) -> int:
    """Bytes of the blobs, read by none of our code."""
    return sum(path.stat().st_blocks * 512 for path in (daemon.root / "blobs").rglob("*") if path.is_file())


def fetched(daemon: Daemon, *names: str) -> None:
    """Each by a process that has ended when this returns."""
    for name in names:
        with Client.of(daemon) as task:
            task.fetch(f"org/{name}")


def here(wire: Wire) -> set[str]:
    return {each["repo_id"].partition("/")[2] for each in wire.request("ls")["repos"]}


def status(wire: Wire) -> dict[str, Any]:
    found: dict[str, Any] = wire.request("status")
    return found


def counted(wire: Wire) -> dict[str, Any]:
    until(lambda: bool(status(wire)["room"]["is_counted"]))
    room: dict[str, Any] = status(wire)["room"]
    return room


def test_above_the_high_watermark_what_was_used_first_goes(tmp_path: Path, repos: Hub) -> None:
    config: dict[str, Any] = {"max_size": "12MiB", "high_watermark": "99%", "low_watermark": "70%"}
    with Daemon.start(tmp_path / "root", repos, min_free="0", grace="0", **config) as daemon, wired(daemon.socket) as wire:
        fetched(daemon, "one")
        assert here(wire) == {"one"}  # and its lease was seen to have ended, before that of the next one
        fetched(daemon, "two")
        counted(wire)
        assert here(wire) == {"one", "two"}
        fetched(daemon, "half")  # asks for its room, for there is none
        assert here(wire) == {"two", "half"}
        until(lambda: status(wire)["room"]["used_bytes"] == on_disk(daemon))
        assert on_disk(daemon) <= 12 * MIB and status(wire)["room"]["evictions"] == 1
        fetched(daemon, "one")
        assert "one" in here(wire)


def test_a_shared_blob_stays_while_somebody_shows_it(tmp_path: Path, repos: Hub) -> None:
    with Daemon.start(tmp_path / "root", repos, min_free="0", grace="0") as daemon, wired(daemon.socket) as wire:
        fetched(daemon, "half")
        with Client.of(daemon) as task:
            path = Path(task.fetch("org/other")["path"])
            evicted = wire.request("evict", size_bytes=0)
            assert [each["what"].partition("@")[0] for each in evicted["victims"]] == ["org/half"]
            assert 2 * MIB <= evicted["freed_bytes"] < 3 * MIB
            assert (path / "shared.bin").read_bytes() == bytes(Random("shared", 2 * MIB))
        assert here(wire) == {"other"}


def test_what_was_used_a_moment_ago_goes_only_for_a_save(tmp_path: Path, repos: Hub) -> None:
    """I4: the grace; and I6: a checkpoint's room is made at its cost."""
    with small_tmpfs(tmp_path / "disk", "16m") as disk:
        store = f"file://{tmp_path}/store"
        with (
            Daemon.start(disk / "root", repos, min_free="0", checkpoint_reserve="0", store=store, store_repos=False) as daemon,
            wired(daemon.socket) as wire,
        ):
            fetched(daemon, "one", "two")
            assert wire.request("evict", size_bytes=0)["victims"] == []
            repos.commit("org/large", {"model.safetensors": Random("large", 9 * MIB)})
            with Client.of(daemon) as task:
                refused = task.refused("snapshot_download", repo_id="org/large")
            assert refused.is_error("NoSpaceError") and "8.0 MiB used a moment ago (grace)" in refused.message
            assert here(wire) == {"one", "two"} and refused.value["evictable_bytes"] < MIB
            data = os.urandom(9 * MIB)
            wire.save("checkpoint", {"weights": data})
            assert here(wire) < {"one", "two"}
            assert (Path(wire.load("checkpoint")["path"]) / "weights").read_bytes() == data


def test_saved_trees_are_evicted_once_the_store_has_them(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with Daemon.start(tmp_path / "root", store=f"file://{store}", min_free="0", grace="0") as daemon, wired(daemon.socket) as wire:
        data = os.urandom(2 * MIB)
        small = {f"{number}.txt": str(number).encode() for number in range(20)}
        wire.save("kept", {"weights": data, **small})
        wire.flush()
        evicted = wire.request("evict", size_bytes=0)
        assert [each["again"] for each in evicted["victims"]] == ["store"] and on_disk(daemon) == 0
        view = Path(wire.load("kept")["path"])
        assert (view / "weights").read_bytes() == data and {path.name for path in view.iterdir()} == {"weights", *small}


def test_what_is_not_in_the_store_is_never_evicted(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root", store="file:///sys/away", min_free="0", grace="0") as daemon, wired(daemon.socket) as wire:
        wire.save("kept", {"weights": b"w" * MIB})
        assert (Path(wire.load("kept")["path"]) / "weights").stat().st_size == MIB  # hashed by now
        before = on_disk(daemon)
        assert wire.request("evict", size_bytes=0)["victims"] == [] and on_disk(daemon) == before
        (told,) = wire.request("explain", key=key_of("kept"))["trees"]
        assert "spool" in {each["kind"] for each in told["held"]}


def test_offline_nothing_of_the_hub_goes(tmp_path: Path, repos: Hub) -> None:
    with Daemon.start(tmp_path / "root", repos, min_free="0", grace="0") as daemon:
        fetched(daemon, "one")
        daemon.restart(offline=True)
        with wired(daemon.socket) as wire:
            assert wire.request("evict", size_bytes=0)["victims"] == [] and here(wire) == {"one"}


def test_leftovers_go_before_anything_else(tmp_path: Path, repos: Hub) -> None:
    with Daemon.start(tmp_path / "root", repos, min_free="0", grace="0") as daemon:
        fetched(daemon, "one")
        daemon.terminate()
        nobodys = daemon.root / "blobs" / "sha256" / "ab" / ("ab" * 32)
        nobodys.write_bytes(bytes(3 * MIB))
        abandoned = daemon.root / "partial" / ("cd" * 32)
        abandoned.write_bytes(bytes(3 * MIB))
        lied = daemon.root / "quarantine" / ("ef" * 32)
        lied.write_bytes(bytes(3 * MIB))
        daemon.restart()
        with wired(daemon.socket) as wire:
            used = counted(wire)["used_bytes"]
            evicted = wire.request("evict", size_bytes=used - 8 * MIB)
            assert evicted["leftovers"] == 3 and evicted["victims"] == [] and here(wire) == {"one"}
            assert not nobodys.exists() and not abandoned.exists() and not lied.exists()
            assert status(wire)["room"]["used_bytes"] == on_disk(daemon)


HOUR, MINUTE = 3600.0, 60.0


@pytest.mark.parametrize(
    ("what", "age", "is_save", "why"),
    [
        ("partial", 2 * HOUR, False, ""),
        ("partial", 0.0, False, "ended"),  # somebody may go on with it
        ("partial", 0.0, True, ""),  # a checkpoint does not wait for that
        ("flying", 2 * HOUR, True, "flight"),
        ("promised", 2 * HOUR, True, "flight"),  # taking it away would free nothing
        ("in hand", 2 * HOUR, True, "flight"),
        ("blob", 2 * HOUR, False, ""),
        ("blob", 2 * MINUTE, False, "ended"),
        ("blob", 2 * MINUTE, True, ""),
        ("blob", 0.5 * MINUTE, True, "ended"),  # an import shows it in a moment
        ("blob in hand", 2 * HOUR, True, "flight"),
        ("quarantine", 2 * HOUR, False, ""),
        ("quarantine", 0.0, False, "quarantine"),
        ("quarantine", 0.0, True, ""),
        ("partial", -1e8, False, ""),  # the clock was wrong then
        ("partial", -1.0, False, "ended"),
    ],
)
async def test_whose_bytes_are_nobodys(tmp_path: Path, what: str, age: float, is_save: bool, why: str) -> None:
    """Leftovers stay for the grace, but not for a save (I4, I6); and who is told why is told how much."""
    layout, lock = open_root(tmp_path / "root", private=True)
    pool, holds, name = Pool("test", 2), Holds(), "ab" * 32
    folder = {"blob": layout.blob(Digest(name)).parent, "quarantine": layout.quarantine}.get(what.partition(" ")[0], layout.partials)
    (folder / name).write_bytes(bytes(5000))
    try:
        async with asyncio.TaskGroup() as group:
            blobs = Blobs(layout, pool, group)
            leftovers = Leftovers(
                layout,
                blobs,
                Trees(layout, blobs.path),
                holds,
                HOUR,
                lambda path: what == "flying" and path.name == name,
                lambda: {name} if what == "promised" else set(),
                lambda: time.time() + age,
            )
            with holds.hand(*([name] if "in hand" in what else [])):
                found, kept = leftovers.find(1, is_save)
            assert ([each.path for each in found], dict(kept)) == (([], {why: 8192}) if why else ([folder / name], {}))
            blobs.close()
    finally:
        pool.close()
        os.close(lock)


def test_a_checkpoint_takes_the_room_of_a_download_that_was_left(tmp_path: Path, hub: Hub) -> None:
    """I6: at once, whatever the grace; and a download is told who has the room."""
    hub.commit("org/left", {"model.safetensors": Random("left", 20 * MIB)})
    hub.commit("org/next", {"model.safetensors": Random("next", 20 * MIB)})
    store: dict[str, Any] = {"store": f"file://{tmp_path}/store", "store_repos": False}
    with (
        small_tmpfs(tmp_path / "disk", "32m") as disk,
        Daemon.start(disk / "root", hub, min_free="0", checkpoint_reserve="0", **store) as daemon,
        wired(daemon.socket) as wire,
    ):
        hub.misbehave("no_range")
        hub.misbehave("stall", match="^lfs", after=15 * MIB)
        with Client.of(daemon) as task:
            task.begin("fetch", repo_id="org/left")
            task.progress(lambda progress: progress["done_bytes"] >= 14 * MIB)
            with Client.of(daemon) as other:
                refused = other.refused("fetch", repo_id="org/next")
            assert refused.is_error("NoSpaceError"), refused.message
            assert "MiB being fetched" in refused.message, refused.message
            task.kill()
        until(lambda: not opened(daemon, "partial"))
        hub.calm()
        with Client.of(daemon) as task:
            refused = task.refused("fetch", repo_id="org/next")
        assert refused.is_error("NoSpaceError") and "MiB left by downloads that ended (grace)" in refused.message
        assert refused.value["evictable_bytes"] == 0 and next(iter(refused.value["held_bytes"].values())) > 12 * MIB
        data = os.urandom(20 * MIB)
        wire.save("checkpoint", {"weights": data})
        assert (Path(wire.load("checkpoint")["path"]) / "weights").read_bytes() == data


def opened(daemon: Daemon, folder: str) -> list[str]:
    """What the daemon has open there."""
    found = []
    for descriptor in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(descriptor))
    return [path for path in found if path.startswith(f"{daemon.root}/{folder}/")]


@pytest.mark.parametrize("uid", [1501])
def test_only_owners_evict(shared_tmp_path: Path, repos: Hub, uid: int) -> None:
    with Daemon.start(shared_tmp_path / "root", repos, min_free="0") as daemon, Client.of(daemon, uid=uid) as task:
        assert task.refused("ask", method="evict", size_bytes=0).is_error("NotPermittedError")
