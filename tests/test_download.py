"""One large file in parallel ranges: each byte once, what a broken answer delivered is kept, and nothing goes on that was stopped."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from modelcached.download import MIN_RANGE_BYTES, Download, Limits, Sink
from modelcached.errors import ContentMismatch, HubUnavailable
from modelcached.hub import Hub as HubClient
from modelcached.hub import Source
from modelcached.model import Commit, Content, Repo
from modelcached.partials import Partial
from modelcached.spans import Span
from modelcached.tasks import Pool
from modelcached.transfer import FileOrigin, Transfer

from .hub import Hub, Random
from .kernel import small_tmpfs
from .peers import answering, reply

MIB = 1 << 20
DATA = bytes(Random("download", 18 * MIB + 12_345))
SIZE = len(DATA)
LIMITS = Limits(connections=3, piece_bytes=256 << 10, range_bytes=8 * MIB)
STALL_SECONDS = 0.3


@pytest.fixture(scope="module")
def commit(the_hub: Hub) -> Commit:
    return Commit(the_hub.commit("org/name", {"model.bin": Random("download", SIZE)}))


class Downloading:
    """What downloads of one source need, and the bytes they reported."""

    def __init__(self, source: Source, connections: int, attempts: int) -> None:
        self.client = HubClient(attempts, 0.01)
        self.transfer = Transfer(self.client, connections, STALL_SECONDS)
        self.pool = Pool("test", 4)
        self.source = source
        self.received = 0

    async def into(self, sink: Sink, size: int = SIZE, limits: Limits = LIMITS) -> None:
        origin = FileOrigin(self.transfer, self.source, size)
        await Download(origin, self.pool, limits, size, sink, self._report).run()

    def _report(self, count: int) -> None:
        self.received += count


@asynccontextmanager
async def downloading(endpoint: str, commit: str, connections: int = 3, attempts: int = 4) -> AsyncIterator[Downloading]:
    it = Downloading(Source(Repo(endpoint, "model", "org/name"), Commit(commit), "model.bin"), connections, attempts)
    try:
        yield it
    finally:
        assert it.transfer.budget.free == connections  # every connection was given back
        await it.transfer.close()
        it.client.close()
        it.pool.close()


class Memory:
    """A sink that remembers what was written, and complains of bytes that come twice."""

    def __init__(self, size: int = SIZE, have: Sequence[Span] = ()) -> None:
        self.data = bytearray(size)
        self.have = list(have)
        for start, end in have:
            self.data[start:end] = DATA[start:end]
        self.lock = threading.Lock()

    def missing(self) -> list[Span]:
        with self.lock:
            gaps, position = [], 0
            for start, end in [*sorted(self.have), (len(self.data), len(self.data))]:
                if start > position:
                    gaps.append((position, start))
                position = max(position, end)
            return gaps

    def write(self, offset: int, chunks: Sequence[bytes]) -> None:
        data = b"".join(chunks)
        with self.lock:
            assert not any(start < offset + len(data) and offset < end for start, end in self.have), f"{offset} came twice"
            self.have.append((offset, offset + len(data)))
            self.data[offset : offset + len(data)] = data


def spans(hub: Hub) -> list[Span]:
    """What the second host was asked for."""
    asked = [request.range.removeprefix("bytes=").split("-") for request in hub.requests(kind="lfs") if request.range]
    return [(int(start), int(end) + 1) for start, end in asked]


async def test_each_byte_once(hub: Hub, commit: Commit, tmp_path: Path) -> None:
    partial = Partial(tmp_path / "partial", Content("sha256", hashlib.sha256(DATA).hexdigest(), SIZE))
    async with downloading(hub.endpoint, commit) as it:
        await it.into(partial)
        assert it.received == SIZE
    assert partial.finish() == hashlib.sha256(DATA).hexdigest()
    partial.close()
    assert (tmp_path / "partial").read_bytes() == DATA
    asked = sorted(spans(hub))
    assert [start for start, _ in asked] == [0, *(end for _, end in asked[:-1])] and asked[-1][1] == SIZE
    assert max(end - start for start, end in asked) <= LIMITS.range_bytes and len(asked) >= 3
    assert sum(request.bytes_sent for request in hub.requests(kind="lfs")) == SIZE


@pytest.mark.parametrize(
    "have",
    [
        pytest.param([(0, SIZE)], id="everything"),
        pytest.param([(0, 3 * MIB)], id="the front"),
        pytest.param([(SIZE - 5, SIZE)], id="the end"),
        pytest.param([(1, 2), (MIB, 7 * MIB), (7 * MIB + 1, 16 * MIB)], id="here and there"),
    ],
)
async def test_only_the_gaps_are_asked_for(hub: Hub, commit: Commit, have: list[Span]) -> None:
    sink = Memory(have=have)
    gaps = sink.missing()
    async with downloading(hub.endpoint, commit) as it:
        await it.into(sink)
    assert sink.data == DATA
    assert it.received == sum(end - start for start, end in gaps) == sum(request.bytes_sent for request in hub.requests(kind="lfs"))
    assert all(any(first <= start and end <= last for first, last in gaps) for start, end in spans(hub))


@pytest.mark.parametrize(
    ("fault", "wasted"),
    [
        pytest.param({"kind": "reset", "after": 2 * MIB, "times": 6}, 6 * MIB, id="reset"),  # what lay in buffers when it broke
        pytest.param({"kind": "short", "after": 2 * MIB, "times": 6}, 6 * MIB, id="short"),
        pytest.param({"kind": "short", "after": 100_001, "times": 30}, 0, id="short, often"),
        pytest.param({"kind": "stall", "after": 3 * MIB, "times": 3}, 0, id="stall"),
        pytest.param({"kind": "5xx", "match": "lfs", "times": 3}, 0, id="5xx"),
        pytest.param({"kind": "5xx", "match": "resolve", "times": 2}, 0, id="5xx of the hub"),
        pytest.param({"kind": "expired", "times": 1}, 0, id="expired"),
        pytest.param({"kind": "429", "match": "lfs", "times": 1}, 0, id="429"),
    ],
)
async def test_what_was_delivered_is_kept(hub: Hub, commit: Commit, fault: dict[str, object], wasted: int) -> None:
    """Faults that come again and again are no reason to give up while bytes come in."""
    sink = Memory()
    if fault["kind"] == "expired":
        async with downloading(hub.endpoint, commit) as it:
            await it.into(Memory(have=[(1, SIZE)]))
            location = it.source.location
        hub.reset_log()
    async with downloading(hub.endpoint, commit) as it:
        if fault["kind"] == "expired":
            it.source.location = location
        hub.misbehave(**fault)  # type: ignore[arg-type]
        await it.into(sink)
        assert it.received == SIZE
    assert sink.data == DATA
    assert sum(request.bytes_sent for request in hub.requests(kind="lfs") if request.status == 206) <= SIZE + wasted


@pytest.mark.parametrize("have", [[], [(5, MIB), (2 * MIB, 2 * MIB + 1), (10 * MIB, 18 * MIB)]])
@pytest.mark.parametrize("breaks", [False, True])
async def test_a_server_without_ranges(hub: Hub, commit: Commit, have: list[Span], breaks: bool) -> None:
    """It sends the whole file: one stream, of which only what is missing is written."""
    hub.misbehave("no_range")
    if breaks:
        hub.misbehave("short", after=11 * MIB, times=2, match="lfs")
    sink = Memory(have=have)
    async with downloading(hub.endpoint, commit) as it:
        await it.into(sink)
        assert it.transfer.budget.free == 3
    assert sink.data == DATA


async def test_it_gives_up(hub: Hub, commit: Commit) -> None:
    """When nothing comes in any more; what came stays."""
    hub.misbehave("short", after=MIB, times=3, match="lfs")
    hub.misbehave("5xx", match="lfs")
    sink = Memory()
    async with downloading(hub.endpoint, commit) as it:
        with pytest.raises(HubUnavailable, match="HTTP 503"):
            await it.into(sink)
        received = it.received
        assert sum(end - start for start, end in sink.have) == received
        hub.calm()
        await it.into(sink)
        assert it.received == SIZE
    assert sink.data == DATA


async def test_never_more_connections_than_the_budget_has(hub: Hub, commit: Commit) -> None:
    most, now = 0, 0

    async def answer(path: str, headers: dict[str, str]) -> bytes:
        nonlocal most, now
        now += 1
        most = max(most, now)
        start, end = (int(number) for number in headers["range"].removeprefix("bytes=").split("-"))
        await asyncio.sleep(0)
        now -= 1
        return reply(206, DATA[start : end + 1], Content_Range=f"bytes {start}-{end}/{SIZE}")

    async with answering(answer) as peer, downloading(peer, "main", connections=2) as it:
        sinks = [Memory(), Memory()]
        await asyncio.gather(*(it.into(sink, limits=Limits(8, 1 << 16, MIN_RANGE_BYTES)) for sink in sinks))
        assert [sink.data == DATA for sink in sinks] == [True, True] and most <= 2


LIES: dict[str, Callable[[int, int], bytes]] = {
    "another range": lambda start, end: reply(206, DATA[:1000], Content_Range=f"bytes {start + 1}-{end + 1}/{SIZE}"),
    "another size": lambda start, end: reply(206, DATA[start:end], Content_Range=f"bytes {start}-{end - 1}/{SIZE + 1}"),
    "no range said": lambda start, end: reply(206, DATA[start:end]),
    "another file": lambda start, end: reply(200, b"<html>log in, please</html>"),
    "nothing": lambda start, end: reply(200, b""),
}


@pytest.mark.parametrize("lie", LIES)
async def test_servers_that_have_something_else(lie: str) -> None:
    """Nothing of it is written: it would look like a piece with a sound CRC."""

    def answer(path: str, headers: dict[str, str]) -> bytes:
        start, end = headers["range"].removeprefix("bytes=").split("-")
        return LIES[lie](int(start), int(end) + 1)

    sink = Memory()
    async with answering(answer) as peer, downloading(peer, "main") as it:
        with pytest.raises(ContentMismatch, match=f"lists 'model.bin' with {SIZE} bytes, and its server has"):
            await it.into(sink)
    assert sink.have == []


@pytest.mark.parametrize("more", [1, 5 * MIB])
async def test_more_than_was_asked_for_is_left(more: int) -> None:
    def answer(path: str, headers: dict[str, str]) -> bytes:
        start, end = (int(number) for number in headers["range"].removeprefix("bytes=").split("-"))
        return reply(206, (DATA * 2)[start : end + 1 + more], Content_Range=f"bytes {start}-{end + more}/{SIZE}")

    sink = Memory()
    async with answering(answer) as peer, downloading(peer, "main") as it:
        await it.into(sink)
    assert sink.data == DATA


async def test_a_full_disk_ends_all_of_it(hub: Hub, commit: Commit, tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", "4m") as folder:
        partial = Partial(folder / "partial", Content("sha256", "0" * 64, SIZE))
        async with downloading(hub.endpoint, commit) as it:
            with pytest.raises(OSError, match="No space left"):
                await it.into(partial)
            assert it.transfer.budget.free == 3
        kept = partial.done_bytes
        partial.close()
        again = Partial(folder / "partial", Content("sha256", "0" * 64, SIZE))
        assert again.done_bytes == kept > 0  # a larger disk would go on from there
        again.close()


class Held(Memory):
    """A disk on which a write takes as long as the test wants."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.is_held, self.may_go_on = threading.Event(), threading.Event()

    def write(self, offset: int, chunks: Sequence[bytes]) -> None:
        super().write(offset, chunks)
        if sum(end - start for start, end in self.have) >= self.after:
            self.is_held.set()
            assert self.may_go_on.wait(10)


@pytest.mark.parametrize("seed", range(3))
async def test_who_is_stopped_stops(hub: Hub, commit: Commit, seed: int) -> None:
    """Also in the middle of the last write of a range: no further range is begun, and nothing is written behind the caller's back."""
    after = MIN_RANGE_BYTES if seed == 0 else random.Random(seed).randrange(1, SIZE)
    sink = Held(after)
    limits = Limits(connections=1, piece_bytes=256 << 10, range_bytes=MIN_RANGE_BYTES)
    async with downloading(hub.endpoint, commit) as it:
        running = asyncio.create_task(it.into(sink, limits=limits))
        assert await asyncio.to_thread(sink.is_held.wait, 10)
        asked = len(hub.requests(kind="lfs"))
        running.cancel()
        await asyncio.wait([running], timeout=0.05)
        assert not running.done()  # its thread still writes
        sink.may_go_on.set()
        await asyncio.wait([running], timeout=5)
        assert running.cancelled()
        written = len(sink.have)
        assert await it.pool.run(lambda: len(sink.have)) == written
        assert len(hub.requests(kind="lfs")) == asked
        assert it.transfer.budget.free == 3
    assert all(sink.data[start:end] == DATA[start:end] for start, end in sink.have)
