"""Metaflow's steps: ours against metaflow-checkpoint, the same flows (flows/), one hub, one disk, one S3 server, in turns.

A model and a checkpoint are saved and loaded; eight tasks of a foreach want one repo; steps do nothing. Every run begins with nothing: an
empty cache, an empty datastore. A step's seconds are those of its task, from Metaflow's own log: the interpreter's start and the wait
for the store are among them. What was loaded is checked by its size. Both sides keep with their defaults.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.daemon import Daemon, clean_environment
from tests.hub import Hub, Random
from tests.seaweed import SeaweedFS

from .peers import CHECKPOINT_PACKAGES, checkpoint_python
from .processes import TaskFailed
from .report import Row

ROUNDS = 2
EMPTY_ROUNDS = 5
MEBIBYTES = 1024
FILES = 4
TASKS = 8  # of flows/fetch.py
REPO = "bench/model"
SIDES = ("ours", "peer")
BACKENDS = {"local": "a local folder", "s3": "S3"}
SAMPLE_SECONDS = 0.25
RUN_SECONDS = 1800.0
S3_WORKERS = 8  # processes that Metaflow starts for a request, on both sides: its own 64 are slower on a small machine
MB = 1e6
FLOWS = Path(__file__).with_name("flows")

Samples = defaultdict[str, list[float]]
_LINE = re.compile(r"^(\S+ \S+) \[[^/\]]+/(\w+)/(\w+) \(pid \d+\)\] (.*)$", re.M)


class Line(NamedTuple):
    at: float  # seconds since the epoch
    step: str
    task: str
    text: str


class Run:
    """A run that has ended well."""

    def __init__(self, output: str, peak_bytes: int) -> None:
        self.peak_bytes = peak_bytes  # most that lay on the node's disk
        self._lines = [Line(datetime.datetime.fromisoformat(at).timestamp(), *rest) for at, *rest in _LINE.findall(output)]

    def seconds(self, step: str) -> float:
        """From the first task's begin to the last one's end."""
        began = [line.at for line in self._lines if line.step == step and line.text == "Task is starting."]
        ended = [line.at for line in self._lines if line.step == step and line.text == "Task finished successfully."]
        return max(ended) - min(began)

    def said(self, step: str, word: str) -> list[Any]:
        return [json.loads(line.text[len(word) :]) for line in self._lines if line.step == step and line.text.startswith(word + " ")]


class Bench:
    def __init__(self, hub: Hub, seaweed: SeaweedFS, folder: Path, size: int) -> None:
        self.hub = hub
        self.seaweed = seaweed
        self.folder = folder
        self.size = size
        self.source = folder / "source"
        self.source.mkdir()
        for number in range(FILES):
            with open(self.source / f"part-{number}", "wb") as file:
                for chunk in Random(f"{folder} {number}", size // FILES).chunks():
                    file.write(chunk)

    def run(self, side: str, backend: str, flow: str) -> Run:
        with tempfile.TemporaryDirectory(dir=self.folder) as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            for each in ("work", "temporary"):
                (folder / each).mkdir()
            bucket = self.seaweed.bucket() if backend == "s3" else ""
            python: str | Path
            if side == "ours":
                store = f"{bucket}/store" if bucket else f"file://{folder}/store"
                python, environment = sys.executable, stack.enter_context(self._daemon(folder, store)).environment
            else:
                python, environment = checkpoint_python(), clean_environment(HF_HUB_DISABLE_XET="1")
                del environment["PYTHONPATH"]  # ours
            environment |= self._environment(folder, backend, bucket)
            os.sync()
            with Disk(folder) as disk:
                ran = subprocess.run(
                    [str(python), str(FLOWS / f"{flow}.py"), "--no-pylint", "run"],
                    cwd=folder / "work",
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=RUN_SECONDS,
                )
            if ran.returncode:
                raise TaskFailed(f"{flow}.py, {side}, {backend}:\n{ran.stdout[-6000:]}")
            if bucket:
                self._empty(bucket)
            return Run(ran.stdout, disk.peak_bytes)

    def _empty(self, bucket: str) -> None:
        client = self.seaweed.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket[5:]):
            for each in page.get("Contents", ()):
                client.delete_object(Bucket=bucket[5:], Key=each["Key"])

    def _daemon(self, folder: Path, store: str) -> Daemon:
        return Daemon.start(folder / "root", self.hub, store=store, log_level="info")

    def _environment(self, folder: Path, backend: str, bucket: str) -> dict[str, str]:
        return {
            **self.seaweed.environment(),
            "BENCH_SOURCE": str(self.source),
            "BENCH_REPO": REPO,
            "BENCH_PACKAGES": sysconfig.get_path("purelib"),
            "HOME": str(folder),
            "TMPDIR": str(folder / "temporary"),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "METAFLOW_USER": "bench",
            "METAFLOW_DEFAULT_DATASTORE": backend,
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
            "METAFLOW_DATASTORE_SYSROOT_S3": f"{bucket}/flows",
            "METAFLOW_S3_ENDPOINT_URL": self.seaweed.endpoint,
            "METAFLOW_S3_WORKER_COUNT": str(S3_WORKERS),
        }


class Disk:
    """The most that lay below a folder while the block ran, each file once however many names it has."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def __enter__(self) -> Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, sum(_found(self._folder).values()))
            if self._over.wait(SAMPLE_SECONDS):
                return


