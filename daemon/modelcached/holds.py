"""Holds: blobs and trees that a flow has in hand: they belong to somebody although no view shows them yet.

Who removes anything looks here on the event loop, in the same step as it takes it out of sight. So a flow that names a thing *before* it
looks whether the thing is on the disk can't lose it (I4).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager


class Holds:
    """Only the event loop touches `_counts`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    @contextmanager
    def hand(self, *names: str) -> Iterator[Hand]:
        """A hand that holds these names, and what is added to it, until the block ends."""
        hand = Hand(self)
        hand.add(names)
        try:
            yield hand
        finally:
            hand.drop()

    def take(self, name: str) -> None:
        self._counts[name] += 1

    def give_back(self, name: str) -> None:
        self._counts[name] -= 1
        if not self._counts[name]:
            del self._counts[name]

    def __repr__(self) -> str:
        return f"<Holds {len(self._counts)}>"


class Hand:
    def __init__(self, holds: Holds) -> None:
        self._holds = holds
        self._names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._names:
                self._names.add(name)
                self._holds.take(name)

    def drop(self) -> None:
        for name in self._names:
            self._holds.give_back(name)
        self._names.clear()


class Lingering:
    """Hands that outlive the calls which fill them: one for each key, until it is let go, or no call was under way for so long."""

    def __init__(self, holds: Holds, idle_seconds: float) -> None:
        self._holds = holds
        self._idle_seconds = idle_seconds
        self._hands: dict[Hashable, Hand] = {}
        self._calls: Counter[Hashable] = Counter()
        self._ends: dict[Hashable, asyncio.TimerHandle] = {}

    @contextmanager
    def hand(self, key: Hashable) -> Iterator[Hand]:
        """The key's hand, for one call."""
        self._calls[key] += 1
        if key in self._ends:
            self._ends.pop(key).cancel()
        try:
            yield self._hands.setdefault(key, Hand(self._holds))
        finally:
            self._calls[key] -= 1
            if not self._calls[key]:
                del self._calls[key]
                self._ends[key] = asyncio.get_running_loop().call_later(self._idle_seconds, self.let_go, key)

    def let_go(self, key: Hashable) -> None:
        """Drops the key's hand, unless another call is at it."""
        if key in self._ends:
            self._ends.pop(key).cancel()
            self._hands.pop(key).drop()
