"""`modelcache pin | unpin | evict | explain`, and the pin that `pull` leaves: real processes, a real daemon."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .clients import Client
from .daemon import Daemon, clean_environment
from .hub import Hub, Random
from .saves import MIB, key_of, wired
from .test_cli import run

LARGE = Random("large", 3 * MIB)


class World(NamedTuple):
    daemon: Daemon
    folder: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run(clean_environment(HOME=str(self.folder), MODELCACHE_SOCKET=self.daemon.socket, HF_ENDPOINT=self.endpoint), *words)

    @property
    def endpoint(self) -> str:
        return str(self.daemon.config["hub_endpoint"])

    def json(self, *words: str) -> Any:
        ran = self.run("--json", *words)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)


@pytest.fixture
def world(tmp_path: Path, hub: Hub) -> Iterator[World]:
    hub.commit("org/one", {"config.json": b"{}", "model.safetensors": LARGE})
    with Daemon.start(tmp_path / "root", hub, min_free="0", grace="0") as daemon:
        yield World(daemon, tmp_path)


def test_what_was_pulled_stays_for_a_day(world: World) -> None:
    pulled = world.run("pull", "org/one")
    assert pulled.returncode == 0, pulled.stderr
    (pin,) = world.json("pin", "--list")["pins"]
    assert pin["name"] == "pulled org/one@main" and 86_300 < pin["expires"] - pin["created"] <= 86_400
    assert world.json("evict", "--to", "0")["victims"] == []
    said = world.run("explain", "org/one").stdout
    assert "pinned by uid" in said and "(pulled org/one@main)" in said and "the hub" in said

    assert world.run("unpin", pin["name"]).returncode == 0
    assert world.run("unpin", pin["name"]).returncode == 3
    planned = world.json("evict", "--to", "0", "--dry-run")
    assert [each["what"].partition("@")[0] for each in planned["victims"]] == ["org/one"] and planned["freed_bytes"] >= 3 * MIB
    assert world.json("ls")["repos"][0]["files"] == 2
    done = world.run("evict", "--to", "0")
    assert done.returncode == 0 and "org/one@" in done.stdout and "freed 3" in done.stderr
    assert world.json("ls")["repos"] == []
    assert not any(path.is_file() for path in (world.daemon.root / "blobs").rglob("*"))
    again = world.run("pull", "org/one")
    assert (Path(again.stdout.strip()) / "model.safetensors").read_bytes() == bytes(LARGE)


def test_a_pin_has_a_name_and_an_end(world: World) -> None:
    with Client.of(world.daemon) as task:
        task.fetch("org/one")
    pinned = world.json("pin", "org/one", "--name", "mine", "--for", "7d")
    assert pinned["name"] == "mine" and pinned["what"] == "org/one" and pinned["uid"] == os.getuid()
    assert pinned["expires"] - pinned["created"] == 7 * 86_400
    replaced = world.json("pin", "org/one", "--name", "mine")
    assert replaced["expires"] is None
    assert [each["name"] for each in world.json("pin", "--list")["pins"]] == ["mine"]
    world.daemon.restart()
    assert [each["name"] for each in world.json("pin", "--list")["pins"]] == ["mine"]
    assert world.json("evict", "--to", "0")["victims"] == []
    assert world.run("pin", "org/other").returncode == 3
    assert world.run("pin").returncode == 2


def test_a_lease_is_explained_and_holds(world: World) -> None:
    with Client.of(world.daemon) as task:
        reply = task.fetch("org/one", purpose="a test of leases")
        (told,) = world.json("explain", reply["path"] + "/config.json")["trees"]
        held = {each["kind"]: each for each in told["held"]}
        assert held["lease"]["who"] == f"pid {task.pid} of uid {os.getuid()}" and held["lease"]["name"] == "a test of leases"
        assert told["what"].startswith("org/one@") and told["again"] == "hub" and told["frees_bytes"] >= 3 * MIB
        assert world.json("evict", "--to", "0")["victims"] == []
        assert (Path(reply["path"]) / "config.json").read_bytes() == b"{}"


def test_what_was_saved_is_explained_by_its_key(world: World) -> None:
    with wired(world.daemon.socket) as wire:
        wire.save("kept", {"weights": b"w" * 300_000})
        assert wire.flush()["pending"] == []
    (told,) = world.json("explain", key_of("kept"))["trees"]
    assert told["what"] == key_of("kept") and told["again"] == "store" and told["held"] == []
    evicted = world.json("evict", "--to", "0")
    assert len(evicted["victims"]) == 1
    assert world.run("explain", key_of("kept")).returncode == 3
    with wired(world.daemon.socket) as wire:
        assert (Path(wire.load("kept")["path"]) / "weights").read_bytes() == b"w" * 300_000


@pytest.mark.parametrize("words", [("evict", "--to", "much"), ("explain",), ("pin", "--for", "long", "x")])
def test_wrong_words(world: World, words: tuple[str, ...]) -> None:
    assert world.run(*words).returncode == 2
