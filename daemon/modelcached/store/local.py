"""The caller's side of a `put_file`: an open file, read by offset in threads."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from modelcached.errors import LocalMismatch, disk_errors
from modelcached.tasks import Pool

READ_BYTES = 1 << 20


@asynccontextmanager
async def opened(pool: Pool, file: Path | int | Callable[[], int]) -> AsyncIterator[int]:
    """A descriptor of the file, closed at the end (one that came as such stays open); a function opens it itself, in a thread."""
    if isinstance(file, int):
        yield file
        return
    handles: list[int] = []  # filled by the thread: a caller who is cancelled meanwhile closes it all the same

    def begin() -> None:
        if isinstance(file, Path):
            with disk_errors("opening a file for the store"):
                handles.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        else:
            handles.append(file())

    try:
        await pool.run(begin)
        yield handles[0]
    finally:
        for handle in handles:
            os.close(handle)


def scan(handle: int, start: int, length: int, *takers: Callable[[memoryview], object]) -> None:
    """Gives a span of the file, piece by piece, to each of the takers (blocks). A piece is theirs until they return."""
    buffer = memoryview(bytearray(min(READ_BYTES, length)))
    position, end = start, start + length
    while position < end:
        with disk_errors("reading a file for the store"):
            count = os.preadv(handle, [buffer[: end - position]], position)
        _check_end(count)
        for take in takers:
            take(buffer[:count])
        position += count


def read(handle: int, most_bytes: int, position: int) -> bytes:
    with disk_errors("reading a file for the store"):
        chunk = os.pread(handle, most_bytes, position)
    _check_end(len(chunk))
    return chunk


def _check_end(count: int) -> None:
    if not count:
        raise LocalMismatch("a file for the store became shorter while it was read", "save it again")
