"""One task, as a process of its own: `python -m benchmarks.task ours|peer REPO [--calls N] [--local]`.

Prints one JSON object: when the calls began and ended (the machine's monotonic clock, so that processes can be compared), the CPU
seconds they took, each call's seconds, the path. What a side imports lazily counts; what it imports at the top does not.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any


def main() -> None:
    side, repo, *flags = sys.argv[1:]
    calls = int(flags[flags.index("--calls") + 1]) if "--calls" in flags else 1
    snapshot_download: Any = import_module("huggingface_hub" if side == "peer" else "modelcache").snapshot_download
    options = {"local_files_only": True} if "--local" in flags else {}
    print("ready", flush=True)
    if not sys.stdin.readline():  # everybody starts at the same time, or not at all
        return
    seconds = []
    cpu, began = time.process_time(), time.monotonic()
    for _ in range(calls):
        start = time.perf_counter()
        path = snapshot_download(repo, **options)
        seconds.append(time.perf_counter() - start)
    ended = time.monotonic()
    print(json.dumps({"began": began, "ended": ended, "cpu_seconds": time.process_time() - cpu, "calls": seconds, "path": str(path)}))


main()
