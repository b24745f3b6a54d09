"""Claims, on a store in a folder: who gets one, who gives it back, and what becomes of those who wait. Fleets are in test_fleet.py."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcached.claims import Claims
from modelcached.errors import StoreMissingBucket
from modelcached.store import Store, open_store
from modelcached.tasks import Pool

KEY = "claims/x.json"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    pool = Pool("io", 2)
    yield open_store(f"file://{tmp_path}/store", pool)
    pool.close()


def standing() -> int:
    return 0


async def test_a_claim_is_one_nodes_and_shared_within_it(store: Store) -> None:
    async with asyncio.TaskGroup() as group:
        here, there = Claims(store, "here", 0.1, group), Claims(store, "there", 0.1, group)
        first = await here.take("x", standing)
        assert first is not None and await here.take("x", standing) is first
        assert await there.take("x", standing) is None
        await here.release(first)
        assert await store.head(KEY) is not None  # the other one still has it
        await here.release(first)
        assert await store.head(KEY) is None


async def test_who_leaves_while_a_claim_is_taken_has_none(store: Store) -> None:
    async with asyncio.TaskGroup() as group:
        claims = Claims(store, "here", 0.1, group)
        for turns in range(8):
            taking = asyncio.create_task(claims.take("x", standing))
            for _ in range(turns):
                await asyncio.sleep(0)
            taking.cancel()
            await asyncio.wait([taking])
            if not taking.cancelled() and (claim := taking.result()) is not None:  # it came just in time
                await claims.release(claim)
    assert await store.head(KEY) is None
    assert claims.taken


async def test_one_that_was_lost_is_not_given_back_in_anothers_place(store: Store) -> None:
    counter = itertools.count()
    async with asyncio.TaskGroup() as group:
        claims = Claims(store, "here", 0.04, group)
        first = await claims.take("x", lambda: next(counter))
        assert first is not None
        await store.put(KEY, b"somebody else's")
        async with asyncio.timeout(10):
            while (again := await claims.take("x", standing)) is first:  # until a renewal has told us
                await claims.release(first)
        assert again is None
        await store.delete(KEY)
        second = await claims.take("x", standing)
        assert second is not None and second is not first
        await claims.release(first)
        assert await store.head(KEY) is not None
        await claims.release(second)
        assert await store.head(KEY) is None


async def test_those_who_wait_are_told_that_the_store_is_away(tmp_path: Path, store: Store) -> None:
    (tmp_path / "store").write_bytes(b"a file")
    async with asyncio.TaskGroup() as group:
        claims = Claims(store, "here", 30, group)
        waiting = [asyncio.create_task(claims.wait("x")), asyncio.create_task(claims.gone("y"))]
        async with asyncio.timeout(10):
            await asyncio.wait(waiting)
        for task in waiting:
            with pytest.raises(StoreMissingBucket):
                task.result()


async def test_at_the_end_all_are_given_back(store: Store) -> None:
    async with asyncio.TaskGroup() as group:
        claims = Claims(store, "here", 0.1, group)
        assert await claims.take("x", standing) is not None
        await claims.close()
        assert await store.head(KEY) is None
