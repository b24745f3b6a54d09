"""`python -m benchmarks.run`: every benchmark, then benchmarks/results.json and the table in README.md. `--rounds N` for more or fewer.

A missing peer is an error. Goals that are missed are shown, and are none: how fast a machine is proves nothing about the code.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from modelcached import __version__

from . import fetch
from .processes import ROOT
from .report import table, write_into

RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=fetch.ROUNDS, help="of the cold downloads (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if importlib.util.find_spec("huggingface_hub") is None:
        print("error: huggingface_hub, the peer, is not installed\nhint: pip install 'modelcached[daemon]'", file=sys.stderr)
        return 1
    load = os.getloadavg()[0]
    rows, facts = fetch.measure(options.rounds)
    facts = {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "modelcached": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(load, 1),
        **facts,
    }
    text = f"{table(rows)}\n\n{_note(facts)}"
    print(text)
    if not options.dry:
        RESULTS.write_text(json.dumps({**facts, "fetch": [row.to_json() for row in rows]}, indent=1) + "\n")
        if not write_into(ROOT / "README.md", text):
            print("README.md has no place for the table", file=sys.stderr)
    return 0


def _note(facts: dict[str, object]) -> str:
    return (
        f"Median (least–most), {facts['rounds']} rounds of the cold ones, ours and the peer's in turns, on {facts['cores']} shared cores "
        f"(load {facts['load_before']} before it began); Python {facts['python']}, commit {facts['commit']}. "
        f"The peer is huggingface_hub {facts['huggingface_hub']} over HTTP, "
        "which neither checks nor syncs what it downloads. 1 GB in 4 files and 20 small ones, from a local hub that gives "
        f"plain sockets {facts['hub_gigabytes_a_second']} GB/s, onto a disk that takes {facts['disk_gigabytes_a_second']} GB/s. "
        "`make bench` measures your machine."
    )


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "daemon", "sdk") else "")


if __name__ == "__main__":
    sys.exit(main())
