"""Threads for the event loop: bulk work runs in bounded pools, and a cancelled caller never outruns its thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """A bounded pool of threads. The work is cut into pieces (a chunk, a file), so that waiting for one is short."""

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `function` in a thread. Cancelled while it runs: waits for the thread, then re-raises."""
        future = self._executor.submit(function, *args, **kwargs)
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not future.cancel():
                await settled(waiting)
            raise

    async def abandon(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `run`, for work that holds nothing of ours (a request of a foreign client): a cancelled caller leaves at once."""
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


async def settled(future: asyncio.Future[T]) -> None:
    """Waits until `future` is done, whatever its outcome. A caller who is cancelled meanwhile is told so afterwards, not before."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if not future.cancelled():
        future.exception()
    if cancelled is not None:
        raise cancelled
