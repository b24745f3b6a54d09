"""Reading a tar that lies somewhere else, once, from its front to its end, without keeping it.

Its headers and small members come in windows of a few MiB; what a caller fetches of a large member by itself is passed over. Names and
kinds are checked as they are read (I9): a member is a file, a second name of one, a link, or a folder.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from .errors import StoreMismatch, UnsafePath
from .model import check_paths
from .spans import Span

WINDOW_BYTES = 4 << 20
MAX_HEADER_BYTES = 1 << 20  # of one member, with the long names before it
_BEFORE_A_HEADER = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Member(NamedTuple):
    path: str  # "" is the folder that holds everything
    kind: str  # "file", "second name", "link" or "folder"
    target: str  # of a link; of a second name, the file's path
    size: int  # bytes of a file
    offset: int  # where they begin in the tar
    executable: bool


class TarReader:
    """`fetch` gives the bytes of a span, at most a window's. One caller at a time."""

    def __init__(self, size: int, fetch: Callable[[Span], Awaitable[bytes]]) -> None:
        self._size = size
        self._fetch = fetch
        self._next = 0  # where the next header begins
        self._start = 0  # of the window
        self._window = bytearray()

    async def next(self) -> Member | None:
        """The next member; None at the end. StoreMismatch if this is no whole tar, UnsafePath for what must not be in one."""
        position, header = self._next, b""
        try:
            while True:
                block = await self._read(position, tarfile.BLOCKSIZE)
                if not header and not any(block):
                    return None
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                header += block
                position += len(block)
                if info.type not in _BEFORE_A_HEADER:
                    break
                if info.size > MAX_HEADER_BYTES - len(header):
                    raise StoreMismatch("the tar has a name that is too long", "it is damaged")
                header += await self._read(position, _padded(info.size))
                position += _padded(info.size)
            with tarfile.TarFile(fileobj=io.BytesIO(header), encoding="utf-8", errors="surrogateescape") as tar:
                found = tar.next()
            assert found is not None, "a header was read"
        except (tarfile.TarError, ValueError) as error:
            raise StoreMismatch(f"the tar can't be read at {self._next}: {error}", "it is damaged") from error
        size = found.size if found.isreg() else 0
        self._next = position + _padded(size)
        if position + size > self._size:
            raise self._too_short()
        return _member(found, size, position)

    async def data(self, member: Member) -> bytes:
        """All bytes of the small file that came last."""
        return await self._read(member.offset, member.size)

    def known(self, member: Member) -> bytes:
        """What has come already, from its first byte on, of the file that came last."""
        begin = member.offset - self._start
        return bytes(self._window[begin : begin + member.size]) if begin >= 0 else b""

    async def _read(self, start: int, count: int) -> bytes:
        if start + count > self._size:
            raise self._too_short()
        if self._start <= start <= self._start + len(self._window):
            del self._window[: start - self._start]
        else:
            self._window.clear()
        self._start = start
        while len(self._window) < count:
            at = self._start + len(self._window)
            self._window += await self._fetch((at, min(at + WINDOW_BYTES, self._size)))
        return bytes(self._window[:count])

    def _too_short(self) -> StoreMismatch:
        return StoreMismatch(f"the tar breaks off after {self._size} bytes", "it is damaged")


def _member(found: tarfile.TarInfo, size: int, offset: int) -> Member:
    path = found.name
    if found.isdir():
        kind = "folder"
    elif found.issym():
        kind = "link"
    elif found.islnk():
        kind = "second name"
    elif found.isreg() and not found.issparse():
        kind = "file"
    else:
        raise UnsafePath(f"the tar has {path[:200]!r}, which is neither file nor link nor folder", "save it without")
    if path or kind != "folder":
        check_paths([path], "the tar")
    return Member(path, kind, found.linkname, size, offset, bool(found.mode & 0o100))


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
