"""Waiting for files that are still being written, and the end of waiting."""

from __future__ import annotations

import os
import time
from typing import Callable, Optional

from . import walk
from .errors import FileChangedError
from .probe import describe, writer_of

WRITER = "is open for writing"
CHANGED = "was changed while it was saved"
GONE = "disappeared while it was saved"
_TRIES = 10
_TOLD_AFTER = 7  # tries, half a second: what is over sooner is not worth a word


class Moved(Exception):
    """The listing is out of date: `path` came, went, or has another size, or may have."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path = path
        self.what = what


class Patience:
    """The pauses of one save: 1 ms, 3, 10, ... 10 s, over all its attempts; then FileChangedError."""

    def __init__(
        self, source: walk.Readable, warn: Callable[[str], None], sleep: Callable[[float], None] = time.sleep, tries: int = _TRIES
    ) -> None:
        self._source = source
        self._warn = warn
        self._sleep = sleep
        self._tries = tries
        self._tried = 0

    def pause(self, path: str, what: str) -> None:
        """`what` is wrong with `path`: waits a little, or raises FileChangedError."""
        self._tried += 1
        pid = self._writer(path)
        if pid is not None:
            what = "is open for writing by %s" % describe(pid)
        if self._tried >= self._tries or what == GONE:  # what has begun to go must not be saved in part
            raise self.lost(path, what, pid)
        if self._tried == _TOLD_AFTER:
            self._warn("%s %s: waiting for it to be complete" % (self._source.name(path), what))
        self._sleep(0.001 * 10 ** ((self._tried - 1) / 2))

    def lost(self, path: str, what: str, pid: Optional[int] = None) -> FileChangedError:
        name = self._source.name(path)
        return FileChangedError(
            "%s %s: nothing was saved" % (name, what),
            "save it when it is complete, and close its files first",
            {"path": name, **({} if pid is None else {"pid": pid})},
        )

    def _writer(self, path: str) -> Optional[int]:
        """Looked up only when it is going to be said."""
        if self._tried not in (self._tries, _TOLD_AFTER):
            return None
        try:
            descriptor = self._source.open(path)
        except OSError:
            return None
        try:
            found = os.fstat(descriptor)
            return writer_of((found.st_dev, found.st_ino))
        finally:
            os.close(descriptor)
