"""A small real service behind the real server, in a process of its own; and a client that may misbehave.

`python -m tests.fake_service serve ...` is `modelcached serve` with this service. Tests wait for its events through the socket.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modelcache.protocol import PROTOCOL_VERSION, HelloReply, Progress
from modelcached import command, errors
from modelcached.config import Config
from modelcached.connection import Service, Traffic
from modelcached.model import Caller, Reply

DEADLINE_SECONDS = 15.0


class Echo(NamedTuple):
    text: str
    number: int = 0
    words: list[str] = []
    maybe: str | None = None


class Named(NamedTuple):
    name: str


class Count(NamedTuple):
    count: int = 1  # type: ignore[assignment]  # shadows tuple.count, as Python allows


class Nothing(NamedTuple):
    pass


class Nested(NamedTuple):
    inner: Echo
    several: list[Echo]


class FakeService:
    methods: Mapping[str, type] = {
        "echo": Echo,
        "who": Nothing,
        "traffic": Nothing,
        "wait": Named,  # until the caller leaves, or `release`
        "release": Named,
        "started": Named,  # until somebody waits
        "cancelled": Named,  # until a wait was cancelled
        "refuse": Named,
        "crash": Nothing,
        "block": Named,  # the event loop, until somebody writes to the FIFO of that name
        "give_up": Nothing,
        "nested": Nothing,
        "open": Count,
        "open_and_fail": Count,
        "large": Count,
        "large_open": Count,
        "news": Count,
        "unsendable": Nothing,
        "end_background": Nothing,
        "cling": Nothing,  # from now on the daemon does not end
    }
    taking: frozenset[str] = frozenset()
    is_busy = False

    def __init__(self, config: Config, traffic: Traffic) -> None:
        self._config = config
        self._counts = traffic.counts
        self._events: dict[str, asyncio.Event] = {}
        self.ended = asyncio.Event()
        self.clings = asyncio.Event()

    def reload(self, config: Config) -> None:
        self.config = config

    def hello(self) -> HelloReply:
        config = self._config
        return HelloReply(PROTOCOL_VERSION, "0", str(config.root), config.hub_endpoint, config.private, os.getpid())

    def attach(self, connect: Callable[[], socket.socket]) -> None:
        """It connects to nobody."""

    async def call(
        self, method: str, params: Any, caller: Caller, report: Callable[[Progress], None], descriptors: tuple[int, ...]
    ) -> Reply:
        reply: Reply = await getattr(self, f"_{method}")(params, caller, report)
        return reply

    def _event(self, name: str) -> asyncio.Event:
        return self._events.setdefault(name, asyncio.Event())

    async def _echo(self, params: Echo, *_: Any) -> Reply:
        return Reply(params)

    async def _who(self, params: Any, caller: Caller, report: Any) -> Reply:
        return Reply(caller)

    async def _traffic(self, *_: Any) -> Reply:
        return Reply(dict(self._counts()))

    async def _wait(self, params: Named, *_: Any) -> Reply:
        self._event(f"started {params.name}").set()
        try:
            await self._event(f"release {params.name}").wait()
        except asyncio.CancelledError:
            self._event(f"cancelled {params.name}").set()
            raise
        return Reply(params)

    async def _release(self, params: Named, *_: Any) -> Reply:
        self._event(f"release {params.name}").set()
        return Reply({})

    async def _started(self, params: Named, *_: Any) -> Reply:
        await self._event(f"started {params.name}").wait()
        return Reply({})

    async def _cancelled(self, params: Named, *_: Any) -> Reply:
        await self._event(f"cancelled {params.name}").wait()
        return Reply({})

    async def _refuse(self, params: Named, *_: Any) -> Reply:
        raise errors.NoSpace("the disk is full", "free some", needed=params.name)

    async def _crash(self, *_: Any) -> Reply:
        raise RuntimeError("the secret is hf_abcdefghijklmnop")

    async def _block(self, params: Named, *_: Any) -> Reply:
        with open(params.name) as told:  # noqa: ASYNC230 - on purpose
            told.read()
        return Reply(params)

    async def _give_up(self, *_: Any) -> Reply:
        raise asyncio.CancelledError  # as from a future that somebody else cancelled

    async def _nested(self, *_: Any) -> Reply:
        return Reply(Nested(Echo("a"), [Echo("b"), Echo("c")]))

    async def _open(self, params: Count, *_: Any) -> Reply:
        return Reply({}, tuple(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(params.count)))

    async def _open_and_fail(self, params: Count, *_: Any) -> Reply:
        return Reply({"no": object()}, (await self._open(params)).descriptors)

    async def _large(self, params: Count, *_: Any) -> Reply:
        return Reply({"text": "x" * params.count})

    async def _large_open(self, params: Count, *_: Any) -> Reply:
        return Reply({"text": "x" * params.count}, (await self._open(Count(1))).descriptors)

    async def _news(self, params: Count, caller: Caller, report: Callable[[Progress], None]) -> Reply:
        for done in range(params.count):
            report(Progress("download", done, params.count))
        return Reply({})

    async def _unsendable(self, *_: Any) -> Reply:
        raise errors.Storage("bad name \udcff", data_of=object())

    async def _end_background(self, *_: Any) -> Reply:
        self.ended.set()
        return Reply({})

    async def _cling(self, *_: Any) -> Reply:
        self.clings.set()
        return Reply({})


async def build(
    config: Config,
    background: asyncio.TaskGroup,
    flights: asyncio.TaskGroup,
    callers: asyncio.TaskGroup,
    closing: contextlib.AsyncExitStack,
    traffic: Traffic,
) -> Service:
    if config.root.name == "locked":
        raise errors.InUse("the root is in use", "stop the other daemon")
    service = FakeService(config, traffic)

    async def fail_when_asked() -> None:
        await service.ended.wait()
        raise RuntimeError("a background task died")

    async def cling_when_asked() -> None:
        await service.clings.wait()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    _ = background.create_task(fail_when_asked())
    _ = background.create_task(cling_when_asked())
    closing.callback(print, "closed last", file=sys.stderr, flush=True)
    return service


# ---- the other side


class Answer(NamedTuple):
    message: dict[str, Any]
    descriptors: tuple[int, ...]


class Client:
    """Says hello unless told otherwise; then says what it is told to, well-formed or not."""

    def __init__(self, path: Path | str, hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE_SECONDS)
        self._buffer = b""
        self._descriptors: list[int] = []
        self._id = 0
        try:
            self.socket.connect(str(path))
            if hello:
                self.welcome = self.call("hello", protocol=PROTOCOL_VERSION)["result"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def raw(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            sent = self.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
            data = data[sent:]
        if data:
            self.socket.sendall(data)

    def request(self, method: str, descriptors: Sequence[int] = (), /, **params: Any) -> int:
        self._id += 1
        message = {"jsonrpc": "2.0", "id": self._id, "method": method, "params": params}
        if descriptors:
            message["fds"] = len(descriptors)
        self.raw(json.dumps(message).encode() + b"\n", descriptors)
        return self._id

    def cancel(self, request: int) -> None:
        self.raw(json.dumps({"jsonrpc": "2.0", "method": "cancel", "params": {"id": request}}).encode() + b"\n")

    def receive(self) -> Answer:
        """The next message; EOFError when the daemon has closed the connection."""
        while b"\n" not in self._buffer:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(64 * 4), socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                data, ancillary = b"", []
            for _, _, rights in ancillary:
                found = array.array("i")
                found.frombytes(rights)
                self._descriptors += found
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        count = message.get("fds", 0)
        taken, self._descriptors = tuple(self._descriptors[:count]), self._descriptors[count:]
        assert len(taken) == count
        return Answer(message, taken)

    def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """The answer, progress left out. Descriptors are closed."""
        request = self.request(method, **params)
        while True:
            message, descriptors = self.receive()
            for descriptor in descriptors:
                os.close(descriptor)
            if message.get("id") == request:
                return message

    def refusal(self) -> str:
        """The name of the error that comes next."""
        return str(self.receive().message["error"]["data"]["name"])

    def is_closed(self) -> bool:
        try:
            self.receive()
        except EOFError:
            return True
        return False


class Daemon:
    """One daemon process with the fake service; ready when the constructor returns."""

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str] | None = None, command: Sequence[str] = ()) -> None:
        self.socket = folder / "modelcached.sock"
        self.log = folder / "log"
        self._notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notices.bind("")  # an abstract name of the kernel's choice
        name = self._notices.getsockname()
        address = "@" + (name[1:].decode() if isinstance(name, bytes) else name[1:])
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*(command or (sys.executable, "-m", "tests.fake_service", "serve")), "--socket", str(self.socket), *flags],
                env={**os.environ, "NOTIFY_SOCKET": address, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        self.notices: list[str] = []
        try:
            self.wait_for("READY=1")
        except BaseException:
            self.kill()
            raise

    def wait_for(self, notice: str) -> None:
        """Until the daemon tells the service manager so; an AssertionError with its log when it ends instead."""
        if notice in self.notices:
            return
        ended = os.pidfd_open(self.process.pid)
        try:
            while True:
                readable, _, _ = select.select([self._notices.fileno(), ended], [], [], DEADLINE_SECONDS)
                assert self._notices.fileno() in readable, self.log.read_text()
                self.notices += self._notices.recv(4096).decode().splitlines()
                if notice in self.notices:
                    return
        finally:
            os.close(ended)

    def hears(self, seconds: float) -> bool:
        """Whether the daemon tells the service manager anything within this time; what it has told before is dropped."""
        while select.select([self._notices], [], [], 0)[0]:
            self._notices.recv(4096)
        return bool(select.select([self._notices], [], [], seconds)[0])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def ask_to_end(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(DEADLINE_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._notices.close()


@contextlib.contextmanager
def daemon(*flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="modelcached-test-") as folder:
        running = Daemon(Path(folder), *flags, environment=environment)
        try:
            yield running
        finally:
            running.kill()


if __name__ == "__main__":
    command.OVERTIME_SECONDS = float(os.environ.get("OVERTIME_SECONDS", command.OVERTIME_SECONDS))
    sys.exit(command.main(build=build))
