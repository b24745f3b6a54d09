"""Ends that nobody asked for: kill -9 and SIGTERM in the middle of downloads, leases that outlive the daemon, forks.

The callers are real tasks that wait all the while: resuming is the SDK's own doing. Which phase a kill met is read from what it left on
the disk, where nothing moves any more.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .clients import Client, Tree, blobs, clients, hashes, partials, sha256, views
from .conftest import as_uid
from .daemon import Daemon
from .hub import Hub, Random

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
RATE = 40 * MIB  # of the hub, bytes a second: below what the daemon takes, or bytes in the kernel's buffers would count as fetched
MAX_LOST_BYTES = 8 * MIB  # asked for again, each kill
PHASES = ("look up", "range", "verify", "publish")
POLL_SECONDS = 0.001
DAEMON_UID = 1500


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.start(tmp_path, rate=RATE) as hub:
        yield hub


class Crashes:
    """Downloads repos, one after the other, while the daemon is killed again and again."""

    def __init__(self, hub: Hub, daemon: Daemon, seed: int, file_bytes: int) -> None:
        self.hub, self.daemon = hub, daemon
        self.random = random.Random(seed)
        self.met: Counter[str] = Counter()
        self.lost: list[int] = []  # bytes that came in one life and were not on the disk at its end
        self._file_bytes = file_bytes
        self._seed = seed
        self._rounds = 0

    def run(self, kills: int, at_least: int) -> None:
        """So many kills, and at least so many in each phase of the download itself."""
        with clients(self.daemon, 3) as tasks:
            while self._wanted(kills, at_least):
                self._download(tasks, kills, at_least)

    def _wanted(self, kills: int, at_least: int) -> list[str]:
        """The phases that are worth a kill now."""
        lacking = [phase for phase in PHASES[1:] if self.met[phase] < at_least]
        return lacking or (list(PHASES) if self.met.total() < kills else [])

    def _download(self, tasks: list[Client], kills: int, at_least: int) -> None:
        self._rounds += 1
        name = f"org/round-{self._rounds}"
        large = {f"{number}.bin": Random(f"{self._seed}:{self._rounds}:{number}", self._file_bytes + number) for number in range(2)}
        tree: Tree = {"config.json": name.encode(), **large}
        self.hub.commit(name, tree)
        self._sizes = {sha256(content): len(content) for content in large.values()}
        self._before = blobs(self.daemon)
        self._begin_life()
        for task in tasks:
            task.begin("snapshot_download", repo_id=name, hashes=True)
        while (wanted := self._wanted(kills, at_least)) and self._reach(self.random.choice(wanted), tasks[0]):
            self.daemon.kill()
            self._end_life()
            self.daemon.restart()
            self._begin_life()
        outcomes = [task.good() for task in tasks]
        assert {outcome.path for outcome in outcomes} <= {str(view) for view in views(self.daemon)}
        assert all(outcome.files == hashes(tree) for outcome in outcomes)
        self.lost.append(self._sent() - (sum(self._sizes.values()) - self._kept))
        self.daemon.check_no_temp_files()
        assert os.listdir(self.daemon.root / "partial") == []

    def _reach(self, phase: str, task: Client) -> bool:
        """Waits for a random moment in the phase. False: the download was over before."""
        held = sum(self._on_disk().values())
        goal = self.random.uniform(held, sum(self._sizes.values()))
        arrived: dict[str, Callable[[], bool]] = {
            "look up": lambda: True,
            "range": lambda: sum(self._on_disk().values()) >= goal and self._phase() == "range" and bool(self._open_partials()),
            "verify": lambda: any(self._is_complete(path) and not _is_sealed(path) for path in self._open_partials()),
            "publish": lambda: any(_is_sealed(path) for path in self._open_partials()),
        }
        if phase == "look up":
            with contextlib.suppress(Exception):
                self.hub.wait(kind="info", requests=1, timeout=0.5)
        while not arrived[phase]():
            if task.has_answered:
                return False
            time.sleep(POLL_SECONDS)  # a disk sends no events that are finer than this
        time.sleep(self.random.uniform(0, 0.02))  # anywhere in the phase, or shortly after
        return not task.has_answered

    def _phase(self) -> str:
        """What the daemon is, or was, about, by what lies on the disk."""
        new = blobs(self.daemon) - self._before
        data = [path for path in (self.daemon.root / "partial").iterdir() if path.suffix != ".map"]
        if any(_is_sealed(path) for path in data) or self._sizes.keys() <= new or any(not path.exists() for path in self._maps()):
            return "publish"
        if any(self._is_complete(path) for path in data):
            return "verify"
        return "range" if data or new else "look up"

    def _begin_life(self) -> None:
        self.hub.reset_log()
        self._kept = sum(self._on_disk().values())

    def _end_life(self) -> None:
        """Counts the kill. What it cost: bytes that left the hub in this life and are not on the disk now."""
        asked = self.hub.requests("lfs")
        self.hub.wait(kind="lfs", requests=len(asked), over=True)
        self.met[self._phase()] += 1
        self.lost.append(self._sent() - (sum(self._on_disk().values()) - self._kept))

    def _sent(self) -> int:
        return sum(request.bytes_sent for request in self.hub.requests("lfs"))

    def _on_disk(self) -> dict[str, int]:
        """Bytes of each large file that the next life need not ask for."""
        begun = partials(self.daemon)
        folder = self.daemon.root / "blobs" / "sha256"
        return {digest: size if (folder / digest[:2] / digest).exists() else begun.get(digest, 0) for digest, size in self._sizes.items()}

    def _is_complete(self, path: Path) -> bool:
        return path.name in self._sizes and partials(self.daemon).get(path.name, 0) == self._sizes[path.name]

    def _maps(self) -> list[Path]:
        """The data that the maps are about."""
        return [path.with_suffix("") for path in (self.daemon.root / "partial").glob("*.map")]

    def _open_partials(self) -> list[Path]:
        """Those that this life of the daemon has opened: what an earlier one left behind is no phase of this one."""
        found = set()
        folder = f"/proc/{self.daemon.pid}/fd"
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"{folder}/{name}"))
        return [path for path in (self.daemon.root / "partial").iterdir() if path.suffix != ".map" and str(path) in found]


def _is_sealed(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(path.stat().st_mode) == 0o444
    return False


def crash(hub: Hub, root: Path, *, kills: int, at_least: int, file_bytes: int, uid: int | None = None) -> None:
    seed = int(os.environ.get("MODELCACHE_TEST_SEED") or random.randrange(10**6))
    print(f"seed {seed} (MODELCACHE_TEST_SEED)")
    with Daemon.start(root, hub, uid=uid, min_free="0", hub_backoff_seconds=0.02) as daemon:
        crashes = Crashes(hub, daemon, seed, file_bytes)
        try:
            crashes.run(kills, at_least)
        finally:
            print(f"kills by phase: {dict(crashes.met)}; bytes asked for again in each life: {crashes.lost}")
        assert crashes.met.total() >= kills and all(crashes.met[phase] >= at_least for phase in PHASES[1:])
        assert max(crashes.lost) <= MAX_LOST_BYTES


def test_six_kills(hub: Hub, tmp_path: Path) -> None:
    crash(hub, tmp_path / "root", kills=6, at_least=1, file_bytes=24 * MIB)


@pytest.mark.soak
def test_kills_of_a_daemon_that_is_not_root(hub: Hub, shared_tmp_path: Path) -> None:
    """What is read-only for root can still be written by it; for others a file that was sealed when the kill came has to be opened up."""
    as_uid(DAEMON_UID)  # or skip
    crash(hub, shared_tmp_path / "root", kills=3, at_least=1, file_bytes=12 * MIB, uid=DAEMON_UID)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_thirty_kills(hub: Hub, tmp_path: Path) -> None:
    crash(hub, tmp_path / "root", kills=30, at_least=5, file_bytes=64 * MIB)


def test_a_kill_between_the_two_names_of_a_blob(hub: Hub, tmp_path: Path) -> None:
    """Published, and its download not yet forgotten: too short a moment to meet by chance. The second name must not keep the bytes."""
    tree: Tree = {"a.bin": Random("two names", 2 * MIB)}
    hub.commit("org/two-names", tree)
    with Daemon.start(tmp_path / "root", hub, min_free="0") as daemon:
        with Client.of(daemon) as task:
            task.download("org/two-names")
        daemon.kill()
        digest = sha256(tree["a.bin"])
        os.link(daemon.root / "blobs" / "sha256" / digest[:2] / digest, daemon.root / "partial" / digest)
        (daemon.root / "partial" / f"{digest}.map").touch()
        (daemon.root / "partial" / f"{'0' * 64}.map").touch()
        daemon.restart()
        assert os.listdir(daemon.root / "partial") == []
        with Client.of(daemon) as task:
            assert task.ask("rm", repo_id="org/two-names")["freed_bytes"] >= 2 * MIB and blobs(daemon) == set()


# ---- the end of a daemon, in order


def test_sigterm_in_the_middle_of_a_download(hub: Hub, tmp_path: Path) -> None:
    """It ends in order, what came is kept, and the callers go on with the next daemon."""
    tree: Tree = {"config.json": b"{}", "a.bin": Random("a", 24 * MIB), "b.bin": Random("b", 8 * MIB)}
    hub.commit("org/terminated", tree)
    with Daemon.start(tmp_path / "root", hub, min_free="0", shutdown_seconds=0.1) as daemon, clients(daemon, 4) as tasks:
        for task in tasks:
            task.begin("fetch", repo_id="org/terminated")
        tasks[0].progress(lambda progress: progress["done_bytes"] > 10 * MIB and progress["waiters"] == len(tasks))
        daemon.terminate()
        kept = sum(partials(daemon).values())
        assert kept > 5 * MIB
        asked = hub.requests("lfs")
        hub.wait(kind="lfs", requests=len(asked), over=True)
        published = sum(len(data) for data in tree.values() if sha256(data) in blobs(daemon) and len(data) > MIB)
        hub.reset_log()
        daemon.restart()
        for task in tasks:
            assert task.call("hashes", folder=task.good().path).files == hashes(tree)
        assert sum(request.bytes_sent for request in hub.requests("lfs")) == 32 * MIB - kept - published


def test_sigterm_waits_for_what_is_nearly_done(hub: Hub, tmp_path: Path) -> None:
    hub.commit("org/nearly", {"a.bin": Random("nearly", 16 * MIB)})
    with Daemon.start(tmp_path / "root", hub, min_free="0", shutdown_seconds=30) as daemon, Client.of(daemon) as task:
        task.begin("fetch", repo_id="org/nearly")
        task.progress(lambda progress: progress["done_bytes"] > MIB)
        daemon.terminate()
        reply = task.good().value
        assert reply["hub_bytes"] == 16 * MIB and os.listdir(reply["path"]) == ["a.bin"]


# ---- leases


@pytest.mark.parametrize("how", ["SIGTERM", "kill -9"])
def test_a_lease_outlives_the_daemon_and_ends_with_its_holder(hub: Hub, tmp_path: Path, how: str) -> None:
    tree: Tree = {"config.json": b"{}", "a.bin": Random("lease", 2 * MIB)}
    hub.commit("org/leased", tree)
    with Daemon.start(tmp_path / "root", hub, min_free="0") as daemon, Client.of(daemon) as other:
        with clients(daemon, 2) as holders:
            path = holders[0].download("org/leased")
            assert holders[1].download("org/leased") == path
            if how == "kill -9":
                daemon.kill()
            daemon.restart()
            refused = other.refused("ask", method="rm", repo_id="org/leased")
            assert refused.is_error("InUseError") and refused.value["holders"] == 2
            assert all(str(holder.pid) in refused.message for holder in holders)
            holders[0].kill()
            assert other.refused("ask", method="rm", repo_id="org/leased").value["holders"] == 1
            assert holders[1].call("hashes", folder=path).files == hashes(tree)
        assert other.ask("rm", repo_id="org/leased")["freed_bytes"] >= 2 * MIB
        assert views(daemon) == [] and blobs(daemon) == set() and os.listdir(daemon.root / "leases") == []


def test_one_lease_for_each_process_and_tree(hub: Hub, tmp_path: Path) -> None:
    hub.commit("org/once", {"config.json": b"{}", "other.txt": b"x"})
    with Daemon.start(tmp_path / "root", hub) as daemon, Client.of(daemon) as task:
        for _ in range(5):
            task.download("org/once")
        assert daemon.status()["leases"] == 1
        daemon.restart()
        task.download("org/once")
        task.download("org/once", allow_patterns="*.json")
        assert daemon.status()["leases"] == 2


def test_a_fork_keeps_working(hub: Hub, tmp_path: Path) -> None:
    """Parent and child each go their own way; the lease that the child inherited stays when the parent ends."""
    first: Tree = {"a.bin": Random("first", 2 * MIB)}
    second: Tree = {"b.bin": Random("second", 6 * MIB)}
    hub.commit("org/first", first)
    hub.commit("org/second", second)
    with Daemon.start(tmp_path / "root", hub, min_free="0") as daemon, Client.of(daemon) as other, Client.of(daemon) as parent:
        path = parent.download("org/first")
        with contextlib.closing(parent.fork()) as child:
            for task in (parent, child):
                task.begin("snapshot_download", repo_id="org/second", hashes=True)
            assert parent.good().files == child.good().files == hashes(second)
            assert child.download("org/first") == path
            parent.kill()
            for repo in ("org/first", "org/second"):
                assert other.refused("ask", method="rm", repo_id=repo).is_error("InUseError")
            daemon.restart()
            assert child.call("hashes", folder=path).files == hashes(first) and child.download("org/second")
            assert other.refused("ask", method="rm", repo_id="org/first").is_error("InUseError")
        assert other.ask("rm", repo_id="org/first")["freed_bytes"] >= 2 * MIB
        assert other.ask("rm", repo_id="org/second")["freed_bytes"] >= 6 * MIB
        assert daemon.status()["leases"] == 0


def test_a_fork_in_the_middle_of_a_download(hub: Hub, tmp_path: Path) -> None:
    """The parent's connection is not the child's, and what the parent waits for is not disturbed."""
    tree: Tree = {"a.bin": Random("forked", 12 * MIB)}
    hub.commit("org/forked", tree)
    hub.commit("org/small", {"config.json": b"{}"})
    with Daemon.start(tmp_path / "root", hub, min_free="0") as daemon, Client.of(daemon) as parent:
        parent.download("org/small")
        with contextlib.closing(parent.fork()) as child:
            parent.begin("snapshot_download", repo_id="org/forked", hashes=True)
            hub.wait(kind="lfs", bytes_sent=MIB)
            child.begin("snapshot_download", repo_id="org/forked", hashes=True)
            child.kill()
            assert parent.good().files == hashes(tree)
    assert hub.bytes_sent(sha256(tree["a.bin"])) == 12 * MIB
