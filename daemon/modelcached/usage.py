"""Usage: how many bytes lie under blobs/. Counted by one walk, which nobody waits for, and kept by increments from then on.

There is no index: a sum for each of the 256 shards is all that is remembered. A shard that changes while it is being counted is
counted again, so the sums are exact whatever goes on meanwhile.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from .layout import Layout

TRIES = 3  # of a shard that changes all the time; then the count may be off by what came and went meanwhile
BLOCK = 512


class Usage:
    """`_sums`, `_counting` and `_is_changed` belong to whoever holds `_lock`; blobs come and go in many threads."""

    def __init__(self, layout: Layout) -> None:
        self._shards = layout.shards()
        self._sums: dict[str, int] = {}
        self._counting = ""
        self._is_changed = False
        self._lock = threading.Lock()

    @property
    def is_counted(self) -> bool:
        return len(self._sums) == len(self._shards)

    @property
    def size_bytes(self) -> int:
        """As far as it is counted."""
        with self._lock:
            return sum(self._sums.values())

    def note(self, blob: Path, change: int) -> None:
        """A blob came (bytes on disk), or went (the same, negative)."""
        shard = blob.parent.name
        with self._lock:
            self._is_changed |= shard == self._counting
            if shard in self._sums:
                self._sums[shard] += change

    def count(self, number: int) -> None:
        """Counts one shard of 256 (blocks)."""
        shard = self._shards[number]
        for _ in range(TRIES):
            with self._lock:
                self._counting, self._is_changed = shard.name, False
            found = _size_of(shard)
            with self._lock:
                self._counting = ""
                if not self._is_changed:
                    break
        with self._lock:
            self._sums[shard.name] = found

    def __repr__(self) -> str:
        return f"<Usage {self.size_bytes} bytes in {len(self._sums)} shards>"


def on_disk(found: os.stat_result) -> int:
    """What a file takes, in bytes."""
    return found.st_blocks * BLOCK


def _size_of(shard: Path) -> int:
    total = 0
    with os.scandir(shard) as files:
        for file in files:
            try:
                total += on_disk(file.stat(follow_symlinks=False))
            except FileNotFoundError:  # it went meanwhile
                continue
    return total
