"""Wake-ups for a watcher: a thread that says that something happened below a folder, and nothing more.

watchfiles loses events without a word (too many at once, no room for another watch, folders made a moment ago) and ends at a
name that is not UTF-8. So an event is only a reason to look sooner, and without watchfiles, on filesystems of servers, or after
its failures, the watcher's own pace is all there is.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any, Callable

from . import probe

_FIRST_PAUSE = 1.0  # seconds, after a failure; doubled up to
_LONGEST_PAUSE = 60.0
_TICK_MS = 1000  # so long the end may take
# Events of other nodes' changes don't come here.
_SILENT = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "9p", "ceph", "beegfs", "afs", "glusterfs")


class Events:
    """`wake` is called from a thread of this object's own, soon after something happened, sometimes without reason."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._ended = threading.Event()
        self._watched = threading.Event()  # ends the watching of one folder
        self.is_working = False

    def follow(self, folder: int) -> None:
        """Watches this folder from now on, instead of another; the descriptor stays the caller's."""
        self._watched.set()
        if self._ended.is_set() or is_silent(folder):
            self.is_working = False
            return
        try:
            import watchfiles
        except ImportError:
            return
        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells every batch
        self._watched = threading.Event()
        name = "modelcache events"
        threading.Thread(target=self._run, args=(watchfiles, os.dup(folder), self._watched), name=name, daemon=True).start()

    def end(self) -> None:
        self._ended.set()
        self._watched.set()

    def _run(self, watchfiles: Any, folder: int, ended: threading.Event) -> None:
        pause = _FIRST_PAUSE
        try:
            while not ended.is_set():
                try:
                    self.is_working = True
                    for changes in watchfiles.watch(
                        "/proc/self/fd/%d" % folder,  # whatever its path is by now
                        watch_filter=None,
                        debounce=400,
                        stop_event=ended,
                        rust_timeout=_TICK_MS,
                        yield_on_timeout=True,
                        raise_interrupt=False,
                        recursive=True,
                        ignore_permission_denied=True,
                    ):
                        if changes:
                            pause = _FIRST_PAUSE
                            self._wake()
                except Exception:  # of a library's own making, or OSError: no more watches, no such folder
                    self.is_working = False
                    self._wake()
                    ended.wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            os.close(folder)


def is_silent(folder: int) -> bool:
    """Whether no events can be expected from where it lies."""
    kind = probe.filesystem_of(os.fstat(folder).st_dev)
    return kind in _SILENT or kind.startswith("fuse")
