"""Depot: brings a tree to a store: the blobs it lacks, small ones in packs, then the tree's record. What names the tree is the caller's.

The caller has named the tree in the store before, and makes it known to everybody after. In between, the depot waits until a garbage
collection that may not have read that name deletes no more, and looks at everything again: what is missing, or older than half the
collection's grace by the store's own clock, is put again. So nothing ever names what is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from . import packs
from .blobs import Blobs
from .gc_claim import Rounds
from .layout import Layout
from .model import Digest, Tree, TreeFile, TreeId
from .packs import PACKED_BYTES, Pack
from .references import Record, blob_key, encode_record, tree_key
from .store import Store
from .tasks import Pool, each

BLOBS_AT_ONCE = 4
HEADS_AT_ONCE = 16

PutFile = Callable[[Digest, Path, int], Awaitable[None]]  # a blob, the file with its bytes, its size
RoomFor = Callable[[Path, int], AbstractAsyncContextManager[object]]  # a file that is going to be written while the block runs, its size


def _unasked(path: Path, size: int) -> AbstractAsyncContextManager[object]:
    return contextlib.nullcontext()


class Depot:
    def __init__(self, layout: Layout, blobs: Blobs, pool: Pool, grace_seconds: float) -> None:
        self._layout = layout
        self._blobs = blobs
        self._pool = pool
        self._half_grace_seconds = grace_seconds / 2
        self._rounds: dict[str, Rounds] = {}  # by store

    async def bring(
        self,
        store: Store,
        name: TreeId,
        tree: Tree,
        put_file: PutFile,
        is_tar: bool = False,
        doubts: bool = False,
        room_for: RoomFor = _unasked,
    ) -> Record:
        """The tree's record, once it and everything it names is in the store.

        With `is_tar` all files are in one pack; with `doubts` packs are put again that are there: somebody has read wrong bytes.
        A pack is put together on the disk, and `room_for` is asked before (I6).
        """
        record = Record(tree, await self._put_blobs(store, tree, put_file, is_tar, doubts, room_for))
        await store.put(tree_key(name), await self._pool.run(encode_record, *record))
        await self._rounds.setdefault(store.url, Rounds(store)).passed()
        await self._put_again_if_old(store, name, record, put_file, room_for)
        return record

    async def _put_blobs(
        self, store: Store, tree: Tree, put_file: PutFile, is_tar: bool, doubts: bool, room_for: RoomFor
    ) -> tuple[Pack, ...]:
        small = [file for file in tree.files if is_tar or file.size < PACKED_BYTES]
        large = {file.sha256: file.size for file in tree.files if not is_tar and file.size >= PACKED_BYTES}

        async def put(blob: tuple[Digest, int]) -> None:
            digest, size = blob
            found = await store.head(blob_key(digest))
            if found is None or found.size != size:
                await put_file(digest, self._blobs.path(digest), size)

        await each(large.items(), put, BLOBS_AT_ONCE)
        groups = [small] if is_tar and small else packs.group(small)
        return tuple([await self._put_pack(store, group, put_file, doubts, room_for) for group in groups])

    async def _put_pack(self, store: Store, files: list[TreeFile], put_file: PutFile, doubts: bool, room_for: RoomFor) -> Pack:
        async with self._packed(files, room_for) as (pack, path):
            found = await store.head(blob_key(pack.sha256))
            if doubts or found is None or found.size != pack.size:
                await put_file(pack.sha256, path, pack.size)
        return pack

    async def _put_again_if_old(self, store: Store, name: TreeId, record: Record, put_file: PutFile, room_for: RoomFor) -> None:
        """What a collection took away, or could, is put again."""
        oldest = await store.now() - self._half_grace_seconds

        async def is_old(key: str) -> bool:
            found = await store.head(key)
            return found is None or found.modified < oldest

        if await is_old(tree_key(name)):
            await store.put(tree_key(name), await self._pool.run(encode_record, *record))
        packed = {file.path for pack in record.packs for file in pack.files}
        large = {file.sha256: file.size for file in record.tree.files if file.path not in packed}
        by_path = {file.path: file for file in record.tree.files}

        async def put(blob: tuple[Digest, int]) -> None:
            digest, size = blob
            if await is_old(blob_key(digest)):
                await put_file(digest, self._blobs.path(digest), size)

        await each(large.items(), put, HEADS_AT_ONCE)
        for pack in record.packs:
            if await is_old(blob_key(pack.sha256)):
                async with self._packed([by_path[file.path] for file in pack.files], room_for) as (_, path):
                    await put_file(pack.sha256, path, pack.size)

    @contextlib.asynccontextmanager
    async def _packed(self, files: Sequence[TreeFile], room_for: RoomFor) -> AsyncIterator[tuple[Pack, Path]]:
        path = self._layout.fresh("pack")
        size = await self._pool.run(lambda: packs.size_of((file.path, file.size, file.executable) for file in files))
        async with room_for(path, size):
            try:
                yield await self._pool.run(packs.write, [(file, self._blobs.path(file.sha256)) for file in files], path), path
            finally:
                path.unlink(missing_ok=True)
