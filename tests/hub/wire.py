"""From an answer to bytes on a connection: ranges, faults, pace, counting; and the hosts that listen.

Invariants: a file's bytes go through the kernel alone (sendfile on a duplicate of the connection's descriptor), so a benchmark
measures the client, and what is counted is what the kernel took. A host that is down keeps its port.
"""

from __future__ import annotations

import asyncio
import fcntl
import gzip
import json
import os
import re
import socket
import struct
import termios
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from .content import IN_MEMORY_BYTES, Body
from .faults import IN_BODY, INSTEAD, Fault, Faults, Pace
from .log import Log, Request

PIECE_BYTES = 4 << 20
DRAIN_SECONDS = 5.0  # how long a reset waits for the client to take what was sent before

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Answer:
    """What a host has to say, before ranges and faults."""

    body: Body = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    etag: str | None = None  # with it the answer is content: it has ranges and can be asked for conditionally

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        made = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8", **made})

    @property
    def size(self) -> int:
        return self.body.stat().st_size if isinstance(self.body, Path) else len(self.body)


Responder = Callable[[web.BaseRequest, Request], Awaitable[Answer]]


class Host:
    """One listening address. `responder` fills in what the request is about and answers it, or raises."""

    def __init__(self, name: str, address: str, responder: Responder, faults: Faults) -> None:
        self.log = Log(name)
        self._address = address
        self._respond = responder
        self._faults = faults
        self._listener: asyncio.Server | None = None

    async def start(self, port: int = 0) -> None:
        self._reserved = socket.socket()  # bound, never listening: nobody else gets the port while the host is down
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((self._address, port))
        self._server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        await self.up()

    @property
    def url(self) -> str:
        return f"http://{self._address}:{self._reserved.getsockname()[1]}"

    async def up(self) -> None:
        if self._listener is None:
            listening = socket.socket()
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(self._reserved.getsockname())
            self._listener = await asyncio.get_running_loop().create_server(self._server, sock=listening, backlog=1024)

    def down(self) -> None:
        """New connections are refused, existing ones reset."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in self._server.connections:
            if isinstance(connection.transport, asyncio.Transport):
                _reset(connection.transport)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path, _, query = request.raw_path.partition("?")
        record = self.log.begin(request.method, unquote(path), query, request.headers)
        try:
            answer = await self._respond(request, record)
            self.log.changed()  # what it is about is known now: whoever waits for such a request may see it hang
            fault = self._faults.meet(record, INSTEAD)
            if fault is not None and fault.kind == "hang":
                await self._faults.calmed.wait()
                answer = _answer_of(Fault("5xx"))
            elif fault is not None:
                answer = _answer_of(fault)
            return await self._send(request, answer, record)
        finally:
            self.log.end(record)

    async def _send(self, request: web.BaseRequest, answer: Answer, record: Request) -> web.StreamResponse:
        status, start, end = answer.status, 0, answer.size
        headers = {"Date": formatdate(usegmt=True), "Access-Control-Allow-Origin": "*", **answer.headers}
        if answer.etag is not None:
            headers["ETag"] = f'"{answer.etag}"'
            if headers["ETag"] in request.headers.get("If-None-Match", ""):
                status, end = 304, 0
            elif record.range and request.method == "GET" and self._faults.meet(record, ("no_range",)):
                pass  # 200 and the whole of it, whatever was asked for
            else:
                headers["Accept-Ranges"] = "bytes"
                if request.method == "GET" and request.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
                    status, start, end = _apply_range(record.range, answer.size)
                if status != 200:
                    headers["Content-Range"] = f"bytes {f'{start}-{end - 1}' if status == 206 else '*'}/{answer.size}"
        record.status = status
        if status == 200 and answer.etag and "gzip" in request.headers.get("Accept-Encoding", "") and self._faults.meet(record, ("gzip",)):
            return await self._compress(request, answer, record, headers)
        fault = self._faults.meet(record, IN_BODY, end - start)
        pace = self._faults.pace(record)
        if isinstance(answer.body, Path) or fault is not None or pace is not None or end - start > IN_MEMORY_BYTES:
            return await self._stream(request, answer, record, status, headers, start, end, fault, pace)
        body = bytes(answer.body)[start:end]
        response = web.Response(body=body or None, status=status, headers=headers)
        if status != 304:
            response.headers["Content-Length"] = str(end - start)
        await response.prepare(request)
        await response.write_eof()  # headers and body in one write, which the kernel takes whole
        record.bytes_sent = len(body) if request.method != "HEAD" else 0
        return response

    async def _compress(self, request: web.BaseRequest, answer: Answer, record: Request, headers: dict[str, str]) -> web.StreamResponse:
        """As the real hub answers for text when it is allowed to: compressed, and so without a length, a range or a strong ETag."""
        body = gzip.compress(answer.body.read_bytes() if isinstance(answer.body, Path) else bytes(answer.body))
        headers = {**headers, "Content-Encoding": "gzip", "ETag": "W/" + headers["ETag"]}
        headers.pop("Accept-Ranges")
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(request)
        if request.method != "HEAD":
            await response.write(body)
            record.bytes_sent = len(body)
        await response.write_eof()
        return response

    async def _stream(
        self,
        request: web.BaseRequest,
        answer: Answer,
        record: Request,
        status: int,
        headers: dict[str, str],
        start: int,
        end: int,
        fault: Fault | None,
        pace: Pace | None,
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = end - start
        await response.prepare(request)
        if request.method == "HEAD" or status == 304:
            return response
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        with _Pipe(transport, answer.body, record, self.log) as pipe:
            if fault is None:
                await pipe.pour(start, end, pace)
                return response
            good = start + (fault.after if fault.after is not None else (end - start) // 2)
            await pipe.pour(start, good, pace)
            if fault.kind == "wrong":
                await pipe.spoil(good)
                await pipe.pour(good + 1, end, pace)
                return response
            if fault.kind == "stall":
                await self._faults.calmed.wait()
            await pipe.emptied()
            if fault.kind == "short":
                transport.close()
            else:
                _reset(transport)
        return response


class _Pipe:
    """Pushes a body into the connection below a transport that has nothing of its own to send."""

    def __init__(self, transport: asyncio.Transport, body: Body, record: Request, log: Log) -> None:
        self._transport, self._record, self._log = transport, record, log
        self._body = open(body, "rb") if isinstance(body, Path) else memoryview(bytes(body))
        self._out = os.dup(transport.get_extra_info("socket").fileno())  # a number of our own: the loop lets us wait on it

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        if not isinstance(self._body, memoryview):
            self._body.close()

    async def pour(self, start: int, end: int, pace: Pace | None) -> None:
        while start < end:
            start += await self._push(start, min(end - start, pace.piece_bytes if pace else PIECE_BYTES), pace)

    async def spoil(self, place: int) -> None:
        """Sends the wrong byte instead of the one at `place`."""
        right = self._body[place] if isinstance(self._body, memoryview) else os.pread(self._body.fileno(), 1, place)[0]
        body, self._body = self._body, memoryview(bytes([right ^ 0xFF]))
        try:
            await self._push(0, 1, None)
        finally:
            self._body = body

    async def emptied(self) -> None:
        """Returns when the client's kernel has everything that was sent, or does not want it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_SECONDS
        while struct.unpack("i", fcntl.ioctl(self._out, termios.TIOCOUTQ, b"\0" * 4))[0] and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # there is no event for it

    async def _push(self, start: int, count: int, pace: Pace | None) -> int:
        while self._transport.get_write_buffer_size():  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # the headers did not fit: the kernel's buffer is full of the answer before
        while True:
            try:
                if isinstance(self._body, memoryview):
                    sent = os.write(self._out, self._body[start : start + count])
                else:
                    sent = os.sendfile(self._out, self._body.fileno(), start, count)
                break
            except BlockingIOError:
                await _writable(self._out)
        self._record.bytes_sent += sent
        self._log.changed()
        if pace is not None:
            await pace.passed(sent)
        return sent


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    loop.add_writer(descriptor, lambda: None if waiter.done() else waiter.set_result(None))
    try:
        await waiter
    finally:
        loop.remove_writer(descriptor)


def _reset(transport: asyncio.Transport) -> None:
    """RST instead of FIN."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _apply_range(header: str | None, size: int) -> tuple[int, int, int]:
    """(status, start, end) of what to send. Several ranges, and nonsense, are answered with the whole, as HTTP allows."""
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or found[0] == "bytes=-":
        return 200, 0, size
    first, last = found[1], found[2]
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= size or (first and last and int(last) < start):
        return 416, 0, 0
    return 206, start, end


def _answer_of(fault: Fault) -> Answer:
    if fault.kind == "expired":
        return Answer(b"<Error><Code>AccessDenied</Code></Error>", 403, {"Content-Type": "application/xml"})
    if fault.kind == "5xx":
        return Answer.json({"error": "Internal Error - We're working hard to fix this as soon as possible!"}, fault.status)
    refused = Answer.json({"error": "We had to rate limit you."}, 429)
    if fault.kind == "ratelimit":
        refused.headers["RateLimit"] = f'"api";r=0;t={fault.retry_after}'
        refused.headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
    else:
        refused.headers["Retry-After"] = str(fault.retry_after)
    return refused
