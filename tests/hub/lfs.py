"""The second host: large files by their SHA-256, at signed addresses that expire.

Invariant: it answers 400 to a request that carries an Authorization header, as object stores do: a client that takes the hub's token
across hosts fails here. It needs nothing from the hub but the state folder, so it can be a process of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode

from aiohttp import web

from .content import Shelf
from .log import Request
from .wire import Answer


class Signer:
    """Makes and checks signed addresses. The secret lies in the state folder: two processes on one folder agree."""

    def __init__(self, state: Path) -> None:
        path = state / "secret"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, os.urandom(32))  # one write of 32 bytes: the other process sees nothing or all
            os.close(descriptor)
        except FileExistsError:
            pass
        self._secret = path.read_bytes()

    def sign(self, repo: str, sha256: str, filename: str, seconds: float) -> str:
        """The path and query at which the file can be had for so long."""
        path = f"/repos/{hashlib.sha256(repo.encode()).hexdigest()}/{sha256}"
        expires = str(int(time.time() + seconds))
        shown = f"inline; filename*=UTF-8''{quote(filename)}"
        return f"{path}?" + urlencode(
            {"response-content-disposition": shown, "Expires": expires, "Signature": self._signature(path, expires), "Key-Pair-Id": "K1"}
        )

    def is_valid(self, path: str, expires: str, signature: str) -> bool:
        return hmac.compare_digest(self._signature(path, expires), signature) and time.time() < int(expires)

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()


class LfsHost:
    """Answers requests for signed addresses."""

    def __init__(self, shelf: Shelf, signer: Signer) -> None:
        self._shelf = shelf
        self._signer = signer

    async def __call__(self, request: web.BaseRequest, record: Request) -> Answer:
        record.kind = "lfs"
        query = {name: values[0] for name, values in parse_qs(record.query).items()}
        sha256 = record.path.rpartition("/")[2]
        record.oid = sha256
        shown = query.get("response-content-disposition", "")
        record.file = shown.partition("UTF-8''")[2]
        record.file = parse_qs("f=" + record.file.replace("+", "%2B")).get("f", [""])[0]
        if record.authorization is not None:
            return _refusal(400, "InvalidArgument", "Only one auth mechanism allowed")
        if not self._signer.is_valid(record.path, query.get("Expires", "0"), query.get("Signature", "")):
            return _refusal(403, "AccessDenied", "Access denied")
        path = self._shelf.lfs_path(sha256)
        if not re.fullmatch("[0-9a-f]{64}", sha256) or not path.exists():
            return _refusal(404, "NoSuchKey", "The specified key does not exist.")
        if request.method not in ("GET", "HEAD"):
            return _refusal(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")
        headers = {"Content-Type": "application/octet-stream", "Content-Disposition": shown}
        etag = hashlib.md5(sha256.encode()).hexdigest()  # this host's own idea of an ETag; not the file's name
        return Answer(path, headers=headers, etag=etag)


def _refusal(status: int, code: str, message: str) -> Answer:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Answer(text.encode(), status, {"Content-Type": "application/xml"})
