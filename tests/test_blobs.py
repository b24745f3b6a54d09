"""Blobs: a name is complete, right and read-only (I1); what lies is a miss and is kept aside (I10)."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from modelcached.blobs import BATCH_FILES, Blobs, hash_file
from modelcached.durable import MTIME_NS
from modelcached.errors import NoSpace, Storage
from modelcached.layout import Layout
from modelcached.model import Digest
from modelcached.root import open_root
from modelcached.tasks import Pool

from .kernel import Machine, read_only, small_tmpfs


def digest_of(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout, lock = open_root(tmp_path / "root", private=True)
    yield layout
    os.close(lock)
    assert os.listdir(layout.tmp) == []


@asynccontextmanager
async def on(layout: Layout) -> AsyncIterator[Blobs]:
    pool = Pool("test", 4)
    async with asyncio.TaskGroup() as group:
        blobs = Blobs(layout, pool, group)
        yield blobs
    blobs.close()
    pool.close()


async def test_small_ones_come_in_batches(layout: Layout) -> None:
    contents = [f"file {number}".encode() for number in range(BATCH_FILES + 30)]
    async with on(layout) as blobs:
        adding = []
        for data in [*contents, *contents[:30]]:
            adding.append(asyncio.create_task(blobs.add(data, digest_of(data))))
            if len(adding) % 100 == 0:
                await asyncio.sleep(0)
        await asyncio.gather(*adding)
        for data in contents[::7]:
            digest = digest_of(data)
            assert blobs.has(digest, len(data)) and not blobs.has(digest, len(data) + 1)
            found = blobs.path(digest).stat()
            assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns, found.st_nlink) == (0o444, MTIME_NS, 1)
            assert hash_file(blobs.path(digest)) == digest
        assert dict(blobs.walk()) == {digest_of(data): len(data) for data in contents}


async def test_a_large_one_moves_in(layout: Layout) -> None:
    data = os.urandom(3 << 20)
    async with on(layout) as blobs:
        for _ in range(2):  # the second time its name is taken already
            source = layout.partials / "download"
            source.write_bytes(data)
            await blobs.adopt(source, digest_of(data))
            assert blobs.has(digest_of(data), len(data)) and not source.exists()
            assert blobs.check(digest_of(data))
    assert blobs.quarantined == 0


async def test_who_leaves_does_not_stop_the_batch(layout: Layout) -> None:
    async with on(layout) as blobs:
        leaver = asyncio.create_task(blobs.add(b"left", digest_of(b"left")))
        stays = asyncio.create_task(blobs.add(b"stays", digest_of(b"stays")))
        await asyncio.sleep(0)
        leaver.cancel()
        await stays
        assert leaver.cancelled()
    assert blobs.has(digest_of(b"left"), 4)  # the group has waited for it


async def test_when_the_group_ends_nobody_is_left_waiting(layout: Layout) -> None:
    pool = Pool("test", 1)
    waiting: list[asyncio.Task[None]] = []
    with pytest.raises(ExceptionGroup):  # noqa: PT012 - the group is what ends
        async with asyncio.TaskGroup() as group:
            blobs = Blobs(layout, pool, group)
            waiting = [asyncio.create_task(blobs.add(data, digest_of(data))) for data in (b"one", b"two")]
            await asyncio.sleep(0)
            waiting.append(asyncio.create_task(blobs.add(b"three", digest_of(b"three"))))  # for the next batch
            await asyncio.sleep(0)
            raise ValueError("the daemon ends")
    done, pending = await asyncio.wait(waiting, timeout=5)
    assert len(done) == 3 and not pending and all(task.cancelled() for task in done)
    blobs.close()
    pool.close()


async def test_a_full_disk_costs_only_what_did_not_fit(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, "2m"):
        layout, lock = open_root(tmp_path, private=True)
        async with on(layout) as blobs:
            small, large = b"small", b"x" * (4 << 20)
            with pytest.raises(NoSpace, match="the disk is full") as caught:
                await blobs.add(large, digest_of(large))
            assert "modelcache rm" in caught.value.hint
            assert os.listdir(layout.tmp) == [] and not blobs.has(digest_of(large), len(large))
            await blobs.add(small, digest_of(small))
            assert blobs.check(digest_of(small))
        os.close(lock)


async def test_a_shard_that_cannot_be_written(layout: Layout) -> None:
    data = b"data"
    async with on(layout) as blobs:
        with read_only(blobs.path(digest_of(data)).parent), pytest.raises(Storage, match="publishing"):
            await blobs.add(data, digest_of(data))
        await blobs.add(data, digest_of(data))
        assert blobs.has(digest_of(data), 4)


def overwrite(path: Path) -> None:
    """As root can, through any of its names."""
    with open(path, "r+b") as file:
        file.write(b"evil")


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


LIES: dict[str, Callable[[Path], None]] = {
    "overwritten": overwrite,
    "longer": append,
    "cut off": lambda path: os.truncate(path, 3),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_lies_goes_to_quarantine(layout: Layout, lie: str) -> None:
    data = b"the right bytes"
    digest = digest_of(data)
    async with on(layout) as blobs:
        await blobs.add(data, digest)
        LIES[lie](blobs.path(digest))
        assert not blobs.has(digest, len(data))
        assert not blobs.check(digest)
        assert not blobs.path(digest).exists() and (layout.quarantine / digest).exists()
        assert blobs.quarantined == 1
        assert not blobs.check(digest)  # not here
        await blobs.add(data, digest)
        assert blobs.has(digest, len(data)) and blobs.check(digest)


async def test_what_the_disk_cannot_read_goes_to_quarantine(tmp_path: Path) -> None:
    """A filesystem that keeps checksums gives an error instead of bytes that are wrong, as every one does for a bad sector."""
    machine, data = Machine(tmp_path, "btrfs"), os.urandom(1 << 20)
    with machine.on() as place:
        layout, lock = open_root(place / "root", private=True)
        async with on(layout) as blobs:
            await blobs.add(data, digest_of(data))
        os.close(lock)
    machine.spoil(data)
    with machine.on():
        layout, lock = open_root(place / "root", private=True)
        async with on(layout) as blobs:
            with pytest.raises(OSError, match="Input/output error"):
                hash_file(blobs.path(digest_of(data)))
            assert blobs.has(digest_of(data), len(data)) and not blobs.check(digest_of(data))
            assert blobs.quarantined == 1 and (layout.quarantine / digest_of(data)).exists()
            await blobs.add(data, digest_of(data))
            assert blobs.check(digest_of(data))
        os.close(lock)


@pytest.mark.parametrize("size", [15, 2 << 20])
@pytest.mark.parametrize("lie", LIES)
async def test_what_lies_does_not_keep_the_good_one_out(layout: Layout, lie: str, size: int) -> None:
    """A name that is taken keeps its bytes, so whoever publishes looks at what has it."""
    data = os.urandom(size)
    digest = digest_of(data)
    async with on(layout) as blobs:
        for attempt in range(2):
            if size < 1 << 20:
                await blobs.add(data, digest)
            else:
                (layout.partials / "download").write_bytes(data)
                await blobs.adopt(layout.partials / "download", digest)
            assert blobs.has(digest, size) and hash_file(blobs.path(digest)) == digest
            if not attempt:
                LIES[lie](blobs.path(digest))
    assert blobs.quarantined == 1


async def test_what_was_only_touched_is_kept(layout: Layout) -> None:
    digest = digest_of(b"data")
    async with on(layout) as blobs:
        await blobs.add(b"data", digest)
        inode = blobs.path(digest).stat().st_ino
        blobs.path(digest).touch()
        blobs.path(digest).chmod(0o644)
        assert not blobs.has(digest, 4)
        assert blobs.check(digest) and blobs.has(digest, 4)
        assert blobs.path(digest).stat().st_ino == inode and stat.S_IMODE(blobs.path(digest).stat().st_mode) == 0o444


async def test_only_what_nothing_shows_can_be_forgotten(layout: Layout) -> None:
    digest = digest_of(b"data")
    async with on(layout) as blobs:
        await blobs.add(b"data", digest)
        os.link(blobs.path(digest), layout.views / "shown")
        assert blobs.forget(digest) == 0 and blobs.has(digest, 4)
        (layout.views / "shown").unlink()
        assert blobs.forget(digest) == 4096 and not blobs.has(digest, 4)
        assert blobs.forget(digest) == 0
