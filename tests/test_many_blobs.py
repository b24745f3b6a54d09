"""A million blobs: a daemon is ready as fast as with none, counts them behind, and holds none of them in memory.

How long it takes depends on the machine and on who else uses it: it is printed, not asserted. On two quiet cores: less than a second.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from .daemon import Daemon
from .saves import MIB, until

MANY = 1_000_000
FLAT_BYTES = 16 * MIB


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_million_blobs(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root"):
        pass  # makes the folders
    for number in range(MANY):
        _make(tmp_path / "root", str(number).encode(), b"")
    _make(tmp_path / "root", b"one that is not empty", os.urandom(MIB))
    begun = time.perf_counter()
    with Daemon.start(tmp_path / "root", scrub_rate=0) as daemon:  # their names are no hashes of theirs
        ready, before = time.perf_counter() - begun, daemon.memory_bytes
        until(lambda: daemon.status()["room"]["is_counted"], 120)
        counted, after = time.perf_counter() - begun, daemon.memory_bytes
        print(f"ready after {ready:.2f} s, counted after {counted:.1f} s, RSS {before / MIB:.0f} -> {after / MIB:.0f} MiB")
        assert daemon.status()["room"]["used_bytes"] == MIB
        assert after - before <= FLAT_BYTES


def _make(root: Path, name: bytes, data: bytes) -> None:
    digest = hashlib.sha256(name).hexdigest()
    handle = os.open(f"{root}/blobs/sha256/{digest[:2]}/{digest}", os.O_WRONLY | os.O_CREAT, 0o444)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)

