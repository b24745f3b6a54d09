"""The process behind `kernel.fuse`: a filesystem that passes all on to a folder, writes down what it was told, and fails as asked."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import mfusepy

_STAT = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_ino")
_TIMES = ("st_atime", "st_mtime", "st_ctime")


class PassOn(mfusepy.Operations):  # type: ignore[misc, unused-ignore]
    use_ns = True

    def __init__(self, kept: str, calls: str, refuse: str) -> None:
        self._kept = kept
        self._calls = os.open(calls, os.O_WRONLY | os.O_APPEND)
        name, _, number = refuse.partition(":")
        self._refused, self._number = name, getattr(errno, number or "EIO")

    def init(self, path: str) -> None:
        os.write(1, b"mounted\n")

    def _told(self, call: str, path: str) -> str:
        """Writes a change down; where it happens."""
        os.write(self._calls, f"{call} {path}\n".encode())
        if call == self._refused:
            raise mfusepy.FuseOSError(self._number)
        return self._kept + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._kept + path)
        return {**{name: getattr(found, name) for name in _STAT}, **{name: getattr(found, f"{name}_ns") for name in _TIMES}}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._kept + path)]

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._kept)
        return {name: getattr(found, name) for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree")}

    def open(self, path: str, flags: int) -> int:
        return os.open(self._kept + path, flags)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._told("create", path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._told("write", path)
        return os.pwrite(fh, data, offset)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._told("truncate", path), length)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._told("chmod", path), mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int] = (0, 0)) -> int:
        os.utime(self._told("utimens", path), ns=times)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._told("mkdir", path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._told("rmdir", path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._told("unlink", path))
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._told("rename", old), self._kept + new)
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._kept + source, self._told("link", target))
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._told("fsync", path)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._told("fsyncdir", path)
        return 0


if __name__ == "__main__":
    kept, mount, calls, refuse, device = sys.argv[1:]
    options: dict[str, Any] = {"blkdev": True, "fsname": device} if device else {"fsname": "passed-on"}
    mfusepy.FUSE(PassOn(kept, calls, refuse), mount, foreground=True, nothreads=True, **options)
