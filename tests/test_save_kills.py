"""kill -9 of the daemon while it takes saves and brings them to the store: every acknowledged save arrives as it was (I3).

The daemon runs under strace, which makes the steps that change something slow enough to be met. Which phase a kill met is read from what
it left on the disk and in the store, where nothing moves any more; before S3, from the requests that a proxy saw pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcache.errors import ModelcacheError

from .daemon import Daemon
from .hub import Random
from .kernel import straced
from .proxy import Proxy
from .saves import MIB, Read, Saving, Tree, Wire, contents, hashes, in_bucket, in_folder, key_of, read_only_file, wired
from .seaweed import SeaweedFS

PHASES = ("capture", "hash", "blob", "tree", "reference")
BETWEEN = "between"  # hashed, and nothing was sent yet
REACH_SECONDS = 20.0
READY_SECONDS = 2.0  # the quickest restart, and what all need of a core; more is waiting for what else the machine does
POLL_SECONDS = 0.0005
LOADED = 25  # saves that another node loads in the end; every byte of all of them is compared in the store

Slow = straced("rename,link,fsync", "delay_enter=10ms", "--seccomp-bpf")


class FolderStore:
    """A store in a folder; which phase was met is seen in it."""

    large_bytes = 2 * MIB

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = f"file://{folder}"

    def objects(self) -> tuple[list[str], Read]:
        return in_folder(self._folder)

    def expect(self, wanted: str) -> None:
        pass

    def phase_of(self, key: str, tree: str) -> str:
        """Of a save that is hashed."""
        if (self._folder / "refs" / f"{key}.json").exists():
            return "reference"
        return "tree" if (self._folder / "trees" / f"{tree}.json").exists() else "blob"

    def go_on(self) -> None:
        pass


class BucketStore:
    """A real bucket behind a proxy, which stops everything as soon as the wanted request has passed: no answer comes back.

    Of blobs it waits for a part of a multipart upload.
    """

    large_bytes = 20 * MIB  # a multipart upload, of two parts
    _asked = re.compile(rb"PUT /[^ ]*/(blobs|trees|refs)/([^ ]*)(?<!\.pending) ")
    _phases = {b"blobs": "blob", b"trees": "tree", b"refs": "reference"}

    def __init__(self, seaweed: SeaweedFS, proxy: Proxy) -> None:
        self.url = seaweed.bucket()
        self._seaweed = seaweed
        self._proxy = proxy
        self._wanted = ""
        self._seen = ""  # stays as it is when it is what was wanted
        self.parts = 0  # of multipart uploads, that passed
        proxy.alter("server", self._pass)

    def objects(self) -> tuple[list[str], Read]:
        return in_bucket(self._seaweed, self.url)

    def expect(self, wanted: str) -> None:
        self._wanted, self._seen = wanted, ""

    def phase_of(self, key: str, tree: str) -> str:
        return self._seen or BETWEEN

    def go_on(self) -> None:
        self._proxy.let_go()

    def _pass(self, piece: bytes) -> bytes:
        """In the proxy's own thread, with everything that goes to the server."""
        for asked in self._asked.finditer(piece):
            phase, is_part = self._phases[asked[1]], b"partNumber=" in asked[2]
            self.parts += is_part
            if (self._wanted and self._seen == self._wanted) or (phase == self._wanted == "blob" and not is_part):
                continue
            self._seen = phase
            if phase == self._wanted:
                self._proxy.hold_now()
        return piece


AnyStore = FolderStore | BucketStore


