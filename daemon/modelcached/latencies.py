"""How long requests took, counted by method into buckets: plain integers that whoever wants to know reads. Nothing is kept per request."""

from __future__ import annotations

from bisect import bisect_left

# Seconds: a hit takes one of the first, a large download one of the last.
BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


class Histogram:
    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)  # how many took at most so long, and longer than the one before
        self.seconds = 0.0  # all of them together

    def observe(self, seconds: float) -> None:
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class Latencies:
    """Only the event loop touches it. Methods are those the daemon has, so they are few."""

    def __init__(self) -> None:
        self.by_method: dict[str, Histogram] = {}

    def observe(self, method: str, seconds: float) -> None:
        found = self.by_method.get(method)
        if found is None:
            found = self.by_method[method] = Histogram()
        found.observe(seconds)
