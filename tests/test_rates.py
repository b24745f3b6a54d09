"""Rates: the whole node's bytes a second, to the hub and to stores, and their change under way."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import pytest

from modelcached.rates import BURST_SECONDS, Rate

from .clients import Client
from .configured import start_configured
from .daemon import Daemon
from .hub import Hub, Random
from .saves import fill
from .seaweed import SeaweedFS

MIB = 1 << 20


async def test_no_limit_costs_nothing() -> None:
    rate = Rate()
    moving = asyncio.ensure_future(rate.passed(1 << 60))
    await asyncio.sleep(0)
    assert moving.done()


async def test_bytes_take_their_time_whoever_moves_them() -> None:
    rate, start = Rate(1 * MIB), time.monotonic()
    await asyncio.gather(*(rate.passed(MIB // 8) for _ in range(4)))
    assert time.monotonic() - start >= 0.5 - BURST_SECONDS


async def test_a_change_counts_for_those_who_wait() -> None:
    rate = Rate(1)
    waiting = [asyncio.ensure_future(rate.passed(1 << 40)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    rate.set(1 << 30)
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
        await rate.passed(1 << 20)  # and what was asked of the old rate is not owed to the new one


async def test_who_leaves_is_not_waited_for() -> None:
    rate = Rate(1)
    waiting = asyncio.ensure_future(rate.passed(1 << 40))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_downloads_keep_to_the_hubs_rate_until_it_changes(tmp_path: Path, hub: Hub) -> None:
    """A reload lets a flight under way go faster; nothing of it is asked for again."""
    content = Random(7, 8 * MIB)
    hub.commit("org/model", {"model.safetensors": content, "small": b"x" * 1000})
    start = time.monotonic()
    text = 'hub_rate = "1MiB/s"\n'
    with start_configured(tmp_path / "c.toml", text, tmp_path / "root", hub) as daemon, Client.of(daemon) as task:
        task.begin("fetch", repo_id="org/model")
        seen = task.progress(lambda progress: progress["done_bytes"] >= MIB)
        assert seen["done_bytes"] / (time.monotonic() - start) <= 2 * MIB  # reads in flight come on top of a second's worth
        daemon.reload("hub_rate = 0\n")
        reply = task.good().value
        got = (Path(reply["path"]) / "model.safetensors").read_bytes()
        assert hashlib.sha256(got).digest() == hashlib.sha256(bytes(content)).digest()
        assert hub.bytes_sent() == 8 * MIB + 1000, "nothing was asked for twice"
        assert daemon.status()["blob_flights"]["started"] == 2, "one for each file, before and after the reload"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_saves_and_loads_keep_to_the_stores_rate(kind: str, tmp_path: Path, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    store = seaweed.bucket() if kind == "s3" else f"file://{tmp_path}/store"
    fill(tmp_path / "out", {"weights.bin": Random(3, 3 * MIB)})
    with Daemon.start(tmp_path / "one", store=store, store_rate="2MiB") as daemon, Client.of(daemon) as task:
        task.begin("save", path=str(tmp_path / "out"))
        reference = task.good().value
        start = time.monotonic()
        task.begin("flush")
        task.good()
        assert time.monotonic() - start > 0.9, "3 MiB at 2 MiB/s, less a burst and what was sent before the flush"
    with Daemon.start(tmp_path / "two", store=store, store_rate="2MiB") as daemon, Client.of(daemon) as task:
        start = time.monotonic()
        task.begin("load", reference=reference)
        task.good()
        assert time.monotonic() - start > 1.3


def test_a_slow_rate_is_no_stall(tmp_path: Path, hub: Hub) -> None:
    """Connections that wait their turn are not taken for broken ones."""
    hub.commit("org/slow", {"model.safetensors": Random(8, 2 * MIB)})
    settings = {"hub_rate": "1MiB/s", "stall_seconds": "300ms", "hub_connections": 4}
    with Daemon.start(tmp_path / "root", hub, uid=None, **settings) as daemon, Client.of(daemon) as task:
        task.fetch("org/slow")
        assert daemon.status()["hub"]["bytes"] == 2 * MIB == hub.bytes_sent()
