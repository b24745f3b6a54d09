"""An HTTP client that hides nothing: one exchange, its bytes, and how it ended."""

from __future__ import annotations

import http.client
from urllib.parse import quote, urlsplit

from .handle import Hub


class Reply:
    """One plain HTTP exchange on a connection of its own. `broken` is what ended the body early."""

    def __init__(self, url: str, method: str = "GET", **headers: str) -> None:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=10)
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers)
        answer = connection.getresponse()
        self.status, self.headers, self.body, self.broken = answer.status, answer.headers, b"", ""
        try:
            while chunk := answer.read1(1 << 16):
                self.body += chunk
            if answer.length:
                self.broken = "short"
        except ConnectionResetError:
            self.broken = "reset"
        connection.close()


def resolve(hub: Hub, repo_id: str, path: str) -> str:
    return f"{hub.endpoint}/{repo_id}/resolve/main/{quote(path)}"


def large(hub: Hub, repo_id: str, path: str) -> str:
    """The signed address of a file in LFS."""
    return Reply(resolve(hub, repo_id, path), "HEAD").headers["Location"]
