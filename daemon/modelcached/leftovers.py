"""Leftovers: bytes that belong to nobody any more. They go before any tree does.

Downloads that nobody continued for long, blobs that no view shows and no flow has in hand, what was quarantined, and notes about trees
that are gone. What a `kill -9` in the wrong moment leaves is among them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from . import durable
from .blobs import Blobs
from .holds import Holds
from .layout import Layout
from .model import Digest, TreeId, is_digest
from .trees import Trees
from .usage import on_disk

SEARCH_SECONDS = 0.3  # somebody waits; what is not found then is found by a later search, which begins where this one ended


class Leftover(NamedTuple):
    kind: str  # "download", "blob", "quarantine" or "note"
    path: Path
    size: int  # bytes on disk


class _Note(msgspec.Struct):
    tree: str


_note_json = msgspec.json.Decoder(_Note)


class Leftovers:
    """`_next_shard` and `_aside` are used by one search, or removal, at a time."""

    def __init__(
        self,
        layout: Layout,
        blobs: Blobs,
        trees: Trees,
        holds: Holds,
        grace_seconds: float,
        is_flying: Callable[[Path], bool],
    ) -> None:
        self._layout = layout
        self._blobs = blobs
        self._trees = trees
        self._holds = holds
        self._grace_seconds = grace_seconds
        self._is_flying = is_flying  # whether a flight continues this download
        self._next_shard = 0
        self._aside: dict[Path, list[Path]] = {}

    def find(self, budget: int) -> list[Leftover]:
        """Leftovers of so many bytes, if that many can be found (blocks)."""
        found, size = [], 0
        for leftover in self._all():
            if size >= budget:
                break
            found.append(leftover)
            size += leftover.size
        return found

    def set_aside(self, leftover: Leftover) -> bool:
        """Takes it out of sight, on the event loop; False when somebody wants it after all. Follow it with `remove`."""
        if leftover.kind == "blob":
            digest = Digest(leftover.path.name[:64])
            aside = [] if digest in self._holds else self._blobs.set_aside(digest)[0]
        elif leftover.kind == "download" and self._is_flying(leftover.path):
            aside = []
        else:
            aside = [self._layout.fresh("leftover")]
            try:
                durable.rename(leftover.path, aside[0])
            except FileNotFoundError:
                aside = []
        if aside:
            self._aside[leftover.path] = aside
        return bool(aside)

    def remove(self, leftover: Leftover) -> int:
        """The bytes freed (blocks)."""
        for path in self._aside.pop(leftover.path):
            path.unlink(missing_ok=True)
        return leftover.size

    def _all(self) -> Iterator[Leftover]:
        yield from self._files(self._layout.partials, "download")
        yield from self._files(self._layout.quarantine, "quarantine")
        yield from self._notes()
        yield from self._blobs_of_nobody()

    def _files(self, folder: Path, kind: str) -> Iterator[Leftover]:
        """The oldest first; none that changed within the grace."""
        found = []
        with os.scandir(folder) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    if self._is_old(max(status.st_mtime, status.st_ctime)):
                        found.append((status.st_mtime, Leftover(kind, Path(file.path), on_disk(status))))
        yield from (leftover for _, leftover in sorted(found))

    def _notes(self) -> Iterator[Leftover]:
        """Which tree an old artifact turned out to be, where that tree is gone."""
        for leftover in self._files(self._layout.root / "legacy", "note"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                tree = _note_json.decode(leftover.path.read_bytes()).tree
                if not self._layout.tree(TreeId(tree)).exists():
                    yield leftover

    def _blobs_of_nobody(self) -> Iterator[Leftover]:
        """Goes round the shards, a little at a time: there may be a million blobs."""
        deadline = time.monotonic() + SEARCH_SECONDS
        shards = self._layout.shards()
        named: set[Digest] | None = None
        for _ in shards:
            if time.monotonic() > deadline:
                return
            for path, status in _unlinked(shards[self._next_shard]):
                digest = Digest(path.name[:64])
                if not self._is_old(status.st_ctime) or self._blobs.names(digest)[0]:
                    continue
                named = self._named() if named is None else named
                if digest not in named:
                    yield Leftover("blob", path, on_disk(status))
            self._next_shard = (self._next_shard + 1) % len(shards)

    def _named(self) -> set[Digest]:
        """Blobs of trees without a view: links tell nothing of them."""
        found: set[Digest] = set()
        for name in self._trees.names():
            if not self._trees.view(name).exists() and (tree := self._trees.load(name)) is not None:
                found.update(file.sha256 for file in tree.files)
        return found

    def _is_old(self, moment: float) -> bool:
        return time.time() - moment > self._grace_seconds


def _unlinked(shard: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    with os.scandir(shard) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                status = file.stat(follow_symlinks=False)
                if status.st_nlink == 1 and is_digest(file.name[:64]):
                    found.append((Path(file.path), status))
    return found
