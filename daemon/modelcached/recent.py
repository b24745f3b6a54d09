"""A bounded memory that forgets what was used longest ago."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A bounded memory, the least recently used goes first: of what is on disk anyway, or can be asked again (I11).

    The event loop and the pool's threads may use it at the same time; `_lock` is held for a few dictionary steps.
    """

    def __init__(self, size: int, weigh: Callable[[V], int] = lambda _: 1) -> None:
        self._size = size
        self._weigh = weigh
        self._weight = 0
        self._items: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K) -> V | None:
        with self._lock:
            value = self._items.get(key)
            if value is not None:
                self._items.move_to_end(key)
            return value

    def put(self, key: K, value: V) -> V:
        with self._lock:
            self._drop(key)
            self._items[key] = value
            self._weight += self._weigh(value)
            while self._weight > self._size and len(self._items) > 1:
                self._drop(next(iter(self._items)))
        return value

    def drop(self, key: K) -> None:
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        with self._lock:
            self._items.clear()
            self._weight = 0

    def _drop(self, key: K) -> None:
        value = self._items.pop(key, None)
        if value is not None:
            self._weight -= self._weigh(value)
