"""How a fetch is getting on: one meter per running fetch, shown to everybody who waits for it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from modelcache.protocol import Progress

RATE_SECONDS = 3.0  # the rate is an average over so long
TICK_SECONDS = 0.2
Report = Callable[[Progress], None]


class Spent:
    """Where time went, by kind: wall time during which at least one part of the work was of that kind. Kinds may overlap."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[int, float]] = {}  # how many parts, and since when there was one
        self._seconds: dict[str, float] = {}

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        self.enter(kind)
        try:
            yield
        finally:
            self.leave(kind)

    def enter(self, kind: str) -> None:
        count, since = self._running.get(kind, (0, time.monotonic()))
        self._running[kind] = (count + 1, since)

    def leave(self, kind: str) -> None:
        count, since = self._running.pop(kind)
        if count > 1:
            self._running[kind] = (count - 1, since)
        else:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + time.monotonic() - since

    def add(self, kind: str, seconds: float) -> None:
        """What was measured elsewhere."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def seconds(self, kinds: Sequence[str]) -> dict[str, float]:
        """What is over of each kind, as keys of a log line."""
        return {f"{kind}_seconds": round(self._seconds.get(kind, 0.0), 6) for kind in kinds}


class Running(Protocol):
    """A part of the work that is under way."""

    done_bytes: int


class Meter:
    """Counts what is done; `parts` are flights under way, whose bytes count while they fly."""

    def __init__(self) -> None:
        self.phase = "look up"
        self.source = ""
        self.total_bytes = 0
        self.total_files = 0
        self.done_bytes = 0  # of finished parts
        self.done_files = 0
        self.received_bytes = 0  # that came over the network since the meter began
        self.store_bytes = 0  # of these, from the store
        self.parts: set[Running] = set()
        self.reports: list[Report] = []
        self.spent = Spent()
        self._samples: deque[tuple[float, int]] = deque()

    def start(self, total_bytes: int, total_files: int, done_bytes: int, done_files: int) -> None:
        self.total_bytes, self.total_files = total_bytes, total_files
        self.done_bytes, self.done_files = done_bytes, done_files

    def receive(self, count: int, tier: str) -> None:
        self.received_bytes += count
        if tier == "store":
            self.store_bytes += count

    def finish(self, size: int) -> None:
        """One more file is done."""
        self.done_bytes += size
        self.done_files += 1

    def progress(self, message: str = "") -> Progress:
        """The meter as everybody who waits is shown it."""
        return Progress(
            phase="paused" if message else self.phase,
            done_bytes=min(self.total_bytes, self.done_bytes + sum(part.done_bytes for part in self.parts)),
            total_bytes=self.total_bytes,
            rate=self._rate(),
            source=self.source,
            done_files=self.done_files,
            total_files=self.total_files,
            waiters=len(self.reports),
            message=message,
        )

    def activity(self, what: str, **more: Any) -> dict[str, Any]:
        """The same, as `status` tells it."""
        return {"what": what, **self.progress()._asdict(), **more}

    def show(self, message: str = "") -> None:
        progress = self.progress(message)
        for report in self.reports:
            report(progress)

    def _rate(self) -> float:
        now = time.monotonic()
        self._samples.append((now, self.received_bytes))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_SECONDS:
            self._samples.popleft()
        since, before = self._samples[0]
        return (self.received_bytes - before) / (now - since) if now > since else 0.0


@asynccontextmanager
async def ticking(meter: Meter, pause: Callable[[], str] = str) -> AsyncIterator[None]:
    """While the block runs, everybody who waits sees the meter; `pause` tells why nothing happens right now, "" if there is no reason."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            meter.show(pause())

    task = asyncio.create_task(tick())
    try:
        yield
        meter.show()
    finally:
        task.cancel()
