"""`gc-store` against saves that are held up at the worst moments: no reference ever names what is gone.

The audit asks the S3 server through botocore's own client, and knows only what the store's layout says. It is worth something because
it finds what daemons do that lack one of the two things that keep references whole: the check right before the reference
(`Careless`), and the wait for a round that deletes (`Impatient`).
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import StoreUnavailableError

from .daemon import Daemon
from .hub import Random
from .proxy import Proxy
from .saves import Tree, Wire, contents, hashes, in_bucket, key_of, until, wired
from .seaweed import SeaweedFS

WAIT_SECONDS = 60.0
GRACE = "2s"
SHARED = Random("shared", 300_000)
DIGEST = next(iter(hashes({"": SHARED}).values()))
SHARED_KEY = f"blobs/sha256/{DIGEST[:2]}/{DIGEST}"


def broken(name: str, change: str) -> type[Daemon]:
    """A daemon that is like ours but for one method, which does nothing."""
    code = f"""
import sys
from modelcached import command, depot, gc_claim
async def nothing(*_): pass
{change} = nothing
sys.exit(command.main())
"""
    return type(name, (Daemon,), {"program": ("-c", code)})


class Hasty(Daemon):
    """Ours, with less patience."""

    program = (
        "-c",
        "import sys; from modelcached import command, gc_claim; "
        "gc_claim.DELETE_SECONDS, gc_claim.STALE_SECONDS = 1.0, 3.0; sys.exit(command.main())",
    )


Careless = broken("Careless", "depot.Depot._put_again_if_old")
Impatient = broken("Impatient", "gc_claim.Rounds.passed")


class Fleet:
    """One bucket; savers and collectors, each a daemon with a network of its own."""

    def __init__(self, seaweed: SeaweedFS, folder: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = seaweed.bucket()
        self.bucket = self.url.removeprefix("s3://")
        self._seaweed = seaweed
        self._folder = folder
        self._stack = stack
        self._monkeypatch = monkeypatch

    def node(self, name: str, kind: type[Daemon] = Daemon) -> tuple[Wire, Proxy]:
        proxy = self._stack.enter_context(Proxy(self._seaweed.address))
        for variable, value in self._seaweed.environment(endpoint=proxy.endpoint).items():
            self._monkeypatch.setenv(variable, value)
        daemon = self._stack.enter_context(kind.start(self._folder / name, store=self.url, store_grace=GRACE))
        return self._stack.enter_context(wired(daemon.socket)), proxy

    def has(self, key: str) -> bool:
        client = self._seaweed.client()
        try:
            client.head_object(Bucket=self.bucket, Key=key)
        except client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            return False
        return True

    def read(self, key: str) -> Any:
        client = self._seaweed.client()
        try:
            return json.loads(client.get_object(Bucket=self.bucket, Key=key)["Body"].read())
        except client.exceptions.NoSuchKey:
            return None

    def put_request(self, key: str) -> bytes:
        """How a PUT of keys that begin so looks on the wire."""
        return f"PUT /{self.bucket}/{key}".encode()

    def contents(self) -> dict[str, dict[str, str]]:
        return contents(*in_bucket(self._seaweed, self.url))

    def dangling(self) -> list[str]:
        """References, there before and after, that name what is not there in between."""
        pages = self._seaweed.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix="refs/")
        keys = [found["Key"] for page in pages for found in page.get("Contents", ()) if found["Key"].endswith(".json")]
        return [key for key in keys if self._lacks(key) and self.has(key)]

    def _lacks(self, key: str) -> bool:
        reference = self.read(key)
        if reference is None:
            return False
        record = self.read(f"trees/{reference['tree']}.json")
        if record is None:
            return True
        packed = {file[0] for pack in record["packs"] for file in pack["files"]}
        digests = [pack["sha256"] for pack in record["packs"]] + [file[2] for file in record["tree"]["files"] if file[0] not in packed]
        return not all(self.has(f"blobs/sha256/{digest[:2]}/{digest}") for digest in digests)


@pytest.fixture
def fleet(seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(seaweed, tmp_path, stack, monkeypatch)


def collect(wire: Wire, **more: Any) -> dict[str, Any]:
    collected: dict[str, Any] = wire.request("gc_store", **more)
    return collected


def leave_garbage(saver: Wire) -> None:
    """What the next save needs is in the store, and nothing names it any more."""
    saver.save("old", {"shared.bin": SHARED, "n": b"old"})
    assert saver.flush(WAIT_SECONDS)["pending"] == []
    saver.request("delete", key=key_of("old"))


NEW: Tree = {"shared.bin": SHARED, "n": b"new"}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("kind", [Daemon, Careless])
def test_what_is_taken_between_blobs_and_reference_is_put_again(fleet: Fleet, kind: type[Daemon]) -> None:
    """The save finds a blob in the store, and is held up until a collection has taken it."""
    saver, network = fleet.node("saver", kind)
    collector, _ = fleet.node("collector")
    leave_garbage(saver)
    network.hold(at=fleet.put_request("trees/"))
    saver.save("new", NEW)
    network.wait(lambda network: network.is_held, WAIT_SECONDS)
    pending = fleet.read(f"refs/{key_of('new')}.pending")
    assert len(pending["tree"]) == 64 and fleet.has(SHARED_KEY)

    def is_taken() -> bool:
        collect(collector)
        return not fleet.has(SHARED_KEY)

    until(is_taken)
    network.let_go()
    assert saver.flush(WAIT_SECONDS)["pending"] == []
    if kind is Careless:
        assert fleet.dangling() == [f"refs/{key_of('new')}.json"]
        with pytest.raises(AssertionError, match="is named and not there"):
            fleet.contents()
    else:
        assert fleet.contents() == {key_of("new"): hashes(NEW)} and fleet.dangling() == []


@pytest.mark.timeout(90)
@pytest.mark.parametrize("kind", [Daemon, Impatient])
def test_a_delete_that_was_sent_before(fleet: Fleet, kind: type[Daemon]) -> None:
    """It is on its way, and would take what the save puts again meanwhile."""
    saver, network = fleet.node("saver", kind)
    collector, slow = fleet.node("collector")
    leave_garbage(saver)
    until(lambda: SHARED_KEY in collect(collector, dry_run=True)["keys"])
    slow.hold(at=f"DELETE /{fleet.bucket}/{SHARED_KEY}".encode())
    collecting = collector.start("gc_store")
    slow.wait(lambda slow: slow.is_held, WAIT_SECONDS)
    looks = threading.Semaphore(0)

    def count(piece: bytes) -> bytes:
        if f"GET /{fleet.bucket}/claims/gc.json".encode() in piece:
            looks.release()
        return piece

    network.alter("server", count)
    saver.save("new", NEW)
    if kind is Impatient:
        assert saver.flush(WAIT_SECONDS)["pending"] == [] and fleet.dangling() == []
    else:
        assert all(looks.acquire(timeout=WAIT_SECONDS) for _ in range(4))
        assert not fleet.has(f"refs/{key_of('new')}.json")
    slow.let_go()
    collector.wait(collecting)
    assert saver.flush(WAIT_SECONDS)["pending"] == []
    assert fleet.dangling() == ([f"refs/{key_of('new')}.json"] if kind is Impatient else [])
    if kind is Daemon:
        assert fleet.contents() == {key_of("new"): hashes(NEW)}


@pytest.mark.soak
@pytest.mark.timeout(90)
def test_a_delete_that_is_not_answered(fleet: Fleet) -> None:
    """Nobody knows when it will come: saves and collections wait until it is certain that it has."""
    saver, _ = fleet.node("saver", Hasty)
    collector, slow = fleet.node("collector", Hasty)
    leave_garbage(saver)
    until(lambda: SHARED_KEY in collect(collector, dry_run=True)["keys"])
    slow.hold(at=f"DELETE /{fleet.bucket}/{SHARED_KEY}".encode())
    with pytest.raises(StoreUnavailableError, match="does not answer to a delete"):
        collect(collector)
    assert fleet.read("claims/gc.json")["is_deleting"]
    slow.heal()
    saver.save("new", NEW)
    assert saver.flush(WAIT_SECONDS)["pending"] == []
    assert collect(collector)["findings"] == [] and not fleet.has("claims/gc.json")
    assert fleet.contents() == {key_of("new"): hashes(NEW)}


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_save_that_is_held_up_keeps_what_it_has_brought(fleet: Fleet) -> None:
    """From its tree's record on, however long the reference takes: nothing of it has to be sent twice."""
    saver, network = fleet.node("saver")
    collector, _ = fleet.node("collector")
    network.hold(at=fleet.put_request("refs/") + key_of("new").encode() + b".json")
    saver.save("new", NEW)
    network.wait(lambda network: network.is_held, WAIT_SECONDS)
    collector.save("other", {"n": b"other"})
    assert collector.flush(WAIT_SECONDS)["pending"] == []
    collector.request("delete", key=key_of("other"))

    until(lambda: bool(collect(collector)["deleted"]["blobs"]["objects"]))  # that one is younger than ours
    assert fleet.has(SHARED_KEY) and not fleet.has(f"refs/{key_of('new')}.json")
    network.let_go()
    assert saver.flush(WAIT_SECONDS)["pending"] == []
    assert fleet.contents() == {key_of("new"): hashes(NEW)}


