"""Peers that tests/hub does not play: odd servers of five lines, a proxy, and a hub behind TLS. They run on the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

Answer = Callable[[str, dict[str, str]], Awaitable[bytes | None] | bytes]
"""From a request's path and headers (lower case) to all bytes of the answer; the connection is closed after it. None: reset."""


@contextlib.asynccontextmanager
async def listening(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server on loopback; its host and port."""
    talking: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await talk(reader, writer)
        except asyncio.CancelledError:
            pass  # the block has ended
        finally:
            talking.discard(task)
            if not writer.transport.is_closing():
                writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    finally:
        server.close()
        for task in [*talking]:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)


async def read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    """The request line and the headers."""
    line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    return line, {name.lower(): value.strip() for name, _, value in (header.partition(":") for header in rest if header)}


@contextlib.asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[str]:
    """An HTTP server in one function; its address."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, headers = await read_head(reader)
        said = answer(line.split(" ")[1], headers)
        data = said if isinstance(said, bytes) else await said
        if data is not None:
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            await reader.read()

    async with listening(talk) as place:
        yield f"http://{place}"


def reply(status: int, body: bytes = b"", **headers: str) -> bytes:
    """An answer in bytes; a Content-Length is added unless it is said."""
    lines = {"Content-Length": str(len(body)), "Connection": "close", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return "\r\n".join([f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in lines.items()), "", ""]).encode() + body


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, place: str, first: bytes = b"") -> None:
    """Bytes both ways until both ends have closed."""
    host, _, port = place.rpartition(":")
    there_in, there_out = await asyncio.open_connection(host, int(port))

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        if sink.can_write_eof():
            with contextlib.suppress(OSError):
                sink.write_eof()
        else:
            sink.close()

    there_out.write(first)
    try:
        await asyncio.gather(copy(reader, there_out), copy(there_in, writer))
    finally:
        if not there_out.transport.is_closing():
            there_out.transport.abort()


class Proxy:
    """An HTTP proxy; `asked` are the request lines it saw."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async with listening(self._talk) as place:
            yield f"http://{place}"

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, headers = await read_head(reader)
        self.asked.append(line)
        method, target, _ = line.split(" ")
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            await pass_on(reader, writer, target)
        else:
            url = urlsplit(target)
            headers = {name: value for name, value in headers.items() if not name.startswith("proxy-")} | {"connection": "close"}
            path = url.path + (f"?{url.query}" if url.query else "")
            head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
            await pass_on(reader, writer, url.netloc, head.encode())


def make_certificate(folder: Path) -> Path:
    """A self-made certificate for 127.0.0.1 in `folder`/cert.pem, its key beside it."""
    subject = ["-subj", "/CN=modelcached test", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "cert.pem"


@contextlib.asynccontextmanager
async def behind_tls(url: str, certificate: Path) -> AsyncIterator[str]:
    """The server at `url` under an https address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    async with listening(lambda reader, writer: pass_on(reader, writer, urlsplit(url).netloc), context) as place:
        yield f"https://{place}"
