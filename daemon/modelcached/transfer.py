"""Answers with bytes from the hub, under one connection budget for the whole node: small files first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ContentMismatch
from .hub import Hub, Source, unavailable
from .rates import Rate
from .spans import Again, Body, Budget, NoRanges, Span

if TYPE_CHECKING:
    import aiohttp

    from .answers import Answers


class Transfer:
    def __init__(self, hub: Hub, connections: int, stall_seconds: float, rate: Rate | None = None) -> None:
        self.budget = Budget(connections)
        self.rate = rate or Rate()
        self._hub = hub
        self._stall_seconds = stall_seconds  # no byte for so long breaks a connection
        self._answers: Answers | None = None

    async def whole(self, source: Source, size: int, report: Callable[[int], None]) -> bytes:
        """All bytes of a small file. They may be wrong, and one more than `size` shows that there are too many."""
        failures = 0
        while True:
            try:
                async with self.answer(source, None, first=True) as answer:
                    data = bytearray()
                    async for chunk in answer.content.iter_any():
                        data += chunk
                        report(len(chunk))
                        await self.rate.passed(len(chunk))
                        if len(data) > size:
                            break
                    if len(data) < size:
                        raise Again(f"the answer broke off after {len(data)} of {size} bytes")
                    return bytes(data[: size + 1])
            except Again as again:
                failures += 1
                await self.after(source, again, failures)

    async def after(self, source: Source, again: Again, failures: int) -> None:
        """Waits until the hub may be asked again, or gives up after so many failures in a row."""
        source.location = None  # the next try asks the hub where the bytes are now
        if again.pause:
            self._hub.pauses.note(source.repo.endpoint, again.pause)
        if failures >= self._hub.attempts:
            raise unavailable(source.repo.endpoint, again.reason) from again
        await asyncio.sleep(self._hub.backoff(failures))

    @asynccontextmanager
    async def answer(self, source: Source, span: Span | None, first: bool = False) -> AsyncIterator[aiohttp.ClientResponse]:
        """The 200 or 206 answer for a source, on a connection of the budget.

        Again when asking later may help (also when the connection breaks inside the block), an error with a name when not.
        """
        answers = self._answers or await self._open()
        while True:
            await self._hub.pauses.wait(source.repo.endpoint)
            async with self.budget.connection(first):
                if self._hub.pauses.remaining(source.repo.endpoint):
                    continue  # the hub asked for it while we stood in the queue
                async with answers.to(source, span) as answer:
                    yield answer
                return

    async def _open(self) -> Answers:
        kind = await asyncio.to_thread(_load)
        self._answers = self._answers or kind(self._stall_seconds)
        return self._answers

    async def close(self) -> None:
        if self._answers is not None:
            await self._answers.close()


@dataclass(frozen=True)
class FileOrigin:
    """A file of the hub, whose listed size is known, as an Origin of spans."""

    transfer: Transfer
    source: Source
    size: int

    @asynccontextmanager
    async def answer(self, span: Span | None) -> AsyncIterator[Body]:
        async with self.transfer.answer(self.source, span) as answer:
            if span is not None:
                self._check_span(answer, span)
            yield _Chunks(answer, self.transfer.rate)

    async def after(self, again: Again, failures: int) -> None:
        await self.transfer.after(self.source, again, failures)

    def _check_span(self, answer: aiohttp.ClientResponse, span: Span) -> None:
        if answer.status == 206:
            said = answer.headers.get("Content-Range", "")
            if not said.startswith(f"bytes {span[0]}-") or not said.endswith((f"/{self.size}", "/*")):
                raise self._mismatch(f"a range of {said!r}")
        elif answer.content_length not in (None, self.size):
            raise self._mismatch(f"{answer.content_length} bytes")
        elif span != (0, self.size):
            raise NoRanges

    def _mismatch(self, got: str) -> ContentMismatch:
        return ContentMismatch(
            f"{self.source.repo}: the hub lists {self.source.path!r} with {self.size} bytes, and its server has {got}",
            "try again later; if it stays so, tell the repo's owner",
        )


class _Chunks:
    """An answer's bytes as they came from the socket. aiohttp's own `readany` would copy all that waits into one piece."""

    def __init__(self, answer: aiohttp.ClientResponse, rate: Rate) -> None:
        self._content = answer.content
        self._rate = rate

    async def readany(self) -> bytes:
        while True:
            chunk, is_boundary = await self._content.readchunk()
            if chunk or not is_boundary:
                await self._rate.passed(len(chunk))
                return chunk


def _load() -> type[Answers]:
    from .answers import Answers

    return Answers