def measure(rounds: int = ROUNDS, mebibytes: int = MEBIBYTES) -> tuple[list[Row], dict[str, object]]:
    """The rows, and what has to be known to read them."""
    checkpoint_python()
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="modelcached-bench-"))
        hub = stack.enter_context(Hub.start(name, lfs_process=True))
        seaweed = stack.enter_context(SeaweedFS.start(name, volume_megabytes=1024))
        stack.enter_context(_environment(seaweed.environment()))
        bench = Bench(hub, seaweed, Path(name), mebibytes << 20)
        hub.commit(REPO, {f"model-{i}.safetensors": Random(f"{name} repo {i}", bench.size // FILES) for i in range(FILES)})
        rows = [row for backend in BACKENDS for part in (_keep, _fetch) for row in part(bench, backend, rounds)]
        rows += _empty(bench, EMPTY_ROUNDS)
    peers = {package.partition("==")[0]: package.partition("==")[2] for package in CHECKPOINT_PACKAGES[:2]}
    return rows, {"rounds": rounds, "mebibytes": mebibytes, "uid": os.geteuid(), **peers}


def _keep(bench: Bench, backend: str, rounds: int) -> list[Row]:
    found: Samples = defaultdict(list)
    for _ in range(rounds):
        for side in SIDES:
            run = bench.run(side, backend, "keep")
            if run.said("load", "bytes") != [bench.size] * 2:
                raise RuntimeError(f"{side} loaded {run.said('load', 'bytes')} bytes and not {bench.size}")
            for step in ("save_model", "save_checkpoint", "load"):
                found[f"{side} {step}"].append(run.seconds(step))
                found[f"{side} {step} blocked"] += run.said(step, "blocked")
            found[f"{side} disk"].append(run.peak_bytes / MB)

    def row(what: str, name: str, unit: str = "s", digits: int = 2) -> Row:
        return Row(what, unit, found[f"ours {name}"], found[f"peer {name}"], digits=digits)

    return [
        row(f"a step that saves {_spelt(bench.size)} as a model, {BACKENDS[backend]}", "save_model"),
        row("... of it in `save`", "save_model blocked"),
        row("... as a checkpoint", "save_checkpoint"),
        row("... of it in `save`", "save_checkpoint blocked"),
        row("a step that loads both", "load"),
        row("... bytes on the node's disk at most", "disk", "MB", 0),
    ]


def _fetch(bench: Bench, backend: str, rounds: int) -> list[Row]:
    found: Samples = defaultdict(list)
    for _ in range(rounds):
        for side in SIDES:
            bench.hub.reset_log()
            run = bench.run(side, backend, "fetch")
            if run.said("work", "bytes") != [bench.size] * TASKS:
                raise RuntimeError(f"{side} loaded {run.said('work', 'bytes')} bytes and not {bench.size}")
            found[f"{side} seconds"].append(run.seconds("work"))
            found[f"{side} hub"].append(bench.hub.bytes_sent() / MB)
            found[f"{side} disk"].append(run.peak_bytes / MB)
    what = f"{TASKS} tasks of a foreach with one repo of {_spelt(bench.size)}, {BACKENDS[backend]}"
    return [
        Row(what, "s", found["ours seconds"], found["peer seconds"]),
        Row("... bytes from the hub", "MB", found["ours hub"], found["peer hub"], digits=0),
        Row("... bytes on the node's disk at most", "MB", found["ours disk"], found["peer disk"], digits=0),
    ]


def _empty(bench: Bench, rounds: int) -> list[Row]:
    found: Samples = defaultdict(list)
    for _ in range(rounds):
        for side in SIDES:
            run = bench.run(side, "local", "empty")
            for name in ("checkpoint", "model", "huggingface_hub"):
                found[f"{side} {name}"].append(run.seconds(f"with_{name}") - run.seconds("plain"))
    return [
        Row(f"an empty step with @{name}, over one without", "s", found[f"ours {name}"], found[f"peer {name}"])
        for name in ("checkpoint", "model", "huggingface_hub")
    ]


def _found(folder: Path) -> dict[tuple[int, int], int]:
    """Bytes of every file below a folder that other processes change meanwhile."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(where, name))
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


def _spelt(size: int) -> str:
    return f"{size >> 30} GiB" if size % (1 << 30) == 0 else f"{size >> 20} MiB"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
