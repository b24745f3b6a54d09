"""Packs: small files of one tree as one uncompressed tar, with an index of where each one's bytes begin.

An ordinary tar, so `tar xf` gives the files back without us; the index (in the tree's record) lets single files be read by
range. The same files give the same pack, byte for byte. How a tree is packed is no part of its identity.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import LocalMismatch, disk_errors
from .model import Digest, TreeFile

PACKED_BYTES = 256 << 10  # smaller files travel in packs
PACK_BYTES = 64 << 20  # a pack of small files is closed when it is this large
SPAN_BYTES = 4 << 20  # small files that lie together are asked for together, up to so much
GAP_BYTES = 64 << 10  # and so much between them that nobody wants
COPY_BYTES = 1 << 20
_END_BYTES = 2 * tarfile.BLOCKSIZE  # of zeros
MTIME = 315_532_800  # seconds: 1980-01-01, as blobs have


class Packed(NamedTuple):
    path: str
    offset: int
    size: int


class Pack(NamedTuple):
    sha256: Digest
    size: int  # bytes of the tar
    files: tuple[Packed, ...]


def group(files: Iterable[TreeFile], limit: int = PACK_BYTES) -> list[list[TreeFile]]:
    """The files in order, cut into packs of about `limit` bytes."""
    groups: list[list[TreeFile]] = []
    room = 0
    for file in files:
        if not groups or file.size > room:
            groups.append([])
            room = limit
        groups[-1].append(file)
        room -= file.size
    return groups


def spans(files: Iterable[Packed]) -> list[list[Packed]]:
    """Files of one pack, cut into runs that are worth one request each: from a run's first offset to the end of its last file."""
    runs: list[list[Packed]] = []
    start = end = 0
    for file in sorted(files, key=lambda file: (file.offset, file.size)):  # an empty file before the one that begins there
        if not runs or file.offset - end > GAP_BYTES or file.offset + file.size - start > SPAN_BYTES:
            runs.append([])
            start = file.offset
        runs[-1].append(file)
        end = file.offset + file.size
    return runs


def size_of(files: Iterable[tuple[str, int, bool]]) -> int:
    """How many bytes the tar of these (path, size, executable) will have; before anybody knows what is in them."""
    return sum(_header_bytes(*file) + file[1] + -file[1] % tarfile.BLOCKSIZE for file in files) + _END_BYTES


def write(files: Sequence[tuple[TreeFile, Path]], target: Path) -> Pack:
    """Writes the tar into a new file (blocks) and tells its digest and index. LocalMismatch if a file is not what its name says."""
    whole = hashlib.sha256()
    position = 0
    index = []

    with disk_errors("packing small files"), open(target, "xb", buffering=COPY_BYTES) as tar:

        def put(data: bytes) -> None:
            nonlocal position
            whole.update(data)
            tar.write(data)
            position += len(data)

        for file, source in files:
            put(_header(file.path, file.size, file.executable))
            index.append(Packed(file.path, position, file.size))
            inner = hashlib.sha256()
            with open(source, "rb", buffering=0) as opened:
                while chunk := opened.read(COPY_BYTES):
                    inner.update(chunk)
                    put(chunk)
            if inner.hexdigest() != file.sha256:
                raise LocalMismatch(f"the blob of {file.path!r} is not what its name says", "modelcache verify looks at every blob")
            put(bytes(-file.size % tarfile.BLOCKSIZE))
        put(bytes(_END_BYTES))
    return Pack(Digest(whole.hexdigest()), position, tuple(index))


def _header_bytes(path: str, size: int, executable: bool) -> int:
    """The length of a header; most are plain ones, and need not be made to know it."""
    is_plain = len(path) <= tarfile.LENGTH_NAME and path.isascii() and size < 8 << 30
    return tarfile.BLOCKSIZE if is_plain else len(_header(path, size, executable))


def _header(path: str, size: int, executable: bool) -> bytes:
    info = tarfile.TarInfo(path)
    info.size, info.mtime, info.mode = size, MTIME, 0o755 if executable else 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
