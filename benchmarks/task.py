"""One task, as a process of its own: `python -m benchmarks.task ours|peer REPO [--calls N] [--local]`.

Prints one JSON object: when the calls began and ended (the machine's monotonic clock, so that processes can be compared), the CPU
seconds they took, each call's seconds, the path. What a side imports lazily counts; what it imports at the top does not.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    side, repo, *flags = sys.argv[1:]
    calls = int(flags[flags.index("--calls") + 1]) if "--calls" in flags else 1
    if side == "peer":
        from huggingface_hub import snapshot_download
    else:
        from modelcache import snapshot_download
    options = {"local_files_only": True} if "--local" in flags else {}
    print("ready", flush=True)
    sys.stdin.readline()  # everybody starts at the same time
    seconds = []
    cpu, began = time.process_time(), time.monotonic()
    for _ in range(calls):
        start = time.perf_counter()
        path = snapshot_download(repo, **options)
        seconds.append(time.perf_counter() - start)
    ended = time.monotonic()
    print(json.dumps({"began": began, "ended": ended, "cpu_seconds": time.process_time() - cpu, "calls": seconds, "path": str(path)}))


main()
