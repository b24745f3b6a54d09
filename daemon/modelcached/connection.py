"""One client's connection: who is calling, requests in, answers out.

Every request is a task in the connection's group; a caller that leaves, by `cancel` or by closing, cancels what it asked
for. Whatever a client sends costs a bounded amount of memory and descriptors, and so does a client that reads nothing.
Descriptors that are sent or dropped are closed here, always. Reading and sending happen in the event loop's callbacks,
without a task: a small call must cost microseconds.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
import stat
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import msgspec

from modelcache.protocol import MAX_DESCRIPTORS, MAX_REQUESTS, PROTOCOL_VERSION, Hello, HelloReply, Progress

from .config import Config
from .errors import InvalidRequest, ModelcachedError, ShuttingDown, TooMany
from .frames import Envelope, FrameError, Frames, Message, RequestId, close_all, encode
from .latencies import Latencies
from .logs import caller_keys
from .model import Caller, Reply
from .outbox import Outbox
from .verbs import RequestError, Verb, encode_error, encode_reply

RECEIVE_BYTES = 1 << 16
ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
HELLO = "hello"
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid

logger = logging.getLogger(__name__)


class Service(Protocol):
    """The verbs. `methods` names each one's parameters, a NamedTuple of the protocol; `hello` is the server's own."""

    @property
    def methods(self) -> Mapping[str, type]: ...

    @property
    def taking(self) -> frozenset[str]:
        """The methods that take descriptors."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether something is still to be done for callers who have gone: a daemon that ends when idle waits for it."""
        ...

    async def call(
        self, method: str, params: Any, caller: Caller, report: Callable[[Progress], None], descriptors: tuple[int, ...]
    ) -> Reply:
        """Answers one request; cancelled when the caller leaves. A ModelcachedError reaches the caller by its name.
        `report` never blocks and is called from the event loop's thread. The descriptors are closed after the call."""
        ...

    def hello(self) -> HelloReply: ...

    def reload(self, config: Config) -> None:
        """Takes over a new configuration, as far as a running daemon can."""
        ...

    def attach(self, connect: Callable[[], socket.socket]) -> None:
        """The server runs. `connect` makes a connection to it from this process; any thread may call it."""
        ...


class Traffic:
    """How much is going on, over all connections. Changed in the event loop's thread only."""

    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self.of_uid: Counter[int] = Counter()  # connections
        self.requests = 0  # running now
        self.served = 0  # requests ever
        self.refused = 0  # connections and requests above a limit, ever
        self.latencies = Latencies()
        self.is_draining = False  # no new requests
        self.last_active = time.monotonic()  # a connection came, went or asked for something
        self.no_connections = asyncio.Event()
        self.no_connections.set()
        self.no_requests = asyncio.Event()
        self.no_requests.set()

    def counts(self) -> dict[str, int]:
        return {"connections": len(self.connections), "requests": self.requests, "served": self.served, "refused": self.refused}

    def connected(self, connection: Connection) -> None:
        self.last_active = time.monotonic()
        self.connections.add(connection)
        self.of_uid[connection.caller.uid] += 1
        self.no_connections.clear()

    def disconnected(self, connection: Connection) -> None:
        self.last_active = time.monotonic()
        self.connections.discard(connection)
        self.of_uid[connection.caller.uid] -= 1
        self.of_uid += Counter()  # forgets who has none
        if not self.connections:
            self.no_connections.set()

    def request_started(self) -> None:
        self.last_active = time.monotonic()
        self.requests += 1
        self.served += 1
        self.no_requests.clear()

    def request_ended(self) -> None:
        self.requests -= 1
        if not self.requests:
            self.no_requests.set()


