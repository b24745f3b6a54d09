"""Watched folders: what runs in this process, and what helpers of other uids tell of theirs.

The watcher itself is the SDK's, and the same wherever it runs; here it has threads of its own, and talks to this daemon as any client
does, over a connection that begins and ends in this process. Only a folder of the daemon's own uid is watched here, from the descriptor
that was passed (I7); for others the reply has no descriptor, and the client starts a helper.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

from modelcache.protocol import WatchOpen, WatchOpened, WatchTold

from .errors import InvalidRequest, TooMany
from .meter import Report
from .model import Caller, Reply

MOST_WATCHES = 256  # in this process, and again of helpers that tell of theirs
FORGET_SECONDS = 60.0  # a helper tells again before
log = logging.getLogger(__name__)

Verb = Callable[[Any, Caller, Report, tuple[int, ...]], Awaitable[Reply]]


class _Told(NamedTuple):
    uid: int
    at: float  # time.monotonic
    shown: dict[str, Any]


class Watching:
    """Only the event loop touches its fields, but for `connect`, which any thread may call."""

    def __init__(self) -> None:
        self.connect: Callable[[], socket.socket] | None = None  # to this daemon; the server says how
        self._hosts: dict[int, Any] = {}  # by thread number
        self._told: dict[tuple[int, str, str, str], _Told] = {}
        self._client: Any = None  # one connection for all
        self.verbs: dict[str, tuple[type, Verb]] = {"watch": (WatchOpen, self._watch), "watch_told": (WatchTold, self._note)}
        self.taking = frozenset({"watch"})

    @property
    def is_busy(self) -> bool:
        return bool(self._living())

    def statistics(self, uid: int | None) -> list[dict[str, Any]]:
        """Watches as `status` shows them; those of one uid, or all."""
        now = time.monotonic()
        self._told = {name: told for name, told in self._told.items() if now - told.at < FORGET_SECONDS}
        shown = [] if uid not in (None, os.geteuid()) else [_shown(host) for host in self._living() if host.ask is not None]
        return shown + [told.shown for told in self._told.values() if uid in (None, told.uid)]

    def close(self) -> None:
        for host in self._living():
            host.end()

    async def _watch(self, params: WatchOpen, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        if len(descriptors) != 1:
            raise InvalidRequest(f"a watch came with {len(descriptors)} descriptors", "one: of the folder that the watched one lies in")
        if caller.uid != os.geteuid() or self.connect is None:
            return Reply(WatchOpened(False))
        if len(self._living()) >= MOST_WATCHES:
            raise TooMany(f"{MOST_WATCHES} folders are watched already", "end a watch first")
        return Reply(WatchOpened(True), (self._start(descriptors[0], params),))

    def _start(self, parent: int, params: WatchOpen) -> int:
        from modelcache import watch_host  # with all that it needs: seldom needed

        ours, theirs = socket.socketpair()
        host = watch_host.Host(ours, os.dup(parent), "daemon", self._using)
        thread = threading.Thread(target=self._run, args=(host,), name="watch", daemon=True)
        self._hosts[id(host)] = host, thread
        thread.start()
        log.info("watching", extra={"directory": params.directory, "checkpoints": params.name})
        return theirs.detach()

    def _run(self, host: Any) -> None:
        try:
            host.serve()
        except Exception:  # of one watch: its client sees the end of the stream, and begins another
            log.exception("a watch failed unexpectedly", extra={"watch": repr(host)})

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """The SDK's calls in this thread go to this daemon."""
        from modelcache import client

        assert self.connect is not None
        if self._client is None:
            self._client = client.Client("this daemon", self.connect)
        with client.using(self._client):
            yield

    async def _note(self, params: WatchTold, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        name = caller.uid, params.directory, params.name, params.where
        self._told.pop(name, None)
        if not params.is_over and len(self._told) < MOST_WATCHES:
            self._told[name] = _Told(
                caller.uid,
                time.monotonic(),
                {
                    "directory": params.directory,
                    "name": params.name,
                    "where": params.where,
                    "uid": caller.uid,
                    "captured": params.captured,
                    "last_error": params.last_error,
                },
            )
        return Reply({})

    def _living(self) -> list[Any]:
        self._hosts = {number: (host, thread) for number, (host, thread) in self._hosts.items() if thread.is_alive()}
        return [host for host, _ in self._hosts.values()]

    def __repr__(self) -> str:
        return f"<Watching here={len(self._hosts)} told={len(self._told)}>"


def _shown(host: Any) -> dict[str, Any]:
    report = host.report()
    return {
        "directory": host.ask.directory,
        "name": host.ask.name,
        "where": "daemon",
        "uid": os.geteuid(),
        "captured": 0 if report is None else report.captured_count,
        "last_error": "" if report is None else report.last_error,
    }
