"""A trainer that rewrites its files while it saves them, as hostilely as it can; a process of its own, for test_torn.

    python -m tests.torn_process FOLDER CAPTURES [enormous | quick]

Every file says one version all over: bytes of two are a torn capture. What was saved is looked at through `load`. One line of JSON
comes out: how many saves were whole, refused (FileChangedError), torn, and which files. It ends with the first torn one.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

PAGE = 4096
WHOLE_BYTES, MAPPED_BYTES, SMALL_BYTES = 2 << 20, 1 << 20, 100 << 10
LONGEST_WRITE = 0x7FFFF000  # of one system call
PAUSES = (0.0, 0.005, 0.02, 0.1, 0.2)
QUICK_PAUSES = (0.0, 0.0005, 0.002, 0.004, 0.008, 0.05)


def page(version: int) -> bytes:
    return struct.pack("<Q", version) * (PAGE // 8)


def in_one_write(path: Path, version: int, size: int = WHOLE_BYTES) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(page(version) * (size // PAGE))


def in_many_writes(path: Path, version: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        for _ in range(WHOLE_BYTES // PAGE // 16):
            file.write(page(version) * 16)


def truncated_first(path: Path, version: int) -> None:
    path.write_bytes(page(version) * (WHOLE_BYTES // PAGE))


def small(path: Path, version: int) -> None:
    in_one_write(path, version, SMALL_BYTES)


def mapped(path: Path, version: int) -> None:
    """Nothing but stores, through a mapping whose descriptor is closed; it stays for a while when all is done."""
    with open(path, "r+b") as file:
        pages = mmap.mmap(file.fileno(), 0)
    with pages:
        for start in range(0, MAPPED_BYTES, PAGE):
            pages[start : start + PAGE] = page(version)
        time.sleep(random.choice(PAUSES) / 8)
        for start in range(MAPPED_BYTES - PAGE, -1, -PAGE):
            pages[start : start + PAGE] = page(version + 1)


def quick(path: Path, version: int) -> None:
    """Begun and over between two ticks of the clock."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[:] = page(version) * (MAPPED_BYTES // PAGE)


def enormous(path: Path, version: int) -> None:
    """A machine that takes long to write takes long to copy: some of the copies are to get through."""
    began = time.monotonic()
    in_one_write(path, version, LONGEST_WRITE)
    time.sleep(4 * (time.monotonic() - began))  # in proportion, no guess


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "one-write.bin": in_one_write,
    "many-writes.bin": in_many_writes,
    "truncated.bin": truncated_first,
    "mapped.bin": mapped,
    "small.bin": small,
}
SIZES = dict.fromkeys(WRITERS, WHOLE_BYTES) | {"mapped.bin": MAPPED_BYTES, "small.bin": SMALL_BYTES}
Way = tuple[dict[str, Callable[[Path, int], None]], dict[str, int], tuple[float, ...]]
WAYS: dict[str, Way] = {
    "": (WRITERS, SIZES, PAUSES),
    "quick": ({"quick.bin": quick}, {"quick.bin": MAPPED_BYTES}, QUICK_PAUSES),
    "enormous": ({"enormous.bin": enormous}, {"enormous.bin": LONGEST_WRITE}, (2.0, 3.0)),
}


def write_for_ever(path: Path, write: Callable[[Path, int], None], pauses: tuple[float, ...]) -> None:
    version = 1
    while True:
        version += 2
        write(path, version)
        time.sleep(random.choice(pauses))


def torn_files(view: Path, sizes: dict[str, int]) -> list[str]:
    return [name for name, size in sizes.items() if not is_whole(view / name, size)]


def is_whole(path: Path, size: int) -> bool:
    with open(path, "rb") as file:
        first = file.read(PAGE)
        chunk = first[:8] * ((1 << 20) // 8)
        if path.stat().st_size != size:
            return False
        file.seek(0)
        return all(data == chunk[: len(data)] for data in iter(lambda: file.read(1 << 20), b""))


def main() -> None:
    import modelcache
    from modelcache.errors import FileChangedError

    folder, captures = Path(sys.argv[1]), int(sys.argv[2])
    writers, sizes, pauses = WAYS["".join(sys.argv[3:])]
    os.umask(0o077)
    folder.mkdir()
    for name, size in sizes.items():
        with open(folder / name, "wb") as file:
            for start in range(0, size, 1 << 20):
                file.write((page(1) * 256)[: size - start])
    fork = get_context("fork")
    processes = [fork.Process(target=write_for_ever, args=(folder / name, write, pauses), daemon=True) for name, write in writers.items()]
    outcomes: Counter[str] = Counter()
    torn: list[str] = []
    for process in processes:
        process.start()
    try:
        while outcomes.total() < captures and not torn:
            try:
                reference = modelcache.save(folder)
            except FileChangedError as error:
                outcomes["refused" if any(name in str(error) for name in writers) else "refused without a name"] += 1
                continue
            torn = torn_files(Path(modelcache.load(reference)), sizes)
            outcomes["torn" if torn else "whole"] += 1
    finally:
        for process in processes:
            process.kill()
            process.join()
    print(json.dumps({**outcomes, "files": torn}))


if __name__ == "__main__":
    main()
