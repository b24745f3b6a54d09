"""The store goes away for a while, in every way a network knows: no save notices, and everything arrives when it is back (I3)."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .daemon import Daemon
from .hub import Random
from .proxy import Proxy
from .saves import MIB, Tree, contents, hashes, in_bucket, key_of, wired
from .seaweed import SeaweedFS

FLUSH_SECONDS = 180.0  # after the longest pause between two attempts


@pytest.fixture
def proxy(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(seaweed.address) as proxy:
        for name, value in seaweed.environment(endpoint=proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        yield proxy


def reset(proxy: Proxy) -> None:
    """Every connection breaks, and nobody listens."""
    proxy.refuse()


def swallow(proxy: Proxy) -> None:
    """Connections are accepted, and nothing ever moves on them."""
    proxy.listen()
    proxy.hold()


def be_away(seaweed: SeaweedFS, proxy: Proxy, root: Path, ways: list[Callable[[Proxy], None]], seconds: float) -> None:
    """Saves for so long while the store is away in each of these ways, one after another."""
    url, saved, numbers = seaweed.bucket(), dict[str, Tree](), itertools.count()
    with Daemon.start(root, store=url, min_free="0") as daemon, wired(daemon.socket) as wire:

        def save() -> None:
            number = next(numbers)
            large = 20 * MIB if number % 8 == 0 else MIB
            tree: Tree = {"a.bin": Random(f"away {number}", large), "same.bin": Random("same", MIB), "n": b"%d" % number}
            wire.save(f"away-{number}", tree, durable=random.random() < 0.3, storage_format=random.choice(["files", "tar"]))
            saved[key_of(f"away-{number}")] = tree

        save()
        proxy.wait(lambda proxy: proxy.sent > 2 * MIB)  # in the middle of an upload
        for way in ways:
            way(proxy)
            kept, moved, sent = len(saved), proxy.received, daemon.status()["spool"]["sent_saves"]
            ends = time.monotonic() + seconds / len(ways)
            while time.monotonic() < ends or len(saved) < kept + 3:
                save()
                time.sleep(seconds / 60)  # a trainer does something else, too
            status = daemon.status()["spool"]
            assert proxy.received == moved and status["sent_saves"] == sent, "the store was not away"
            assert status["saves"] >= len(saved) - kept
            assert wire.load(f"away-{len(saved) - 1}")["store_bytes"] == 0
        print(f"{len(saved)} saves while the store was away")
        proxy.heal()
        proxy.listen()
        assert wire.flush(FLUSH_SECONDS) == {"pending": [], "error": ""}
    assert contents(*in_bucket(seaweed, url)) == {key: hashes(tree) for key, tree in saved.items()}


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_the_store_is_away_for_a_moment(tmp_path: Path, seaweed: SeaweedFS, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    be_away(seaweed, proxy, tmp_path / "root", [swallow, reset], 3.0)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_store_is_away_for_a_minute(tmp_path: Path, seaweed: SeaweedFS, proxy: Proxy) -> None:
    be_away(seaweed, proxy, tmp_path / "root", [reset, swallow, reset], 60.0)
