"""The process's way to its daemon: finds it, starts one where that is allowed, and mends the connection.

Invariants:
- One connection per process, opened by the first request. A forked child opens its own; the leases it inherited stay.
- Requests are idempotent, so one whose connection broke is sent again, to the daemon's next life, until the waiting
  has lasted MODELCACHE_CONNECT_SECONDS without success.
- Once connected, a process stays with that socket: it waits for its daemon to come back and looks for no other.
"""

from __future__ import annotations

import _socket as socket  # see connection
import atexit
import contextlib
import os
import stat
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type, TypeVar, Union

from . import __version__, runtime
from .connection import Connection, OnProgress, Reply, known_fields
from .errors import DaemonConnectionError, DaemonNotAvailableError, ModelcacheError, ProtocolError, unavailable
from .leases import Lease, Leases
from .protocol import PROTOCOL_VERSION, Fetch, FetchReply, Hello, HelloReply, Load, LoadFolder, LoadReply, PlanReply

_CONNECT_SECONDS = 30.0
_HELLO_SECONDS = 5.0  # a daemon that listens gets so long to answer, however little patience there is for one that does not
_SHORTEST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.5
_MAX_LAUNCHES = 2  # a daemon that ends twice before it says hello will do so again

_Result = TypeVar("_Result")
_Shown = TypeVar("_Shown", bound=Union[FetchReply, LoadReply])


class Fetched(NamedTuple):
    reply: FetchReply
    lease: Lease  # open: the caller closes it, or keeps the view for the life of the process
    listing: Optional[int]  # a descriptor of the commit's full listing, when asked for; the caller's, to close
    root: str  # the daemon's


class Loaded(NamedTuple):
    reply: LoadReply
    lease: Lease  # as in Fetched
    root: str


