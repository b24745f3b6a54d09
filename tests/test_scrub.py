"""The scrub finds damage that nobody has asked for yet, mends it, and goes on where it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from .clients import Client, Tree
from .daemon import Daemon
from .hub import Hub, Random
from .kernel import Machine
from .saves import MIB, until, wired

TREE: Tree = {"config.json": b"{}", "model.safetensors": Random("scrubbed", 3 * MIB)}
OFTEN: dict[str, Any] = {"min_free": "0", "scrub_interval": "1s", "scrub_rate": "1GB/s"}


def blob(daemon: Daemon, content: bytes) -> Path:
    digest = hashlib.sha256(content).hexdigest()
    return daemon.root / "blobs" / "sha256" / digest[:2] / digest


def damage(path: Path) -> None:
    """One bit, with the size and the mtime of before: only the bytes tell."""
    before = path.stat()
    path.chmod(0o644)
    with open(path, "r+b", buffering=0) as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def scrub(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.status()["scrub"]
    return found


def test_damage_is_found_and_mended(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/name", TREE)
    with Daemon.start(tmp_path / "root", hub, **OFTEN) as daemon:
        with Client.of(daemon) as task:
            view = Path(task.fetch("org/name")["path"])
        paths = [blob(daemon, bytes(content)) for content in TREE.values()]
        for path in paths:
            damage(path)
        until(lambda: scrub(daemon)["repaired"] == 2)
        for name, content in TREE.items():
            assert (view / name).read_bytes() == bytes(content), "nobody has asked for it"
        assert daemon.status()["quarantined"] == 2 and scrub(daemon)["damaged"] == 2


def test_what_the_disk_cannot_read_is_mended_too(tmp_path: Path, hub: Hub) -> None:
    """And costs nothing else: every other blob is hashed in the same round."""
    contents = {f"{number}.bin": Random(f"sector {number}", MIB) for number in range(4)}
    hub.commit("org/name", dict(contents))
    machine, bad = Machine(tmp_path, "btrfs"), bytes(contents["2.bin"])
    with machine.on() as place, Daemon.start(place / "root", hub, min_free="0", scrub_rate="0") as daemon, Client.of(daemon) as task:
        view = Path(task.fetch("org/name")["path"])
    machine.spoil(bad)
    with machine.on() as place, Daemon.start(place / "root", hub, **OFTEN) as daemon:
        until(lambda: scrub(daemon)["repaired"] == 1 and scrub(daemon)["blobs"] >= 4)
        assert (view / "2.bin").read_bytes() == bad
        assert daemon.status()["quarantined"] == scrub(daemon)["damaged"] == 1


def test_what_was_saved_comes_from_the_store(tmp_path: Path) -> None:
    data = os.urandom(MIB)
    with Daemon.start(tmp_path / "root", store=f"file://{tmp_path}/store", **OFTEN) as daemon, wired(daemon.socket) as wire:
        wire.save("kept", {"weights": data})
        wire.flush()
        damage(blob(daemon, data))
        until(lambda: scrub(daemon)["repaired"] == 1)
        assert blob(daemon, data).read_bytes() == data


def test_an_executable_copy_and_a_truncated_blob_are_mended_too(tmp_path: Path) -> None:
    """The copy is made of the good blob; how much of a blob is asked of the store, its tree says, and not what is left of it."""
    data = os.urandom(MIB)
    with Daemon.start(tmp_path / "root", store=f"file://{tmp_path}/store", **OFTEN) as daemon, wired(daemon.socket) as wire:
        with wire.open("tool", MIB) as saving:
            saving.file("run", data, executable=True)
            saving.close()
        wire.flush()
        view, plain = Path(wire.load("tool")["path"]), blob(daemon, data)
        damage(plain.with_name(f"{plain.name}.x"))
        until(lambda: scrub(daemon)["repaired"] == 1)
        assert (view / "run").read_bytes() == data and daemon.status()["quarantined"] == 1
        os.truncate(plain, 100)
        until(lambda: plain.exists() and plain.stat().st_size == MIB and (view / "run").read_bytes() == data)


def test_what_is_in_use_is_left_alone(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/name", TREE)
    hub.commit("org/cold", {"cold.bin": b"cold" * 1000})
    with Daemon.start(tmp_path / "root", hub, **OFTEN) as daemon, Client.of(daemon) as task:
        with Client.of(daemon) as other:
            other.fetch("org/cold")
        task.fetch("org/name")
        before = scrub(daemon)
        until(lambda: scrub(daemon)["began"] > before["began"] + 1)  # a whole round began and ended after the lease
        done = scrub(daemon)
        until(lambda: scrub(daemon)["began"] > done["began"])
        assert 0 < scrub(daemon)["bytes"] - before["bytes"] < 3 * MIB


def test_a_round_goes_on_after_a_restart(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root", min_free="0", scrub_interval="1h") as daemon:
        until(lambda: scrub(daemon)["shard"] == 256)
        began = scrub(daemon)["began"]
        daemon.restart()
        assert scrub(daemon)["began"] == began and scrub(daemon)["shard"] == 256
        daemon.restart(scrub_rate="0")
        assert scrub(daemon)["blobs"] == 0


def test_the_rate_is_kept(tmp_path: Path) -> None:
    """At a byte a second the first piece is followed by a pause that outlasts the test."""
    data = os.urandom(3 * MIB)
    with Daemon.start(tmp_path / "root", store=f"file://{tmp_path}/store", **{**OFTEN, "scrub_rate": "1"}) as daemon:
        with wired(daemon.socket) as wire:
            wire.save("kept", {"weights": data})
            wire.flush()
        until(lambda: scrub(daemon)["bytes"] > 0)
        assert scrub(daemon)["bytes"] == MIB and scrub(daemon)["blobs"] == 0
