"""`python -m benchmarks.run`: every benchmark, then benchmarks/results.json and the tables in README.md. `--rounds N` for more or fewer.

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
from typing import Any

from modelcached import __version__

from . import fetch, metaflow, save, watch
from .peers import MissingPeer
from .processes import ROOT
from .report import Row, table, write_into

RESULTS = Path(__file__).with_name("results.json")
WHOLE = ("fetch", "save", "metaflow", "watch")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    rounds = f"fetch: {fetch.ROUNDS}, save: {save.ROUNDS}, metaflow: {metaflow.ROUNDS}, watch: {watch.ROUNDS}"
    parser.add_argument("--rounds", type=int, help=f"of what takes long ({rounds})")
    parser.add_argument(
        "--size", type=int, metavar="MIB", help=f"of what flows keep and fetch ({metaflow.MEBIBYTES}); another is not written down"
    )
    parser.add_argument("--only", choices=[*WHOLE, *save.PARTS], help="one benchmark; of a part of `save` nothing is written down")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    try:
        found = _measure(options.only, options.rounds, options.size)
    except MissingPeer as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_text(found))
    if not options.dry and options.size is None and options.only not in save.PARTS:
        everything = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), **found}
        RESULTS.write_text(json.dumps(everything, indent=1) + "\n")
        if not write_into(ROOT / "README.md", _text(everything)):
            print("README.md has no place for the tables", file=sys.stderr)
    return 0


def _measure(only: str | None, rounds: int | None, size: int | None) -> dict[str, dict[str, Any]]:
    """Facts and rows of each benchmark, as results.json keeps them."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingPeer("huggingface_hub is not installed: pip install 'modelcached[daemon]'")
    found = {}
    if only in (None, "fetch"):
        found["fetch"] = _facts()
        rows, facts = fetch.measure(rounds or fetch.ROUNDS)
        found["fetch"] |= {**facts, "rows": [row.to_json() for row in rows]}
    if only in (None, "save", *save.PARTS):
        found["save"] = _facts()
        rows, facts = save.measure(rounds or save.ROUNDS, only if only in save.PARTS else "")
        found["save"] |= {**facts, "rows": [row.to_json() for row in rows]}
    if only in (None, "metaflow"):
        found["metaflow"] = _facts()
        rows, facts = metaflow.measure(rounds or metaflow.ROUNDS, size or metaflow.MEBIBYTES)
        found["metaflow"] |= {**facts, "rows": [row.to_json() for row in rows]}
    if only in (None, "watch"):
        found["watch"] = _facts()
        rows, facts = watch.measure(rounds or watch.ROUNDS)
        found["watch"] |= {**facts, "rows": [row.to_json() for row in rows]}
    return found


def _facts() -> dict[str, Any]:
    """Of now: it is asked before the benchmark runs."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "modelcached": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
    }


def _text(found: dict[str, dict[str, Any]]) -> str:
    notes = {"fetch": _fetch_note, "save": _save_note, "metaflow": _metaflow_note, "watch": _watch_note}
    shown = [(found[name], notes[name]) for name in WHOLE if name in found]
    return "\n\n".join(f"{table([Row.from_json(row) for row in facts['rows']])}\n\n{note(facts)}" for facts, note in shown)


def _fetch_note(facts: dict[str, Any]) -> str:
    return (
        f"{_how(facts)} The peer is huggingface_hub {facts['huggingface_hub']} over HTTP, "
        "which neither checks nor syncs what it downloads. 1 GB in 4 files and 20 small ones, from a local hub that gives "
        f"plain sockets {facts['hub_gigabytes_a_second']} GB/s, onto a disk that takes {facts['disk_gigabytes_a_second']} GB/s. "
        "`make bench` measures your machine."
    )


def _save_note(facts: dict[str, Any]) -> str:
    return (
        f"{_how(facts)} Peers: cp, metaflow-checkpoint {facts['metaflow-checkpoint']}, s5cmd {facts['s5cmd']}; the S3 server is SeaweedFS "
        f"{facts['seaweedfs']} on the same cores. Sources and the server's files lie in the page cache, and the disk has nothing left to "
        "write when something begins. Ours hashes and syncs what it keeps, and verifies what it brings; no peer does. "
        "While the training loop is measured, the server gets only what nobody else wants of the cores."
    )


def _metaflow_note(facts: dict[str, Any]) -> str:
    return (
        f"{_how(facts)} The peer is metaflow-checkpoint {facts['metaflow-checkpoint']}; both under Metaflow {facts['metaflow']}, "
        "with an empty cache and an empty datastore in every run. A step's seconds are its task's, with the interpreter's start and "
        "the wait for the store. The disk is the node's: with a local datastore what that holds counts, with S3 it does not."
    )


def _watch_note(facts: dict[str, Any]) -> str:
    return (
        f"{_how(facts)} Peers: a loop of `s5cmd sync` {facts['s5cmd']}, which also sends what is half written, and metaflow-checkpoint "
        f"{facts['metaflow-checkpoint']}; the S3 server is SeaweedFS {facts['seaweedfs']} on the same cores. A checkpoint has to be quiet "
        "for 5 s before it is taken."
    )


def _how(facts: dict[str, Any]) -> str:
    return (
        f"Median (least–most), {facts['rounds']} rounds of what takes long, ours and the peer's in turns, on {facts['cores']} shared cores "
        f"(load {facts['load_before']} before it began); Python {facts['python']}, commit {facts['commit']}."
    )


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "daemon", "sdk") else "")


if __name__ == "__main__":
    sys.exit(main())
