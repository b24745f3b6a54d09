"""Save: a client hands over files, and goes on as soon as they are safe on this node (I3).

The story: open (is there room?), copy each file from its descriptor into the spool, close: the spool entry gets its name, and only
then "saved" is said. The hashing and the upload find the entry in the spool, and take it from there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from . import capture, durable, packs
from .blobs import Blobs
from .errors import InvalidRequest, SaveUnknown, disk_errors
from .lanes import Lanes
from .model import Caller, Tree, TreeId, check_links, check_paths
from .references import reference_key
from .room import Room
from .spool import COPIES_AT_ONCE, Entry, OpenSave, SavedFile, Spool
from .tasks import Pool, each, finished
from .trees import Trees

MAX_FILES = 1_000_000
log = logging.getLogger(__name__)

Handed = tuple[str, int, bool]  # path, size in bytes, executable


class Save:
    def __init__(
        self, room: Room, spool: Spool, blobs: Blobs, trees: Trees, pool: Pool, lanes: Lanes, group: asyncio.TaskGroup
    ) -> None:
        self._room = room
        self._spool = spool
        self._blobs = blobs
        self._trees = trees
        self._pool = pool
        self._lanes = lanes
        self._group = group

    async def open(
        self,
        caller: Caller,
        reference: dict[str, Any],
        size: int,
        files: int,
        storage_format: str,
        is_durable: bool,
        supersede: bool,
        store: str,
    ) -> tuple[OpenSave, int]:
        """An open save, and the descriptor that keeps it open for its client."""
        if files > MAX_FILES:
            raise InvalidRequest(f"{files} files are too many for one save", f"at most {MAX_FILES}")
        await self.drop_abandoned()
        self._spool.require_quota(caller.uid, size)  # before anything is evicted for it
        # A tar is put together on the disk before it is sent (I6).
        await self._room.admit_save(2 * size if storage_format == "tar" else size, "the save")

        def make(name: str) -> Entry:
            now = time.time()
            complete = {**reference, "created_on": datetime.fromtimestamp(now, UTC).isoformat(), "save_id": name}
            return Entry(name, caller.uid, now, complete, storage_format, store, is_durable, supersede, [], [], [])

        return self._spool.begin(make, size)

    async def keep_tree(self, caller: Caller, reference: dict[str, Any], name: TreeId, store: str) -> dict[str, Any]:
        """Saves what lies on this node already: the entry's files are further names of its blobs, so nothing is copied or hashed."""
        tree = await self._pool.run(self._trees.load, name)
        if tree is None:
            raise SaveUnknown(f"the tree {name[:12]} is not on this node", "ask for it again, then save it")
        save, alive = await self.open(caller, reference, 0, len(tree.files), "files", False, False, store)
        save.entry.linked = True
        try:
            with disk_errors("saving what is here"):
                await self._pool.run(self._link, save, tree)
                await self._pool.run(self._spool.note_tree, save, name)
            return await self.close(save, list(tree.links), list(tree.folders))
        except BaseException:
            await self.drop(save)
            raise
        finally:
            os.close(alive)

    def _link(self, save: OpenSave, tree: Tree) -> None:
        for file in tree.files:
            source = save.next_source("files")
            blob, target = self._blobs.path(file.sha256), save.folder / source
            if not durable.link(blob, target):
                shutil.copyfile(blob, target)
            save.files[file.path] = SavedFile(file.path, file.size, file.executable, source)

    async def take(self, save: OpenSave, files: list[Handed], descriptors: tuple[int, ...]) -> list[int]:
        """Captures large files; the positions of those that changed meanwhile."""
        changed: list[int] = []
        with taking(save, files) as captured:
            sources = [save.next_source("files") for _ in files]

            async def take_one(position: int) -> None:
                path, size, executable = files[position]
                if await self._capture(save, descriptors[position], path, size, sources[position]):
                    save.add(sources[position], [SavedFile(path, size, executable, sources[position])])
                    captured.append(size)
                else:
                    changed.append(position)

            await each(range(len(files)), take_one, COPIES_AT_ONCE)
        return sorted(changed)

    async def take_pack(self, save: OpenSave, files: list[Handed], descriptor: int) -> None:
        """Captures small files that come one after another in one descriptor."""
        with taking(save, files) as captured:
            size, source, offset = sum(size for _, size, _ in files), save.next_source("packs"), 0
            if not await self._capture(save, descriptor, "pack", size, source):
                raise InvalidRequest("a pack is not as long as its files", "hand over all bytes of the files, one file after another")
            packed = []
            for path, length, executable in files:
                packed.append(SavedFile(path, length, executable, source, offset))
                offset += length
            save.add(source, packed)
            captured.append(size)

    async def close(self, save: OpenSave, links: list[tuple[str, str]], folders: list[str]) -> dict[str, Any]:
        """Keeps the save; its complete reference. Nothing is said before the spool entry is safe (I3)."""
        if save.capturing:
            raise InvalidRequest("files of this save are still being copied", "wait for the replies before closing it")
        discard = self._spool.forget(save)  # nobody else may touch it from here on
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._group.create_task(self._keep(save, save.links + links, save.folders + folders, discard, kept))
        await asyncio.shield(kept)  # a caller who leaves now has saved all the same
        return save.entry.reference

    async def drop(self, save: OpenSave) -> None:
        await finished(self._pool.run(self._spool.forget(save)))

    async def drop_abandoned(self) -> None:
        for save in self._spool.abandoned():
            log.info("an abandoned save is dropped", extra={"save": save.entry.id, "key": save.entry.key})
            await self.drop(save)

    async def _keep(
        self, save: OpenSave, links: list[tuple[str, str]], folders: list[str], discard: Callable[[], None], kept: asyncio.Future[None]
    ) -> None:
        """The outcome travels in the future: a failure is the caller's, not the daemon's."""
        try:
            with disk_errors("keeping the save"):
                await self._pool.run(_complete, save, links, folders)
                await self._pool.run(self._spool.keep, save)
        except BaseException as error:
            if not isinstance(error, Exception):
                kept.cancel()
                raise
            await self._pool.run(discard)
            kept.set_exception(error)
            kept.exception()  # retrieved: the caller may have left
        else:
            self._spool.add_kept(save.entry)
            kept.set_result(None)

    async def _capture(self, save: OpenSave, descriptor: int, path: str, size: int, source: str) -> bool:
        with disk_errors(f"capturing {path!r}"):
            own = os.dup(descriptor)  # a copy that hangs outlives the request, and its descriptors
            target = save.folder / source
            return await self._lanes.run(
                save.entry.uid, save.lanes, lambda beat: capture.capture(own, path, size, target, beat), lambda: os.close(own)
            )


