"""The leases this process holds: what keeps a view on the node while anything here uses it.

A lease is an open descriptor of a locked file; the daemon sees it as held until the last process with a copy has closed
it. So it is dropped by close() and never by LOCK_UN, which would drop it for a forked child that still reads.

Invariants:
- One descriptor per tree and process, however many handles: the second one that arrives is closed.
- What a request names as held stays held until its reply is in (`hold`): dropping in another thread meanwhile takes
  effect after it, so the daemon never counts on a lease that has just gone.
- A tree counts as held only for the daemon root it came from.
"""

from __future__ import annotations

import os
import threading
from typing import Dict, List, Optional, Tuple

MAX_HELD = 256  # trees named in a request, latest first; one that is not named costs a second descriptor, closed at once

# One for all tables, held for moments only, so a fork can wait for it: a child never sees a half-changed table. Reentrant
# because a fork may happen in a signal handler.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class _Held:
    __slots__ = ("descriptor", "handles")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.handles = 0


class Lease:
    """A handle on this process's lease of one tree. Its view stays until the last handle is closed; one that is never
    closed keeps it as long as the process lives."""

    def __init__(self, table: Leases, key: Tuple[str, str]) -> None:
        self.tree = key[1]
        self._table = table
        self._key = key
        self._is_open = True

    def close(self) -> None:
        """Idempotent, from any thread."""
        with _lock:
            if self._is_open:
                self._is_open = False
                self._table._drop(self._key)

    def __repr__(self) -> str:
        return "<Lease %s %s>" % (self.tree, "open" if self._is_open else "closed")


class Leases:
    def __init__(self) -> None:
        self._held: Dict[Tuple[str, str], _Held] = {}  # (root, tree), the latest last; changed under `_lock`

    def hold(self, root: str) -> List[Lease]:
        """Handles on the latest leases from `root`, for as long as a request names them. To be closed by the caller."""
        with _lock:
            keys = [key for key in self._held if key[0] == root][-MAX_HELD:]
            return [self._handle(key) for key in keys]

    def adopt(self, root: str, tree: str, descriptor: Optional[int]) -> Optional[Lease]:
        """A handle on `tree`. Takes the descriptor over; None says that a lease is held already.

        Returns None when there is neither: whoever answered was wrong about what is held here.
        """
        key = (root, tree)
        with _lock:
            held = self._held.pop(key, None)
            if held is None:
                if descriptor is None:
                    return None
                held = _Held(descriptor)
            elif descriptor is not None:
                os.close(descriptor)
            self._held[key] = held
            return self._handle(key)

    def trees(self) -> List[str]:
        """Trees held now, the latest last."""
        with _lock:
            return [tree for _, tree in self._held]

    def close(self) -> None:
        """Drops everything at once; handles that are still open close to no effect."""
        with _lock:
            while self._held:
                os.close(self._held.popitem()[1].descriptor)

    def descriptors(self) -> List[int]:
        """Of all leases held now, for a process that is started with them: theirs to keep, not to close here."""
        with _lock:
            return [held.descriptor for held in self._held.values()]

    def _handle(self, key: Tuple[str, str]) -> Lease:
        self._held[key].handles += 1
        return Lease(self, key)

    def _drop(self, key: Tuple[str, str]) -> None:
        held = self._held.get(key)
        if held is None:
            return
        held.handles -= 1
        if not held.handles:
            del self._held[key]
            os.close(held.descriptor)

    def __repr__(self) -> str:
        return "<Leases %d>" % len(self._held)
