"""A trainer that knows nothing of modelcache: fits a line, writes `OUT/model-step<N>.safetensors` every 10 steps, resumes from the newest.

    modelcache watch out --name line --resume -- python train.py out --die-at 47   # SIGKILL after step 47
    rm -r out                                                                      # or go to another node
    modelcache watch out --name line --resume -- python train.py out               # goes on after step 40

Prints the last step and what it has learnt: the same as without the kill. All it needs is Python.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import struct
import time
from pathlib import Path

EVERY = 10


class Model:
    """y = slope * x + offset, and the random numbers that pick the next sample."""

    def __init__(self) -> None:
        self.step = 0
        self.slope, self.offset = 0.0, 0.0

    def train(self) -> float:
        """One step of gradient descent; returns the loss before it."""
        self.step += 1
        x = random.Random(self.step).uniform(-1, 1)
        error = self.slope * x + self.offset - (3 * x + 1)
        self.slope -= 0.1 * error * x
        self.offset -= 0.1 * error
        return error * error

    def save(self, folder: Path) -> None:
        weights = struct.pack("<2d", self.slope, self.offset)
        tensor = {"dtype": "F64", "shape": [2], "data_offsets": [0, len(weights)]}
        header = json.dumps({"__metadata__": {"step": str(self.step)}, "weights": tensor}).encode()
        made = folder / f"model-step{self.step}.safetensors"
        made.write_bytes(struct.pack("<Q", len(header)) + header + weights)
        (folder / f"model-step{self.step - 2 * EVERY}.safetensors").unlink(missing_ok=True)  # room for two only

    def load(self, folder: Path) -> None:
        found = [(int(name[1]), name[0]) for name in map(re.compile(r"model-step(\d+)\.safetensors").fullmatch, os.listdir(folder)) if name]
        if found:
            self.step, name = max(found)
            self.slope, self.offset = struct.unpack("<2d", (folder / name).read_bytes()[-16:])
            print(f"goes on after step {self.step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--die-at", type=int, help="a step that this process does not survive")
    asked = parser.parse_args()
    asked.out.mkdir(exist_ok=True)
    model, loss = Model(), 0.0
    model.load(asked.out)
    while model.step < asked.steps:
        loss = model.train()
        if model.step % EVERY == 0:
            model.save(asked.out)
        if model.step == asked.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)  # a step takes its time
    print(f"step {model.step}: y = {model.slope:.9f} x + {model.offset:.9f}, loss {loss:.3e}")


main()