# ---- for as long as one likes

PIECES = {f"{number}.bin": Random(f"piece {number}", 270_000 + number) for number in range(6)}


def work(fleet: Fleet, seconds: float, seed: int, kind: type[Daemon] = Daemon) -> tuple[int, int, list[str]]:
    """Saves, deletes and holds at random, while one collection follows another. How many were saved, how much was taken, what dangled."""
    end = time.monotonic() + seconds
    failures: list[BaseException] = []
    found: list[str] = []
    counts = {"saves": 0, "taken": 0}

    def guarded(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                function()
            except BaseException as error:
                failures.append(error)

        return run

    def save(number: int, wire: Wire, network: Proxy) -> None:
        choices = random.Random(f"{seed} {number}")
        keys: list[str] = []
        for turn in range(10_000):
            if time.monotonic() > end:
                return
            name = f"s{number}-{turn}"
            if choices.random() < 0.7:
                network.hold(at=fleet.put_request(choices.choice(["blobs/", "trees/", f"refs/{key_of(name)}.json"])))
            tree: Tree = {"n": b"%d %d" % (number, turn), **{path: PIECES[path] for path in choices.sample(sorted(PIECES), 2)}}
            wire.save(name, tree)
            taken = counts["taken"]
            latest = time.monotonic() + choices.uniform(0.5, 4.0)
            while wire.flush(0.05)["pending"]:
                if network.is_held and (counts["taken"] > taken or time.monotonic() > latest):
                    network.let_go()
            counts["saves"] += 1
            keys.append(key_of(name))
            while len(keys) > choices.randrange(1, 4):
                wire.request("delete", key=keys.pop(0))

    def sweep(wire: Wire) -> None:
        while time.monotonic() < end:
            counts["taken"] += collect(wire)["deleted"]["blobs"]["objects"]

    def audit() -> None:
        nonlocal end
        while time.monotonic() < end:
            found.extend(fleet.dangling())
            if found:
                end = 0.0

    jobs: list[Callable[[], None]] = [audit]
    for number in range(3):
        wire, network = fleet.node(f"saver-{number}", kind)
        jobs.append(lambda number=number, wire=wire, network=network: save(number, wire, network))  # type: ignore[misc]
    collector, _ = fleet.node("collector")
    jobs.append(lambda: sweep(collector))
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=guarded(job)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + WAIT_SECONDS)
        assert not thread.is_alive()
    if failures:
        raise failures[0]
    return counts["saves"], counts["taken"], found + fleet.dangling()


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [Daemon, Careless])
def test_saves_and_collections_at_the_same_time(fleet: Fleet, kind: type[Daemon]) -> None:
    seed = random.randrange(1 << 30)
    saves, taken, dangling = work(fleet, 50, seed, kind)
    print(f"seed {seed}: {saves} saves, {taken} blobs taken, {len(set(dangling))} references dangled")
    assert bool(dangling) == (kind is Careless), (seed, dangling)
    if kind is Daemon:
        assert saves > 20 and taken > 20, (seed, saves, taken)
        fleet.contents()
