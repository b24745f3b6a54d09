"""What everybody who waits is shown."""

from __future__ import annotations

from dataclasses import dataclass

from modelcache.protocol import Progress
from modelcached.meter import Meter


@dataclass(eq=False)
class Part:
    done_bytes: int = 0


def test_what_is_under_way_counts() -> None:
    meter = Meter()
    assert meter.progress() == Progress(phase="look up")
    meter.phase, meter.source = "download", "hub"
    meter.start(total_bytes=1000, total_files=4, done_bytes=100, done_files=1)
    part = Part()
    meter.parts.add(part)
    part.done_bytes = 300
    assert (meter.progress().done_bytes, meter.progress().done_files) == (400, 1)
    meter.parts.discard(part)
    meter.finish(300)
    assert (meter.progress().done_bytes, meter.progress().done_files) == (400, 2)
    part.done_bytes = 10_000  # bytes that were asked for twice
    meter.parts.add(part)
    assert meter.progress().done_bytes == 1000


def test_everybody_is_shown_the_same() -> None:
    meter = Meter()
    seen: list[list[Progress]] = [[], []]
    meter.reports.append(seen[0].append)
    meter.show()
    meter.reports.append(seen[1].append)
    meter.phase = "download"
    meter.show("the hub asks to wait 3 s more")
    assert [len(each) for each in seen] == [2, 1] and seen[0][1] == seen[1][0]
    assert (seen[0][1].phase, seen[0][1].message, seen[0][1].waiters) == ("paused", "the hub asks to wait 3 s more", 2)
    assert (seen[0][0].phase, seen[0][0].waiters) == ("look up", 1)


def test_the_rate_is_of_what_came_over_the_network() -> None:
    meter = Meter()
    meter.start(1 << 30, 1, 1 << 29, 0)  # half of it is here already
    assert meter.progress().rate == 0
    meter.received_bytes += 1 << 20
    first = meter.progress().rate
    assert first > 0
    for _ in range(1000):
        meter.progress()
    assert 0 < meter.progress().rate < first  # nothing came since
