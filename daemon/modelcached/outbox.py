"""What goes out on one socket: at once while the socket takes it, queued up to a bound when it does not.

Descriptors go with the first byte of their message. What is given to `send` is owned here: it is closed when it was sent, or
when it can't be. A client that reads nothing is cut off above the bounds.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import socket
from collections import deque
from collections.abc import Callable

from modelcache.protocol import MAX_DESCRIPTORS

from .frames import close_all

MAX_QUEUED_BYTES = 8 << 20
MAX_QUEUED_DESCRIPTORS = 4 * MAX_DESCRIPTORS

logger = logging.getLogger(__name__)


class Outbox:
    """`sent_all` is called when the queue has become empty, `broken` when nothing more can be sent; neither during `close`."""

    def __init__(self, connected: socket.socket, sent_all: Callable[[], None], broken: Callable[[], None]) -> None:
        self._socket = connected
        self._sent_all = sent_all
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._queued_bytes = self._queued_descriptors = 0
        self._is_closed = False
        self.flushed = asyncio.Event()  # nothing is queued, or nothing can be sent any more
        self.flushed.set()

    @property
    def is_empty(self) -> bool:
        return not self._queue

    def send(self, line: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Never blocks, never raises."""
        if self._is_closed:
            return close_all(descriptors)
        if not self._queue:
            left = self._try_to_send(line, descriptors)
            if left is None:
                return
            line, descriptors = left
            self._loop.add_writer(self._socket, self._send_queued)
            self.flushed.clear()
        self._queue.append((line, descriptors))
        self._queued_bytes += len(line)
        self._queued_descriptors += len(descriptors)
        if self._queued_bytes > MAX_QUEUED_BYTES or self._queued_descriptors > MAX_QUEUED_DESCRIPTORS:
            logger.warning("a client reads no replies: cut off", extra={"queued": repr(self)})
            self._broken()

    def close(self) -> None:
        """Drops what is queued. The socket is its owner's to close, afterwards. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_writer(self._socket)
        for _, descriptors in self._queue:
            close_all(descriptors)
        self._queue.clear()
        self.flushed.set()

    def _try_to_send(self, line: bytes, descriptors: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]] | None:
        """What is left of the message; None: nothing, or the connection is broken."""
        try:
            if descriptors:
                sent = self._socket.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
            else:
                sent = self._socket.send(line)
        except (BlockingIOError, InterruptedError):
            return line, descriptors
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                logger.warning("a reply can't be sent", extra={"error": error.strerror})
            close_all(descriptors)
            self._broken()
            return None
        close_all(descriptors)
        return (line[sent:], ()) if sent < len(line) else None

    def _send_queued(self) -> None:
        while self._queue:
            line, descriptors = self._queue.popleft()
            left = self._try_to_send(line, descriptors)
            if self._is_closed:
                return
            self._queued_bytes -= len(line) - (len(left[0]) if left else 0)
            self._queued_descriptors -= len(descriptors) - (len(left[1]) if left else 0)
            if left:
                return self._queue.appendleft(left)
        self._loop.remove_writer(self._socket)
        self.flushed.set()
        self._sent_all()

    def __repr__(self) -> str:
        return f"<Outbox {len(self._queue)} messages, {self._queued_bytes} bytes, {self._queued_descriptors} descriptors>"
