"""What the hub gives away: bytes, their names, and where they lie.

Invariants: a name is what git and git-lfs would say (blob id = SHA-1 of "blob N\\0" + bytes, SHA-256 for LFS, an LFS file's blob id is
its pointer's); the same `Random` is the same bytes in every process; content above `IN_MEMORY_BYTES` lies in a file, so that it can be sent
without passing through Python.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

IN_MEMORY_BYTES = 64 << 10
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Random:
    """`size` bytes that depend on nothing but `seed` and `size`; no two blocks are alike, so bytes in a wrong place show."""

    seed: int | str
    size: int

    def chunks(self) -> Iterator[bytes]:
        if self.size <= BLOCK_BYTES:
            yield hashlib.shake_128(f"{self.seed}".encode()).digest(self.size)
            return
        base = hashlib.shake_128(f"{self.seed}".encode()).digest(BLOCK_BYTES)
        for block, start in enumerate(range(0, self.size, BLOCK_BYTES)):  # a rotation costs a memcpy; fresh random bytes cost 2 s a GB
            head = hashlib.sha512(f"{self.seed}:{block}".encode()).digest()
            turn = block * 4099 % BLOCK_BYTES
            yield (head + base[turn:] + base[:turn])[: min(BLOCK_BYTES, self.size - start)]

    def __bytes__(self) -> bytes:
        return b"".join(self.chunks())

    def __len__(self) -> int:
        return self.size


Source = bytes | Random | Path
Body = bytes | Random | Path  # what a response can be made of; a Path is sent by the kernel


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class Blob(NamedTuple):
    """One content as a listing shows it."""

    oid: str  # git's id; of the pointer when it is in LFS
    size: int
    sha256: str | None  # only for LFS: the protocol knows no other
    pointer_size: int
    body: Body

    def row(self, path: str) -> dict[str, Any]:
        """As the tree API shows it."""
        made: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256 is not None:
            made["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return made


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def many_path(number: int, folder: int) -> str:
    """The path of file `number` of commit_many: `folder` files in each folder; 0: all in one."""
    return f"{number // folder:05}/{number:07}.txt" if folder else f"{number:07}.txt"


def many_content(repo_id: str, number: int, size: int) -> Random:
    return Random(f"{repo_id}:{number}", size)


class Shelf:
    """The content on disk: `lfs/ab/<sha256>` (all that the second host needs) and `git/<id>` for large files outside LFS."""

    def __init__(self, state: Path) -> None:
        self._state = state
        (state / "lfs").mkdir(parents=True, exist_ok=True)
        (state / "git").mkdir(exist_ok=True)

    def lfs_path(self, sha256: str) -> Path:
        return self._state / "lfs" / sha256[:2] / sha256

    def put(self, source: Source, lfs: bool) -> Blob:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        if lfs:
            sha256, _ = self._write(source, hashlib.sha256(), self.lfs_path)
            pointer = lfs_pointer(sha256, size)
            return Blob(git_blob_id(pointer), size, sha256, len(pointer), self.lfs_path(sha256))
        if size > IN_MEMORY_BYTES:
            oid, path = self._write(source, hashlib.sha1(b"blob %d\0" % size), lambda name: self._state / "git" / name)
            return Blob(oid, size, None, 0, path)
        if isinstance(source, Path):
            source = source.read_bytes()
        return Blob(git_blob_id(bytes(source)), size, None, 0, source)  # a small Random stays one: 100,000 of them cost no memory

    def _write(self, source: Source, name_hash: _Hash, place: Callable[[str], Path]) -> tuple[str, Path]:
        descriptor, temp = tempfile.mkstemp(dir=self._state)
        with open(descriptor, "wb", buffering=0) as file:
            for chunk in _chunks(source):
                name_hash.update(chunk)
                file.write(chunk)
        path = place(name_hash.hexdigest())
        path.parent.mkdir(exist_ok=True)
        os.replace(temp, path)
        return name_hash.hexdigest(), path


def _chunks(source: Source) -> Iterator[bytes]:
    if isinstance(source, Random):
        yield from source.chunks()
    elif isinstance(source, bytes):
        yield source
    else:
        with source.open("rb") as file:
            while chunk := file.read(BLOCK_BYTES):
                yield chunk
