"""A task that keeps things, as a process of its own: `python worker.py ours|peer|loop`, one JSON object a line, in and out.

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


def main() -> None:
    calls = {"ours": ours, "peer": peer, "loop": loop}[sys.argv[1]]()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        cpu, start = sum(os.times()[:4]), time.perf_counter()
        value = calls[asked["call"]](**asked["arguments"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "cpu_seconds": sum(os.times()[:4]) - cpu, "value": value}), file=out, flush=True)


main()
