"""`Liar`: a bucket that speaks S3 and can't be trusted: it proves nothing, its ETags are made up, and it may do worse.

Only what a store asks for single objects, without signatures. A fake, because no real server can be told to lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from aiohttp import web


class Liar:
    """`keep` makes what it stores of what it was sent; `obeys` says whether it looks at preconditions; `ranges`, at Range."""

    def __init__(self, keep: Callable[[bytes], bytes] = bytes, obeys: bool = False, ranges: bool = True) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self._keep = keep
        self._obeys = obeys
        self._ranges = ranges
        self._etags = itertools.count(1)
        self._runner: web.AppRunner | None = None
        self.endpoint = ""

    async def __aenter__(self) -> Liar:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{bucket}/{key:.*}", self._answer)
        application.router.add_get("/{bucket}", self._list)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.endpoint = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        return web.Response(text="<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>", content_type="application/xml")

    async def _answer(self, request: web.Request) -> web.Response:
        key = request.match_info["key"]
        if request.method == "PUT":
            return await self._put(request, key)
        if request.method == "DELETE":
            self.objects.pop(key, None)
            return web.Response(status=204)
        if key not in self.objects:
            text = "" if request.method == "HEAD" else "<Error><Code>NoSuchKey</Code></Error>"
            return web.Response(status=404, text=text, content_type="application/xml")
        data, etag = self.objects[key]
        headers = {"ETag": etag, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if self._ranges and "Range" in request.headers:
            start, end = (int(number) for number in request.headers["Range"].removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {start}-{min(end + 1, len(data)) - 1}/{len(data)}"
            return web.Response(status=206, body=data[start : end + 1], headers=headers)
        return web.Response(body=data, headers=headers)

    async def _put(self, request: web.Request, key: str) -> web.Response:
        data = await request.read()
        there = self.objects.get(key)
        refused = ("If-None-Match" in request.headers and there) or (
            "If-Match" in request.headers and (there is None or there[1] != request.headers["If-Match"])
        )
        if self._obeys and refused:
            return web.Response(status=412, text="<Error><Code>PreconditionFailed</Code></Error>", content_type="application/xml")
        etag = f'"{next(self._etags):032x}"'
        self.objects[key] = (self._keep(data), etag)
        return web.Response(headers={"ETag": etag})
