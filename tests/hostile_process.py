"""Trainers as hostile as they can be, beside a watcher of their own uid; a process of its own, for test_watch_hostile.

    python -m tests.hostile_process FOLDER NAME UNITS

Every page of every file says which version it is of; a unit that is a folder has a list of its files. Some trainers write units and
rotate them away, the marker first or last; others rewrite one file in place for ever: in many writes, in one, through a mapping,
truncated first, or beside and renamed. They stop in the middle for longer than the watcher wants quiet. Nobody is told when it is done.
One line of JSON comes out: how many units were captured whole, and which were torn or partial.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from modelcache import layouts
from modelcache.watch_client import Ask
from modelcache.watcher import Watcher

PAGE = 4096
FILE_BYTES = 96 << 10
SETTLE = 0.5
LONGEST_SECONDS = 600.0
RULES = [
    {"name": "folders", "pattern": r"checkpoint-(\d+)", "needs": ["state.json"], "step_in": "state.json:step", "settle": SETTLE},
    {"name": "files", "pattern": r".*\.dat", "kind": "file", "settle": SETTLE},
]
Write = Callable[[Path, int], None]


def pages(version: int, size: int = FILE_BYTES) -> bytes:
    return struct.pack("<Q", version) * (size // 8)


def rest(most: float) -> None:
    """A trainer's own pace."""
    time.sleep(random.random() * most)


# ---- units that come and go


def rotate_for_ever(folder: Path, first: int) -> None:
    """Three units are there at a time. No pause inside a unit is as long as the rule's: that is what the rule relies on."""
    step = first
    while True:
        step += 1
        unit = folder / f"checkpoint-{step}"
        unit.mkdir()
        names = [f"{number}.bin" for number in range(random.randint(1, 4))]
        marker = json.dumps({"step": step, "files": names})
        is_marker_first = random.random() < 0.5
        if is_marker_first:
            (unit / "state.json").write_text(marker)
        for name in names:
            random.choice([in_one_write, in_many_writes, renamed])(unit / name, step)
            rest(SETTLE / 10)
        if not is_marker_first:
            (unit / "state.json").write_text(marker)
        rest(SETTLE * 1.5)
        old = folder / f"checkpoint-{step - 3}"
        with contextlib.suppress(FileNotFoundError):
            if random.random() < 0.5:
                shutil.rmtree(old)
            else:
                for entry in sorted(os.listdir(old)):  # the marker goes last
                    (old / entry).unlink()
                    rest(SETTLE / 20)
                old.rmdir()


# ---- files that are rewritten


def in_one_write(path: Path, version: int) -> None:
    with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:
        file.write(pages(version))


def in_many_writes(path: Path, version: int) -> None:
    with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:
        for _ in range(4):
            file.write(pages(version, FILE_BYTES // 4))


def renamed(path: Path, version: int) -> None:
    beside = path.with_name(f".tmp{os.getpid()}")
    beside.write_bytes(pages(version))
    beside.rename(path)


def truncated(path: Path, version: int) -> None:
    path.write_bytes(pages(version))


def with_a_rest(path: Path, version: int) -> None:
    """Held open, half of it new, for longer than the rule's quiet."""
    with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:
        file.write(pages(version, FILE_BYTES // 2))
        time.sleep(SETTLE * 2)
        file.write(pages(version, FILE_BYTES // 2))


def mapped(path: Path, version: int) -> None:
    """The same through a mapping, whose descriptor is closed: no event, and after the first touch no stamp, says that it is written."""
    if not path.exists():
        path.write_bytes(pages(version))
    with open(path, "r+b") as file:
        held = mmap.mmap(file.fileno(), 0)
    with held:
        for at in range(0, FILE_BYTES, PAGE):  # every page is touched, and none is new
            held[at] = held[at]
        half = FILE_BYTES // 2
        held[:half] = pages(version, half)
        time.sleep(SETTLE * 2)
        held[half:] = pages(version, half)


WRITERS: tuple[Write, ...] = (in_one_write, in_many_writes, renamed, truncated, with_a_rest, mapped)


def rewrite_for_ever(path: Path, write: Write) -> None:
    version = 0
    while True:
        version += 1
        write(path, version)
        time.sleep(random.choice([0.01, SETTLE * 1.3, SETTLE * 2]))


# ---- what was captured


def flaw(view: Path, reference: dict[str, Any]) -> str:
    """What is torn or missing in it."""
    versions = {path.name: set(struct.unpack(f"<{path.stat().st_size // 8}Q", path.read_bytes())) for path in view.glob("*.[bd]*")}
    sizes = {path.stat().st_size for path in view.glob("*.[bd]*")}
    if sizes != {FILE_BYTES}:
        return f"{reference['unit']}: sizes {sizes}"
    if any(len(found) != 1 for found in versions.values()):
        return f"{reference['unit']}: torn {versions}"
    if reference["unit_type"] == "folder":
        state = json.loads((view / "state.json").read_text())
        if set(state["files"]) != set(versions) or any(found != {state["step"]} for found in versions.values()):
            return f"{reference['unit']}: partial, {sorted(versions)} of {state}"
    return ""


def main() -> None:
    import modelcache
    from modelcache.client import shared

    folder, name, wanted = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.umask(0o077)
    folder.mkdir()
    fork = get_context("fork")
    trainers = []
    for number in range(4):
        (folder / f"run{number}").mkdir()
        trainers.append(fork.Process(target=rotate_for_ever, args=(folder / f"run{number}", 1000 * number), daemon=True))
    for write in WRITERS:
        for number in range(3):
            trainers.append(fork.Process(target=rewrite_for_ever, args=(folder / f"{write.__name__}{number}.dat", write), daemon=True))
    for trainer in trainers:
        trainer.start()
    parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    watcher = Watcher(Ask(str(folder), name), parent, folder.name, layouts.from_plain(RULES))
    watching = threading.Thread(target=watcher.run)
    watching.start()
    end = time.monotonic() + LONGEST_SECONDS
    while watcher.report().captured_count < wanted and time.monotonic() < end:
        watcher.wake()  # as events would
        time.sleep(0.05)  # so long nothing is missed that the test waits for
    watcher.end()
    watching.join()
    for trainer in trainers:
        trainer.kill()
        trainer.join()
    watcher.close()
    references = modelcache.list(name=name)
    flaws = []
    for reference in references:
        view = Path(modelcache.load(reference))
        flaws += [found for found in [flaw(view, reference)] if found]
        shared().leases.close()
    kinds = Counter("folder" if each["unit_type"] == "folder" else each["unit"][: -len("0.dat")] for each in references)
    print(json.dumps({"captured": len(references), "flaws": flaws, "kinds": kinds, "last_error": watcher.report().last_error}))


if __name__ == "__main__":
    main()
