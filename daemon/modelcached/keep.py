"""Keep: repos that the configuration wants on this node are fetched when the daemon starts, and pinned (I4).

They are public ones: nothing that the daemon has lets it into others (I8). Their pins are named `keep org/name@revision` and belong to the
daemon; what is no longer wanted is unpinned at the next start. What can't be fetched now is tried again, with growing pauses: the daemon
serves meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random

from .errors import ModelcachedError
from .fetch import Fetch
from .model import Caller, check_repo
from .pins import Pins
from .selection import Ask
from .tasks import Pool, finished
from .trees import Trees

PREFIX = "keep "
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 5.0, 600.0
TYPES = {"datasets": "dataset", "spaces": "space"}
log = logging.getLogger(__name__)


class Keep:
    def __init__(self, fetch: Fetch, trees: Trees, pins: Pins, pool: Pool, endpoint: str) -> None:
        self._fetch = fetch
        self._trees = trees
        self._pins = pins
        self._pool = pool
        self._endpoint = endpoint
        self._caller = Caller(os.geteuid(), os.getegid(), os.getpid())

    async def run(self, wanted: tuple[str, ...]) -> None:
        """Returns when all of them are here."""
        mine = [pin for pin in self._pins.all() if pin.uid == self._caller.uid and pin.name.startswith(PREFIX)]
        for pin in mine:
            if pin.name.removeprefix(PREFIX) not in wanted:
                try:
                    await finished(self._pool.run(self._pins.remove(pin.name, self._caller)))
                except OSError as error:
                    log.warning("what is not to be kept any more stays pinned", extra={"pin": pin.name, "error": str(error)})
        left, pause = list(wanted), FIRST_PAUSE_SECONDS
        while left:
            left = [text for text in left if not await self._bring(text)]
            if left:
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(MAX_PAUSE_SECONDS, pause * 2)

    async def _bring(self, text: str) -> bool:
        try:
            ask = self._ask(text)
            got = await self._fetch.get(ask, lambda progress: None, lambda warning: None)
            _, keep = self._pins.put(PREFIX + text, text, (got.shown.name,), self._caller, None)  # no await since it was there
            self._trees.admit(got.shown.name, self._caller, got.is_private)
            await finished(self._pool.run(keep))
        except Exception as error:  # of one repo: the others, and the daemon, go on
            is_expected = isinstance(error, (ModelcachedError, OSError))
            log.warning("what is to be kept can't be fetched now", exc_info=not is_expected, extra={"repo": text, "error": str(error)})
            return False
        log.info("kept", extra={"repo": text, "commit": got.commit, "bytes": got.shown.tree.size, "hub_bytes": got.hub_bytes})
        return True

    def _ask(self, text: str) -> Ask:
        name, _, revision = text.partition("@")
        first, _, rest = name.partition("/")
        kind = TYPES.get(first) if rest else None
        repo = check_repo(self._endpoint, kind or "model", rest if kind else name)
        return Ask(repo, revision or "main", None, None, None, None)
