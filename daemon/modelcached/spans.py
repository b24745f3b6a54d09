"""Ranges of bytes over shared connections: what answers of the hub and of the store have in common."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Protocol

Span = tuple[int, int]  # a half-open range of bytes


class Again(Exception):
    """Asking later may help: 429, 5xx, a broken connection, a stalled one. `reason` is for people."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause = pause  # seconds that the other side asked for


class NoRanges(Exception):
    """The server ignores ranges: it sent the whole content instead."""


class Body(Protocol):
    """The bytes of one answer, as they come; b"" is the end, early or not."""

    async def readany(self) -> bytes: ...


class Origin(Protocol):
    """One content somewhere else. `answer` gives the bytes of a span (None: all of them) on a connection that it closes itself.

    It raises Again when asking later may help (also when the connection breaks inside the block), NoRanges, or an error with a name.
    """

    def answer(self, span: Span | None) -> AbstractAsyncContextManager[Body]: ...

    async def after(self, again: Again, failures: int) -> None:
        """Waits until it may be asked again, or gives up, with an error that has a name, after so many failures in a row."""
        ...


class Budget:
    """So many connections for the whole node. Who asks with `first=True` (a small file) is served before everybody else."""

    def __init__(self, connections: int) -> None:
        self.free = connections
        self._first: deque[asyncio.Future[None]] = deque()
        self._then: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def connection(self, first: bool = False) -> AsyncIterator[None]:
        await self._take(first)
        try:
            yield
        finally:
            self._give()

    async def _take(self, first: bool) -> None:
        if self.free and not (self._first or self._then):
            self.free -= 1
            return
        queue = self._first if first else self._then
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give()  # it was our turn already: hand it on
            else:
                with suppress(ValueError):  # `_give` has passed over it already
                    queue.remove(turn)
            raise

    def _give(self) -> None:
        for queue in (self._first, self._then):
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self.free += 1