class Connection:
    def __init__(self, service: Service, verbs: Mapping[str, Verb], traffic: Traffic, connected: socket.socket, caller: Caller) -> None:
        self._service = service
        self._verbs = verbs  # "hello" included
        self._traffic = traffic
        self._socket = connected
        self.caller = caller
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._is_greeted = False
        self._requests: asyncio.TaskGroup | None = None
        self._running: dict[RequestId, asyncio.Task[None]] = {}  # until the task is over, cancelled ones too
        self._answered: set[RequestId] = set()  # of those running: no second answer, no progress
        self._progress: dict[RequestId, Progress] = {}  # the latest of each, while the outbox is not empty
        self._is_closed = False
        self._ended = asyncio.Event()
        self.outbox = Outbox(connected, self._send_progress, self.end)

    async def run(self) -> None:
        caller_keys.set({"uid": self.caller.uid, "pid": self.caller.pid})  # the reader's context, so that of every request
        try:
            async with asyncio.TaskGroup() as self._requests:
                if not self._is_closed:
                    self._loop.add_reader(self._socket, self._receive)
                await self._ended.wait()
                for task in self._running.values():
                    task.cancel()
        finally:
            self.end()
            self._traffic.disconnected(self)

    def end(self) -> None:
        """Closes the socket and what is queued for it; `run` then cancels the requests. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._socket)
        self.outbox.close()
        self._socket.close()
        self._frames.close()
        self._progress.clear()
        self._ended.set()

    def fail(self, error: ModelcachedError) -> None:
        """Says why, as far as the socket takes it, and ends."""
        self._send_error(None, error)
        self.end()

    def abandon_requests(self) -> None:
        for request, task in self._running.items():
            self._answer_error(request, _ending())
            task.cancel()

    # ---- in

    def _receive(self) -> None:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(RECEIVE_BYTES, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            return self.end()
        descriptors = _passed(ancillary) if ancillary else ()
        if flags & socket.MSG_CTRUNC:  # some are lost: more than allowed, or this process can hold no more
            close_all(descriptors)
            return self.fail(RequestError("invalid_request", f"descriptors were lost: a message carries at most {MAX_DESCRIPTORS}"))
        if any(map(_is_socket, descriptors)):  # its own end, say: then it would hold itself open after its client has gone
            close_all(descriptors)
            return self.fail(RequestError("invalid_request", "a descriptor is a socket: only files are taken"))
        if not data:
            close_all(descriptors)
            return self.end()
        try:
            messages = self._frames.feed(data, descriptors)
        except FrameError as error:
            logger.warning("malformed message", extra={"reason": error.message})
            return self.fail(RequestError(error.name, error.message, "the connection is closed"))
        for message in messages:
            self._dispatch(message)

    def _dispatch(self, message: Message) -> None:
        envelope, descriptors = message.envelope, message.descriptors
        if envelope is None or envelope.id is None or envelope.method not in self._service.taking:
            close_all(descriptors)
        if envelope is None:
            return self._send_error(None, RequestError("invalid_request", f"not a request: {message.problem}"))
        if envelope.id is None:
            return self._notified(envelope)
        try:
            if envelope.id in self._running:
                raise RequestError("invalid_request", f"a request with the id {envelope.id!r} is running")
            if descriptors and envelope.method not in self._service.taking:
                raise InvalidRequest(f"{envelope.method} takes no descriptors")
            self._start(envelope.id, envelope, descriptors)
        except ModelcachedError as error:
            if envelope.method in self._service.taking:
                close_all(descriptors)
            self._send_error(None if envelope.id in self._running else envelope.id, error)

    def _notified(self, envelope: Envelope) -> None:
        """Notifications get no answer, not even a wrong one."""
        if envelope.method != "cancel":
            return
        try:
            request = _cancel.decode(envelope.params).id
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        task = self._running.get(request)
        if task is not None:
            self._answered.add(request)
            task.cancel()

    def _greet(self, request: RequestId, hello: Hello) -> None:
        if not 1 <= hello.protocol <= PROTOCOL_VERSION:
            hint = "upgrade the daemon, or use an older client"
            message = f"the client speaks protocol {hello.protocol}, this daemon up to {PROTOCOL_VERSION}"
            raise RequestError("unsupported_version", message, hint, protocol=PROTOCOL_VERSION)
        self._is_greeted = True
        self.outbox.send(encode({"jsonrpc": "2.0", "id": request, "result": self._service.hello()._asdict()}))

    def _start(self, request: RequestId, envelope: Envelope, descriptors: tuple[int, ...]) -> None:
        if envelope.method == HELLO:
            return self._greet(request, self._verbs[HELLO].read(envelope.params))
        if not self._is_greeted:
            raise RequestError("invalid_request", "the first request of a connection is hello")
        verb = self._verbs.get(envelope.method)
        if verb is None:
            hint = f"there are: {', '.join(sorted(self._verbs))}"
            raise RequestError("method_not_found", f"there is no method {envelope.method!r}", hint)
        params = verb.read(envelope.params)
        if self._traffic.is_draining:
            raise _ending()
        if len(self._running) >= MAX_REQUESTS:
            self._traffic.refused += 1
            raise TooMany(f"{MAX_REQUESTS} requests of this connection are running", "wait for one of them")
        if self._requests is None or self._is_closed:
            return close_all(descriptors)
        task = self._running[request] = self._requests.create_task(self._serve(request, envelope.method, params, descriptors))
        task.add_done_callback(partial(self._finished, request, descriptors))
        self._traffic.request_started()

    async def _serve(self, request: RequestId, method: str, params: Any, descriptors: tuple[int, ...]) -> None:
        start = time.monotonic()
        try:
            reply = await self._service.call(method, params, self.caller, partial(self._report, request), descriptors)
        except ModelcachedError as error:
            self._answer_error(request, error)
        except asyncio.CancelledError:
            self._answer_error(request, _ending())  # heard only where the cancelling came from below: nobody has to wait for ever
            raise
        except Exception:
            logger.exception("a request failed unexpectedly", extra={"method": method})
            self._answer_error(request, ModelcachedError(f"the daemon failed at {method}", "the daemon's log says more"))
        else:
            self._answer(request, reply)
        finally:
            self._traffic.latencies.observe(method, time.monotonic() - start)

    def _finished(self, request: RequestId, descriptors: tuple[int, ...], task: asyncio.Task[None]) -> None:
        close_all(descriptors)
        del self._running[request]
        self._answered.discard(request)
        self._traffic.request_ended()

    # ---- out

    def _answer(self, request: RequestId, reply: Reply) -> None:
        descriptors = reply.descriptors
        if request in self._answered or self._is_closed:
            return close_all(descriptors)
        try:
            line, descriptors = encode_reply(request, reply)
        except Exception:
            close_all(descriptors)
            logger.exception("a reply can't be sent")
            return self._answer_error(request, ModelcachedError("the daemon's answer can't be sent", "the daemon's log says more"))
        self._answered.add(request)
        self._progress.pop(request, None)
        self.outbox.send(line, descriptors)

    def _answer_error(self, request: RequestId, error: ModelcachedError) -> None:
        if request not in self._answered:
            self._answered.add(request)
            self._progress.pop(request, None)
            self._send_error(request, error)

    def _send_error(self, request: RequestId | None, error: ModelcachedError) -> None:
        self.outbox.send(encode_error(request, error))

    def _report(self, request: RequestId, progress: Progress) -> None:
        if request not in self._running or request in self._answered or self._is_closed:
            return
        if self.outbox.is_empty:
            self.outbox.send(encode({"jsonrpc": "2.0", "method": "progress", "params": {"id": request, **progress._asdict()}}))
        else:  # this client reads slowly: it gets the latest news when it has read the old
            self._progress[request] = progress

    def _send_progress(self) -> None:
        while self._progress and self.outbox.is_empty:
            self._report(*self._progress.popitem())

    def __repr__(self) -> str:
        return f"<connection {self.caller} running={len(self._running)} {self.outbox}>"


class _Cancel(msgspec.Struct):
    id: int | str


_cancel = msgspec.json.Decoder(_Cancel)


def _ending() -> ShuttingDown:
    return ShuttingDown("the daemon is ending", "ask again: what is on disk stays")


def credentials(connected: socket.socket) -> Caller:
    """The process at the other end when it connected, as the kernel vouches for it."""
    pid, uid, gid = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Caller(uid, gid, pid)


def _is_socket(descriptor: int) -> bool:
    return stat.S_ISSOCK(os.fstat(descriptor).st_mode)


def _passed(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return tuple(found)
