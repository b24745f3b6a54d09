"""Flush: waiting until what this process saved is in the store, on demand, and where the daemon may not outlive the job.

A private daemon may end with the job's container, so a process that saved through one flushes when it exits. And where its
root lies in the container's own file system, nothing would be left to bring afterwards: there a save flushes at once.
"""

from __future__ import annotations

import atexit
import os
import time
from typing import Iterable, List, Optional

from . import client, progress, views
from .connection import Connection, Reply, known_fields
from .errors import ModelcacheError, SavesPendingError
from .protocol import Flush, FlushReply, HelloReply

_EXIT_SECONDS = 300.0
_MAX_KEYS = 5000  # in a request; a process that saved more asks for everything of its user
_CONTAINERS_OWN = ("overlay", "aufs", "fuse.fuse-overlayfs")

_saved: List[str] = []  # keys not known to be in the store
_is_at_exit = False
_has_said = False


def flush(deadline: Optional[float] = None, *, everything: bool = False) -> None:
    """Returns when everything this process saved is in the store.

    Args:
        deadline: seconds to wait at most; None waits as long as it takes, through restarts of the daemon.
        everything: of this user on this node, not only of this process.

    Raises:
        SavesPendingError (TimeoutError): the deadline has passed; `data["pending"]` has the keys. They stay on this node, and the
            daemon goes on.
    """
    keys = list(_saved)
    if not keys and not everything:
        return
    _wait(None if everything or len(keys) > _MAX_KEYS else keys, deadline)
    for key in keys:
        try:
            _saved.remove(key)
        except ValueError:  # another thread has waited for it too
            pass


def saved(key: str, hello: HelloReply) -> None:
    """A save was acknowledged by the daemon that said `hello`."""
    global _is_at_exit, _has_said
    _saved.append(key)
    if hello.private and not _is_at_exit:
        _is_at_exit = True
        atexit.register(_flush_at_exit, os.getpid())
    if hello.private and _is_containers_own(hello.root):
        if not _has_said:
            _has_said = True
            views.warn("%s goes with this container, so each save waits until the store has it" % hello.root)
        flush()


def expect(keys: Iterable[str]) -> None:
    """The next flush waits for these too: others saved them for this process."""
    known = set(_saved)
    _saved.extend(key for key in keys if key not in known)


def leave() -> None:
    """This process does not wait at its exit: it has waited already, or told its user how to."""
    _saved.clear()


def exit_seconds() -> float:
    """How long a process waits at its exit. ValueError for what is no number in MODELCACHE_EXIT_FLUSH_SECONDS."""
    text = os.environ.get("MODELCACHE_EXIT_FLUSH_SECONDS", "")
    return float(text) if text else _EXIT_SECONDS


def _wait(keys: Optional[List[str]], deadline: Optional[float]) -> None:
    end = None if deadline is None else time.monotonic() + deadline
    with progress.shown("flush") as on_progress:

        def attempt(connection: Connection, hello: HelloReply) -> Reply:
            left = None if end is None else max(0.0, end - time.monotonic())
            return connection.request("flush", client.fields_of(Flush(keys, left)), on_progress)

        reply = known_fields(FlushReply, client.shared().session(attempt).result)
    if reply.pending:
        raise SavesPendingError(
            "%d saves are not in the store yet%s" % (len(reply.pending), ": " + reply.error if reply.error else ""),
            "they are safe on this node and the daemon goes on; modelcache flush waits for them",
            {"pending": reply.pending, "error": reply.error},
        )


def _flush_at_exit(pid: int) -> None:
    if pid != os.getpid():  # a forked child: its parent does it
        return
    try:
        flush(exit_seconds())
    except (ModelcacheError, ValueError) as error:
        views.warn(str(error))


def _is_containers_own(root: str) -> bool:
    """Whether `root` lies in a file system that goes with its container."""
    found, kind = "", ""
    try:
        path = os.path.realpath(root)
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split(" ")
                place = fields[4].replace("\\040", " ")
                if len(place) >= len(found) and (path == place or path.startswith(place.rstrip("/") + "/")):
                    found, kind = place, fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        return False
    return kind in _CONTAINERS_OWN


def _after_fork_in_child() -> None:
    _saved.clear()  # the parent's


os.register_at_fork(after_in_child=_after_fork_in_child)
