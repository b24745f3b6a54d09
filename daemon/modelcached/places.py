"""Places where a content can be had: a file of the hub, an object of the store. What a blob flight tries one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .hub import Source
from .model import Digest, Repo
from .references import blob_key
from .spans import Origin, Span
from .store import Store
from .transfer import FileOrigin, Transfer


@dataclass(frozen=True)
class HubPlace:
    tier = "hub"
    transfer: Transfer
    source: Source

    @property
    def label(self) -> str:
        return f"{self.source.path!r} in {self.source.repo}"

    @property
    def data(self) -> dict[str, str]:
        return {"path": self.source.path}

    @property
    def repo(self) -> Repo:
        return self.source.repo

    async def whole(self, size: int, report: Callable[[int], None]) -> bytes:
        return await self.transfer.whole(self.source, size, report)

    def origin(self, size: int) -> Origin:
        return FileOrigin(self.transfer, self.source, size)

    def renew(self) -> None:
        """The next try asks the hub again where the bytes are."""
        self.source.location = None


@dataclass(frozen=True)
class StorePlace:
    """An object of the store, or a part of one: a file in a pack."""

    tier = "store"
    store: Store
    digest: Digest  # of the object
    offset: int = 0

    @property
    def label(self) -> str:
        return f"{self.digest[:12]} in {self.store.url}"

    @property
    def data(self) -> dict[str, str]:
        return {"key": blob_key(self.digest)}

    @property
    def repo(self) -> None:
        return None

    async def whole(self, size: int, report: Callable[[int], None]) -> bytes:
        sink = Memory(size)
        await self.store.read(blob_key(self.digest), self._span(size), sink, report)
        return sink.data()

    def origin(self, size: int) -> Origin:
        return self.store.origin(blob_key(self.digest), self._span(size))

    def renew(self) -> None: ...

    def _span(self, size: int) -> Span:
        return (self.offset, self.offset + size)


class Memory:
    """A sink for a span that is small enough for one request: its bytes come in order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._data = bytearray()

    def missing(self) -> list[Span]:
        return [(len(self._data), self._size)] if len(self._data) < self._size else []

    def write(self, offset: int, chunks: Sequence[bytes]) -> None:
        assert offset == len(self._data), "a small span has come in pieces"
        for chunk in chunks:
            self._data += chunk

    def data(self) -> bytes:
        return bytes(self._data)
