"""One piece of work per key: who joins, who leaves, what the others notice (I5)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from modelcached.errors import ShuttingDown
from modelcached.singleflight import Flight, Flights


class Job:
    """Work that ends when it is told to, and tidies up for as long as it is told to."""

    def __init__(self) -> None:
        self.has_started = self.is_cancelled = self.is_over = False
        self.told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.may_leave: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> str:
        self.has_started = True
        try:
            return await self.told
        except asyncio.CancelledError:
            self.is_cancelled = True
            await asyncio.wait([self.may_leave])
            raise
        finally:
            self.is_over = True


Jobs = Flights[str, Flight[str], str]


class Airport:
    """Flights in a task group, and the jobs they run."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self.flights: Jobs = Flights(group)
        self.jobs: dict[str, list[Job]] = defaultdict(list)

    def join(self, key: str = "key") -> asyncio.Task[str]:
        return asyncio.create_task(self.flights.join(key, self.maker(key)))

    def maker(self, key: str) -> Callable[[], Flight[str]]:
        def make() -> Flight[str]:
            self.jobs[key].append(Job())
            return Flight(self.jobs[key][-1])

        return make

    def running(self, key: str) -> list[Job]:
        return [job for job in self.jobs[key] if job.has_started and not job.is_over]


async def quiet() -> None:
    """Lets everything happen that can happen without anybody else."""
    for _ in range(12):
        await asyncio.sleep(0)


@pytest.fixture
async def airport() -> AsyncIterator[Airport]:
    async with asyncio.TaskGroup() as group:
        airport = Airport(group)
        yield airport
        for job in (job for jobs in airport.jobs.values() for job in jobs):
            if not job.told.done():
                job.told.set_result("")
            if not job.may_leave.done():
                job.may_leave.set_result(None)
    assert len(airport.flights) == 0 and "0 flying, 0 ending" in repr(airport.flights)


async def test_everybody_gets_the_one_result(airport: Airport) -> None:
    callers = [airport.join() for _ in range(5)]
    await quiet()
    assert (airport.flights.started, airport.flights.joined, len(airport.flights)) == (1, 4, 1)
    airport.jobs["key"][0].told.set_result("here")
    assert await asyncio.gather(*callers) == ["here"] * 5
    again = airport.join()  # outcomes are shared, never cached
    await quiet()
    assert airport.flights.started == 2 and not again.done()


async def test_a_failure_reaches_everybody_and_ends_nothing_else(airport: Airport) -> None:
    callers, other = [airport.join() for _ in range(3)], airport.join("other")
    await quiet()
    error = OSError("the disk")
    airport.jobs["key"][0].told.set_exception(error)
    assert await asyncio.gather(*callers, return_exceptions=True) == [error] * 3
    assert not other.done() and len(airport.flights) == 1
    airport.jobs["other"][0].told.set_result("fine")
    assert await other == "fine"


async def test_who_leaves_does_not_stop_the_others(airport: Airport) -> None:
    first, second = airport.join(), airport.join()
    await quiet()
    first.cancel()
    await quiet()
    assert first.cancelled() and not airport.jobs["key"][0].is_cancelled
    airport.jobs["key"][0].told.set_result("here")
    assert await second == "here"


async def test_the_last_one_to_leave_stops_it(airport: Airport) -> None:
    callers = [airport.join() for _ in range(2)]
    await quiet()
    for caller in callers:
        caller.cancel()
    await quiet()
    (job,) = airport.jobs["key"]
    assert job.is_cancelled and not job.is_over and len(airport.flights) == 0
    late = airport.join()  # waits until that one is out of the way
    await quiet()
    assert not airport.jobs["key"][1].has_started
    job.may_leave.set_result(None)
    await quiet()
    assert airport.jobs["key"][1].has_started
    airport.jobs["key"][1].told.set_result("here")
    assert await late == "here"


async def test_a_restart_that_is_left_too(airport: Airport) -> None:
    """However many come and go while the first one tidies up, nobody starts before it is done."""
    first = airport.join()
    await quiet()
    first.cancel()
    for wait in (0, 1, 2, 3, 5, 8):
        await quiet()
        late = airport.join()
        for _ in range(wait):
            await asyncio.sleep(0)
        late.cancel()
    last = airport.join()
    await quiet()
    assert [job.has_started for job in airport.jobs["key"]] == [True] + [False] * (len(airport.jobs["key"]) - 1)
    airport.jobs["key"][0].may_leave.set_result(None)
    await quiet()
    assert airport.running("key") == airport.jobs["key"][-1:]
    airport.jobs["key"][-1].told.set_result("here")
    assert await last == "here"


