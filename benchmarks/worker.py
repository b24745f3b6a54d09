"""A task that keeps things, as a process of its own: `python worker.py ours|peer|loop|trainer`, one JSON object a line, in and out.

Runs in the peer's virtualenv too, so nothing but the standard library is imported before the side is known. A call's answer has
its wall and CPU seconds, those of the processes it started included. What a side imports at the top does not count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

Calls = dict[str, Callable[..., Any]]


def ours() -> Calls:
    import modelcache

    return {"save": modelcache.save, "load": modelcache.load, "flush": modelcache.flush}


def peer() -> Calls:
    checkpoint = import_module("metaflow").Checkpoint()

    def load(reference: dict[str, Any], path: str) -> None:
        os.mkdir(path)
        checkpoint.load(reference, path)

    return {"save": checkpoint.save, "load": load}


def loop() -> Calls:
    """A training loop that needs one core."""

    def spin(seconds: float) -> float:
        """Iterations a second."""
        count, end = 0, time.perf_counter() + seconds
        start = time.perf_counter()
        while (now := time.perf_counter()) < end:
            for _ in range(1000):
                count += 1
        return count / (now - start)

    return {"spin": spin}


def trainer() -> Calls:
    """Writes to its folder and knows nobody who looks at it."""

    def write(folder: str, step: int, files: int, size: int) -> float:
        """A checkpoint; when (time.monotonic) its last byte was written."""
        os.mkdir(folder)
        for number in range(files):
            block = os.urandom(1 << 20)
            with open(f"{folder}/model-{number + 1}-of-{files}.bin", "wb", buffering=0) as file:
                for _ in range(size // len(block)):
                    file.write(block)
        with open(folder + "/trainer_state.json", "w") as state:
            json.dump({"global_step": step}, state)
        return time.monotonic()

    def fill(folder: str, files: int, each: int) -> None:
        for number in range(files):
            above = f"{folder}/{number // each}"
            if number % each == 0:
                os.makedirs(above)
            with open(f"{above}/{number}.txt", "w") as file:
                file.write(f"{number}\n")

    def change(folder: str, rate: float, seconds: float) -> None:
        """Writes to so many files a second, one after the other."""
        paths = sorted(os.path.join(above, name) for above, _, names in os.walk(folder) for name in names)
        start = time.monotonic()
        for number in range(int(rate * seconds)):
            with open(paths[(number * 7919) % len(paths)], "a") as file:
                file.write("more\n")
            time.sleep(max(0.0, start + number / rate - time.monotonic()))

    return {"write": write, "fill": fill, "change": change}


def main() -> None:
    calls = {"ours": ours, "peer": peer, "loop": loop, "trainer": trainer}[sys.argv[1]]()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        cpu, start = sum(os.times()[:4]), time.perf_counter()
        value = calls[asked["call"]](**asked["arguments"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "cpu_seconds": sum(os.times()[:4]) - cpu, "value": value}), file=out, flush=True)


main()
