"""Capture: a private copy of one file that a client has opened, taken from its descriptor alone (I7).

Bytes move by the best way both filesystems have: FICLONE (shares them), copy_file_range (in the kernel), read and write. The
file is read by offset, exactly as long as was said. If it looks different afterwards it has changed meanwhile, and the
copy is worth nothing; whether somebody has it open for writing is for its owner to find out, who may ask the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .errors import InvalidRequest

FICLONE = 0x40049409
COPY_BYTES = 8 << 20
READ_BYTES = 1 << 20
CANT_COPY = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ETXTBSY, errno.EPERM)
CANT_CLONE = (*CANT_COPY, errno.ENOTTY)


class Seen(NamedTuple):
    """What tells that a file is as it was: mtime alone is not enough, it is stamped when a write starts."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def look(descriptor: int, path: str) -> Seen:
    """The file behind a client's descriptor; InvalidRequest if it is none that may be captured."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise InvalidRequest(f"{path!r} is not a regular file", "save files, links and folders only")
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_PATH:
        raise InvalidRequest(f"{path!r} is not open for reading only", "open it with O_RDONLY")
    return Seen(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def capture(descriptor: int, path: str, size: int, target: Path, beat: Callable[[], None]) -> bool:
    """Copies `size` bytes into the new file `target` (blocks, on a hanging filesystem for ever); `beat` is called as they move.

    False: the file changed, or is not of that size; nothing is left.
    """
    before = look(descriptor, path)
    if before.size != size:
        return False
    copy(descriptor, size, target, beat)
    is_same = look(descriptor, path) == before and target.stat().st_size == size
    if not is_same:
        target.unlink()
    return is_same


def copy(source: int, size: int, target: Path, beat: Callable[[], None]) -> None:
    """Copies the first `size` bytes of a descriptor, or as many as there are, into a new private file."""
    made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if size and not _clone(source, made):
            _copy_bytes(source, size, made, beat)
        os.ftruncate(made, min(size, os.fstat(made).st_size))
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        os.close(made)


def clone(source: int, size: int, target: Path) -> bool:
    """Makes `target` share a whole file's bytes; False, and nothing is left, where the filesystem can't."""
    made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        is_done = _clone(source, made) and os.fstat(made).st_size == size
    finally:
        os.close(made)
    if not is_done:
        target.unlink()
    return is_done


def _clone(source: int, made: int) -> bool:
    try:
        fcntl.ioctl(made, FICLONE, source)
    except OSError as error:
        if error.errno in CANT_CLONE:
            return False
        raise
    return True


def _copy_bytes(source: int, size: int, made: int, beat: Callable[[], None]) -> None:
    done, in_kernel = 0, True
    while done < size:
        length = min(COPY_BYTES, size - done)
        if in_kernel:
            moved = _copy_in_kernel(source, made, length, done)
            in_kernel = moved > 0  # filesystems have been seen that say "end of file" where they mean "can't"
            if not in_kernel:
                continue
        else:
            moved = _write(made, os.pread(source, min(length, READ_BYTES), done), done)
        if not moved:
            return  # shorter than it was: the caller compares
        done += moved
        beat()


def _copy_in_kernel(source: int, made: int, length: int, offset: int) -> int:
    try:
        return os.copy_file_range(source, made, length, offset, offset)
    except OSError as error:
        if error.errno not in CANT_COPY:
            raise
        return 0


def _write(made: int, data: bytes, offset: int) -> int:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(made, rest, offset + len(data) - len(rest))
        rest = rest[count:]
    return len(data)
