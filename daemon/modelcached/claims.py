"""Claims: a node's short lease, in the store, on fetching something from the hub. Losing one costs bandwidth, never correctness (I5).

claims/<name>.json is taken by a put of a new object and taken over by a replacement of the very object that was seen. No clocks are
compared: a claim is stale when its ETag has not changed for `stale_seconds` of the observer's own clock, and it is renewed only
while bytes come in. Who waits holds nothing; all waiters of a node share one look at the store about once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable

import msgspec

from .errors import MissingObject, ModelcachedError, ObjectChanged, ObjectExists, ShuttingDown, StoreUnavailable
from .store import Store
from .tasks import behind, each

POLL_SECONDS = 1.0
RENEWALS = 4  # while a claim that stands still becomes stale
MAX_CLAIM_BYTES = 4096
ANSWER_SECONDS = 10.0  # of one look, or one renewal
CLOSE_SECONDS = 2.0
log = logging.getLogger(__name__)

_Waiting = dict[str, set["asyncio.Future[None]"]]


class _ClaimJson(msgspec.Struct):
    node: str
    id: str
    renewed: int


_claim_json = msgspec.json.Decoder(_ClaimJson)


class Claim:
    """One that this node holds. `progress` grows, or at least changes, while bytes come in."""

    def __init__(self, key: str, etag: str, progress: Callable[[], int]) -> None:
        self.key = key
        self.etag = etag
        self.progress = progress
        self.users = 1
        self.renewed = 0
        self.seen = progress()
        self.writing = asyncio.Lock()  # a renewal and the release, one after the other: the ETag is that of the last one


class Claims:
    """`_held` are this node's; `_seen` others' ETags and since when. Only the event loop touches them, and who waits."""

    def __init__(self, store: Store, node: str, stale_seconds: float, group: asyncio.TaskGroup) -> None:
        self._store = store
        self._node = node
        self._stale_seconds = stale_seconds
        self._group = group
        self._held: dict[str, Claim] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        self._waiting: _Waiting = {}
        self._watching: _Waiting = {}
        self._found: set[str] = set()  # by the last look
        self._renewing: asyncio.Task[None] | None = None
        self._polling: asyncio.Task[None] | None = None
        self.taken = 0
        self.taken_over = 0
        self.waited = 0

    async def take(self, name: str, progress: Callable[[], int]) -> Claim | None:
        """The claim, or None: another node holds it. One that this node holds already is shared. A caller who leaves meanwhile has none."""
        taken: asyncio.Future[Claim | None] = asyncio.get_running_loop().create_future()

        async def work() -> None:
            try:
                claim = await self._take(f"claims/{name}.json", progress)
            except Exception as error:
                if not taken.done():
                    taken.set_exception(error)
                elif not isinstance(error, ModelcachedError):
                    raise
            else:
                if not taken.done():
                    taken.set_result(claim)
                elif claim is not None:
                    await self.release(claim)

        if behind(self._group, work()) is None:
            raise _ending()
        try:
            return await taken
        except asyncio.CancelledError:
            if taken.done() and not taken.cancelled() and taken.exception() is None and (claim := taken.result()) is not None:
                behind(self._group, self.release(claim))
            raise

    async def _take(self, key: str, progress: Callable[[], int]) -> Claim | None:
        held = self._held.get(key)
        if held is not None:
            held.users += 1
            return held
        try:
            found = await self._store.put_new(key, self._body(0))
        except ObjectExists:
            etag = await self._abandoned(key)
            if etag is None:
                return None
            try:
                found = await self._store.replace(key, self._body(0), etag)
            except (ObjectChanged, MissingObject):
                return None
            self.taken_over += 1
            log.info("a claim is taken over", extra={"claim": key})
        self._seen.pop(key, None)
        self.taken += 1
        claim = self._held[key] = Claim(key, found.etag, progress)
        if self._renewing is None or self._renewing.done():
            self._renewing = behind(self._group, self._renew())
        return claim

    async def wait(self, name: str) -> None:
        """Returns when another try to take the claim may succeed."""
        self.waited += 1
        await self._look_until(self._waiting, name)

    async def gone(self, name: str) -> None:
        """Returns when another node's claim of that name has come and gone: what it stands for is probably in the store."""
        await self._look_until(self._watching, name)

    async def _look_until(self, waiting: _Waiting, name: str) -> None:
        key = f"claims/{name}.json"
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.setdefault(key, set()).add(turn)
        if self._polling is None or self._polling.done():
            self._polling = behind(self._group, self._poll())
        try:
            if self._polling is None:
                raise _ending()
            await turn
        finally:
            turns = waiting.get(key, set())
            turns.discard(turn)
            if not turns:
                waiting.pop(key, None)

    async def release(self, claim: Claim) -> None:
        """Gives it back, best effort: one that stays becomes stale."""
        claim.users -= 1
        if claim.users or self._held.get(claim.key) is not claim:
            return  # others of this node use it, or it was lost
        del self._held[claim.key]
        try:
            with contextlib.suppress(ModelcachedError, TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS), claim.writing:
                    found = await self._store.head(claim.key)
                    if found is not None and found.etag == claim.etag:
                        await self._store.delete(claim.key)
        except asyncio.CancelledError:
            self._held.setdefault(claim.key, claim)  # the daemon ends: `close` gives it back
            raise

    async def close(self) -> None:
        """Gives back everything, so that nobody has to wait for it to become stale."""
        held = list(self._held.values())
        for claim in held:
            claim.users = 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await each(held, self.release, 16)

    async def _abandoned(self, key: str) -> str | None:
        """The ETag of a claim that nobody works for: a stale one, or one that a predecessor of this daemon held."""
        seen = self._seen.get(key)
        if seen is not None:
            return seen[0] if time.monotonic() - seen[1] > self._stale_seconds else None
        found = await self._store.head(key)
        if found is None:
            return None
        try:
            body = _claim_json.decode(await self._store.get(key, MAX_CLAIM_BYTES))
        except (MissingObject, msgspec.MsgspecError):
            return None
        return found.etag if body.node == self._node and key not in self._held else None

    async def _renew(self) -> None:
        while self._held:
            await asyncio.sleep(self._stale_seconds / RENEWALS)
            moving = [claim for claim in self._held.values() if claim.progress() != claim.seen]
            await each(moving, self._renew_one, 16)

    async def _renew_one(self, claim: Claim) -> None:
        claim.seen = claim.progress()
        claim.renewed += 1
        try:
            async with asyncio.timeout(ANSWER_SECONDS), claim.writing:
                if self._held.get(claim.key) is claim:  # not given back meanwhile
                    claim.etag = (await self._store.replace(claim.key, self._body(claim.renewed), claim.etag)).etag
        except (ObjectChanged, MissingObject):
            if self._held.get(claim.key) is claim:
                log.info("a claim was lost", extra={"claim": claim.key})
                del self._held[claim.key]
        except (ModelcachedError, TimeoutError) as error:
            log.info("a claim could not be renewed", extra={"claim": claim.key, "error": str(error) or "no answer"})

    async def _poll(self) -> None:
        while self._waiting or self._watching:
            await asyncio.sleep(POLL_SECONDS * random.uniform(1.0, 1.3))
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    found = {each.key: each.etag async for each in self._store.list("claims/")}
            except Exception as error:  # whatever it is: nobody else tells those who wait
                for waiting in (self._waiting, self._watching):
                    _wake(waiting, list(waiting), error)
                if isinstance(error, (ModelcachedError, TimeoutError)):
                    continue
                raise
            _wake(self._waiting, [key for key in self._waiting if self._may_be_free(key, found.get(key))])
            _wake(self._watching, [key for key in self._watching if key in self._found and key not in found])
            self._found = found.keys() - self._held.keys()
            for key in self._seen.keys() - found.keys():
                del self._seen[key]

    def _may_be_free(self, key: str, etag: str | None) -> bool:
        seen, now = self._seen.get(key), time.monotonic()
        if etag is None:
            self._seen.pop(key, None)
            return True
        if seen is None or seen[0] != etag:
            self._seen[key] = (etag, now)
            return False
        return now - seen[1] > self._stale_seconds

    def _body(self, renewed: int) -> bytes:
        return msgspec.json.encode(_ClaimJson(self._node, secrets.token_hex(8), renewed))


def _ending() -> ShuttingDown:
    return ShuttingDown("the daemon is ending", "ask again: what is on disk stays")


def _wake(waiting: _Waiting, keys: list[str], error: Exception | None = None) -> None:
    for key in keys:
        for turn in waiting.pop(key, ()):
            if turn.done():
                continue
            if error is None:
                turn.set_result(None)
            elif isinstance(error, ModelcachedError):
                turn.set_exception(type(error)(error.message, error.hint))  # one for each: a traceback belongs to one who raises
            else:
                turn.set_exception(StoreUnavailable("the store does not say who fetches what", "look at the network, or try again later"))
