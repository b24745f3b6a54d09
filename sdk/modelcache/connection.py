"""One connection to the daemon, shared by every thread of a process.

No thread of its own: the first caller who waits reads, and hands the others what is theirs; when it leaves, the next one
reads. So a process that never asks has no thread, and a reply wakes the thread that wants it directly.

Invariants:
- Every descriptor that arrives has one owner: the queue, then a message, then the caller; whoever drops one closes it.
- Bytes are read and written in whole steps. A step that is interrupted (Ctrl-C) in the middle leaves the stream in an unknown
  state and breaks the connection; waiting is no step, so an interrupted wait costs only its own caller, and the daemon is told.
- A connection breaks once, for everybody, and is never mended: the client opens another.
- The socket is closed when nobody can be inside a system call on it any more: its number may be another file's by then.
"""

from __future__ import annotations

import _socket as socket  # the public one is made of enums, which take longer to import than the rest of this package
import json
import os
import select
import sys
import threading
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterable, List, NamedTuple, NoReturn, Optional, Tuple, Type, TypeVar

from .errors import DaemonConnectionError, InvalidRequestError, ModelcacheError, ProtocolError, from_wire
from .protocol import MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, MAX_REQUESTS, Progress

_READ_BYTES = 64 << 10
_INT_BYTES = 4  # of a descriptor in a message's ancillary data
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)

OnProgress = Callable[[Progress], None]
_Inbox = Deque[Tuple[Dict[str, Any], List[int]]]
_Fields = TypeVar("_Fields")


class Reply(NamedTuple):
    result: Dict[str, Any]
    descriptors: List[int]  # the caller's, to close


