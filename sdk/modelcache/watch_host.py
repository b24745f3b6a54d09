"""What runs a watcher for somebody else: reads orders from a socket, and goes on for a while when nobody is at its other end.

The orders are JSON objects, a line each: first {"ask", "rules", "entry", "linger"}, answered {"where"}; then {"do": "status"}
and {"do": "stop", "deadline"}, answered with the fields of a Status. The end of the stream means that who asked is gone: then the
watcher ends when everything complete is captured and nothing has changed for `linger` seconds.

Invariants:
- An answer never waits for a capture: those are the worker's, a thread of its own.
- A stop loses nothing that a kill would have kept: what is not captured at the deadline is captured after it, before `serve` returns.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from typing import Any, Callable, ContextManager, Dict, List, Optional

from . import client, layouts, retention
from .connection import known_fields
from .errors import ModelcacheError
from .protocol import Flush, FlushReply, WatchTold
from .watch_client import Ask, Status, received_ask, series_of
from .watch_events import Events
from .watcher import Report, Watcher

_MAX_LINE = 1 << 20
_MAX_KEYS = 5000  # that one question about the store may have
_TICK_SECONDS = 1.0
_TOLD_SECONDS = 20.0  # the daemon forgets what it is not told again
_LONGEST_CAPTURE_SECONDS = 3600.0  # after the end: then it hangs


def _close_after(working: threading.Thread, watcher: Watcher) -> None:
    working.join()
    watcher.close()


class Host:
    """`control` and `parent`, the folder that the watched one lies in, are the host's own from now on. `using` wraps its threads."""

    def __init__(self, control: socket.socket, parent: int, where: str, using: Callable[[], ContextManager[Any]]) -> None:
        self._control = control
        self._parent = parent
        self._where = where
        self._using = using
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._buffer = b""
        self._ended = threading.Event()
        self._unsent: List[str] = []  # keys not known to be in the store
        self._deadline: Optional[float] = None  # time.monotonic, once the watch is told to stop
        self._told = (float("-inf"), -1, "")  # when, and what, the daemon was told last
        self.ask: Optional[Ask] = None
        self._watcher: Optional[Watcher] = None
        self._events: Optional[Events] = None

    def serve(self) -> None:
        """Returns when the watch is over."""
        try:
            with self._using():
                first = self._line(None)
                if first:
                    self._serve(first)
        finally:
            self._control.close()
            if self._watcher is None:
                os.close(self._parent)

    def end(self) -> None:
        """From any thread: `serve` returns soon, whatever is left to do."""
        self._ended.set()
        try:
            self._control.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def report(self) -> Optional[Report]:
        return None if self._watcher is None else self._watcher.report()

    def _serve(self, first: Dict[str, Any]) -> None:
        ask = self.ask = received_ask(first["ask"])
        events = self._events = Events(lambda: watcher.wake())
        watcher = self._watcher = Watcher(
            ask, self._parent, first["entry"], layouts.from_plain(first["rules"]), self._retain, events.follow
        )
        linger = float(first["linger"])
        working = threading.Thread(target=self._work, args=(watcher, linger), name="modelcache watcher", daemon=True)
        working.start()
        try:
            self._send({"where": self._where})
            self._obey(watcher, working, linger)
        finally:
            self._control.close()
            events.end()
            watcher.end()
            self._outlast(watcher, working)
            self._tell(watcher.report(), is_over=True)
            if working.is_alive():  # a capture, or a filesystem that hangs: the descriptors are its own until it ends
                threading.Thread(target=_close_after, args=(working, watcher), name="modelcache end", daemon=True).start()
            else:
                watcher.close()

    def _work(self, watcher: Watcher, linger: float) -> None:
        with self._using():
            watcher.run()
            if self._deadline is not None:
                watcher.finish(self._deadline)
                if not watcher.report().is_settled:
                    watcher.finish(time.monotonic() + linger)

    def _outlast(self, watcher: Watcher, working: threading.Thread) -> None:
        """Nobody else would capture what is being captured now."""
        end = time.monotonic() + _LONGEST_CAPTURE_SECONDS
        working.join(_TICK_SECONDS)
        while working.is_alive() and not self._ended.is_set() and time.monotonic() < end:
            self._tell(watcher.report())
            working.join(_TICK_SECONDS)

    def _obey(self, watcher: Watcher, working: threading.Thread, linger: float) -> None:
        alone_since = None
        while not self._ended.is_set():
            self._tell(watcher.report())
            if alone_since is not None:
                report = watcher.report()
                if report.is_settled and report.looked > max(alone_since, report.quiet_since) + linger:
                    return
                if time.monotonic() > alone_since + linger:
                    watcher.wake()
                self._ended.wait(min(_TICK_SECONDS, max(linger, 0.05)))
                continue
            order = self._line(_TICK_SECONDS)
            if order is None:
                alone_since = time.monotonic()
            elif order.get("do") == "status":
                self._send(self._status(0.0)._asdict())
            elif order.get("do") == "stop":
                return self._stop(watcher, working, time.monotonic() + float(order["deadline"]))

    def _stop(self, watcher: Watcher, working: threading.Thread, deadline: float) -> None:
        told = time.monotonic()
        self._deadline = deadline
        watcher.end()
        working.join(max(0.0, deadline - told))
        status = self._status(max(0.0, deadline - time.monotonic()), told)
        self._send(status._asdict())

    def _status(self, deadline: float, since: float = float("-inf")) -> Status:
        """With what is not in the store yet, after waiting for so many seconds, and what a look since then found and did not capture."""
        assert self._watcher is not None and self.ask is not None and self._events is not None
        report = self._watcher.report()
        self._unsent += self._watcher.new_keys()
        error = report.last_error
        try:
            if self._unsent:
                asked = Flush(self._unsent[-_MAX_KEYS:], deadline)
                reply = known_fields(FlushReply, client.shared().call("flush", asked))
                self._unsent, error = list(reply.pending), reply.error or error
        except ModelcacheError as failure:
            error = str(failure)
        captured = [tuple(each) for each in report.captured]
        is_scanned = not self._events.is_working
        return Status(
            self.ask.directory,
            self.ask.name,
            self._where,
            captured,  # type: ignore[arg-type]  # as JSON has them
            report.captured_count,
            report.skipped,
            error,
            list(self._unsent),
            is_scanned,
            report.unfinished or ([self.ask.directory] if report.scanned < since else []),
        )

    def _tell(self, report: Report, is_over: bool = False) -> None:
        """The daemon shows watches in its status; those that run in it, it knows."""
        when, count, error = self._told
        is_same = (count, error) == (report.captured_count, report.last_error) and time.monotonic() - when < _TOLD_SECONDS
        if self._where == "daemon" or (is_same and not is_over) or self.ask is None:
            return
        self._told = time.monotonic(), report.captured_count, report.last_error
        ask = self.ask
        try:
            told = WatchTold(ask.directory, ask.name, self._where, report.captured_count, report.last_error, is_over)
            client.shared().call("watch_told", told)
        except ModelcacheError:  # it is told again
            pass

    def _retain(self, ask: Ask) -> None:
        rule = retention.Rule.parse(ask.keep, ask.keep_best)
        retention.apply(series_of(ask), rule)

    # ---- the socket

    def _line(self, seconds: Optional[float]) -> Optional[Dict[str, Any]]:
        """The next order; {} if none came in time, None at the end of the stream."""
        end = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = None if end is None else max(0.0, end - time.monotonic()) * 1000
            try:
                if not self._poll.poll(left):
                    return {}
                data = self._control.recv(1 << 16)
            except OSError:
                return None
            if not data or len(self._buffer) + len(data) > _MAX_LINE:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            order = json.loads(line)
        except ValueError:
            return None
        return order if isinstance(order, dict) else None

    def _send(self, answer: Dict[str, Any]) -> None:
        try:
            self._control.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:  # nobody is there any more; the next read says so
            pass

    def __repr__(self) -> str:
        return "<Host %s %r>" % (self._where, self._watcher)
