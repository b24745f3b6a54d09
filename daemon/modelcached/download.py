"""One large content from the hub or the store into a sink: parallel ranges, each streamed piece by piece into threads that write.

What a broken, stalled or short answer did deliver is kept; only the rest is asked again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .spans import Again, Body, NoRanges, Origin, Span
from .tasks import Pool, apart, settled

MIN_RANGE_BYTES = 4 << 20


class Sink(Protocol):
    """Where the bytes go. Both methods block; `write` is called from several threads at once, for spans that don't overlap."""

    def missing(self) -> list[Span]: ...

    def write(self, offset: int, chunks: Sequence[bytes]) -> None: ...


@dataclass(frozen=True)
class Limits:
    connections: int  # most ranges of one file at the same time
    piece_bytes: int  # what is written, and counted, at once; a kill costs about two of them for each connection
    range_bytes: int  # most that one request asks for


class Download:
    """Workers take spans from the front of `_todo`; what a broken one lacks goes back there. Only the event loop touches it."""

    def __init__(self, origin: Origin, pool: Pool, limits: Limits, size: int, sink: Sink, report: Callable[[int], None]) -> None:
        self._origin = origin
        self._pool = pool
        self._limits = limits
        self._size = size
        self._sink = sink
        self._report = report
        self._todo: deque[Span] = deque()
        self._answered = asyncio.Event()  # it is known where the bytes are

    async def run(self) -> None:
        """Fills all gaps of the sink."""
        self._todo.extend(_spans(await self._pool.run(self._sink.missing), self._limits))
        try:
            await apart(self._work_at_once())
        except ExceptionGroup as errors:
            if any(isinstance(error, NoRanges) for error in errors.exceptions):
                await self._run_whole()
            else:
                raise errors.exceptions[0] from None

    async def _work_at_once(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._limits.connections, len(self._todo))):
                group.create_task(self._work())
                await self._answered.wait()  # the hub is asked by the first one only; the others go where it was sent

    async def _work(self) -> None:
        failures = 0  # in a row
        while self._todo:
            start, end = self._todo.popleft()
            cursor = _Cursor(start, end)
            try:
                async with self._origin.answer((start, end)) as answer:
                    self._answered.set()
                    await self._pour(answer, cursor)
            except Again as again:
                failures = 1 if cursor.position > start else failures + 1
                if cursor.position < end:
                    self._todo.appendleft((cursor.position, end))
                await self._origin.after(again, failures)
            else:
                failures = 0

    async def _run_whole(self) -> None:
        """For a server without ranges: one stream from the first byte on, of which only what is missing is kept."""
        failures = 0
        while gaps := await self._pool.run(self._sink.missing):
            skipper = _Cursor(0, 0)
            try:
                async with self._origin.answer(None) as answer:
                    rest = b""
                    for start, end in gaps:
                        rest = await self._skip(answer, rest, skipper, start)
                        skipper.end = end
                        rest = await self._pour(answer, skipper, rest)
            except Again as again:
                failures = 1 if skipper.position > gaps[0][0] else failures + 1
                await self._origin.after(again, failures)

    async def _skip(self, answer: Body, rest: bytes, cursor: _Cursor, start: int) -> bytes:
        """Reads over what is on disk already; what was read beyond `start`."""
        while cursor.position + len(rest) < start:
            cursor.position += len(rest)
            rest = await answer.readany()
            if not rest:
                raise Again(f"the answer broke off after {cursor.position} of {self._size} bytes")
        rest, cursor.position = rest[start - cursor.position :], start
        return rest

    async def _pour(self, answer: Body, cursor: _Cursor, chunk: bytes = b"") -> bytes:
        """Streams the answer into the sink up to the cursor's end; what was read beyond it. `chunk` was read before.

        However this ends, everything received up to then is written, and the cursor stands behind it.
        """
        piece: list[bytes] = []
        length = 0
        writing: asyncio.Future[None] | None = None
        try:
            while cursor.position + length < cursor.end:
                chunk = chunk or await answer.readany()
                if not chunk:
                    raise Again(f"the answer broke off after {cursor.position + length} of {cursor.end} bytes")
                wanted = chunk[: cursor.end - cursor.position - length]
                chunk = chunk[len(wanted) :]
                piece.append(wanted)
                length += len(wanted)
                self._report(len(wanted))
                if length >= self._limits.piece_bytes:
                    if writing is not None:
                        await writing
                    writing = asyncio.ensure_future(self._pool.run(self._sink.write, cursor.position, piece))
                    cursor.position += length
                    piece, length = [], 0
            return chunk
        finally:
            if writing is not None:
                await settled(writing)
                writing.result()
            if piece:
                await self._pool.run(self._sink.write, cursor.position, piece)
                cursor.position += length


class _Cursor:
    """How far a span has been handed to the sink."""

    __slots__ = ("end", "position")

    def __init__(self, position: int, end: int) -> None:
        self.position = position
        self.end = end


def _spans(gaps: list[Span], limits: Limits) -> list[Span]:
    """The gaps cut into requests: a few for each connection, so that all of them end together."""
    total = sum(end - start for start, end in gaps)
    step = min(limits.range_bytes, max(MIN_RANGE_BYTES, total // (2 * limits.connections)))
    return [(at, min(at + step, end)) for start, end in gaps for at in range(start, end, step)]
