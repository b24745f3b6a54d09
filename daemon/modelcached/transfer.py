"""Answers with bytes from the hub, over aiohttp, under one connection budget for the whole node: small files first.

Redirects are followed by hand, for a token goes to the endpoint's own origin and nowhere else. Proxies and certificates come
from the environment, as everywhere.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from .errors import ContentMismatch, HubProblem
from .hub import Hub, file_url, pause_asked, refusal, unavailable
from .model import Commit, Repo
from .rates import Rate
from .spans import Again, Body, Budget, NoRanges, Span

MAX_REDIRECTS = 5
CONNECT_SECONDS = 10.0
READ_BUFFER_BYTES = 512 << 10


@dataclass(eq=False)
class Source:
    """One place where a content can be had: a file of a commit, and the token of the caller who asked for it."""

    repo: Repo
    commit: Commit
    path: str
    token: str | None = field(default=None, repr=False)
    location: str | None = field(default=None, repr=False)  # where the last redirect led: valid for a while

    @property
    def url(self) -> str:
        return file_url(self.repo, self.commit, self.path)


class Transfer:
    def __init__(self, hub: Hub, connections: int, stall_seconds: float, rate: Rate | None = None) -> None:
        self.budget = Budget(connections)
        self.rate = rate or Rate()
        self._hub = hub
        self._stall_seconds = stall_seconds  # no byte for so long breaks a connection
        self._session: aiohttp.ClientSession | None = None

    async def whole(self, source: Source, size: int, report: Callable[[int], None]) -> bytes:
        """All bytes of a small file. They may be wrong, and one more than `size` shows that there are too many."""
        failures = 0
        while True:
            try:
                async with self.answer(source, None, first=True) as answer:
                    data = bytearray()
                    async for chunk in answer.content.iter_any():
                        data += chunk
                        report(len(chunk))
                        await self.rate.passed(len(chunk))
                        if len(data) > size:
                            break
                    if len(data) < size:
                        raise Again(f"the answer broke off after {len(data)} of {size} bytes")
                    return bytes(data[: size + 1])
            except Again as again:
                failures += 1
                await self.after(source, again, failures)

    async def after(self, source: Source, again: Again, failures: int) -> None:
        """Waits until the hub may be asked again, or gives up after so many failures in a row."""
        source.location = None  # the next try asks the hub where the bytes are now
        if again.pause:
            self._hub.pauses.note(source.repo.endpoint, again.pause)
        if failures >= self._hub.attempts:
            raise unavailable(source.repo.endpoint, again.reason) from again
        await asyncio.sleep(self._hub.backoff(failures))

    @asynccontextmanager
    async def answer(self, source: Source, span: Span | None, first: bool = False) -> AsyncIterator[aiohttp.ClientResponse]:
        """The 200 or 206 answer for a source, on a connection of the budget.

        Again when asking later may help (also when the connection breaks inside the block), an error with a name when not.
        """
        while True:
            await self._hub.pauses.wait(source.repo.endpoint)
            async with self.budget.connection(first):
                if self._hub.pauses.remaining(source.repo.endpoint):
                    continue  # the hub asked for it while we stood in the queue
                with _broken_connections():
                    answer = await self._follow(source, span)
                    try:
                        yield answer
                    finally:
                        answer.release()
                return

    async def _follow(self, source: Source, span: Span | None) -> aiohttp.ClientResponse:
        home = URL(source.repo.endpoint).origin()
        known = source.location
        url = URL(known or source.url, encoded=True)
        for _ in range(MAX_REDIRECTS):
            answer = await self._get(url, source.token if url.origin() == home else None, span)
            if answer.status in (200, 206):
                if url.origin() != home:
                    source.location = str(url)
                return answer
            answer.release()
            if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                url = _joined(url, answer.headers["Location"])
            elif answer.status == 429 or answer.status >= 500:
                raise Again(f"HTTP {answer.status} from {url.host}", pause_asked(answer.headers))
            elif known is not None:
                source.location = None  # a signed address that has expired
                raise Again(f"HTTP {answer.status} from {url.host}")
            elif url.origin() == home:
                raise refusal(answer.status, answer.headers, source.repo, source.path)
            else:
                raise HubProblem(
                    f"{source.path!r} of {source.repo} lies on {url.host}, which refuses it with HTTP {answer.status}",
                    "check this node's clock and its way to that host (a proxy?); if both are fine, tell the repo's owner",
                    status=answer.status,
                )
        raise HubProblem(f"{source.repo.endpoint} redirects {source.path!r} in a circle", "is this a hub at all? look at hub_endpoint")

    async def _get(self, url: URL, token: str | None, span: Span | None) -> aiohttp.ClientResponse:
        headers = {"Accept-Encoding": "identity"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context()),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=self._stall_seconds),
                auto_decompress=False,
                read_bufsize=READ_BUFFER_BYTES,
            )
        return await self._session.get(url, headers=headers, allow_redirects=False, proxy=_proxy(url))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


@dataclass(frozen=True)
class FileOrigin:
    """A file of the hub, whose listed size is known, as an Origin of spans."""

    transfer: Transfer
    source: Source
    size: int

    @asynccontextmanager
    async def answer(self, span: Span | None) -> AsyncIterator[Body]:
        async with self.transfer.answer(self.source, span) as answer:
            if span is not None:
                self._check_span(answer, span)
            yield _Chunks(answer, self.transfer.rate)

    async def after(self, again: Again, failures: int) -> None:
        await self.transfer.after(self.source, again, failures)

    def _check_span(self, answer: aiohttp.ClientResponse, span: Span) -> None:
        if answer.status == 206:
            said = answer.headers.get("Content-Range", "")
            if not said.startswith(f"bytes {span[0]}-") or not said.endswith((f"/{self.size}", "/*")):
                raise self._mismatch(f"a range of {said!r}")
        elif answer.content_length not in (None, self.size):
            raise self._mismatch(f"{answer.content_length} bytes")
        elif span != (0, self.size):
            raise NoRanges

    def _mismatch(self, got: str) -> ContentMismatch:
        return ContentMismatch(
            f"{self.source.repo}: the hub lists {self.source.path!r} with {self.size} bytes, and its server has {got}",
            "try again later; if it stays so, tell the repo's owner",
        )


class _Chunks:
    """An answer's bytes as they came from the socket. aiohttp's own `readany` would copy all that waits into one piece."""

    def __init__(self, answer: aiohttp.ClientResponse, rate: Rate) -> None:
        self._content = answer.content
        self._rate = rate

    async def readany(self) -> bytes:
        while True:
            chunk, is_boundary = await self._content.readchunk()
            if chunk or not is_boundary:
                await self._rate.passed(len(chunk))
                return chunk


def _proxy(url: URL) -> str | None:
    """The environment's proxy for an address. aiohttp's own way would read ~/.netrc, too: a token nobody sent (I8)."""
    return None if proxy_bypass(url.host or "") else getproxies().get(url.scheme)


def _joined(url: URL, location: str) -> URL:
    with suppress(ValueError):
        target = url.join(URL(location, encoded=True))
        if target.scheme in ("http", "https") and target.host:
            return target
    raise HubProblem(f"{url.host} redirects to {location[:200]!r}, which is no address", "is this a hub at all? look at hub_endpoint")


@contextmanager
def _broken_connections() -> Iterator[None]:
    """What a connection may do to us, as one word: Again. The disk's errors pass: they are no ConnectionError."""
    try:
        yield
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise Again(f"{type(error).__name__}: {str(error)[:200]}") from error
