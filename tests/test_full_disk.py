"""A root on 64 MB that is filled in every way: by downloads, by saves, from outside. Nothing is lost or damaged, and room is used again.

What does not fit is refused within REFUSED_SECONDS; whatever was said to be saved is there in the end, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import NoSpaceError

from .clients import Client
from .daemon import Daemon
from .hub import Hub, Random
from .kernel import small_tmpfs
from .saves import MIB, Tree, Wire, contents, hashes, in_folder, key_of, until, wired

REFUSED_SECONDS = 1.0
SIZES = (1, 4, 9, 15, 22)  # MiB
ANY: dict[str, Any] = {"min_free": "0", "grace": "0", "checkpoint_reserve": "4MiB", "scrub_rate": "0", "store_repos": False}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_tmpfs(tmp_path / "disk", "64m") as disk:
        yield disk


@pytest.fixture
def repos(hub: Hub) -> Hub:
    for size in SIZES:
        hub.commit(f"org/{size}", {"config.json": b"{}", "model.safetensors": Random(str(size), size * MIB)})
    return hub


def take_all(path: Path, leave: int = 0) -> None:
    """Fills the disk from outside, but for so many bytes."""
    disk = os.statvfs(path.parent)
    with open(path, "ab") as file, contextlib.suppress(OSError):  # somebody was faster
        os.posix_fallocate(file.fileno(), file.tell(), max(1, disk.f_bavail * disk.f_frsize - leave))


def audit(root: Path) -> None:
    """Every name under blobs/ is what it says (I1), and nothing half-made has a name."""
    for path in (root / "blobs" / "sha256").rglob("*"):
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name[:64]
    for view in (root / "views").iterdir():
        assert (root / "trees" / f"{view.name}.json").exists()


def test_refused_at_once_and_served_as_soon_as_there_is_room(disk: Path, tmp_path: Path, repos: Hub) -> None:
    filler = disk / "filler"
    with (
        Daemon.start(disk / "root", repos, store=f"file://{tmp_path}/store", **ANY) as daemon,
        Client.of(daemon) as task,
        wired(daemon.socket) as wire,
    ):
        task.begin("fetch", repo_id="org/1")
        task.good()
        task.begin("fetch", repo_id="org/15", filename="config.json")  # now the hub's answers are known
        task.good()
        take_all(filler, 5 * MIB)
        refused = task.refused("fetch", REFUSED_SECONDS, repo_id="org/15")
        assert refused.is_error("NoSpaceError") and refused.value["needed_bytes"] == 15 * MIB
        with pytest.raises(NoSpaceError):
            wire.open("large", 15 * MIB)
        wire.save("small", {"weights": b"w" * MIB})  # what downloads may not take
        filler.unlink()
        assert task.fetch("org/15")["size_bytes"] == 15 * MIB + 2
        wire.save("large", {"weights": b"x" * (15 * MIB)})
        wire.flush()
    audit(daemon.root)
    assert set(contents(*in_folder(tmp_path / "store"))) == {key_of("small"), key_of("large")}


def test_a_disk_that_is_full_to_the_last_byte(disk: Path, tmp_path: Path, repos: Hub) -> None:
    """Nothing can be written at all: everything is refused, nothing ends the daemon, and it goes on when that is over."""
    filler = disk / "filler"
    with Daemon.start(disk / "root", repos, store=f"file://{tmp_path}/store", **ANY) as daemon, Client.of(daemon) as task:
        path = Path(task.fetch("org/4")["path"])
        take_all(filler)
        for repo in ("org/1", "org/9"):
            assert task.refused("fetch", repo_id=repo).is_error("NoSpaceError")
        with wired(daemon.socket) as wire:
            with pytest.raises(NoSpaceError):
                wire.save("none", {"weights": b"w" * MIB})
            assert wire.request("status")["pid"] == daemon.pid
        assert (path / "model.safetensors").read_bytes() == bytes(Random("4", 4 * MIB)), "what is in use stays"
        daemon.kill()
        daemon.restart()
        assert daemon.status()["disk"]["free_bytes"] < MIB
        filler.unlink()
        task.fetch("org/9")
        with wired(daemon.socket) as wire:
            wire.save("some", {"weights": b"w" * MIB})
            wire.flush()
    audit(daemon.root)


def test_a_tar_waits_for_room_and_leaves_the_disk_to_others(tmp_path: Path, hub: Hub) -> None:
    """What was free when it was saved is not any more when its store is back. Nothing of it is written until it fits (I6)."""
    hub.commit("org/20", {"model.safetensors": Random("20", 20 * MIB)})
    store = tmp_path / "store"
    store.touch()  # in the way
    with small_tmpfs(tmp_path / "disk", "36m") as disk, Daemon.start(disk / "root", hub, store=f"file://{store}", **ANY) as daemon:
        with wired(daemon.socket) as wire:
            wire.save("tar", {"weights": b"t" * (10 * MIB)}, storage_format="tar")
            with Client.of(daemon) as task:
                task.fetch("org/20")
                store.unlink()
                until(lambda: any(word in daemon.status()["spool"]["last_error"] for word in ("needs", "is full")))
                error = daemon.status()["spool"]["last_error"]
                assert f"the upload of {key_of('tar')} needs 10.0 MiB; " in error and f"leased (pid {task.pid}" in error, error
                wire.save("small", {"weights": b"s" * MIB})
                assert wire.request("flush", keys=[key_of("small")], deadline_seconds=30)["pending"] == [], "it lets others pass"
                assert wire.flush(0)["pending"] == [key_of("tar")]
            assert wire.flush(60)["pending"] == [], "there is room: nobody holds what was fetched"
        audit(daemon.root)
    assert set(contents(*in_folder(store))) == {key_of("tar"), key_of("small")}


def test_small_files_of_a_save_wait_for_room(tmp_path: Path) -> None:
    """As blobs they take their bytes once more."""
    data = {f"f{number}": bytes([number]) * 200_000 for number in range(50)}
    with small_tmpfs(tmp_path / "disk", "36m") as disk:
        with Daemon.start(disk / "root", store=f"file://{tmp_path}/store", **ANY) as daemon, wired(daemon.socket) as wire:
            take_all(disk / "filler", 15 * MIB)
            wire.save("small", data)
            with pytest.raises(NoSpaceError, match=f"the hashing of {key_of('small')} needs 9.5 MiB"):
                wire.load("small")
            assert daemon.status()["disk"]["free_bytes"] > 4 * MIB
            assert not any(path.is_file() for path in (daemon.root / "blobs").rglob("*"))
            (disk / "filler").unlink()
            assert wire.load("small")["size_bytes"] == 10_000_000
            assert wire.flush(60)["pending"] == []
            assert daemon.status()["room"]["promises"] == 0
    assert set(contents(*in_folder(tmp_path / "store"))) == {key_of("small")}


def test_a_disk_that_is_full_of_saves_drains_when_the_store_is_back(tmp_path: Path) -> None:
    """Bringing them there takes room too, for the blobs and the pack of their small files: some is left to it."""
    store, saved = tmp_path / "store", dict[str, dict[str, str]]()
    store.touch()  # in the way

    def save_until_full(wire: Wire, size: int) -> None:
        while True:
            name, small = f"s{len(saved)}", {f"small-{n}": b"%d" % n * 50 for n in range(4)}
            tree: Tree = {"weights": Random(name, size), **small}
            wire.save(name, tree)
            saved[key_of(name)] = hashes(tree)

    with small_tmpfs(tmp_path / "disk", "36m") as disk, Daemon.start(disk / "root", store=f"file://{store}", **ANY) as daemon:
        with wired(daemon.socket) as wire:
            for size in (4 * MIB, MIB, 300_000, 30_000, 3_000):
                with pytest.raises(NoSpaceError, match="are for bringing saves to the store"):
                    save_until_full(wire, size)
            store.unlink()
            assert wire.flush(60)["pending"] == []
        audit(daemon.root)
    assert contents(*in_folder(store)) == saved


def churn(daemon: Daemon, disk: Path, wire: Wire, seed: int, steps: int) -> tuple[dict[str, bytes], dict[str, int]]:
    """Random fetches, saves, loads and fillers; what was saved, and how often each thing happened."""
    chance, saved, happened = random.Random(seed), dict[str, bytes](), dict[str, int]()

    def count(what: str) -> None:
        happened[what] = happened.get(what, 0) + 1

    filler = disk / "filler"
    for step in range(steps):
        size = chance.choice(SIZES)
        what = chance.choice((*3 * ["fetch"], *3 * ["save"], "load", *3 * ["fill"], "empty"))
        try:
            if what == "fetch":
                with Client.of(daemon) as task:
                    outcome = task.call("fetch", repo_id=f"org/{size}")
                    if outcome.error is not None:
                        assert outcome.is_error("NoSpaceError"), outcome
                        raise NoSpaceError(outcome.message)
                    found = (Path(outcome.value["path"]) / "model.safetensors").read_bytes()
                    assert found == bytes(Random(str(size), size * MIB))
            elif what == "save":
                data = chance.randbytes(size * MIB)
                wire.save(f"s{step}", {"weights": data, "small": data[:100]})
                saved[f"s{step}"] = data
            elif what == "load" and saved:
                name = chance.choice(sorted(saved))
                assert (Path(wire.load(name)["path"]) / "weights").read_bytes() == saved[name]
            elif what == "fill":
                take_all(filler, chance.choice((0, 0, MIB, 10 * MIB)))
            elif what == "empty":
                filler.unlink(missing_ok=True)
        except NoSpaceError:
            what += " refused"
        count(what)
    filler.unlink(missing_ok=True)
    return saved, happened


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("seed", "steps"), [(1, 25), pytest.param(2, 120, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_filled_in_every_way(disk: Path, tmp_path: Path, repos: Hub, seed: int, steps: int) -> None:
    store = tmp_path / "store"
    with Daemon.start(disk / "root", repos, store=f"file://{store}", **ANY) as daemon:
        with wired(daemon.socket) as wire:
            saved, happened = churn(daemon, disk, wire, seed, steps)
            print(f"seed {seed}: {happened}")
            assert {"fetch", "save", "fill"} <= set(happened) and {"fetch refused", "save refused"} & set(happened)
            assert wire.flush(60.0)["pending"] == []
            for name, data in saved.items():
                with wired(daemon.socket) as other:  # its lease ends with it
                    assert (Path(other.load(name)["path"]) / "weights").read_bytes() == data
        daemon.restart()
    audit(daemon.root)
    assert set(contents(*in_folder(store))) == {key_of(name) for name in saved}