@contextmanager
def taking(save: OpenSave, files: list[Handed]) -> Iterator[list[int]]:
    """Takes the files' bytes from what was promised, but for those that are not `captured` in the end.

    A path that is handed over again gives back its own; one in a pack does together with the last of that pack: until then its
    bytes stay where they are.
    """
    check_paths([path for path, _, _ in files], "save")
    size = sum(size for _, size, _ in files)
    earlier = [save.files[path] for path, _, _ in files if path in save.files]
    room = save.room_left + sum(save.unnamed(earlier).values())
    if size > room or any(size < 0 for _, size, _ in files):
        raise InvalidRequest("the save is larger than was said when it was opened", "open another one")
    if len(save.files) - len(earlier) + len(files) > MAX_FILES:
        raise InvalidRequest("the save has too many files", f"at most {MAX_FILES}")
    save.replace(earlier)
    save.room_left -= size
    save.capturing += 1
    captured: list[int] = []
    try:
        yield captured
    finally:
        save.capturing -= 1
        save.room_left += size - sum(captured)


def _complete(save: OpenSave, links: list[tuple[str, str]], folders: list[str]) -> None:
    """Makes an entry of all that was handed over, or refuses it by name (I9)."""
    entry = save.entry
    check_paths([*save.files, *(path for path, _ in links), *folders], "save")
    check_links(links)
    entry.files = sorted(save.files.values(), key=lambda file: file.path)
    entry.links, entry.folders = sorted(links), sorted(folders)
    entry.reference |= {
        "size": _stored_size(entry),
        "files": len(entry.files),
        "storage_format": entry.storage_format,
        "store": entry.store,
        "url": f"{entry.store}/{reference_key(entry.key)}",
        "blocked_seconds": round(max(0.0, time.time() - entry.created), 3),
    }


def _stored_size(entry: Entry) -> int:
    """Bytes of the files; of a save that becomes a tar, those of the tar. Without files there is none."""
    if entry.storage_format != "tar" or not entry.files:
        return entry.size
    return packs.size_of((file.path, file.size, file.executable) for file in entry.files)
