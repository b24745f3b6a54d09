"""Threads for the event loop: bulk work runs in bounded pools, and a cancelled caller never outruns its thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")

BEHIND_NICE = 10  # a tenth of the share that whoever computes on the same core gets
BEHIND_THREADS = max(1, (os.cpu_count() or 1) // 4)
log = logging.getLogger(__name__)


class Pool:
    """A bounded pool of threads. The work is cut into pieces (a chunk, a file), so that waiting for one is short."""

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._behind = ThreadPoolExecutor(BEHIND_THREADS, thread_name_prefix=f"{name}-behind", initializer=_give_way)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `function` in a thread. Cancelled while it runs: waits for the thread, then re-raises."""
        return await _outcome(self._executor.submit(function, *args, **kwargs))

    async def run_behind(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `run`, for what a core works on while nobody waits for it: in few threads, which give way to the tasks of the node."""
        return await _outcome(self._behind.submit(function, *args, **kwargs))

    async def abandon(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `run`, for work that holds nothing of ours (a request of a foreign client): a cancelled caller leaves at once."""
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))

    def close(self) -> None:
        for executor in (self._executor, self._behind):
            executor.shutdown(wait=False, cancel_futures=True)


async def _outcome(future: Future[T]) -> T:
    waiting = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if not future.cancel():
            await settled(waiting)
        raise


def _give_way() -> None:
    """Makes this thread a nice one: in Linux that is each thread's own. A sandbox may refuse; then they are few, and that is all."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(BEHIND_NICE, os.getpriority(os.PRIO_PROCESS, 0)))


async def each(items: Iterable[Item], work: Callable[[Item], Awaitable[object]], workers: int) -> None:
    """Does `work` for every item, in order, so many at the same time. The first failure ends all, and is raised as it is."""
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(worker())

    try:
        await apart(all_of_them())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def apart(work: Coroutine[Any, Any, T]) -> T:
    """Does `work`, which has a TaskGroup that may fail, in a task of its own.

    Until Python 3.13 such a group forgets it when its parent is cancelled while it ends, and counts one cancelling too many of a parent
    that lives on, whose deadlines end as cancellings then.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        await settled(task)
        raise
    return task.result()


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Does all of `work`, the second half of a change, also when its caller is cancelled meanwhile; who is told so afterwards."""
    task = asyncio.ensure_future(work)
    await settled(task)
    return task.result()


async def within(seconds: float | None, waiting: Awaitable[object]) -> None:
    """Waits, but no longer. Not `asyncio.wait_for`: in Python 3.11 that one forgets a cancelling which meets the result."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await waiting


def behind(group: asyncio.TaskGroup, work: Coroutine[None, None, None]) -> asyncio.Task[None] | None:
    """Starts what nobody waits for, so its failure ends nobody else. None when the group takes no new tasks: the daemon ends."""
    guarded = _told_to_the_log(work)
    try:
        return group.create_task(guarded)
    except RuntimeError:
        guarded.close()
        work.close()
        return None


async def _told_to_the_log(work: Coroutine[None, None, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("something in the background failed unexpectedly")


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
