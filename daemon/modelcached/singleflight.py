"""One running piece of work per key; everybody who asks for the same thing meanwhile waits for it.

The work belongs to the daemon, callers only wait: one who leaves does not stop the others, and the last one to leave
cancels it. The outcome travels in a future, so a failure reaches every waiter and never the task group. Outcomes are
shared, never cached. A key whose cancelled work is still tidying up starts again only when that is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from .errors import ShuttingDown

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
F = TypeVar("F", bound="Flight")  # type: ignore[type-arg]


class Flight(Generic[V]):
    """One piece of work and those who wait for it. Subclasses keep what the waiters share."""

    def __init__(self, work: Callable[[], Awaitable[V]]) -> None:
        self.work = work
        self.waiters = 0
        self.outcome: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None


class Flights(Generic[K, F, V]):
    """All state changes happen between awaits of one event loop; nobody else may touch `_flying` and `_ending`."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._flying: dict[K, F] = {}
        self._ending: dict[K, set[asyncio.Task[None]]] = {}  # stopped, still tidying up
        self.started = 0
        self.joined = 0  # callers that found a flight already there

    def __len__(self) -> int:
        return len(self._flying)

    def running(self) -> list[F]:
        return list(self._flying.values())

    def board(self, key: K, make: Callable[[], F]) -> F:
        """The flight for `key`, started if there is none. Follow it with `wait` without an await between."""
        flight = self._flying.get(key)
        if flight is not None:
            self.joined += 1
            return flight
        flight = make()
        flying = self._fly(key, flight)
        try:
            flight.task = self._group.create_task(flying)
        except RuntimeError:  # the group takes no new tasks
            flying.close()
            raise _ending() from None
        flight.task.add_done_callback(lambda _: self._land(key, flight))  # also when cancelled before its first step
        self._flying[key] = flight
        self.started += 1
        return flight

    async def wait(self, key: K, flight: F) -> V:
        """The flight's outcome. Cancelled: the caller leaves, and the last one stops the flight."""
        flight.waiters += 1
        try:
            result: V = await asyncio.shield(flight.outcome)
            return result
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.outcome.done():
                self._stop(key, flight)

    async def join(self, key: K, make: Callable[[], F]) -> V:
        return await self.wait(key, self.board(key, make))

    def _stop(self, key: K, flight: F) -> None:
        assert flight.task is not None
        if self._flying.get(key) is flight:
            del self._flying[key]
            self._ending.setdefault(key, set()).add(flight.task)
        flight.outcome.cancel()
        flight.task.cancel()

    async def _fly(self, key: K, flight: F) -> None:
        try:
            while ending := self._ending.get(key):
                await asyncio.wait(ending)
            result = await flight.work()
        except Exception as error:
            _fail(flight, error)
        else:
            if not flight.outcome.done():
                flight.outcome.set_result(result)
        finally:
            self._land(key, flight)

    def _land(self, key: K, flight: F) -> None:
        """Forgets the flight."""
        _fail(flight, _ending())
        if self._flying.get(key) is flight:
            del self._flying[key]
        ending = self._ending.get(key, set())
        ending.discard(flight.task)
        if not ending:
            self._ending.pop(key, None)

    def __repr__(self) -> str:
        return f"<Flights {len(self._flying)} flying, {len(self._ending)} ending>"


def _ending() -> ShuttingDown:
    return ShuttingDown("the daemon is ending", "ask again: what is on disk stays")


def _fail(flight: Flight[V], error: Exception) -> None:
    if not flight.outcome.done():
        flight.outcome.set_exception(error)
        flight.outcome.exception()  # retrieved: with no waiter left nobody has to be told
