"""Holds: blobs and trees that a flow has in hand: they belong to somebody although no view shows them yet.

Who removes anything looks here on the event loop, in the same step as it takes it out of sight. So a flow that names a thing *before* it
looks whether the thing is on the disk can't lose it (I4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
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
