"""Leases: what keeps a view while a task uses it (I4).

A lease is a `flock` on a file of its own whose descriptor the task holds and the daemon has closed: it ends when the last
process holding that descriptor ends, however it ends, and outlives the daemon. The daemon locks with LOCK_NB only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import durable
from .layout import Layout
from .model import Caller, TreeId


class Holder(NamedTuple):
    uid: int
    pid: int
    start: float  # seconds since the epoch
    purpose: str


class Leases:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def grant(self, tree: TreeId, caller: Caller, purpose: str) -> int:
        """A new lease on `tree`: its locked descriptor, which whoever gets it owns. The daemon keeps nothing."""
        temporary = self._layout.fresh("lease")
        note = {"uid": caller.uid, "pid": caller.pid, "start": time.time(), "purpose": purpose[:200]}
        lease = -1
        try:
            temporary.write_text(json.dumps(note))
            lease = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder, is_named = self._layout.lease_folder(tree), False
            while not is_named:
                folder.mkdir(mode=0o700, exist_ok=True)
                try:
                    durable.rename(temporary, folder / temporary.name)  # locked before it has its name: no sweep can take it for dead
                    is_named = True
                except FileNotFoundError:  # a sweep in another thread has just taken the empty folder away
                    if not temporary.exists():
                        raise
        except BaseException:
            if lease >= 0:
                os.close(lease)
            temporary.unlink(missing_ok=True)
            raise
        return lease

    def holders(self, tree: TreeId) -> list[Holder]:
        """Who holds a lease on `tree` now. Dead leases found on the way are removed."""
        return list(self._living(self._layout.lease_folder(tree)))

    def held(self) -> dict[TreeId, list[Holder]]:
        """Every tree with a living lease. Removes the dead ones: this is the sweep, too."""
        with os.scandir(self._layout.leases) as folders:
            found = {TreeId(folder.name): list(self._living(Path(folder.path))) for folder in folders}
        return {tree: holders for tree, holders in found.items() if holders}

    def _living(self, folder: Path) -> Iterator[Holder]:
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return
        for name in names:
            holder = _holder(folder / name)
            if holder is not None:
                yield holder
            else:
                with contextlib.suppress(OSError):
                    os.utime(self._layout.tree(TreeId(folder.name)))  # it was in use until now, or until shortly before
        with contextlib.suppress(OSError):
            folder.rmdir()


def _holder(path: Path) -> Holder | None:
    """Who holds the lease at `path`; removes it and answers None when nobody does."""
    try:
        lease = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            note = json.loads(os.read(lease, 4096))
            return Holder(int(note["uid"]), int(note["pid"]), float(note["start"]), str(note["purpose"]))
        return Holder(-1, -1, 0.0, "unknown")
    else:
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(lease)
