"""Lanes: threads for work that can hang for ever, as reading a client's file can (I7).

Every save has so many lanes of its own, so work that hangs costs nobody else anything. Work that stops moving, or whose caller leaves, is
left behind with its thread: nobody waits for it, and a uid that has left too much behind gets no more threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from .errors import Storage, TooMany

T = TypeVar("T")
Beat = Callable[[], None]


class Lanes:
    """Only the event loop touches the counters."""

    def __init__(self, name: str, most_left_behind: int, stall_seconds: float) -> None:
        self._name = name
        self._most_left_behind = most_left_behind  # of one uid
        self._stall_seconds = stall_seconds
        self._running = 0
        self._left_behind: Counter[int] = Counter()  # threads that hang, by uid

    async def run(self, uid: int, lanes: asyncio.Semaphore, work: Callable[[Beat], T], after: Callable[[], object]) -> T:
        """Runs `work` in a thread; it calls its argument whenever something has moved. Storage if nothing does for so long.

        `after` is called when the work has ended, however late, or as soon as it is known that it never begins.
        """
        begins = False
        try:
            async with lanes:
                if self._left_behind[uid] >= self._most_left_behind:
                    raise TooMany(
                        f"{self._left_behind[uid]} files of uid {uid} hang in their filesystem",
                        "look at the mount they lie on: is its server there?",
                    )
                started = _Work(work, after)
                # "daemon": one that hangs must not keep the process
                threading.Thread(target=started.run, name=self._name, daemon=True).start()
                begins = True
                return await self._watch(uid, started)
        finally:
            if not begins:
                after()

    def statistics(self) -> dict[str, int]:
        return {"running": self._running, "hanging": self._left_behind.total()}

    async def _watch(self, uid: int, work: _Work[T]) -> T:
        ended = asyncio.wrap_future(work.outcome)
        self._running += 1
        try:
            while not ended.done():
                left = work.moved + self._stall_seconds - time.monotonic()
                if left <= 0:
                    raise Storage(
                        f"a file gave no byte for {self._stall_seconds:.0f} s", "look at the filesystem it lies on: is its server there?"
                    )
                await asyncio.wait([ended], timeout=left)
            return ended.result()
        finally:
            self._running -= 1
            if not ended.done():
                self._left_behind[uid] += 1
                ended.cancel()
                work.outcome.add_done_callback(_on_loop(lambda: self._left_behind.subtract([uid])))


class _Work(Generic[T]):
    """Its outcome is set in its thread."""

    def __init__(self, work: Callable[[Beat], T], after: Callable[[], object]) -> None:
        self._work = work
        self._after = after
        self.moved = time.monotonic()
        self.outcome: Future[T] = Future()
        self.outcome.set_running_or_notify_cancel()  # a caller who leaves does not change what becomes of it

    def run(self) -> None:
        try:
            try:
                result = self._work(self._beat)
            finally:
                self._after()
        except BaseException as error:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(result)

    def _beat(self) -> None:
        self.moved = time.monotonic()


def _on_loop(callback: Callable[[], object]) -> Callable[[object], None]:
    loop = asyncio.get_running_loop()

    def call(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the daemon has ended meanwhile
            loop.call_soon_threadsafe(callback)

    return call