class Client:
    """A daemon's client, for any number of threads. `path`: its socket; None finds it as the environment says."""

    def __init__(self, path: Optional[str] = None, connect: Optional[Callable[[], socket.socket]] = None) -> None:
        """`connect`, where no path leads to the daemon: makes a connected socket, or raises ConnectionRefusedError."""
        self.leases = Leases()
        self._named = path or runtime.named_socket()
        self._connect = connect
        self._lock = threading.Lock()
        # Under the lock:
        self._connected_to: Optional[str] = None
        self._connection: Optional[Connection] = None
        self._hello: Optional[HelloReply] = None
        _clients.append(self)

    def hello(self) -> HelloReply:
        """Who answers: the daemon's version, root, hub, pid."""
        return self._connected()[1]

    @property
    def is_connected(self) -> bool:
        """Whether anything was asked of a daemon so far."""
        return self._connection is not None

    def call(self, method: str, params: Any = None, on_progress: Optional[OnProgress] = None) -> Dict[str, Any]:
        """One request; `params` is a NamedTuple of `protocol` or None. Descriptors in the reply are closed."""
        reply = self._request(method, fields_of(params), on_progress)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return reply.result

    def plan(self, request: Fetch, on_progress: Optional[OnProgress] = None) -> PlanReply:
        return known_fields(PlanReply, self.call("plan", request, on_progress))

    def fetch(self, request: Fetch, on_progress: Optional[OnProgress] = None) -> Fetched:
        """Fetches and takes the lease. `request.held` is filled in here."""
        reply, lease, others, root = self._leased("fetch", request, FetchReply, int(request.listing), on_progress)
        return Fetched(reply, lease, others[0] if others else None, root)

    def load(self, request: Union[Load, LoadFolder], on_progress: Optional[OnProgress] = None) -> Loaded:
        """Loads what was saved and takes the lease. `request.held` is filled in here."""
        method = "load" if isinstance(request, Load) else "load_folder"
        reply, lease, _, root = self._leased(method, request, LoadReply, 0, on_progress)
        return Loaded(reply, lease, root)

    def session(self, attempt: Callable[[Connection, HelloReply], _Result]) -> _Result:
        """Several requests that belong together, on one connection. When it breaks, all of them again: `attempt` is repeatable."""
        return self._mending(attempt)

    def close(self) -> None:
        """Ends the connection; leases stay. The next request opens another."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _request(self, method: str, params: Dict[str, Any], on_progress: Optional[OnProgress]) -> Reply:
        return self._mending(lambda connection, _: connection.request(method, params, on_progress))

    def _leased(
        self, method: str, request: Any, kind: Type[_Shown], others: int, on_progress: Optional[OnProgress]
    ) -> Tuple[_Shown, Lease, List[int], str]:
        """The reply, the lease, so many other descriptors, the daemon's root."""

        def attempt(connection: Connection, hello: HelloReply) -> Tuple[_Shown, Lease, List[int], str]:
            held = self.leases.hold(hello.root)
            try:
                params = fields_of(request._replace(held=[lease.tree for lease in held]))
                reply = connection.request(method, params, on_progress)
                return (*self._take(reply, hello.root, kind, others), hello.root)
            finally:
                for lease in held:
                    lease.close()

        return self._mending(attempt)

    def _take(self, reply: Reply, root: str, kind: Type[_Shown], others: int) -> Tuple[_Shown, Lease, List[int]]:
        descriptors = reply.descriptors
        try:
            fields = known_fields(kind, reply.result)
            if len(descriptors) != int(fields.leased) + others:
                raise ProtocolError("the daemon passed %d descriptors with a path" % len(descriptors))
            lease = self.leases.adopt(root, fields.tree, descriptors.pop(0) if fields.leased else None)
            if lease is None:
                raise ProtocolError("the daemon passed no lease on %s, and none is held" % fields.tree)
            passed, descriptors = descriptors, []
            return fields, lease, passed
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    # ---- staying connected

    def _mending(self, attempt: Callable[[Connection, HelloReply], _Result]) -> _Result:
        deadline, pause = 0.0, _SHORTEST_PAUSE_SECONDS
        while True:
            connection, hello = self._connected()
            began = time.monotonic()
            try:
                return attempt(connection, hello)
            except DaemonConnectionError:
                connection.close()
                now = time.monotonic()
                if not deadline or now - began > _CONNECT_SECONDS:  # it had worked for a while: not the same failure again
                    deadline, pause = now + _connect_seconds(), _SHORTEST_PAUSE_SECONDS
                if now > deadline:
                    raise
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _connected(self) -> Tuple[Connection, HelloReply]:
        with self._lock:
            if self._connection is None or self._hello is None or self._connection.is_broken:
                self._connection, self._hello = self._find()
            return self._connection, self._hello

    def _find(self) -> Tuple[Connection, HelloReply]:
        path, may_launch = self._address()
        # A socket that never was there is most likely a wrong path, unless somebody says how long to wait for it.
        is_expected = self._connected_to is not None or "MODELCACHE_CONNECT_SECONDS" in os.environ
        deadline = time.monotonic() + _connect_seconds()
        pause, launches = _SHORTEST_PAUSE_SECONDS, 0
        while True:
            try:
                found = _dial(path, self._connect, max(deadline, time.monotonic() + _HELLO_SECONDS))
                self._connected_to = path
                return found
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError, DaemonConnectionError) as error:
                failure: OSError = error
            except ModelcacheError:  # what a daemon said; its refusals are PermissionErrors too
                raise
            except PermissionError as error:
                raise DaemonNotAvailableError(
                    "uid %d may not use %s: %s" % (os.geteuid(), path, error.strerror or error),
                    "the socket's group may use it; ask for membership",
                ) from error
            except OSError as error:
                raise unavailable("no daemon can be reached at %s: %s" % (path, error.strerror or error)) from error
            if may_launch and launches >= _MAX_LAUNCHES and not isinstance(failure, BlockingIOError):
                raise unavailable("the daemon that was started for you does not live; its log ends:\n%s" % runtime.last_words())
            if may_launch and isinstance(failure, (FileNotFoundError, ConnectionRefusedError)) and _launch():
                launches += 1
                continue
            is_missing = isinstance(failure, FileNotFoundError) and not may_launch and not is_expected
            if is_missing or time.monotonic() > deadline:
                raise _nobody(path, failure) from failure
            time.sleep(pause * (1 + os.urandom(1)[0] / 256))  # 50 processes that wait for the same daemon do not knock at once
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _address(self) -> Tuple[str, bool]:
        """The socket, and whether a daemon may be started behind it."""
        if self._named:
            return self._named, False
        path = self._connected_to or (runtime.NODE_SOCKET if os.path.exists(runtime.NODE_SOCKET) else runtime.user_socket())
        if path == runtime.NODE_SOCKET:
            return path, False
        runtime.check_folder(os.path.dirname(path))
        return path, True

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # a thread that is not here may have held it
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop_after_fork()

    def __repr__(self) -> str:
        return "<Client %s %r %r>" % (self._connected_to or "not connected", self._connection, self.leases)


