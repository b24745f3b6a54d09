"""Leftovers: bytes that belong to nobody any more. They go before any tree does.

Downloads that nobody continues, blobs that no view shows and no flow has in hand, what was quarantined, and notes about trees that are
gone. What a `kill -9` in the wrong moment leaves is among them. They stay for the grace, in case somebody goes on with them, unless
a checkpoint needs the room.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from . import durable
from .blobs import Blobs
from .holds import Holds
from .layout import Layout
from .model import Digest, TreeId, is_digest
from .trees import Trees, age
from .usage import on_disk

SEARCH_SECONDS = 0.3  # somebody waits; what is not found then is found by a later search, which begins where this one ended
SETTLING_SECONDS = 60.0  # what is published, but shown only by a later request (an import that has paused), is nobody's meanwhile

Why = Literal["", "flight", "ended", "quarantine"]  # somebody is at it, or it has not lain there for long


class Leftover(NamedTuple):
    kind: str  # "download", "blob", "quarantine" or "note"
    path: Path
    size: int  # bytes on disk


class Search(NamedTuple):
    found: list[Leftover]
    kept: Mapping[str, int]  # bytes that nobody shows and that stay all the same, by the reason: `Why`

    @property
    def size(self) -> int:
        """Bytes that can go."""
        return sum(leftover.size for leftover in self.found)


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
        promised: Callable[[], Set[str]] = frozenset,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._layout = layout
        self._blobs = blobs
        self._trees = trees
        self._holds = holds
        self._grace_seconds = grace_seconds
        self._is_flying = is_flying  # whether a flight continues this download
        self._promised = promised  # names of downloads that are about to be continued
        self._clock = clock
        self._next_shard = 0
        self._aside: dict[Path, list[Path]] = {}

    def find(self, budget: int, is_save: bool = False) -> Search:
        """Leftovers of so many bytes, if that many can be found (blocks)."""
        found: list[Leftover] = []
        kept: Counter[str] = Counter()
        size, promised = 0, self._promised()
        for leftover, changed in self._all():
            if size >= budget:
                break
            why = self._why_kept(leftover, changed, promised, is_save)
            if why:
                kept[why] += leftover.size
            else:
                found.append(leftover)
                size += leftover.size
        return Search(found, kept)

    def _why_kept(self, leftover: Leftover, changed: float, promised: Set[str], is_save: bool) -> Why:
        if self._is_wanted(leftover) or (leftover.kind == "download" and leftover.path.name.partition(".")[0] in promised):
            return "flight"
        least = self._grace_seconds
        if is_save and leftover.kind != "note":
            least = min(least, SETTLING_SECONDS if leftover.kind == "blob" else -1.0)
        if age(changed, self._clock()) > least:
            return ""
        return "quarantine" if leftover.kind == "quarantine" else "ended"

    def _is_wanted(self, leftover: Leftover) -> bool:
        """Whether a flow is at it."""
        if leftover.kind == "download" and self._is_flying(leftover.path):
            return True
        return leftover.kind in ("download", "blob") and leftover.path.name[:64] in self._holds

    def set_aside(self, leftover: Leftover) -> bool:
        """Takes it out of sight, on the event loop; False when somebody wants it after all. Follow it with `remove`."""
        if self._is_wanted(leftover):
            return False
        if leftover.kind == "blob":
            aside = self._blobs.set_aside(Digest(leftover.path.name[:64]))[0]
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

    def _all(self) -> Iterator[tuple[Leftover, float]]:
        """With the time of its last change."""
        yield from self._files(self._layout.partials, "download")
        yield from self._files(self._layout.quarantine, "quarantine")
        yield from self._notes()
        yield from self._blobs_of_nobody()

    def _files(self, folder: Path, kind: str) -> Iterator[tuple[Leftover, float]]:
        """The oldest first."""
        found = []
        with os.scandir(folder) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    found.append((max(status.st_mtime, status.st_ctime), Leftover(kind, Path(file.path), on_disk(status))))
        yield from ((leftover, changed) for changed, leftover in sorted(found))

    def _notes(self) -> Iterator[tuple[Leftover, float]]:
        """Which tree an old artifact turned out to be, where that tree is gone."""
        for leftover, changed in self._files(self._layout.root / "legacy", "note"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                tree = _note_json.decode(leftover.path.read_bytes()).tree
                if not self._layout.tree(TreeId(tree)).exists():
                    yield leftover, changed

    def _blobs_of_nobody(self) -> Iterator[tuple[Leftover, float]]:
        """Goes round the shards, a little at a time: there may be a million blobs."""
        deadline = time.monotonic() + SEARCH_SECONDS
        shards = self._layout.shards()
        named: set[Digest] | None = None
        for _ in shards:
            if time.monotonic() > deadline:
                return
            for path, status in _unlinked(shards[self._next_shard]):
                digest = Digest(path.name[:64])
                if self._blobs.names(digest)[0]:
                    continue
                named = self._named() if named is None else named
                if digest not in named:
                    yield Leftover("blob", path, on_disk(status)), status.st_ctime
            self._next_shard = (self._next_shard + 1) % len(shards)

    def _named(self) -> set[Digest]:
        """Blobs of trees without a view: links tell nothing of them."""
        found: set[Digest] = set()
        for name in self._trees.names():
            if not self._trees.view(name).exists() and (tree := self._trees.load(name)) is not None:
                found.update(file.sha256 for file in tree.files)
        return found


def _unlinked(shard: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    with os.scandir(shard) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                status = file.stat(follow_symlinks=False)
                if status.st_nlink == 1 and is_digest(file.name[:64]):
                    found.append((Path(file.path), status))
    return found
