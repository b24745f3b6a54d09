"""Rates: bytes a second for the whole node, to the hub or to stores, that may be changed while bytes move.

Whoever moves bytes waits its turn before the next ones; a change counts at once, also for those who wait.
"""

from __future__ import annotations

import asyncio
import time

BURST_SECONDS = 0.1  # what may pass at once after a silence


class Rate:
    """Only the event loop touches it."""

    def __init__(self, bytes_per_second: int = 0) -> None:
        self.limit = bytes_per_second  # 0: none
        self._free_at = 0.0  # monotonic: when everything that has passed is paid for
        self._changed = asyncio.Event()  # of this limit: set, and replaced, by the next one

    def set(self, bytes_per_second: int) -> None:
        if bytes_per_second == self.limit:
            return
        self.limit = bytes_per_second
        self._free_at = 0.0
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def passed(self, count: int) -> None:
        """Returns when so many bytes may have moved."""
        if not self.limit:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - BURST_SECONDS) + count / self.limit
        if self._free_at > now:
            changed = self._changed
            try:
                async with asyncio.timeout(self._free_at - now):
                    await changed.wait()
            except TimeoutError:
                pass

    def __repr__(self) -> str:
        return f"<Rate {self.limit or 'without limit'}>"