async def test_left_before_it_began(airport: Airport) -> None:
    flight = airport.flights.board("key", airport.maker("key"))
    caller = asyncio.create_task(airport.flights.wait("key", flight))
    caller.cancel()
    await quiet()
    flight = airport.flights.board("key", airport.maker("key"))
    caller = asyncio.ensure_future(airport.flights.wait("key", flight))
    await quiet()
    airport.jobs["key"][-1].told.set_result("here")
    assert await caller == "here"


@pytest.mark.parametrize("steps", [0, 3])
async def test_when_the_group_ends_everybody_is_told(steps: int) -> None:
    """Also those whose flight never made its first step."""
    with pytest.raises(ExceptionGroup):  # noqa: PT012 - the group is what ends
        async with asyncio.TaskGroup() as group:
            airport = Airport(group)
            flight = airport.flights.board("key", airport.maker("key"))
            airport.jobs["key"][0].may_leave.set_result(None)
            caller = asyncio.ensure_future(airport.flights.wait("key", flight))
            for _ in range(steps):
                await asyncio.sleep(0)
            raise ValueError("the daemon ends")
    with pytest.raises(ShuttingDown) as caught:
        await asyncio.wait_for(caller, 5)
    assert caught.value.hint
    with pytest.raises(ShuttingDown):
        await asyncio.wait_for(airport.flights.join("key", airport.maker("key")), 5)
    assert "0 flying, 0 ending" in repr(airport.flights)


class Traffic(RuleBasedStateMachine):
    """Callers come and go, jobs end, fail and tidy up in any order; the model is what each caller must have been told."""

    callers = Bundle("callers")
    keys = st.sampled_from(["a", "b"])

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.ended = self.loop.create_future()
        ready: asyncio.Future[None] = self.loop.create_future()

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                self.airport = Airport(group)
                ready.set_result(None)
                await self.ended

        self.main = self.loop.create_task(main())
        self.loop.run_until_complete(ready)
        self.waiting: dict[asyncio.Task[str], Job] = {}  # the job each caller must hear of

    def run(self, steps: int) -> None:
        async def some() -> None:
            for _ in range(steps):
                await asyncio.sleep(0)

        self.loop.run_until_complete(some())

    def flying(self, key: str) -> list[Job]:
        return [job for job in self.airport.jobs[key] if job in self.waiting.values()]

    @rule(target=callers, key=keys, steps=st.integers(0, 4))
    def join(self, key: str, steps: int) -> tuple[str, asyncio.Task[str]]:
        there = self.flying(key)

        async def join() -> asyncio.Task[str]:
            flight = self.airport.flights.board(key, self.airport.maker(key))
            return asyncio.create_task(self.airport.flights.wait(key, flight))

        caller = self.loop.run_until_complete(join())
        self.waiting[caller] = there[0] if there else self.airport.jobs[key][-1]
        self.run(1 + steps)
        return key, caller

    @rule(caller=consumes(callers), steps=st.integers(0, 4))
    def leave(self, caller: tuple[str, asyncio.Task[str]], steps: int) -> None:
        if caller[1] in self.waiting:
            del self.waiting[caller[1]]
            caller[1].cancel()
            self.run(steps)
            if steps > 2:
                assert caller[1].cancelled()
            self.run(3 - steps if steps < 3 else 0)

    @rule(key=keys, fails=st.booleans())
    def end(self, key: str, fails: bool) -> None:
        for job in self.flying(key):
            self.run(12)
            if not job.has_started:
                continue
            error = OSError("the disk")
            job.told.set_exception(error) if fails else job.told.set_result("here")
            self.run(12)
            for caller in [caller for caller, heard in self.waiting.items() if heard is job]:
                assert caller.exception() is error if fails else caller.result() == "here"
                del self.waiting[caller]

    @rule(key=keys)
    def tidy_up(self, key: str) -> None:
        for job in self.airport.jobs[key]:
            if job.is_cancelled and not job.may_leave.done():
                job.may_leave.set_result(None)
        self.run(12)

    @invariant()
    def one_at_a_time(self) -> None:
        for key in ("a", "b"):
            assert len(self.airport.running(key)) <= 1

    @invariant()
    def nobody_is_forgotten(self) -> None:
        assert not any(caller.done() for caller in self.waiting)
        for key in ("a", "b"):
            assert len(self.flying(key)) <= 1

    @precondition(lambda self: not self.waiting)
    @rule()
    def nothing_is_kept(self) -> None:
        for key in ("a", "b"):
            self.tidy_up(key)
        assert repr(self.airport.flights) == "<Flights 0 flying, 0 ending>"

    def teardown(self) -> None:
        for caller in self.waiting:
            caller.cancel()
        for _ in range(3):
            for key in ("a", "b"):
                self.tidy_up(key)
        self.ended.set_result(None)
        self.loop.run_until_complete(asyncio.wait_for(self.main, 5))
        with contextlib.suppress(AttributeError):
            assert "0 flying, 0 ending" in repr(self.airport.flights)
        self.loop.close()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=100, stateful_step_count=30)
