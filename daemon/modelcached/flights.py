"""Blob flights: one content from the hub to its name under blobs/, once for everybody who needs it (I5).

Each waiter adds the place he asked for, so two repos that share a file share the flight, and one that is refused leaves the others
their chance. Bytes are checked before they get a name (I1); wrong ones are asked for again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable

from .blobs import Blobs
from .download import Download, Limits
from .errors import ContentMismatch, HubProblem, disk_errors
from .meter import Meter
from .model import Content, Digest
from .partials import Partial, Partials
from .repos import Repos
from .singleflight import Flight, Flights
from .tasks import Pool
from .transfer import Source, Transfer

SMALL_BYTES = 1 << 20  # up to here a file is fetched in one piece, in memory
WRONG_BYTES_TRIES = 3
log = logging.getLogger(__name__)


class BlobFlight(Flight[Digest]):
    """One content on its way here, everywhere it can be had, and the meters it counts for."""

    def __init__(self, content: Content, work: Callable[[BlobFlight], Awaitable[Digest]]) -> None:
        super().__init__(lambda: work(self))
        self.content = content
        self.sources: list[Source] = []
        self.meters: list[Meter] = []
        self.done_bytes = 0

    def received(self, count: int) -> None:
        self.done_bytes += count
        for meter in self.meters:
            meter.received_bytes += count


class BlobFlights:
    def __init__(
        self,
        blobs: Blobs,
        repos: Repos,
        partials: Partials,
        transfer: Transfer,
        pool: Pool,
        group: asyncio.TaskGroup,
        limits: Limits,
    ) -> None:
        self._blobs = blobs
        self._repos = repos
        self._partials = partials
        self._transfer = transfer
        self._pool = pool
        self._limits = limits
        self._flights: Flights[Content, BlobFlight, Digest] = Flights(group)
        self.mismatches = 0  # contents that were not what their name says
        self.hub_bytes = 0  # of finished blobs

    async def join(self, content: Content, source: Source, meter: Meter) -> Digest:
        """The blob's SHA-256 once it is published; `meter` is told of every byte meanwhile."""
        flight = self._flights.board(content, lambda: BlobFlight(content, self._bring))
        flight.sources.append(source)
        flight.meters.append(meter)
        meter.parts.add(flight)
        try:
            return await self._flights.wait(content, flight)
        finally:
            flight.meters.remove(meter)
            meter.parts.discard(flight)

    def statistics(self) -> dict[str, int]:
        return {"running": len(self._flights), "started": self._flights.started, "joined": self._flights.joined}

    def running(self) -> list[BlobFlight]:
        return self._flights.running()

    async def _bring(self, flight: BlobFlight) -> Digest:
        arrived = self._arrived(flight)
        if arrived is not None:
            return arrived
        bring = self._bring_small if flight.content.size <= SMALL_BYTES else self._bring_large
        with disk_errors(f"downloading {flight.sources[0].path!r}"):
            digest = await bring(flight)
            if flight.content.algorithm == "git-sha1":
                self._repos.set_digest(flight.sources[0].repo, flight.content.hex, digest)
        self.hub_bytes += flight.content.size
        return digest

    def _arrived(self, flight: BlobFlight) -> Digest | None:
        """The blob, if an earlier flight brought it after this one's caller had looked at the disk."""
        content = flight.content
        digest: Digest | None = Digest(content.hex)
        if content.algorithm == "git-sha1":
            digest = self._repos.digest_of(flight.sources[0].repo, content.hex)
        return digest if digest is not None and self._blobs.has(digest, content.size) else None

    async def _bring_small(self, flight: BlobFlight) -> Digest:
        async def attempt(source: Source) -> Digest | None:
            flight.done_bytes = 0
            data = await self._transfer.whole(source, flight.content.size, flight.received) if flight.content.size else b""
            digest = digest_if_right(data, flight.content)
            if digest is not None:
                await self._blobs.add(data, digest)
            return digest

        return await self._try_sources(flight, attempt)

    async def _bring_large(self, flight: BlobFlight) -> Digest:
        partial: Partial = await self._pool.run(self._partials.open, flight.content)

        async def attempt(source: Source) -> Digest | None:
            flight.done_bytes = partial.done_bytes
            await Download(self._transfer, self._pool, self._limits, source, flight.content.size, partial, flight.received).run()
            digest = await self._pool.run(partial.finish)
            if digest is None:
                await self._pool.run(partial.reset)
                return None
            await self._blobs.adopt(partial.path, digest)
            await self._pool.run(partial.forget_map)
            return digest

        try:
            return await self._try_sources(flight, attempt)
        finally:
            partial.close()

    async def _try_sources(self, flight: BlobFlight, attempt: Callable[[Source], Awaitable[Digest | None]]) -> Digest:
        """The first attempt that brings the right bytes: a refused source is left for the next one, wrong bytes are asked for again."""
        wrong, position = 0, 0
        while wrong < WRONG_BYTES_TRIES:
            source = flight.sources[position]
            try:
                digest = await attempt(source)
            except HubProblem:
                position += 1
                if position == len(flight.sources):
                    raise
                continue
            if digest is not None:
                return digest
            wrong += 1
            self.mismatches += 1
            source.location = None
            log.warning("wrong bytes from the hub", extra={"repo": str(source.repo), "path": source.path})
        raise ContentMismatch(
            f"the hub's bytes of {source.path!r} in {source.repo} are not what their {flight.content.algorithm} says ({wrong} tries)",
            "something between the hub and this node alters them (a proxy?); try again later, or tell the repo's owner",
            path=source.path,
        )


def digest_if_right(data: bytes, content: Content) -> Digest | None:
    """The SHA-256 of `data` if it is the content of that name."""
    digest = hashlib.sha256(data).hexdigest()
    named = digest
    if content.algorithm == "git-sha1":
        named = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Digest(digest) if named == content.hex and len(data) == content.size else None
