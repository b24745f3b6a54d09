"""The claim on collecting a store's garbage: one collection at a time, and what writers have to know of it.

claims/gc.json    who collects, in which round, and whether that round deletes now; rewritten all the time while somebody does

Invariants: a collection deletes only inside a round that it has announced here *before* it looked at what is named, and ends a
round only when every delete of it has been answered. So a writer who has named its tree in the store, and then sees no round, or sees
the round end, knows that whatever is deleted from then on is deleted by somebody who has read that name (`Rounds.passed`).
No clocks are compared: a claim is stale when it has not changed for `STALE_SECONDS` of the observer's own. A collection that could
not say for `FRESH_SECONDS` that it is alive stops deleting, and gives up on a delete before its claim is stale.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from .errors import InUse, MissingObject, ModelcachedError, ObjectChanged, ObjectExists, StoreProblem, StoreUnavailable
from .store import Store
from .tasks import finished, settled

KEY = "claims/gc.json"
STALE_SECONDS = 30.0
RENEW_SECONDS = 5.0
FRESH_SECONDS = 15.0
DELETE_SECONDS = 10.0
POLL_SECONDS = 0.5
MAX_CLAIM_BYTES = 4096
FORMAT = 1
log = logging.getLogger(__name__)


class _ClaimJson(msgspec.Struct):
    format: int
    id: str
    node: str
    pid: int
    count: int  # so that no two are alike
    round: int
    is_deleting: bool


_claim_json = msgspec.json.Decoder(_ClaimJson)


class GcClaim:
    """One that is held. `_saying` makes its writers take turns: every object replaces the one before it."""

    def __init__(self, store: Store, has_conditions: bool) -> None:
        self._store = store
        self._has_conditions = has_conditions
        self._said = _ClaimJson(FORMAT, secrets.token_hex(8), os.uname().nodename, os.getpid(), 0, 0, False)
        self._etag = ""
        self._fresh_until = 0.0
        self._is_lost = False
        self._is_unsure = False  # a delete was sent, and nobody knows when or whether it is done
        self._saying = asyncio.Lock()

    async def begin_round(self) -> None:
        """What is named has to be looked at after this, and before anything is deleted."""
        self._said.round += 1
        self._said.is_deleting = True
        await self._say()

    async def end_round(self) -> None:
        self._said.is_deleting = False
        await self._say()

    async def delete(self, key: str) -> None:
        """Deletes an object, inside a round. InUse when somebody else may have taken the claim."""
        assert self._said.is_deleting
        self._check()
        deleting = asyncio.create_task(self._delete(key))
        await settled(deleting)  # who is cancelled meanwhile waits for the answer: writers rely on it
        deleting.result()

    async def _delete(self, key: str) -> None:
        try:
            async with asyncio.timeout(DELETE_SECONDS):
                await self._store.delete(key)
        except StoreProblem:  # that is an answer
            raise
        except TimeoutError:
            self._is_unsure = True
            raise StoreUnavailable(f"{self._store.url} does not answer to a delete", "look at the network, and collect again") from None
        except BaseException:
            self._is_unsure = True
            raise

    async def _take(self, waiting: Callable[[str], None]) -> None:
        while True:
            began = time.monotonic()
            try:
                put = self._store.put_new if self._has_conditions else self._store.put
                found = await put(KEY, self._body())
            except ObjectExists:
                etag = await self._abandoned(waiting)
                if etag is None:
                    continue
                began = time.monotonic()
                try:
                    found = await self._store.replace(KEY, self._body(), etag)
                except (ObjectChanged, MissingObject):
                    continue
                log.info("a collection that broke off is taken over", extra={"store": self._store.url})
            self._etag, self._fresh_until = found.etag, began + FRESH_SECONDS
            return

    async def _abandoned(self, waiting: Callable[[str], None]) -> str | None:
        """The ETag of a claim that has been watched until it was stale; None if it is gone. InUse if somebody works."""
        first = await self._store.head(KEY)
        since = time.monotonic()
        while True:
            found = await self._store.head(KEY)
            if found is None or first is None:
                return None
            if found.etag != first.etag:
                raise InUse(f"a collection of {self._store.url} runs already{await self._whose()}", "wait until it is done")
            if time.monotonic() - since > STALE_SECONDS:
                return found.etag
            waiting("another collection was begun: does it still run?")
            await asyncio.sleep(POLL_SECONDS)

    async def _whose(self) -> str:
        with contextlib.suppress(MissingObject, msgspec.MsgspecError):
            said = _claim_json.decode(await self._store.get(KEY, MAX_CLAIM_BYTES))
            return f", on {said.node} (pid {said.pid})"
        return ""

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            with contextlib.suppress(ModelcachedError):  # `_check` knows since when nothing was said
                await self._say()

    async def _say(self) -> None:
        async with self._saying:
            self._said.count += 1
            began = time.monotonic()
            try:
                if self._has_conditions:
                    self._etag = (await self._store.replace(KEY, self._body(), self._etag)).etag
                else:
                    await self._store.put(KEY, self._body())
            except (ObjectChanged, MissingObject):
                self._is_lost = True
                self._check()
            self._fresh_until = began + FRESH_SECONDS

    def _check(self) -> None:
        if self._is_lost or time.monotonic() > self._fresh_until:
            raise InUse(
                f"this collection of {self._store.url} lost its claim: the store was away for too long", "begin again: modelcache gc-store"
            )

    async def _release(self) -> None:
        """Best effort. One that is unsure stays until it is stale, and so do the writers who wait for it."""
        if not self._is_lost and not self._is_unsure and time.monotonic() < self._fresh_until:
            with contextlib.suppress(ModelcachedError, TimeoutError):
                async with asyncio.timeout(DELETE_SECONDS):
                    await self._store.delete(KEY)

    def _body(self) -> bytes:
        return msgspec.json.encode(self._said)


@contextlib.asynccontextmanager
async def claimed(store: Store, is_alone: bool, waiting: Callable[[str], None]) -> AsyncIterator[GcClaim]:
    """Holds the claim while the block runs. InUse if another collection runs; one that stands still is waited for, and replaced.

    A store that ignores conditions can't say who was first: there, the caller has to know (`is_alone`).
    """
    has_conditions = await store.has_conditions()
    if not has_conditions and not is_alone:
        raise StoreProblem(
            f"{store.url} ignores conditional writes, so nobody can tell whether another collection runs",
            "when you know that none does: modelcache gc-store --alone",
        )
    claim = GcClaim(store, has_conditions)
    await claim._take(waiting)
    renewing = asyncio.create_task(claim._renew())
    try:
        yield claim
    finally:
        await finished(_end(claim, renewing))  # a claim that is left behind makes everybody wait


async def _end(claim: GcClaim, renewing: asyncio.Task[None]) -> None:
    async with claim._saying:  # not in the middle of a word
        renewing.cancel()
    await claim._release()


class Rounds:
    """A writer's look at the collections of one store. `_stale` is what a collection said last before it died."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stale: bytes | None = None

    async def passed(self) -> None:
        """Returns when nobody can delete any more what the caller named in the store before this call."""
        first: tuple[str, int] | None = None
        last, since = b"", 0.0
        while True:
            try:
                raw = await self._store.get(KEY, MAX_CLAIM_BYTES)
            except MissingObject:
                return
            seen = _round(raw)
            if seen is None or raw == self._stale or (first is not None and seen != first):
                return
            first = seen
            if raw != last:
                last, since = raw, time.monotonic()
            elif time.monotonic() - since > STALE_SECONDS:
                self._stale = raw
                return
            await asyncio.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))


def _round(raw: bytes) -> tuple[str, int] | None:
    """The round that deletes now, if one does."""
    try:
        said = _claim_json.decode(raw)
        if said.format > FORMAT:
            raise ValueError
    except (msgspec.MsgspecError, ValueError):
        return "", 0  # of a newer daemon: until it is gone, it may be deleting
    return (said.id, said.round) if said.is_deleting else None