_clients: List[Client] = []  # all there ever were: a process has one, seldom two
_shared: List[Client] = []
_own = threading.local()
_shared_lock = threading.Lock()


def shared() -> Client:
    """The client of this process, or of this thread (`using`)."""
    own: Optional[Client] = getattr(_own, "client", None)
    if own is not None:
        return own
    named = runtime.named_socket()
    if not _shared or _shared[0]._named != named:  # a program may set MODELCACHE_SOCKET as late as it likes
        with _shared_lock:
            if not _shared:
                atexit.register(_close_shared)
            if not _shared or _shared[0]._named != named:
                _close_shared()
                _shared[:] = [Client()]
    return _shared[0]


@contextlib.contextmanager
def using(client: Client) -> Iterator[None]:
    """What this thread asks goes through this client."""
    _own.client = client
    try:
        yield
    finally:
        _own.client = None


def _close_shared() -> None:
    for client in _shared:
        client.close()


def _after_fork_in_child() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()
    for client in _clients:
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _dial(path: str, connect: Optional[Callable[[], socket.socket]], deadline: float) -> Tuple[Connection, HelloReply]:
    sock = socket.socket(socket.AF_UNIX) if connect is None else connect()
    try:
        if connect is None:
            sock.setblocking(False)  # a full queue is an error then, not a wait without end
            _connect(sock, path)
            sock.setblocking(True)
        connection = Connection(sock)
    except BaseException:
        sock.close()
        raise
    try:
        params = fields_of(Hello(PROTOCOL_VERSION, "modelcache/" + __version__))
        return connection, known_fields(HelloReply, connection.request("hello", params, deadline=deadline).result)
    except BaseException:
        connection.close()
        raise


def _nobody(path: str, failure: OSError) -> DaemonNotAvailableError:
    if isinstance(failure, (FileNotFoundError, ConnectionRefusedError)):
        return unavailable("no daemon listens at %s: %s" % (path, failure.strerror or failure))
    # Somebody holds the socket: systemd, for a daemon that does not start, or a daemon that is stuck.
    hint = "look at it: systemctl status modelcached; journalctl -u modelcached"
    if path != runtime.NODE_SOCKET:
        hint = "look at the process that listens there and at its log; if it is yours, end it: another one is started when it is needed"
    return DaemonNotAvailableError("the daemon behind %s does not answer" % path, hint)


def _connect(sock: socket.socket, path: str) -> None:
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise DaemonNotAvailableError("%s is not a socket" % path, "set MODELCACHE_SOCKET to the daemon's socket")
    runtime.with_short_name(path, sock.connect)


def _launch() -> bool:
    from . import launcher  # seldom needed

    return launcher.launch()


def fields_of(params: Any) -> Dict[str, Any]:
    """What differs from the defaults: an older daemon need not know fields that are not used."""
    if params is None:
        return {}
    defaults = params._field_defaults
    return {name: value for name, value in params._asdict().items() if name not in defaults or value != defaults[name]}


def _connect_seconds() -> float:
    text = os.environ.get("MODELCACHE_CONNECT_SECONDS", "")
    try:
        return float(text) if text else _CONNECT_SECONDS
    except ValueError:
        raise ValueError("MODELCACHE_CONNECT_SECONDS is a number of seconds, not %r" % text) from None
