"""`Proxy`: a bad network between two ends on loopback, in the hands of a test.

    with Proxy(server.address) as proxy:
        proxy.cut(after_bytes=1 << 20, towards="client", times=3)     # three connections are reset half-way
        proxy.hold(); ...; proxy.let_go()                             # nothing moves, nothing breaks
        proxy.hold(at=b"DELETE ")                                     # from the first piece on that has these bytes
        proxy.refuse(); ...; proxy.listen()                           # connections are refused, as if nobody were there

Bytes are counted in both directions (`sent` to the server, `received` from it), and `wait` waits for them. Everything but `wait`
returns at once and may be called from any thread; the proxy has a thread and an event loop of its own.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Direction = Literal["server", "client"]
CHUNK_BYTES = 64 << 10
WAIT_SECONDS = 15.0


@dataclass(eq=False)
class _Cut:
    towards: Direction
    every: int
    left: int
    times: int
    half: bool
    after: bytes


class Proxy:
    """`_rules` and the counters belong to the proxy's own thread; others send it there what to do."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._changed = threading.Condition()
        self._counted = {"server": 0, "client": 0}
        self.connections = 0  # ever
        self.resets = 0  # connections that were cut
        self._cuts: list[_Cut] = []
        self._delay = 0.0
        self._hold_at = b""
        self._alter: dict[Direction, Callable[[bytes], bytes]] = {}
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._moving = asyncio.Event()
        self._moving.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self.listen()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def sent(self) -> int:
        return self._counted["server"]

    @property
    def received(self) -> int:
        return self._counted["client"]

    def wait(self, condition: Callable[[Proxy], bool], seconds: float = WAIT_SECONDS) -> None:
        """Until the condition holds; it is looked at whenever bytes have moved or somebody has connected."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), seconds), f"{self.sent} bytes sent, {self.received} received"

    def cut(self, after_bytes: int, towards: Direction, times: int = 1, half: bool = False, after: bytes = b"") -> None:
        """Resets the connection on which so many more bytes have moved, `times` times; `half`: this direction ends, in good order.

        With `after`, nothing is counted before these bytes have passed, in either direction.
        """
        self._do(lambda: self._cuts.append(_Cut(towards, after_bytes, after_bytes, times, half, after)))

    def delay(self, seconds: float) -> None:
        """Every piece of up to 64 KiB takes so long."""
        self._do(lambda: setattr(self, "_delay", seconds))

    def alter(self, towards: Direction, change: Callable[[bytes], bytes]) -> None:
        """Sends `change(piece)` instead of every piece."""
        self._do(lambda: self._alter.update({towards: change}))

    def hold(self, at: bytes = b"") -> None:
        """With `at`, from the piece on that has these bytes: it does not pass (`is_held`)."""
        self._do(lambda: setattr(self, "_hold_at", at) if at else self.hold_now())

    @property
    def is_held(self) -> bool:
        return not self._moving.is_set()

    def hold_now(self) -> None:
        """For `alter`, in the proxy's own thread: the piece at hand passes, and nothing after it."""
        self._moving.clear()

    def let_go(self) -> None:
        self._do(self._moving.set)

    def refuse(self) -> None:
        """Nobody listens any more, and what was connected is reset."""
        self._run(self._refuse())

    def listen(self) -> None:
        """Listens, again on the same port."""
        self._run(self._listen())

    def heal(self) -> None:
        """No more trouble, for old connections too."""
        self._do(self._heal)

    def close(self) -> None:
        self._run(self._refuse())
        self._run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, change: Callable[[], object]) -> None:
        async def make() -> None:
            change()

        self._run(make())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_SECONDS)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, limit=CHUNK_BYTES)
            self._port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open:
            _reset(writer)

    async def _finish(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)  # what was accepted a moment ago is heard of
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._open:  # of tasks that had not begun
            _reset(writer)
        await asyncio.sleep(0)  # sockets are closed in the next step

    def _heal(self) -> None:
        self._cuts.clear()
        self._alter.clear()
        self._hold_at = b""
        self._delay = 0.0
        self._moving.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._changed:
            self.connections += 1
            self._changed.notify_all()
        self._open.add(writer)
        if self._server is None:
            _reset(writer)  # accepted before `refuse`, and heard of after it
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._upstream, limit=CHUNK_BYTES)
            ends.add(server_writer)
            self._open |= ends
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, server_writer, "server"))
                group.create_task(self._pump(server_reader, writer, "client"))
        except (OSError, ExceptionGroup):
            for end in ends:
                _reset(end)
        except asyncio.CancelledError:
            pass  # the proxy is being closed
        finally:
            self._open -= ends
            for end in ends:
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, towards: Direction) -> None:
        while piece := await reader.read(CHUNK_BYTES):
            if self._hold_at and self._hold_at in piece:
                self._hold_at = b""
                with self._changed:
                    self._moving.clear()
                    self._changed.notify_all()
            await self._moving.wait()
            if self._delay:
                await asyncio.sleep(self._delay)
            if towards in self._alter:
                piece = self._alter[towards](piece)
            allowed, cut = self._allowed(towards, piece)
            writer.write(piece[:allowed])
            await writer.drain()
            with self._changed:
                self._counted[towards] += allowed
                self._changed.notify_all()
            if cut is not None:
                if not cut.half:
                    raise ConnectionResetError
                break
        if writer.can_write_eof():
            writer.write_eof()

    def _allowed(self, towards: Direction, piece: bytes) -> tuple[int, _Cut | None]:
        """How many of these bytes may pass, and what ends the connection behind them."""
        for cut in self._cuts:
            if cut.after:
                cut.after = b"" if cut.after in piece else cut.after
            elif cut.towards == towards:
                cut.left -= len(piece)
                if cut.left <= 0:
                    passed = max(0, len(piece) + cut.left)
                    cut.left, cut.times = cut.every, cut.times - 1
                    self.resets += 1
                    if not cut.times:
                        self._cuts.remove(cut)
                    return passed, cut
        return len(piece), None


def _reset(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
    writer.transport.abort()
