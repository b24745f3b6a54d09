"""A mixed load, and everything that goes wrong on a node: nothing that was said to be saved is lost, no byte is wrong, memory stays flat.

Tasks fetch, save and load on a small disk; meanwhile the hub answers with 5xx, connections to the store are reset, the daemon is killed and
somebody else fills its disk. Then the same load goes on in peace, for a while over which the daemon may not grow. What happens is
drawn from one seed (printed; MODELCACHE_TEST_SEED repeats it). MODELCACHED_SOAK_SECONDS says for how long, all in all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .clients import Client, hashes
from .daemon import Daemon
from .hub import Hub, Random
from .kernel import small_tmpfs
from .proxy import Proxy
from .saves import MIB, Tree, contents, fill, in_bucket, until
from .seaweed import SeaweedFS

SECONDS = float(os.environ.get("MODELCACHED_SOAK_SECONDS", "60"))
DISK_BYTES = 256 * MIB
TASKS = 3
CALLS_OF_A_TASK = 6  # then it ends, and its leases with it
KINDS = ("hub 5xx", "store reset", "kill", "full disk")
LEAST_STRIKES = 2
TROUBLE_SHARE = 0.6  # of the time; what follows is peace, twice: before memory is looked at, and after
FLAT_BYTES = 16 * MIB
MOST_SOCKETS = 24  # two pools of eight connections, the one it listens on, ours, and the event loop's own
EXPECTED = {"NoSpaceError", "HubUnavailableError", "StoreUnavailableError", "DaemonNotAvailableError", "DaemonConnectionError"}
STRIKE_SECONDS = 15.0  # at most, until a fault that waits for somebody has met one

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600 + 2 * SECONDS)]


class Load:
    """The tasks, and what they were told. Only what stands behind `_lock` is shared by their threads."""

    def __init__(self, daemon: Daemon, repos: dict[str, Tree], folder: Path, seed: int) -> None:
        self._daemon = daemon
        self._repos = {name: hashes(tree) for name, tree in repos.items()}
        self._folder = folder
        self._seed = seed
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.saved: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}  # key: reference, hashes
        self.calls: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.wrong: list[str] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._stop.clear()
        threads = [threading.Thread(target=self._work, args=(number,), name=f"task {number}") for number in range(TASKS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _work(self, number: int) -> None:
        try:
            chance = random.Random(f"{self._seed} {number} {sum(self.calls.values())}")
            while not self._stop.is_set():
                with Client.of(self._daemon, {"MODELCACHE_CONNECT_SECONDS": "60"}) as task:
                    for _ in range(CALLS_OF_A_TASK):
                        if not self._stop.is_set():
                            chance.choice((self._fetch, self._save, self._save, self._load))(task, chance)
        except BaseException as error:
            self._note(f"task {number}: {type(error).__name__}: {error}")

    def _fetch(self, task: Client, chance: random.Random) -> None:
        repo = chance.choice(sorted(self._repos))
        self._call("fetch", task, self._repos[repo], "snapshot_download", repo_id=repo, hashes=True)

    def _save(self, task: Client, chance: random.Random) -> None:
        name = f"s{chance.getrandbits(64):x}"
        sizes = [chance.randrange(0, 64 << 10) for _ in range(chance.randrange(1, 6))] + [chance.randrange(256 << 10, 6 * MIB)]
        tree: Tree = {f"part {position}": Random(f"{name}{position}", size) for position, size in enumerate(sizes)}
        source = fill(self._folder / name, tree)
        try:
            outcome = self._call("save", task, None, "save", path=str(source), label=name)
        finally:
            shutil.rmtree(source)
        if outcome is not None:
            with self._lock:
                self.saved[outcome["key"]] = (outcome, hashes(tree))

    def _load(self, task: Client, chance: random.Random) -> None:
        with self._lock:
            known = list(self.saved.values())
        if known:
            reference, right = chance.choice(known[-30:])
            self._call("load", task, right, "load", reference=reference, hashes=True)

    def _call(self, kind: str, task: Client, right: dict[str, str] | None, name: str, **arguments: Any) -> Any:
        outcome = task.call(name, timeout=180.0, **arguments)
        with self._lock:
            self.calls[kind] += 1
            if outcome.error is not None:
                self.refusals[outcome.error[0]] += 1
        if outcome.error is not None:
            if not EXPECTED & set(outcome.error):
                self._note(f"{kind}: {outcome.error[0]}: {outcome.message}")
            return None
        if right is not None and outcome.files != right:
            self._note(f"{kind}: other files than there should be: {arguments}")
        return outcome.value

    def _note(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)


class Trouble:
    """What goes wrong, one thing after the other."""

    def __init__(self, daemon: Daemon, hub: Hub, network: Proxy, load: Load, seed: int) -> None:
        self._daemon = daemon
        self._hub = hub
        self._network = network
        self._load = load
        self._chance = random.Random(f"{seed} trouble")
        self._make: dict[str, Callable[[], int]] = {
            "hub 5xx": self._hub_fails, "store reset": self._reset, "kill": self._kill, "full disk": self._fill_disk
        }  # fmt: skip
        self.struck = Counter(dict.fromkeys(KINDS, 0))

    def run(self, until_then: float) -> None:
        """Until that moment, and until every kind has struck often enough, or has had every chance to."""
        for _ in range(1000):
            if time.monotonic() >= until_then and min(self.struck.values()) >= LEAST_STRIKES:
                return
            assert time.monotonic() < until_then + 120, f"not every fault strikes: {dict(self.struck)}"
            for kind in self._chance.sample(KINDS, len(KINDS)):
                self.struck[kind] += self._make[kind]()
                time.sleep(self._chance.uniform(0.2, 1.0))  # the load goes on in between

    def _hub_fails(self) -> int:
        """Answers that were 5xx, of questions and of bytes. Something has to be asked for that: a repo nobody has."""
        self._hub.reset_log()
        self._hub.misbehave("5xx", times=self._chance.randrange(1, 5))
        name = f"org/new-{self._chance.getrandbits(32):x}"
        self._hub.commit(name, {"weights.bin": Random(name, 300_000)})
        with Client.of(self._daemon, {"MODELCACHE_CONNECT_SECONDS": "60"}) as task:
            outcome = task.call("snapshot_download", timeout=180.0, repo_id=name, hashes=True)
            if outcome.error is None and outcome.files != hashes({"weights.bin": Random(name, 300_000)}):
                self._load._note(f"other bytes after a 5xx: {name}")
        self._hub.calm()
        return sum(request.fault == "5xx" for request in self._hub.requests())

    def _reset(self) -> int:
        before = self._network.resets
        self._network.cut(self._chance.randrange(1, 2 * MIB), self._chance.choice(("server", "client")), times=self._chance.randrange(1, 4))
        deadline = time.monotonic() + STRIKE_SECONDS
        while self._network.resets == before and time.monotonic() < deadline:  # until something comes by
            time.sleep(0.05)  # the proxy counts, and tells nobody
        time.sleep(self._chance.uniform(0.0, 1.0))
        self._network.heal()
        return self._network.resets - before

    def _kill(self) -> int:
        self._daemon.kill()
        self._daemon.restart()
        return 1

    def _fill_disk(self) -> int:
        """Somebody else's bytes take all there is, until a task was told."""
        told = self._load.refusals["NoSpaceError"]
        filler = self._daemon.root / "somebody-elses"
        deadline = time.monotonic() + STRIKE_SECONDS
        try:
            with open(filler, "wb", buffering=0) as file:
                while time.monotonic() < deadline and self._load.refusals["NoSpaceError"] == told:
                    try:
                        file.write(bytes(MIB))
                    except OSError:
                        time.sleep(0.05)  # full: until somebody frees something
        finally:
            filler.unlink()
        return self._load.refusals["NoSpaceError"] - told


