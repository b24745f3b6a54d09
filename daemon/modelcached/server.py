"""Accepts connections, counts them, and ends them in order. What one connection does stands in `connection`.

Nobody is refused without being told why; a daemon that has run out of descriptors waits for some instead of spinning.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time

from modelcache.protocol import Hello

from .admission import Admission
from .connection import HELLO, Connection, Service, Traffic, credentials
from .errors import TooMany
from .tasks import within
from .verbs import Verb

FLUSH_SECONDS = 1.0  # what a client gets at shutdown to read its last replies
ACCEPT_PAUSE_SECONDS = 0.5  # after accept failed for want of descriptors or memory

logger = logging.getLogger(__name__)


class Server:
    """Serves `service` on a listening socket, which stays its owner's to close."""

    def __init__(
        self, service: Service, listening: socket.socket, traffic: Traffic, max_connections: int = 4096, admission: Admission | None = None
    ) -> None:
        self._service = service
        self._verbs = {name: Verb(name, params) for name, params in {HELLO: Hello, **service.methods}.items()}
        self._listening: socket.socket | None = listening
        self._traffic = traffic
        self._max_connections = max_connections
        self._admission = admission or Admission()
        self._group: asyncio.TaskGroup | None = None

    def start(self, group: asyncio.TaskGroup) -> None:
        """Accepts connections from now on; `group` owns them."""
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._service.attach(self.connect)
        self._watch_listening()

    def connect(self) -> socket.socket:
        """The client's end of a new connection from this very process; from any thread."""
        theirs, ours = socket.socketpair()
        try:
            self._loop.call_soon_threadsafe(self._adopt, ours)
            return theirs
        except RuntimeError:  # the loop has ended
            theirs.close()
            ours.close()
            raise ConnectionRefusedError("the daemon has ended") from None

    def stop_accepting(self) -> None:
        """Idempotent."""
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening = None

    async def drain(self, seconds: float) -> None:
        """Ends in order: new requests are refused, running ones get `seconds`, then they are cancelled; every connection is closed."""
        self.stop_accepting()
        self._traffic.is_draining = True
        await within(seconds, self._traffic.no_requests.wait())
        connections = tuple(self._traffic.connections)
        for connection in connections:
            connection.abandon_requests()
        await within(FLUSH_SECONDS, asyncio.gather(*(connection.outbox.flushed.wait() for connection in connections)))
        for connection in connections:
            connection.end()

    async def idle(self, seconds: float) -> None:
        """Returns when for so long nobody was connected."""
        while True:
            await self._traffic.no_connections.wait()
            left = self._traffic.last_active + seconds - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(left)

    def _watch_listening(self) -> None:
        if self._listening is not None:
            asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            accepted, _ = self._listening.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._pause(error)
            return
        self._adopt(accepted)

    def _adopt(self, accepted: socket.socket) -> None:
        assert self._group is not None
        if self._listening is None:  # no new ones
            return accepted.close()
        accepted.setblocking(False)
        caller = credentials(accepted)
        connection = Connection(self._service, self._verbs, self._traffic, accepted, caller)
        refusal = self._admission.refusal(accepted, caller, self._traffic.of_uid[caller.uid])
        if refusal is not None:
            self._traffic.refused += isinstance(refusal, TooMany)
            return connection.fail(refusal)
        if len(self._traffic.connections) >= self._max_connections:
            self._traffic.refused += 1
            logger.warning("too many connections", extra={"uid": caller.uid, "pid": caller.pid, "limit": self._max_connections})
            hint = "try again later, or raise max_connections"
            return connection.fail(TooMany(f"the daemon serves {self._max_connections} connections already", hint))
        self._traffic.connected(connection)
        self._group.create_task(connection.run())

    def _pause(self, error: OSError) -> None:
        """The socket stays readable: without a pause the loop would spin."""
        assert self._listening is not None
        logger.error("no connection can be accepted", extra={"error": error.strerror})
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listening)
        loop.call_later(ACCEPT_PAUSE_SECONDS, self._watch_listening)

    def __repr__(self) -> str:
        return f"<Server {self._traffic.counts()}>"
