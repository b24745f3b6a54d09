"""Upload: brings the spool to its stores, for ever, one save after another: blobs the store lacks, the tree, the reference.

A save's tree is named in the store (`.pending`) before anything of it is put there, and its reference after all of it was looked at again.
An entry leaves the spool only after the store confirmed all of it (I3). Failures are tried again with growing pauses; a store that is
away holds up no other one, and keeps its saves in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

from .blobs import Blobs
from .depot import Depot
from .errors import (
    LocalMismatch,
    ModelcachedError,
    SaveDamaged,
    StoreClockSkew,
    StoreDenied,
    StoreFull,
    StoreMissingBucket,
    StoreUnavailable,
)
from .meter import Meter
from .model import Caller, Digest, Tree, TreeId, is_owner
from .references import blob_key, encode_pending, encode_reference, pending_key, reference_key
from .room import Room
from .spool import Entry, Spool
from .store import Store
from .tasks import Pool

MAX_PAUSE_SECONDS = 60.0
STORE_WIDE = (StoreUnavailable, StoreDenied, StoreMissingBucket, StoreClockSkew, StoreFull)  # the next save would fare no better
log = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """How the spool is."""

    saves: int
    size_bytes: int
    oldest_seconds: float
    sent_bytes: int
    last_error: str


class Upload:
    """`_errors`, `_known` and `_named` speak of entries by id; only the event loop touches them."""

    def __init__(
        self,
        spool: Spool,
        blobs: Blobs,
        depot: Depot,
        pool: Pool,
        room: Room,
        store_of: Callable[[str], Awaitable[Store]],
        tree_of: Callable[[Entry], Awaitable[tuple[TreeId, Tree]]],
        backoff_seconds: float = 1.0,
    ) -> None:
        self._spool = spool
        self._blobs = blobs
        self._depot = depot
        self._pool = pool
        self._room = room
        self._store_of = store_of
        self._tree_of = tree_of
        self._backoff_seconds = backoff_seconds
        self._named: set[str] = set()  # the store knows their trees, or is about to
        self._announcing: dict[str, asyncio.Lock] = {}  # by store: who puts a pending record
        self._errors: dict[str, str] = {}  # the last one of every entry that had one
        self._known: set[str] = set()  # the store has been told of them, or is about to get them
        self._damaged: dict[tuple[str, int], str] = {}  # keys and uids of saves that were set aside since the daemon started, and why
        self._sending: dict[str, Meter] = {}
        self.sent_bytes = 0
        self.saves = 0

    def pending(self, uid: int) -> list[Entry]:
        """Saves of that uid that are not in the store yet, the oldest first."""
        return [entry for entry in self._spool.entries if entry.uid == uid]

    def find(self, key: str, store: str, caller: Caller) -> Entry | None:
        """The caller's newest save of that key that is on its way there. Others' are nobody's business but an owner's (I8)."""
        found = [entry for entry in self._spool.entries if (entry.key, entry.store) == (key, store)]
        mine = [entry for entry in found if entry.uid == caller.uid] or (found if is_owner(caller) else [])
        return max(mine, key=lambda entry: entry.created, default=None)

    def hides(self, save: str, caller: Caller) -> bool:
        """Whether a save, named by its id, waits here and is somebody else's: what the store says of it is not told either (I8)."""
        entry = self._spool.entry(save)
        return entry is not None and entry.uid != caller.uid and not is_owner(caller)

    def lost(self, key: str, caller: Caller) -> str | None:
        """Why a save of this caller was set aside since the daemon started."""
        found = (why for (named, uid), why in self._damaged.items() if named == key and (uid == caller.uid or is_owner(caller)))
        return next(found, None)

    def last_error(self, entries: list[Entry]) -> str:
        """What went wrong last with any of these."""
        ids = {entry.id for entry in entries}
        return next((error for name, error in reversed(self._errors.items()) if name in ids), "")

    def waiting(self, uid: int | None) -> Waiting:
        """Errors name keys: a uid is told of its own saves only, None is told of all."""
        entries = self._spool.entries
        own = entries if uid is None else self.pending(uid)
        oldest = time.time() - min((entry.created for entry in entries), default=time.time())
        return Waiting(len(entries), sum(entry.size for entry in entries), max(0.0, oldest), self.sent_bytes, self.last_error(own))

    def activities(self, uid: int | None) -> list[dict[str, Any]]:
        """What is being sent now: that uid's saves, or with None all."""
        entries = [entry for entry in self._spool.entries if entry.id in self._sending and uid in (None, entry.uid)]
        return [self._sending[entry.id].activity(entry.key) for entry in entries]

    async def flushed(self, keys: set[str]) -> None:
        """Returns when none of these is pending any more."""
        await self._spool.until(lambda: not any(entry.key in keys for entry in self._spool.entries))

    async def run(self) -> None:
        """Drains the spool as long as the daemon lives."""
        urls: set[str] = set()

        def new() -> set[str]:
            return {entry.store for entry in self._spool.entries} - urls

        async with asyncio.TaskGroup() as group:
            while True:
                await self._spool.until(lambda: bool(new()))
                for url in new():
                    urls.add(url)
                    group.create_task(self._drain(url))
                    group.create_task(self._announce(url))

    async def _drain(self, url: str) -> None:
        failures = 0
        late: list[str] = []  # saves that failed by themselves: the others go first
        while True:
            entry = self._next(url, late)
            if entry is None:
                await self._spool.until(lambda: any(entry.store == url for entry in self._spool.entries))
                continue
            self._known.add(entry.id)
            try:
                await self._bring_or_set_aside(entry)
            except Exception as error:  # of one save: the others, and the daemon, go on
                is_expected = isinstance(error, (ModelcachedError, OSError))
                failures += 1
                self._errors.pop(entry.id, None)  # the last one stands last
                self._errors[entry.id] = f"{entry.key}: {error}{_advice(error)}"
                log.warning(
                    "a save could not be brought to the store",
                    exc_info=not is_expected,
                    extra={"key": entry.key, "error": str(error), "failures": failures},
                )
                if not isinstance(error, STORE_WIDE):
                    late = [name for name in late if name in self._errors and name != entry.id] + [entry.id]
                pause = min(MAX_PAUSE_SECONDS, self._backoff_seconds * 2 ** min(failures - 1, 10))
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            else:
                failures = 0

    def _next(self, url: str, late: list[str]) -> Entry | None:
        """The oldest save; of those that supersede each other (same name, asked for so), the newest."""
        entries = [entry for entry in self._spool.entries if entry.store == url]
        entries.sort(key=lambda entry: late.index(entry.id) if entry.id in late else -1)  # stable: by age otherwise
        if not entries:
            return None
        first = entries[0]
        if first.supersede:
            series = (entry for entry in entries if entry.supersede and _series(entry) == _series(first) and entry.id not in late)
            return max(series, key=lambda entry: entry.created, default=first)
        return first

    async def _bring_or_set_aside(self, entry: Entry) -> None:
        try:
            await self._bring(entry)
        except SaveDamaged as error:
            log.error("a save is set aside", extra={"save": entry.id, "key": entry.key, "error": str(error)})
            async with self._announcing.setdefault(entry.store, asyncio.Lock()):
                with contextlib.suppress(ModelcachedError, OSError):  # nobody brings it any more, and nobody is to be told so (I8)
                    await (await self._store_of(entry.store)).delete(pending_key(entry.key))
                await self._pool.run(self._spool.set_aside, entry)
                self._damaged[entry.key, entry.uid] = error.message
                self._forget(entry)

    async def _bring(self, entry: Entry) -> None:
        start = time.monotonic()
        waited = max(0.0, time.time() - entry.created)
        store = await self._store_of(entry.store)
        name, tree = await self._tree_of(entry)
        hashed = time.monotonic()

        meter = self._sending[entry.id] = Meter()
        meter.phase, meter.source = "upload", "store"
        meter.start(sum({file.sha256: file.size for file in tree.files}.values()), len(tree.files), 0, 0)

        def sent(count: int) -> None:
            meter.receive(count, "store")
            meter.done_bytes += count

        async def put_file(digest: Digest, path: Path, size: int) -> None:
            await store.put_file(blob_key(digest), path, size, digest, sent, self._spool.sending(entry, digest))
            self.sent_bytes += size

        def room_for(path: Path, size: int) -> AbstractAsyncContextManager[None]:
            return self._room.reserved(dict([self._room.file(path, size)]), f"the upload of {entry.key}", is_save=True, leaving=0.0)

        try:
            self._named.add(entry.id)
            async with self._announcing.setdefault(entry.store, asyncio.Lock()):
                await store.put(pending_key(entry.key), encode_pending(entry.reference, os.uname().nodename, name))
            await self._depot.bring(store, name, tree, put_file, entry.storage_format == "tar", room_for=room_for)
        except LocalMismatch:
            for digest in {file.sha256 for file in tree.files}:
                await self._pool.run(self._blobs.check, digest)  # what lies is gone then, and made again from the spool if that can be
            raise
        finally:
            del self._sending[entry.id]
        await store.put(reference_key(entry.key), encode_reference(entry.reference, name))
        with contextlib.suppress(ModelcachedError):
            await store.delete(pending_key(entry.key))
        try:
            await self._pool.run(self._spool.remove, entry)
        except OSError as error:  # the store has it: what is left here is sent again, or removed, at the next start
            log.warning("a save in the store can't be taken out of the spool", extra={"key": entry.key, "error": str(error)})
        self._forget(entry)
        self.saves += 1
        log.info(
            "uploaded",
            extra={
                "uid": entry.uid,
                "key": entry.key,
                "bytes": entry.size,
                "files": len(entry.files),
                "seconds": round(time.monotonic() - start, 3),
                "waited_seconds": round(waited, 3),
                "hash_seconds": round(hashed - start, 3),
                "store_seconds": round(time.monotonic() - hashed, 3),
            },
        )

    def _forget(self, entry: Entry) -> None:
        self._errors.pop(entry.id, None)
        self._known.discard(entry.id)
        self._named.discard(entry.id)
        self._spool.forget_kept(entry)

    async def _announce(self, url: str) -> None:
        """Says in the store what has to wait its turn, best effort."""

        def new() -> list[Entry]:
            return [entry for entry in self._spool.entries if entry.store == url and entry.id not in self._known]

        while True:
            await self._spool.until(lambda: bool(new()))
            for entry in new():
                self._known.add(entry.id)
                try:
                    await self._announce_one(url, entry)
                except Exception as error:  # nobody waits for it
                    is_expected = isinstance(error, (ModelcachedError, OSError))
                    log.log(logging.DEBUG if is_expected else logging.WARNING, "a save is not announced", exc_info=not is_expected)

    async def _announce_one(self, url: str, entry: Entry) -> None:
        store = await self._store_of(url)
        async with self._announcing.setdefault(url, asyncio.Lock()):
            if entry.id not in self._named:
                await store.put(pending_key(entry.key), encode_pending(entry.reference, os.uname().nodename))
        if not self._spool.has(entry):  # it overtook us
            await store.delete(pending_key(entry.key))


def _advice(error: Exception) -> str:
    hint = getattr(error, "hint", "")
    return f" ({hint})" if hint else ""


def _series(entry: Entry) -> tuple[object, ...]:
    """Saves that supersede each other: checkpoints of one name and task."""
    reference = entry.reference
    return (entry.uid, entry.store, reference.get("type"), reference.get("name"), reference.get("pathspec"))