def resources(daemon: Daemon) -> tuple[int, int, int]:
    """Bytes of memory, and descriptors: of files and the like, and of sockets, some of which wait in pools to be used again."""
    process = Path(f"/proc/{daemon.pid}")
    lines = (process / "status").read_text().splitlines()
    open_ones = []
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            open_ones.append(os.readlink(link))
    sockets = sum(name.startswith("socket:") for name in open_ones)
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), len(open_ones) - sockets, sockets


def quiet(daemon: Daemon) -> None:
    """Nothing is running and nobody is connected but us."""

    def is_quiet() -> bool:
        said = daemon.status()
        return not said["activities"] and not said["spool"]["saves"] and said["connections"] == 1 and not said["blob_flights"]["running"]

    until(is_quiet, 120.0)


def damaged_blobs(root: Path) -> list[str]:
    found = []
    for path in (root / "blobs").rglob("*"):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != path.name.removesuffix(".x"):
            found.append(path.name)
    return found


def test_nothing_is_lost_or_wrong_and_memory_is_flat(
    tmp_path: Path, hub: Hub, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("MODELCACHE_TEST_SEED") or random.randrange(1 << 32))
    began = time.monotonic()
    repos: dict[str, Tree] = {
        f"org/model-{number}": {"config.json": b"{}", "vocabulary": Random(number, 90_000), "model.safetensors": Random(number, 9 * MIB)}
        for number in range(8)
    }
    for name, tree in repos.items():
        hub.commit(name, tree)
    store = seaweed.bucket()
    (tmp_path / "out").mkdir()
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Proxy(seaweed.address))
        for name, value in seaweed.environment(endpoint=network.endpoint).items():
            monkeypatch.setenv(name, value)
        root = stack.enter_context(small_tmpfs(tmp_path / "root", f"{DISK_BYTES}"))
        settings: dict[str, Any] = {"store": store, "min_free": "8MiB", "grace": "1s", "fresh_seconds": 0, "store_repos": False}
        daemon = stack.enter_context(Daemon.start(root, hub, uid=None, **settings))
        load = Load(daemon, repos, tmp_path / "out", seed)
        trouble = Trouble(daemon, hub, network, load, seed)
        with load.running():
            trouble.run(began + SECONDS * TROUBLE_SHARE)
        hub.calm()
        network.heal()
        quiet(daemon)
        at_peace = []
        for share in (0.15, 0.25):
            with load.running():
                time.sleep(SECONDS * share)
            quiet(daemon)
            at_peace.append(resources(daemon))
        with capsys.disabled():
            print(f"\nseed {seed} (MODELCACHE_TEST_SEED), {time.monotonic() - began:.0f} s, struck: {dict(trouble.struck)}")
            print(f"calls: {dict(load.calls)}; refused: {dict(load.refusals)}; saved: {len(load.saved)}")
            print(f"memory in MiB, files and sockets, at peace: {[(memory >> 20, *counts) for memory, *counts in at_peace]}")
        assert not load.wrong, load.wrong[:10]
        assert min(trouble.struck.values()) >= 1, trouble.struck
        assert min(load.calls[kind] for kind in ("fetch", "save", "load")) > 0
        stored = contents(*in_bucket(seaweed, store))
        lost = {key for key, (_, right) in load.saved.items() if stored.get(key) != right}
        assert not lost, f"{len(lost)} of {len(load.saved)} saves are lost or wrong: {sorted(lost)[:3]}"
        assert daemon.status()["spool"]["corrupt"] == []
        assert damaged_blobs(root) == []
        (before, files, _), (after, files_now, sockets) = at_peace
        assert after - before <= FLAT_BYTES
        assert files_now <= files and sockets <= MOST_SOCKETS
