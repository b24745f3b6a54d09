"""Threads for the loop: a cancelled caller never outruns his thread, and never forgets that he was cancelled."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from modelcached.tasks import BEHIND_NICE, Pool, each, finished, settled, within


async def test_results_and_errors_come_back() -> None:
    pool = Pool("test", 2)
    assert await pool.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 7, 0)
    assert await pool.abandon(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await pool.abandon(divmod, 7, 0)
    pool.close()


async def test_what_nobody_waits_for_gives_way() -> None:
    pool = Pool("test", 2)

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine = niceness()
    assert await pool.run_behind(niceness) == max(mine, BEHIND_NICE)
    assert await pool.run(niceness) == mine == niceness(), "only those threads"
    with pytest.raises(ZeroDivisionError):
        await pool.run_behind(divmod, 7, 0)
    pool.close()


class Work:
    """Runs in a thread until it is told to end."""

    def __init__(self, error: Exception | None = None) -> None:
        self.started, self.may_end, self.is_done = threading.Event(), threading.Event(), False
        self._error = error

    def __call__(self) -> str:
        self.started.set()
        assert self.may_end.wait(10)
        self.is_done = True
        if self._error is not None:
            raise self._error
        return "done"


@pytest.mark.parametrize("error", [None, OSError("the disk")])
@pytest.mark.parametrize("cancels", [1, 3])
async def test_cancelled_while_it_runs(error: Exception | None, cancels: int) -> None:
    """The thread may be writing to a descriptor that the caller is about to close."""
    pool, work = Pool("test", 1), Work(error)
    caller = asyncio.create_task(pool.run(work))
    await asyncio.to_thread(work.started.wait, 5)
    for _ in range(cancels):
        caller.cancel()
        await asyncio.wait([caller], timeout=0.02)
        assert not caller.done()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert work.is_done
    pool.close()


async def test_cancelled_before_it_runs() -> None:
    pool, running, waiting = Pool("test", 1), Work(), Work()
    first = asyncio.create_task(pool.run(running))
    await asyncio.to_thread(running.started.wait, 5)
    second = asyncio.create_task(pool.run(waiting))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    running.may_end.set()
    assert await first == "done"
    assert await pool.run(lambda: "next") == "next"
    assert not waiting.started.is_set()
    pool.close()


async def test_who_holds_nothing_leaves_at_once() -> None:
    pool, work = Pool("test", 1), Work()
    caller = asyncio.create_task(pool.abandon(work))
    await asyncio.to_thread(work.started.wait, 5)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert not work.is_done
    work.may_end.set()
    assert await pool.run(lambda: work.is_done)
    pool.close()


async def test_no_more_threads_than_said() -> None:
    pool = Pool("test", 3)
    everybody = threading.Barrier(3)  # would break with fewer
    busy, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        everybody.wait(10)
        with lock:
            busy -= 1

    await asyncio.gather(*(pool.run(work) for _ in range(12)))
    assert most == 3
    pool.close()


async def test_each_does_all_and_ends_with_the_first_failure() -> None:
    done: list[int] = []

    async def work(item: int) -> None:
        await asyncio.sleep(0)
        done.append(100 // item)

    await each([1, 2, 4], work, 2)
    assert sorted(done) == [25, 50, 100]
    with pytest.raises(ZeroDivisionError):
        await each([1, 0, 2, 4], work, 1)
    assert len(done) == 4


async def test_deadlines_hold_after_one_of_each_failed() -> None:
    """Python 3.11 counts a group's failure as a cancelling of its parent, for ever: a loop that goes on would end at its next deadline."""

    async def fail(item: int) -> None:
        await asyncio.sleep(0)
        raise OSError("the store is away")

    with pytest.raises(OSError, match="away"):
        await each(range(3), fail, 3)
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()


@pytest.mark.parametrize("is_late", [False, True], ids=["while it fails", "and then it fails"])
async def test_each_is_cancelled(is_late: bool) -> None:
    """A failure that the caller would try again must not hide that the caller is to end."""
    pool, work = Pool("test", 1), Work(OSError("the disk"))

    async def one(item: int) -> None:
        if item == 0:
            await pool.run(work)
        elif not is_late:
            await asyncio.to_thread(work.started.wait, 5)
            raise OSError("the store is away")

    caller = asyncio.create_task(each(range(2), one, 2))
    await asyncio.to_thread(work.started.wait, 5)
    await asyncio.wait([caller], timeout=0.05)
    assert not caller.done()
    caller.cancel()
    await asyncio.sleep(0)
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert work.is_done
    pool.close()


async def test_a_second_half_is_done_though_its_caller_leaves() -> None:
    """Also when no thread has begun with it: `Pool.run` alone would leave it."""
    pool, running, second = Pool("test", 1), Work(), Work()
    first = asyncio.create_task(pool.run(running))
    await asyncio.to_thread(running.started.wait, 5)
    second.may_end.set()
    caller = asyncio.create_task(finished(pool.run(second)))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0)
    running.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await first == "done" and second.is_done
    assert await finished(pool.run(lambda: "result")) == "result"
    pool.close()


async def test_within_waits_no_longer() -> None:
    await within(0.01, asyncio.Event().wait())
    await within(None, asyncio.sleep(0))
    with pytest.raises(ZeroDivisionError):
        await within(10, asyncio.to_thread(divmod, 7, 0))


async def test_within_keeps_the_cancellation() -> None:
    """Else a loop that is woken in the moment when the daemon ends would never end."""
    event = asyncio.Event()
    waiter = asyncio.create_task(within(10, event.wait()))
    await asyncio.sleep(0)
    event.set()  # what it waits for has come, and it has not been told yet
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


@pytest.mark.parametrize("outcome", ["result", "error", "cancelled"])
async def test_settled(outcome: str) -> None:
    """Waits for any outcome, shows none of them."""
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waiter = asyncio.create_task(settled(future))
    await asyncio.sleep(0)
    assert not waiter.done()
    if outcome == "result":
        future.set_result("")
    elif outcome == "error":
        future.set_exception(OSError("the disk"))
    else:
        future.cancel()
    await waiter


async def test_settled_keeps_the_cancellation() -> None:
    """Else a download that was stopped while its last piece was written would go on with the next range."""
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waiter = asyncio.create_task(settled(future))
    await asyncio.sleep(0)
    for _ in range(2):
        waiter.cancel()
        await asyncio.wait([waiter], timeout=0.02)
        assert not waiter.done()
    future.set_result("")
    with pytest.raises(asyncio.CancelledError):
        await waiter
