"""Real trainers, unmodified: trained under `modelcache watch`, killed by SIGKILL somewhere, resumed from the store on a node that has
none of it. They end with the step, the loss and the weights of a run that nobody interrupted.

What they run is in tests/trainers. MODELCACHE_TEST_SEED repeats the kills of an earlier run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import ROOT
from .daemon import Daemon
from .saves import until
from .trainers import pace_of

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

SCRIPTS = ROOT / "tests" / "trainers"
TRAINERS = ["hf_trainer", "accelerate_loop", "lightning_fit", "lightning_fit copy", "dcp_loop"]
TRAINERS += ["plain_loop safetensors", "plain_loop torch"]
DEADLINE = "12"  # seconds for the end of a watch; quiet lasts for a third of it at most then
SEED = int(os.environ.get("MODELCACHE_TEST_SEED") or random.randrange(1 << 32))


class Run:
    """A training script, or `modelcache watch` with one. `lines` are what it said so far."""

    def __init__(self, script: str, out: Path, daemon: Daemon, *watch: str, hold: int = 0) -> None:
        name, *more = script.split()
        trainer = [sys.executable, str(SCRIPTS / f"{name}.py"), str(out), *more]
        watched = [sys.executable, "-m", "modelcache", "watch", str(out), *watch, "--deadline", DEADLINE, "--"] if watch else []
        environment = {**daemon.environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment["PACE_HOLD"] = str(hold)
        self.said = out.with_name(out.name + ".said")
        with open(self.said, "wb") as errors:
            self.process = subprocess.Popen(
                [*watched, *trainer], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.lines: list[str] = []

    def line(self, wanted: str) -> int:
        """Waits for a line that begins so; the number after it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if f"{line.rstrip()} ".startswith(f"{wanted} "):
                return int(line.split()[1])
        raise AssertionError(f"it ended without {wanted!r}: {self.lines[-3:]} {self.said.read_text()[-3000:]}")

    def end(self) -> int:
        assert self.process.stdout is not None
        self.lines += [line.rstrip() for line in self.process.stdout]
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def running(script: str, out: Path, daemon: Daemon, *watch: str, hold: int = 0) -> Iterator[Run]:
    run = Run(script, out, daemon, *watch, hold=hold)
    try:
        yield run
    finally:
        run.close()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Daemon]]:
    """Two, and the store they share."""
    folder = tmp_path_factory.mktemp("nodes")
    store = f"file://{folder}/store"
    with Daemon.start(folder / "one", store=store) as one, Daemon.start(folder / "two", store=store) as two:
        yield one, two


@pytest.mark.parametrize("trainer", TRAINERS)
def test_killed_and_resumed_on_another_node(trainer: str, nodes: tuple[Daemon, Daemon], tmp_path: Path) -> None:
    dice = random.Random(f"{SEED} {trainer}")
    name = trainer.replace(" ", "-")
    steps, every = pace_of()
    last = dice.randrange(every + 1, steps)
    delay = dice.uniform(0, 0.3)
    is_all = dice.random() < 0.5  # or the trainer alone
    least = (last - 1) // every * every  # the newest checkpoint that has to be whole; the next one may have been
    hold = min(last + 2, steps)  # a trainer that is killed late has not ended
    print(f"MODELCACHE_TEST_SEED={SEED}: {trainer} is killed {delay:.3f} s after step {last}, {'its watch first' if is_all else 'alone'}")
    with (
        running(trainer, tmp_path / "whole", nodes[0]) as whole,
        running(trainer, tmp_path / "one", nodes[0], "--name", name, hold=hold) as first,
    ):
        pid = first.line("pid")
        first.line(f"step {last}")
        time.sleep(delay)  # where in a step, or in a save, nobody can tell
        if is_all:
            first.process.kill()
        os.kill(pid, signal.SIGKILL)
        assert first.end() == (-signal.SIGKILL if is_all else 128 + signal.SIGKILL)
        if is_all:
            until(lambda: newest_in_store(nodes[0], name) >= (least // every - 1 if trainer == "accelerate_loop" else least))
        assert whole.end() == 0, whole.said.read_text()[-3000:]
    with running(trainer, tmp_path / "two", nodes[1], "--name", name, "--resume") as second:
        begun = second.line("step") - 1
        assert second.end() == 0, second.said.read_text()[-3000:]
    assert begun >= least and begun % every == 0, "more was lost than what was being written"
    assert second.lines[-1] == whole.lines[-1] and whole.lines[-1].startswith(f"end {steps} ")


def newest_in_store(daemon: Daemon, name: str) -> int:
    """The step of the newest checkpoint that the store has; -1 for none."""
    asked = [sys.executable, "-m", "modelcache", "checkpoints", name, "--json"]
    found = json.loads(subprocess.run(asked, env=daemon.environment, capture_output=True, check=True).stdout)["checkpoints"]
    return max([each["step"] for each in found if each["state"] == "uploaded" and each["step"] is not None], default=-1)
