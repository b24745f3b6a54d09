"""The verbs of what tasks keep: save, load, list, delete, flush, collect. Is it sound, may this caller do it, which store is meant?

Saves belong, on this node, to the uid that made them: while one waits in the spool, others can neither list, load, flush nor delete it, and
are told what they are told of a key that nothing has (I8). The store is one trust domain: what is there, whoever may use a daemon with
that store may load.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from modelcache.protocol import (
    DeleteReference,
    Flush,
    FlushReply,
    GcStore,
    Load,
    LoadFolder,
    LoadReply,
    Progress,
    References,
    SaveClose,
    SaveClosed,
    SaveFiles,
    SaveFilesReply,
    SaveLinks,
    SaveOpen,
    SaveOpened,
    SavePack,
    SaveTree,
)

from .collect import Collect
from .errors import InUse, InvalidRequest, NotPermitted, ReferenceNotFound, SaveDamaged
from .leases import Leases
from .load import Loaded, Loader
from .meter import TICK_SECONDS, Report
from .model import Caller, Reply, TreeId, is_digest, require_owner
from .references import check_key, encode_reference
from .save import MAX_FILES, Save
from .spool import Spool
from .stores import Stores
from .tasks import within
from .trees import Trees
from .upload import Upload

STORAGE_FORMATS = ("files", "tar")
MAX_DRAFT_BYTES = 512 << 10  # of a reference
log = logging.getLogger(__name__)

Verb = Callable[[Any, Caller, Report, tuple[int, ...]], Awaitable[Reply]]


class Keeping:
    def __init__(
        self, save: Save, upload: Upload, loader: Loader, collect: Collect, spool: Spool, stores: Stores, trees: Trees, leases: Leases
    ) -> None:
        self._save = save
        self._upload = upload
        self._loader = loader
        self._collect = collect
        self._spool = spool
        self._stores = stores
        self._trees = trees
        self._leases = leases
        self.verbs: dict[str, tuple[type, Verb]] = {
            "save_open": (SaveOpen, self._open),
            "save_tree": (SaveTree, self._tree),
            "save_files": (SaveFiles, self._files),
            "save_pack": (SavePack, self._pack),
            "save_links": (SaveLinks, self._links),
            "save_close": (SaveClose, self._close),
            "load": (Load, self._load),
            "load_folder": (LoadFolder, self._load_folder),
            "references": (References, self._references),
            "delete": (DeleteReference, self._delete),
            "flush": (Flush, self._flush),
            "gc_store": (GcStore, self._gc_store),
        }
        self.taking = frozenset({"save_files", "save_pack"})

    @property
    def is_busy(self) -> bool:
        """Whether saves are on their way to their stores."""
        return bool(self._spool.entries)

    async def _open(self, params: SaveOpen, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        _check_draft(params.reference)
        if params.storage_format not in STORAGE_FORMATS:
            raise InvalidRequest(f"unknown storage_format {params.storage_format!r}", f"one of {', '.join(STORAGE_FORMATS)}")
        if params.size_bytes < 0 or params.files < 0:
            raise InvalidRequest("a save has no negative size", "say how many bytes and files will come")
        store = self._stores.named(params.store)
        save, alive = await self._save.open(
            caller, params.reference, params.size_bytes, params.files, params.storage_format, params.durable, params.supersede, store
        )
        return Reply(SaveOpened(save.entry.id), (alive,))

    async def _tree(self, params: SaveTree, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        _check_draft(params.reference)
        tree = TreeId(params.tree)
        if not is_digest(tree):
            raise InvalidRequest(f"{tree[:80]!r} names no tree", "a tree is what fetch and load reply")
        if not self._trees.may_enter(tree, caller):
            raise NotPermitted(f"uid {caller.uid} has not been shown the tree {tree[:12]}", "ask for it with fetch or load first")
        reference = await self._save.keep_tree(caller, params.reference, tree, self._stores.named(params.store))
        log.info("saved", extra={"key": reference["key"], "tree": tree})
        return Reply(SaveClosed(reference))

    async def _files(self, params: SaveFiles, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        if len(descriptors) != len(params.files):
            raise InvalidRequest(f"{len(params.files)} files came with {len(descriptors)} descriptors", "one for each")
        save = self._spool.opened(params.save, caller.uid)
        return Reply(SaveFilesReply(await self._save.take(save, params.files, descriptors)))

    async def _pack(self, params: SavePack, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        if len(descriptors) != 1:
            raise InvalidRequest(f"a pack came with {len(descriptors)} descriptors", "it has one")
        save = self._spool.opened(params.save, caller.uid)
        await self._save.take_pack(save, params.files, descriptors[0])
        return Reply(SaveFilesReply([]))

    async def _links(self, params: SaveLinks, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        save = self._spool.opened(params.save, caller.uid)
        save.links += params.links
        save.folders += params.folders
        if len(save.links) + len(save.folders) > MAX_FILES:
            raise InvalidRequest("a save has too many links and empty folders", f"at most {MAX_FILES}")
        return Reply({})

    async def _close(self, params: SaveClose, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        start, captured = time.monotonic(), time.time()
        save = self._spool.opened(params.save, caller.uid)
        if params.drop:
            await self._save.drop(save)
            return Reply({})
        reference = await self._save.close(save, params.links, params.folders)
        log.info(
            "saved",
            extra={
                "key": save.entry.key,
                "files": len(save.entry.files),
                "bytes": save.entry.size,
                "seconds": round(max(0.0, time.time() - save.entry.created), 6),
                "capture_seconds": round(max(0.0, captured - save.entry.created), 6),
                "keep_seconds": round(time.monotonic() - start, 6),
            },
        )
        return Reply(SaveClosed(reference))

    async def _load(self, params: Load, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        key, store = check_key(params.key), self._stores.named(params.store)
        return await self._handed_out(params, key, caller, lambda: self._loader.get(key, store, caller, report))

    async def _load_folder(self, params: LoadFolder, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        store, folder = self._stores.around(params.url)
        return await self._handed_out(params, folder, caller, lambda: self._loader.get_folder(folder, store, report))

    async def _handed_out(self, params: Load | LoadFolder, key: str, caller: Caller, get: Callable[[], Awaitable[Loaded]]) -> Reply:
        start = time.monotonic()
        while True:
            loaded = await get()
            view = self._trees.view(loaded.name)
            # No await from here on: nothing can take the view away before the lease is held (I2).
            try:
                found = os.stat(view)
                self._trees.touch(loaded.name)
            except FileNotFoundError:  # removed between the load and here
                continue
            self._trees.admit(loaded.name, caller, is_private=True)
            lease = () if loaded.name in params.held else (self._leases.grant(loaded.name, caller, params.purpose),)
            break
        reply = LoadReply(
            path=str(view),
            device=found.st_dev,
            inode=found.st_ino,
            tree=loaded.name,
            files=len(loaded.tree.files),
            size_bytes=loaded.tree.size,
            store_bytes=loaded.store_bytes,
            seconds=round(time.monotonic() - start, 6),
            leased=bool(lease),
            reference=loaded.reference,
        )
        log.info(
            "load",
            extra={
                "key": key,
                "files": reply.files,
                "bytes": reply.size_bytes,
                "store_bytes": reply.store_bytes,
                "seconds": reply.seconds,
                **loaded.spent,
            },
        )
        return Reply(reply, lease)

    async def _references(self, params: References, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        if params.limit < 0:
            raise InvalidRequest("a limit is not negative")
        store = self._stores.named(params.store)
        here = [entry.reference for entry in self._upload.pending(caller.uid) if entry.store == store]
        found = {reference["key"]: reference for reference in here if _may_match(reference["key"], params)}
        stored, awaited = await (await self._stores.references(store)).listed(params.prefix, lambda key: _may_match(key, params))
        old = await self._loader.old(params.prefix, store, lambda key: _may_match(key, params))
        found = {reference["key"]: reference for reference in old} | found
        for kept in stored:
            found.setdefault(kept.reference["key"], kept.reference)
        wanted = [reference for reference in found.values() if _matches(reference, params)]
        wanted.sort(key=_created, reverse=True)
        del wanted[params.limit :]
        pending = {reference["key"] for reference in here}
        awaited = [record for record in awaited if not self._upload.hides(str(record.get("save_id")), caller)]
        elsewhere = [record for record in awaited if record["key"] not in pending and _matches(record, params)]
        elsewhere.sort(key=_created, reverse=True)
        return Reply(
            {
                "references": wanted,
                "pending": [reference["key"] for reference in wanted if reference["key"] in pending],
                "elsewhere": elsewhere[: params.limit],
            }
        )

    async def _delete(self, params: DeleteReference, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        store, key = self._stores.named(params.store), check_key(params.key)
        if self._upload.find(key, store, caller) is not None:
            raise InUse(f"{key} is still on its way to the store", "delete it when it is there: modelcache flush waits for it", key=key)
        try:
            await (await self._stores.references(store)).delete(key)
        except ReferenceNotFound:
            if await self._loader.is_old(key, store):
                raise NotPermitted(
                    f"{key} was saved by metaflow-checkpoint; this daemon reads what that package wrote and deletes none of it",
                    "delete it with that package (delete_model), or its objects in the datastore",
                    key=key,
                ) from None
            raise
        return Reply({})

    async def _flush(self, params: Flush, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        wanted = {entry.key for entry in self._upload.pending(caller.uid) if params.keys is None or entry.key in params.keys}
        showing = asyncio.create_task(self._show(caller, wanted, report))
        try:
            await within(params.deadline_seconds, self._upload.flushed(wanted))
        finally:
            showing.cancel()
        lost = {key: why for key in wanted.union(params.keys or ()) if (why := self._upload.lost(key, caller)) is not None}
        if lost:
            key, why = next(iter(lost.items()))
            raise SaveDamaged(
                f"{key} was damaged on this node before the store had it: {why}",
                "what is left of it lies in the daemon's spool/corrupt; save it again",
                keys=list(lost),
            )
        pending = [entry for entry in self._upload.pending(caller.uid) if entry.key in wanted]
        return Reply(FlushReply([entry.key for entry in pending], self._upload.last_error(pending)))

    async def _gc_store(self, params: GcStore, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        require_owner(caller, "collect a store's garbage")
        store = await self._stores.open(self._stores.named(params.store))
        return Reply(await self._collect.run(store, params.dry_run, params.alone, report))

    async def _show(self, caller: Caller, wanted: set[str], report: Report) -> None:
        sizes = {entry.key: entry.size for entry in self._upload.pending(caller.uid) if entry.key in wanted}
        while True:
            pending = [entry for entry in self._upload.pending(caller.uid) if entry.key in wanted]
            left = {entry.key for entry in pending}
            done = sum(size for key, size in sizes.items() if key not in left)
            report(
                Progress(
                    "upload",
                    done,
                    sum(sizes.values()),
                    source="store",
                    done_files=len(sizes) - len(left),
                    total_files=len(sizes),
                    message=self._upload.last_error(pending),
                )
            )
            await asyncio.sleep(TICK_SECONDS)


def _check_draft(reference: dict[str, Any]) -> None:
    """InvalidRequest unless it can become a reference."""
    check_key(str(reference.get("key", "")))
    if len(encode_reference(reference, TreeId("0" * 64))) > MAX_DRAFT_BYTES:
        raise InvalidRequest(
            "the reference is too large with this metadata", f"at most {MAX_DRAFT_BYTES >> 10} KiB: save the rest in a file"
        )
    if reference.get("type") not in ("model", "checkpoint"):
        raise InvalidRequest(f"a save of type {reference.get('type')!r}", "type is 'model' or 'checkpoint'")


def _created(reference: dict[str, Any]) -> float:
    """When it was made, in seconds since the epoch. A time without an offset is this node's own, as metaflow-checkpoint writes it."""
    try:
        return datetime.fromisoformat(str(reference.get("created_on"))).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def _matches(reference: dict[str, Any], params: References) -> bool:
    if params.type is not None and reference.get("type") != params.type:
        return False
    return params.name is None or params.name in (reference.get("name"), reference.get("label"))


def _may_match(key: str, params: References) -> bool:
    """What a key alone can say: most of a large listing needs not be read."""
    return key.startswith(params.prefix) and params.last in key.rpartition("/")[2]
