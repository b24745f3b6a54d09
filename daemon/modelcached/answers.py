"""One answer with a file's bytes, over aiohttp.

Redirects are followed by hand, for a token goes to the endpoint's own origin and nowhere else. Proxies and certificates come from the
environment, as everywhere. aiohttp and huggingface_hub take long to load, so `transfer` loads this module with the first file.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from .errors import HubProblem
from .hub import Source
from .hubapi import file_url, pause_asked, refusal
from .spans import Again, Span

MAX_REDIRECTS = 5
CONNECT_SECONDS = 10.0
READ_BUFFER_BYTES = 512 << 10


class Answers:
    """All of them share one session, whose connections are kept."""

    def __init__(self, stall_seconds: float) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context()),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=stall_seconds),
            auto_decompress=False,
            read_bufsize=READ_BUFFER_BYTES,
        )

    @asynccontextmanager
    async def to(self, source: Source, span: Span | None) -> AsyncIterator[aiohttp.ClientResponse]:
        """The 200 or 206 answer for a source. Again when asking later may help, also when the connection breaks inside the block."""
        with _broken_connections():
            answer = await self._follow(source, span)
            try:
                yield answer
            finally:
                answer.release()

    async def close(self) -> None:
        await self._session.close()

    async def _follow(self, source: Source, span: Span | None) -> aiohttp.ClientResponse:
        home = URL(source.repo.endpoint).origin()
        known = source.location
        url = URL(known or file_url(source.repo, source.commit, source.path), encoded=True)
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
        return await self._session.get(url, headers=headers, allow_redirects=False, proxy=_proxy(url))


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
