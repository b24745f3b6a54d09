"""Exchange: nodes give each other what one of them fetched from the hub, by way of the store. For each content it is one node's turn.

A node that lacks a content looks into the store, else takes the claim on it and asks the hub; its bytes go to the store behind the
caller's back, and then the claim is given back. Everybody else waits, holding nothing. A store that does not answer is left alone for a
while: it costs bandwidth, never a fetch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from .claims import Claim, Claims
from .errors import ModelcachedError, StoreUnavailable
from .model import Digest
from .places import StorePlace
from .records import HubRecords
from .references import References, blob_key
from .store import Store
from .tasks import behind

CLAIMS_AT_ONCE = 4  # large contents that this node asks the hub for at the same time: the others are left to other nodes
MEDIUM_BYTES = 2 << 20  # of smaller ones it asks for more: a claim's requests take longer than their bytes
MEDIUM_CLAIMS_AT_ONCE = 16
SENDING_AT_ONCE = 4
ANSWER_SECONDS = 10.0  # of a small question
AWAY_SECONDS = 30.0
T = TypeVar("T")
log = logging.getLogger(__name__)


class Turn:
    """Where a content is to be had: at `place`, or, if there is none, from the hub, now."""

    def __init__(self) -> None:
        self.place: StorePlace | None = None
        self.claim: Claim | None = None
        self._brought: Path | None = None

    def brought(self, path: Path) -> None:
        """The hub had to be asked, and the bytes lie here."""
        self._brought = path


class Exchange:
    """`_sending` are the blobs on their way to the store; only the event loop touches it."""

    def __init__(self, store: Store, claims: Claims, group: asyncio.TaskGroup) -> None:
        self.store = store
        self.records = HubRecords(store)
        self.references = References(store)
        self.claims = claims
        self._group = group
        self._asking_large = asyncio.Semaphore(CLAIMS_AT_ONCE)
        self._asking_medium = asyncio.Semaphore(MEDIUM_CLAIMS_AT_ONCE)
        self._sender = asyncio.Semaphore(SENDING_AT_ONCE)
        self._sending: dict[Digest, asyncio.Task[None]] = {}
        self._away_until = self._quiet_until = 0.0  # it is left alone, and not complained about
        self.sent_bytes = 0

    @contextlib.asynccontextmanager
    async def turn(self, digest: Digest, size: int, done_bytes: Callable[[], int]) -> AsyncIterator[Turn]:
        """Waits until the store has the content, or it is this node's turn to ask the hub for it."""
        turn = Turn()
        async with contextlib.AsyncExitStack() as asking:
            try:
                with self.suppressed():
                    await self._find(turn, asking, digest, size, lambda: done_bytes() + self.sent_bytes)
                yield turn
            finally:
                if turn._brought is not None:
                    self._start(digest, size, turn._brought, turn.claim)
                elif turn.claim is not None:
                    self.release(turn.claim)

    async def _find(
        self, turn: Turn, asking: contextlib.AsyncExitStack, digest: Digest, size: int, progress: Callable[[], int]
    ) -> None:
        while True:
            turn.place = await self._place(digest, size)
            if turn.place is not None or not await self.answered(self.store.has_conditions()):
                return
            async with contextlib.AsyncExitStack() as slot:
                if not await self._has_slot(slot, digest, self._asking_large if size > MEDIUM_BYTES else self._asking_medium):
                    continue
                turn.claim = await self.answered(self.claims.take(digest, progress))
                if turn.claim is not None:
                    turn.place = await self._place(digest, size)  # whoever had the claim before may have brought it
                    if turn.place is None:
                        await asking.enter_async_context(slot.pop_all())
                    else:
                        self.release(turn.claim)
                        turn.claim = None
                    return
            await self.claims.wait(digest)

    async def _has_slot(self, slot: contextlib.AsyncExitStack, digest: Digest, asking: asyncio.Semaphore) -> bool:
        """Waits until this node may ask the hub for one more content. False: another node was faster, as it seems."""
        acquiring = asyncio.ensure_future(asking.acquire())
        gone = asyncio.ensure_future(self.claims.gone(digest)) if asking.locked() else None
        try:
            await asyncio.wait({acquiring} if gone is None else {acquiring, gone}, return_when=asyncio.FIRST_COMPLETED)
            if acquiring.done() or gone is None:
                return True
            gone.result()
            return False
        finally:
            if gone is not None and not gone.cancel() and not gone.cancelled():
                gone.exception()  # retrieved: who has a slot need not know why no other node is waited for
            if acquiring.done() and not acquiring.cancelled():
                slot.callback(asking.release)
            else:
                acquiring.cancel()

    async def _place(self, digest: Digest, size: int) -> StorePlace | None:
        found = await self.answered(self.store.head(blob_key(digest)))
        return StorePlace(self.store, digest) if found is not None and found.size == size else None

    def _start(self, digest: Digest, size: int, path: Path, claim: Claim | None) -> None:
        task = behind(self._group, self._send(digest, size, path, claim))
        if task is not None:  # else `Claims.close` gives back the claim
            self._sending[digest] = task

    async def _send(self, digest: Digest, size: int, path: Path, claim: Claim | None) -> None:
        try:
            async with self._sender:
                with self.suppressed():
                    await self.put(digest, path, size)
        finally:
            if self._sending.get(digest) is asyncio.current_task():
                del self._sending[digest]
            if claim is not None:
                await self.claims.release(claim)

    async def put(self, digest: Digest, path: Path, size: int) -> None:
        """Brings a blob to the store."""
        await self.store.put_file(blob_key(digest), path, size, digest, self._sent)

    async def sent(self, digest: Digest) -> None:
        """Returns when a blob is no longer on its way."""
        task = self._sending.get(digest)
        if task is not None:
            await asyncio.wait([task])

    def release(self, claim: Claim) -> None:
        """Gives a claim back behind the caller's back."""
        behind(self._group, self.claims.release(claim))  # else `Claims.close` does it

    @property
    def is_near(self) -> bool:
        """Whether the store is worth asking."""
        return time.monotonic() >= self._away_until

    async def answered(self, question: Awaitable[T]) -> T:
        """A small question to the store, with a deadline."""
        if not self.is_near:
            if asyncio.iscoroutine(question):
                question.close()
            raise StoreUnavailable(f"{self.store.url} did not answer a moment ago")
        async with asyncio.timeout(ANSWER_SECONDS):
            return await question

    @contextlib.contextmanager
    def suppressed(self) -> Iterator[None]:
        """What the store can't do now, the hub can."""
        try:
            yield
        except (ModelcachedError, TimeoutError) as error:
            now = time.monotonic()
            if now >= self._quiet_until:
                log.warning("the store is of no help", extra={"store": self.store.url, "error": str(error) or "no answer"})
                self._quiet_until = now + AWAY_SECONDS
            if isinstance(error, (StoreUnavailable, TimeoutError)):
                self._away_until = now + AWAY_SECONDS

    def statistics(self) -> dict[str, int]:
        claims = self.claims
        return {
            "claims": claims.taken,
            "taken_over": claims.taken_over,
            "waits": claims.waited,
            "sending": len(self._sending),
            "sent_bytes": self.sent_bytes,
        }

    def _sent(self, count: int) -> None:
        self.sent_bytes += count