class Connection:
    """`sock` is connected, blocking, and belongs to the connection from now on."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._sending = threading.Lock()
        self._condition = threading.Condition(threading.Lock())
        # Under the condition:
        self._calls: Dict[int, _Inbox] = {}
        self._last_id = 0
        self._reader = 0  # the call whose thread reads now
        self._broken: Optional[ModelcacheError] = None
        # Only the reader's:
        self._partial = bytearray()
        self._descriptors: Deque[int] = deque()  # arrived, not yet taken by a message

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    def request(
        self,
        method: str,
        params: Dict[str, Any],
        on_progress: Optional[OnProgress] = None,
        deadline: Optional[float] = None,
        descriptors: Iterable[int] = (),
    ) -> Reply:
        """Sends one request and waits for its reply. Any number of threads may.

        `on_progress` is called in this thread; when progress comes faster than it returns, only the latest is kept. `deadline`
        (time.monotonic) is for requests that are answered at once. `descriptors` are passed along and stay the caller's.

        Raises what the daemon answered (`errors.from_wire`), DaemonConnectionError when the connection breaks, ProtocolError.
        A caller that leaves in any other way has its request cancelled.
        """
        call = self.start(method, params, descriptors)
        assert call is not None  # it waited for its turn
        return call.wait(on_progress, deadline)

    def start(self, method: str, params: Dict[str, Any], descriptors: Iterable[int] = (), is_patient: bool = True) -> Optional[Call]:
        """Sends one request; its reply is the returned call's to wait for. `descriptors` are passed along and stay the caller's.

        A caller who has started others must not be patient: None says that the connection carries all it can, and that one of
        the caller's own has to be waited for first. (Patient ones could wait for each other.)
        """
        inbox: _Inbox = deque()
        number = self._enter(inbox, is_patient)
        if not number:
            return None
        try:
            self._send({"jsonrpc": "2.0", "id": number, "method": method, "params": params}, list(descriptors))
        except BaseException:
            self._cancel(number)
            self._leave(number, inbox)
            raise
        return Call(self, number, inbox)

    def close(self) -> None:
        """Ends the connection; callers that wait get a DaemonConnectionError. Idempotent."""
        self._break(DaemonConnectionError("the connection to the daemon was closed"))
        with self._condition:
            self._close_if_unused()

    def drop_after_fork(self) -> None:
        """In a forked child: closes the child's copies. The connection stays the parent's, so nothing is said on it."""
        self._broken = DaemonConnectionError("the connection belongs to the parent process")
        self._socket.close()
        _close_all(self._descriptors)

    # ---- callers

    def _enter(self, inbox: _Inbox, is_patient: bool) -> int:
        with self._condition:
            while len(self._calls) >= MAX_REQUESTS and self._broken is None:
                if not is_patient:
                    return 0
                self._condition.wait()
            self._raise_if_broken()
            self._last_id += 1
            self._calls[self._last_id] = inbox
            return self._last_id

    def _leave(self, call: int, inbox: _Inbox) -> None:
        with self._condition:
            del self._calls[call]
            if self._reader == call:  # interrupted between taking the role and the first step
                self._reader = 0
            while inbox:
                _close_all(inbox.popleft()[1])
            self._close_if_unused()
            self._condition.notify_all()

    def _next(self, call: int, inbox: _Inbox, deadline: Optional[float]) -> Tuple[Dict[str, Any], List[int]]:
        """The next message for `call`: from its inbox, or by reading when nobody else does."""
        while True:
            with self._condition:
                while not inbox and self._broken is None and self._reader:
                    if not self._condition.wait(_seconds_left(deadline)):
                        raise _silent()
                if inbox:
                    return inbox.popleft()
                self._raise_if_broken()
                self._reader = call
            try:
                self._receive(deadline)
            finally:
                with self._condition:
                    self._reader = 0
                    self._condition.notify_all()

    def _cancel(self, call: int) -> None:
        if self._broken is None:
            try:
                self._send({"jsonrpc": "2.0", "method": "cancel", "params": {"id": call}}, [])
            except (OSError, ModelcacheError):  # then there is nobody left to tell
                pass

    # ---- the stream

    def _send(self, message: Dict[str, Any], descriptors: List[int]) -> None:
        if descriptors:
            message["fds"] = len(descriptors)
        line = memoryview(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        if len(line) > MAX_MESSAGE_BYTES:
            raise InvalidRequestError("the request has %d bytes, at most %d are allowed" % (len(line), MAX_MESSAGE_BYTES))
        rights = b"".join(descriptor.to_bytes(_INT_BYTES, sys.byteorder) for descriptor in descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        sent: List[int] = []  # bytes, step by step
        with self._sending:
            try:
                while sum(sent) < len(line):
                    rest = [line[sum(sent) :]]
                    # `extend(map())`: Ctrl-C can't come between the system call and its count, so the count is always right.
                    sent.extend(map(self._socket.sendmsg, [rest], [[] if sent else ancillary], [socket.MSG_NOSIGNAL]))
            except BaseException as error:
                if isinstance(error, (BrokenPipeError, ConnectionResetError)):
                    self._hear_why()
                if isinstance(error, OSError) or 0 < sum(sent) < len(line):
                    self._break_and_raise(error)
                raise

    def _hear_why(self) -> None:
        """Raises what the daemon said before it hung up, while we were writing; somebody who reads already will hear it."""
        with self._condition:
            if self._reader or self._broken is not None:
                return
            self._reader = -1
        try:
            self._receive(time.monotonic())
        finally:
            with self._condition:
                self._reader = 0
                self._condition.notify_all()

    def _receive(self, deadline: Optional[float]) -> None:
        """Waits until something arrives and hands it out. One thread at a time."""
        seconds = _seconds_left(deadline)
        if not self._poll.poll(None if seconds is None else seconds * 1000):
            self._break_and_raise(_silent())
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    whole = len(payload) - len(payload) % _INT_BYTES
                    self._descriptors.extend(memoryview(payload)[:whole].cast("i"))
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("descriptors were lost on their way", "raise the limit of open files (ulimit -n)")
            if not data:
                raise DaemonConnectionError("the daemon closed the connection")
            self._take(data)
        except BlockingIOError:  # poll may be wrong, once in a blue moon
            pass
        except BaseException as error:
            self._break_and_raise(error)

    def _take(self, data: bytes) -> None:
        first, *rest = data.split(b"\n")
        self._partial += first
        for start in rest:
            if len(self._partial) >= MAX_MESSAGE_BYTES:
                break
            self._deliver(bytes(self._partial))
            self._partial[:] = start
        if len(self._partial) >= MAX_MESSAGE_BYTES:
            raise ProtocolError("the daemon sent a message of more than %d bytes" % MAX_MESSAGE_BYTES)
        if len(self._descriptors) > (MAX_DESCRIPTORS if self._partial else 0):
            raise ProtocolError("the daemon sent %d descriptors that no message declares" % len(self._descriptors))

    def _deliver(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            count = message.get("fds", 0)
            is_progress = "method" in message
            call = message["params"]["id"] if is_progress else message["id"]
            is_sound = isinstance(count, int) and 0 <= count <= len(self._descriptors)
            is_sound &= isinstance(call, int) if "error" not in message else call is None or isinstance(call, int)
            is_sound &= is_progress or "result" in message or "error" in message
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ProtocolError("the daemon sent what is no message: %.200r" % line) from error
        if not is_sound:
            raise ProtocolError("the daemon sent a message without what it declares: %.200r" % line)
        if call is None and "error" in message:  # said about the connection as a whole: our request was not even readable
            raise from_wire(message["error"])
        descriptors = [self._descriptors.popleft() for _ in range(count)]
        with self._condition:
            inbox = self._calls.get(call)
            if inbox is None or (is_progress and count):  # whoever asked has left
                _close_all(descriptors)
            elif is_progress and inbox and "method" in inbox[-1][0]:
                inbox[-1] = (message, descriptors)
            else:
                inbox.append((message, descriptors))
            self._condition.notify_all()

    # ---- the end

    def _break(self, error: ModelcacheError) -> None:
        with self._condition:
            if self._broken is None:
                self._broken = error
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)  # wakes who is inside a call on it
                except OSError:
                    pass
            self._condition.notify_all()

    def _break_and_raise(self, error: BaseException) -> NoReturn:
        if isinstance(error, ModelcacheError):
            self._break(error)
            raise error
        if isinstance(error, OSError):
            broken = DaemonConnectionError("the connection to the daemon broke: %s" % (error.strerror or error))
            self._break(broken)
            raise broken from error
        self._break(DaemonConnectionError("another thread was interrupted while it used the connection"))
        raise error

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise type(self._broken)(self._broken.message, self._broken.hint, self._broken.data)  # one each: tracebacks grow

    def _close_if_unused(self) -> None:
        if self._broken is not None and not self._calls:
            self._socket.close()
            _close_all(self._descriptors)

    def __repr__(self) -> str:
        return "<Connection calls=%d%s>" % (len(self._calls), " broken" if self._broken else "")


class Call:
    """A request that was sent. Its reply is waited for once, or it is abandoned; either way by one thread."""

    def __init__(self, connection: Connection, number: int, inbox: _Inbox) -> None:
        self._connection = connection
        self._number = number
        self._inbox = inbox

    def wait(self, on_progress: Optional[OnProgress] = None, deadline: Optional[float] = None) -> Reply:
        """As `Connection.request`, from the sending on."""
        is_answered = False
        try:
            while True:
                message, received = self._connection._next(self._number, self._inbox, deadline)
                if "method" not in message:
                    is_answered = True
                    return _outcome(message, received)
                if on_progress is not None:
                    on_progress(known_fields(Progress, message["params"]))
        except BaseException:
            if not is_answered:
                self._connection._cancel(self._number)
            raise
        finally:
            self._connection._leave(self._number, self._inbox)

    def abandon(self) -> None:
        """The caller leaves without the reply; the daemon is told."""
        self._connection._cancel(self._number)
        self._connection._leave(self._number, self._inbox)


def known_fields(kind: Type[_Fields], values: Dict[str, Any]) -> _Fields:
    """A wire type from what a daemon sent. Fields of a newer one are left out, missing ones are a ProtocolError."""
    names: Iterable[str] = kind._fields  # type: ignore[attr-defined]  # a NamedTuple; typing has no name for their class
    try:
        return kind(**{name: values[name] for name in names if name in values})
    except TypeError as error:
        raise ProtocolError("the daemon's answer lacks what %s needs: %s" % (kind.__name__, error)) from error


def _outcome(message: Dict[str, Any], descriptors: List[int]) -> Reply:
    try:
        if "error" in message:
            raise from_wire(message["error"])
        result = message["result"]
        if result.get("in_fd") is True:
            descriptor = descriptors.pop(0)
            try:
                result = json.loads(read_all(descriptor))
            finally:
                os.close(descriptor)
        return Reply(result, descriptors)
    except ModelcacheError:
        _close_all(descriptors)
        raise
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        _close_all(descriptors)
        raise ProtocolError("the daemon sent what is no reply: %s" % error) from error


def read_all(descriptor: int) -> bytes:
    """The whole file behind a passed descriptor; its offset, which other processes share, is neither used nor moved."""
    parts: List[bytes] = []
    offset = 0
    while True:
        part = os.pread(descriptor, 1 << 20, offset)
        if not part:
            return b"".join(parts)
        parts.append(part)
        offset += len(part)


def _silent() -> ModelcacheError:
    return DaemonConnectionError("the daemon does not answer")


def _seconds_left(deadline: Optional[float]) -> Optional[float]:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _close_all(descriptors: Any) -> None:
    while descriptors:
        descriptor = descriptors.pop()
        try:
            os.close(descriptor)
        except OSError:  # the kernel has let go of it all the same
            pass
