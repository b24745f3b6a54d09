"""What the hub was asked and what it gave: one `Request` each, alive while it is answered.

Invariant: `bytes_sent` counts the body's bytes that the kernel took from the hub, as they go, not what was promised in headers.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Request:
    """One request, as seen by the host that answered it."""

    number: int
    host: str  # "hub" or "lfs"
    method: str
    path: str  # decoded, without the query
    query: str
    kind: str = "other"  # "info", "tree", "resolve", "cache", "lfs", "auth-check", "refs", "commits", "paths-info", "whoami"
    repo: str = ""  # "model/org/name"; LFS hosts know no repos
    revision: str = ""
    file: str = ""
    oid: str = ""  # of the content: SHA-256 for LFS, else git's
    range: str | None = None
    status: int | None = None  # None: no answer (yet)
    bytes_sent: int = 0
    authorization: str | None = None  # token_mark() of the token that came with it
    fault: str | None = None  # the misbehaviour it met
    started: float = 0.0  # time.monotonic()
    seconds: float | None = None  # None: not over yet

    def is_about(self, what: str) -> bool:
        """`what` is a content's id, a path in a repo, or the path of a URL."""
        return what in (self.oid, self.file, self.path)

    def is_match(self, kind: str | None, match: str | None) -> bool:
        """`match` is a regular expression, searched in "KIND METHOD PATH FILE"."""
        return (kind is None or kind == self.kind) and (match is None or re.search(match, self.line()) is not None)

    def line(self) -> str:
        return f"{self.kind} {self.method} {self.path} {self.file}"


def token_mark(token: str) -> str:
    """How a token is shown in a log: enough to tell two apart."""
    return hashlib.sha256(token.encode()).hexdigest()[:12]


class Log:
    """All requests since the last `reset`. `changed()` is called by whoever changes a request."""

    def __init__(self, host: str) -> None:
        self.requests: list[Request] = []
        self.host = host
        self._count = 0
        self._waiters: list[asyncio.Future[None]] = []

    def begin(self, method: str, path: str, query: str, headers: Any) -> Request:
        self._count += 1
        header = headers.get("Authorization")
        made = Request(self._count, self.host, method, path, query, range=headers.get("Range"), started=time.monotonic())
        made.authorization = token_mark(header.removeprefix("Bearer ")) if header is not None else None
        self.requests.append(made)
        return made

    def end(self, request: Request) -> None:
        request.seconds = time.monotonic() - request.started
        self.changed()

    def changed(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def select(self, kind: str | None, match: str | None) -> list[Request]:
        return [request for request in self.requests if request.is_match(kind, match)]

    async def wait(self, kind: str | None, match: str | None, requests: int, bytes_sent: int, over: bool) -> None:
        """Until so many requests came (and, with `over`, are answered) and so many bytes went out."""
        while True:
            seen = [request for request in self.select(kind, match) if request.seconds is not None or not over]
            if len(seen) >= requests and sum(request.bytes_sent for request in seen) >= bytes_sent:
                return
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def reset(self) -> None:
        self.requests = []

    def to_json(self, kind: str | None, match: str | None) -> list[dict[str, Any]]:
        return [asdict(request) for request in self.select(kind, match)]
