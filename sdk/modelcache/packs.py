"""Packs: small files, one after another in one descriptor, because a descriptor for each would cost more than its bytes.

The bytes lie in memory (a memfd); where this Python or container has none, in a file of the temp folder that has no name.
They are put there by write, never through a mapping: running out of room is an error then, not the end of the process.
"""

from __future__ import annotations

import os
from typing import List

PACK_BYTES = 8 << 20  # several are on their way at a time


class Packer:
    """Collects files' bytes; one buffer serves all packs of a save."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.size = 0  # bytes collected

    def add(self, descriptor: int, size: int) -> bool:
        """Takes the file's first `size` bytes; there has to be room for them. False if it has fewer: then nothing is taken."""
        if not self._buffer:
            self._buffer = bytearray(PACK_BYTES)
        with memoryview(self._buffer) as view:
            done = 0
            while done < size:
                count = os.preadv(descriptor, [view[self.size + done : self.size + size]], done)
                if not count:
                    return False
                done += count
        self.size += size
        return True

    def seal(self) -> int:
        """A read-only descriptor of all that was collected: the caller's, to close. Collecting starts again."""
        writable, readable = _unnamed_file()
        try:
            with memoryview(self._buffer) as view:
                done = 0
                while done < self.size:
                    done += os.pwrite(writable, view[done : self.size], done)
        except BaseException:
            os.close(readable)
            raise
        finally:
            os.close(writable)
        self.size = 0
        return readable


def _unnamed_file() -> List[int]:
    """Two descriptors of a new file without a name: one to write, one to read."""
    if hasattr(os, "memfd_create"):  # a Python built for old C libraries lacks it
        try:
            writable = os.memfd_create("modelcache-pack", os.MFD_CLOEXEC)
        except OSError:  # a sandbox may refuse
            pass
        else:
            try:
                return [writable, os.open("/proc/self/fd/%d" % writable, os.O_RDONLY | os.O_CLOEXEC)]
            except OSError:  # no /proc here
                os.close(writable)
    path = os.path.join(os.environ.get("TMPDIR") or "/tmp", ".modelcache-%d-%s.pack" % (os.getpid(), os.urandom(6).hex()))
    writable = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        return [writable, os.open(path, os.O_RDONLY | os.O_CLOEXEC)]
    except BaseException:
        os.close(writable)
        raise
    finally:
        os.unlink(path)
