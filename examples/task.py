"""A task as the demo starts eight of: waits for its turn, asks for a repo, says how long that took. All it needs is the SDK."""

from __future__ import annotations

import json
import sys
import time

import modelcache

repo, calls = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
if not sys.stdin.readline():
    sys.exit(1)  # the demo has ended without us

seconds = []
for _ in range(calls):
    start = time.perf_counter()
    path = modelcache.snapshot_download(repo)
    seconds.append(time.perf_counter() - start)
print(json.dumps({"path": path, "seconds": seconds}))