class Kills:
    """Saves, and kills the daemon in the middle. What was acknowledged is remembered."""

    def __init__(self, daemon: Daemon, store: AnyStore, seed: int) -> None:
        self.daemon = daemon
        self.random = random.Random(seed)
        self.acknowledged: dict[str, Tree] = {}
        self.met: Counter[str] = Counter()
        self.restarts: list[tuple[float, float]] = []  # how long until the first answer, and how much of a core
        self._store = store
        self._seed = seed
        self._number = 0
        self._audited: set[str] = set()

    def run(self, kills: int, at_least: int) -> None:
        while self.met.total() < kills or any(self.met[phase] < at_least for phase in PHASES):
            self._kill_once()

    def _kill_once(self) -> None:
        wanted = min(PHASES, key=lambda phase: (self.met[phase], self.random.random()))
        self._store.expect(wanted)
        with contextlib.ExitStack() as stack:
            wire = stack.enter_context(wired(self.daemon.socket))
            for _ in range(self.random.randrange(1, 3)):
                self._save(wire, wanted)
            if wanted == "capture":
                stack.enter_context(self._capture(wire))
            self._reach(wanted)
            if self.random.random() < 0.5:  # anywhere in the phase, or shortly after
                self._store.go_on()
                time.sleep(self.random.uniform(0, 0.02))
            self.daemon.kill()
        self.met[self._phase(wanted)] += 1
        self._store.expect("")
        self._store.go_on()
        self._audit()
        left = os.listdir(self.daemon.root / "tmp")
        began = time.monotonic()
        self.daemon.restart()
        self.daemon.status()
        self.restarts.append((time.monotonic() - began, cpu_seconds(self.daemon.pid)))
        assert not set(left).intersection(os.listdir(self.daemon.root / "tmp"))

    def _audit(self) -> None:
        """At no time does a reference name what is not there."""
        keys, read = self._store.objects()
        new = [key for key in keys if key not in self._audited]
        self._audited.update(key for key in new if key.startswith("refs/") and key.endswith(".json"))
        contents([key for key in keys if key in new or not key.startswith("refs/")], read)

    def _save(self, wire: Wire, wanted: str) -> None:
        self._number += 1
        name = f"kill-{self._number}"
        large = self._store.large_bytes if wanted == "blob" else 2 * MIB
        tree: dict[str, bytes | Random] = {f"{number}": f"{name} {number}".encode() for number in range(self.random.randrange(5))}
        tree["own.bin"] = Random(f"{self._seed} {name}", self.random.randrange(large * 7 // 8, large))
        tree["shared.bin"] = Random(f"{self._seed} {self._number % 4}", MIB)
        wire.save(name, tree, storage_format=self.random.choice(["files", "files", "tar"]), durable=self.random.random() < 0.3)
        self.acknowledged[key_of(name)] = tree

    def _capture(self, wire: Wire) -> Saving:
        """A save that is still being handed over; nobody will be told that it is kept."""
        saving = wire.open("never", 64 * MIB)
        wire.start("save_files", [read_only_file(bytes(64 * MIB))], save=saving.name, files=[("a.bin", 64 * MIB, False)])
        return saving

    def _reach(self, wanted: str) -> None:
        """Waits until the daemon is there, or has done everything."""
        deadline = time.monotonic() + REACH_SECONDS
        while self._phase(wanted) not in (wanted, "idle"):
            assert time.monotonic() < deadline, f"{wanted} is not reached: {self.daemon.status()['spool']}"
            time.sleep(POLL_SECONDS)  # a disk sends no events that are finer than this

    def _phase(self, wanted: str) -> str:
        """What is under way, by what lies there; of several the one that is wanted."""
        found = {self._phase_of(entry) for entry in (self.daemon.root / "spool").glob("2*")}
        if any((self.daemon.root / "tmp").glob("save-*/files/*")):
            found.add("capture")
        return wanted if wanted in found else next((phase for phase in (*PHASES, BETWEEN) if phase in found), "idle")

    def _phase_of(self, entry: Path) -> str:
        try:
            key = json.loads((entry / "entry.json").read_text())["reference"]["key"]
            tree = (entry / "tree").read_text()
        except FileNotFoundError:
            return "hash" if (entry / "entry.json").exists() else "idle"
        return self._store.phase_of(key, tree)


def kill_and_check(tmp_path: Path, store: AnyStore, kills: int, at_least: int) -> None:
    seed = int(os.environ.get("MODELCACHE_TEST_SEED") or random.randrange(10**6))
    print(f"seed {seed} (MODELCACHE_TEST_SEED)")
    with Slow.start(tmp_path / "root", store=store.url, min_free="0") as daemon:
        crashes = Kills(daemon, store, seed)
        try:
            crashes.run(kills, at_least)
        finally:
            print(f"kills by phase: {dict(crashes.met)}; acknowledged: {len(crashes.acknowledged)}")
        ready, cpu = zip(*crashes.restarts, strict=True)
        print(f"first answer after {statistics.median(ready):.2f} s ({min(ready):.2f} to {max(ready):.2f} s),", end=" ")
        print(f"of that {statistics.median(cpu):.2f} s of a core")
        assert min(ready) < READY_SECONDS and statistics.median(cpu) < READY_SECONDS
        with wired(daemon.socket) as wire:
            assert wire.flush(120) == {"pending": [], "error": ""}
        assert daemon.status()["spool"]["corrupt"] == []
        daemon.check_no_temp_files()
    assert os.listdir(daemon.root / "spool") == ["corrupt"]
    found = contents(*store.objects())
    assert {key: found[key] for key in crashes.acknowledged} == {key: hashes(tree) for key, tree in crashes.acknowledged.items()}
    some = crashes.random.sample(sorted(crashes.acknowledged), min(LOADED, len(crashes.acknowledged)))
    with Daemon.start(tmp_path / "fresh", store=store.url, min_free="0") as fresh, wired(fresh.socket) as wire:
        for key in some:
            view, tree = Path(wire.request("load", key=key)["path"]), crashes.acknowledged[key]
            assert {path: (view / path).read_bytes() for path in tree} == {path: bytes(content) for path, content in tree.items()}
            assert sorted(os.listdir(view)) == sorted(tree)


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def bucket(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketStore]:
    with Proxy(seaweed.address) as proxy:
        for name, value in seaweed.environment(endpoint=proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        yield BucketStore(seaweed, proxy)


@pytest.mark.timeout(180)
def test_five_kills(tmp_path: Path) -> None:
    kill_and_check(tmp_path, FolderStore(tmp_path / "store"), 5, 1)


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_five_kills_before_s3(tmp_path: Path, bucket: BucketStore) -> None:
    kill_and_check(tmp_path, bucket, 5, 1)
    assert bucket.parts


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_hundred_kills(tmp_path: Path) -> None:
    kill_and_check(tmp_path, FolderStore(tmp_path / "store"), 100, 5)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_hundred_kills_before_s3(tmp_path: Path, bucket: BucketStore) -> None:
    kill_and_check(tmp_path, bucket, 100, 5)
    assert bucket.parts > 20


# ---- at every call


def kill_at(call: str, tmp_path: Path, store: AnyStore) -> int:
    """Kills at the Nth `call` of one save and its upload, until none is left that kills: each thread counts for itself. How many did."""
    tree: Tree = {"a.bin": Random("every call", MIB), "same.bin": Random("every call", MIB), "small": b"s", "zero": b""}
    number, kills, survived = 0, 0, 0
    with Daemon.start(tmp_path / "root", store=store.url):
        pass  # the root's own making is not what is looked at
    while survived < 2:
        number += 1
        name, acknowledged, is_done = f"{call}-{number}", False, False
        tree = {**tree, "own.bin": Random(name, MIB)}
        daemon = straced(call, f"signal=SIGKILL:when={number}")(tmp_path / "root", None, None, {"store": store.url})
        with contextlib.closing(daemon), contextlib.suppress(AssertionError, ModelcacheError):
            daemon.restart()
            with wired(daemon.socket) as wire:
                wire.save(name, tree, durable=True)
                acknowledged = True
                is_done = wire.flush(30)["pending"] == []
        survived = survived + 1 if is_done else 0
        kills += not is_done
        contents(*store.objects())
        if is_done:
            continue
        with Daemon.start(tmp_path / "root", store=store.url) as again, wired(again.socket) as wire:
            assert wire.flush(30)["pending"] == [] and again.status()["spool"]["corrupt"] == []
        assert not acknowledged or contents(*store.objects())[key_of(name)] == hashes(tree)
    print(f"{kills} kills at {call}")
    return kills


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("call", ["rename", "link", "unlink", "fsync,fdatasync", "copy_file_range"])
def test_killed_at_every_call(tmp_path: Path, call: str) -> None:
    assert kill_at(call, tmp_path, FolderStore(tmp_path / "store"))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_killed_at_every_request(tmp_path: Path, bucket: BucketStore) -> None:
    """`sendto` is what a request to S3 leaves with, head and body by themselves."""
    assert kill_at("sendto", tmp_path, bucket) > len(("blob", "tree", "reference"))
