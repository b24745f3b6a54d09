"""Blob flights: one content from the hub or a store to its name under blobs/, once for everybody who needs it (I5).

Each waiter adds the place he asked for, so two repos that share a file share the flight, and one that is refused leaves the others
their chance. Bytes are checked before they get a name (I1); wrong ones are asked for again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from .blobs import Blobs
from .download import Download, Limits
from .errors import ContentMismatch, HubProblem, StoreProblem, StoreUnavailable, disk_errors
from .exchange import Exchange
from .layout import Layout
from .meter import Meter
from .model import Content, Digest, Repo
from .packs import PACKED_BYTES
from .partials import Partials
from .repos import Repos
from .singleflight import Flight, Flights
from .spans import Origin
from .tasks import Pool

SMALL_BYTES = 1 << 20  # up to here a file is fetched in one piece, in memory
WRONG_BYTES_TRIES = 3
log = logging.getLogger(__name__)


class Place(Protocol):
    """Where a content can be had. Errors say that this place is no good; the flight goes on with the next."""

    @property
    def tier(self) -> str:
        """ "hub" or "store"."""
        ...

    @property
    def label(self) -> str: ...

    @property
    def data(self) -> dict[str, str]:
        """What names it, for an error."""
        ...

    @property
    def repo(self) -> Repo | None:
        """The repo whose git ids mean something here."""
        ...

    async def whole(self, size: int, report: Callable[[int], None]) -> bytes:
        """All bytes of a small content. They may be wrong."""
        ...

    def origin(self, size: int) -> Origin: ...

    def renew(self) -> None:
        """The bytes were wrong: forget what can be found out anew."""
        ...


class BlobFlight(Flight[Digest]):
    """One content on its way here, everywhere it can be had, and the meters it counts for."""

    def __init__(self, content: Content, work: Callable[[BlobFlight], Awaitable[Digest]]) -> None:
        super().__init__(lambda: work(self))
        self.content = content
        self.places: list[Place] = []
        self.tier = ""  # that the bytes come from
        self.meters: list[Meter] = []
        self.done_bytes = 0
        self._doing = ""  # what its time goes to

    def join(self, meter: Meter) -> None:
        self.meters.append(meter)
        meter.parts.add(self)
        if self._doing:
            meter.spent.enter(self._doing)

    def leave(self, meter: Meter) -> None:
        self.meters.remove(meter)
        meter.parts.discard(self)
        if self._doing:
            meter.spent.leave(self._doing)

    def turn_to(self, doing: str) -> None:
        """From here on the time of all meters goes to this."""
        for meter in self.meters:
            meter.spent.enter(doing)
            if self._doing:
                meter.spent.leave(self._doing)
        self._doing = doing

    def received(self, count: int) -> None:
        self.done_bytes += count
        for meter in self.meters:
            meter.receive(count, self.tier)


class BlobFlights:
    def __init__(
        self,
        blobs: Blobs,
        repos: Repos,
        partials: Partials,
        pool: Pool,
        group: asyncio.TaskGroup,
        limits: Limits,
        exchange: Exchange | None = None,
    ) -> None:
        self._blobs = blobs
        self._repos = repos
        self._partials = partials
        self._pool = pool
        self._limits = limits
        self._exchange = exchange
        self._flights: Flights[Content, BlobFlight, Digest] = Flights(group)
        self.mismatches = 0  # contents that were not what their name says
        self.bytes = {"hub": 0, "store": 0}  # of finished blobs, by tier

    async def join(self, content: Content, place: Place, meter: Meter) -> Digest:
        """The blob's SHA-256 once it is published; `meter` is told of every byte meanwhile."""
        flight = self._flights.board(content, lambda: BlobFlight(content, self._bring))
        flight.places.append(place)
        flight.join(meter)
        try:
            return await self._flights.wait(content, flight)
        finally:
            flight.leave(meter)

    def statistics(self) -> dict[str, int]:
        return {"running": len(self._flights), "started": self._flights.started, "joined": self._flights.joined}

    def is_flying(self, layout: Layout) -> Callable[[Path], bool]:
        """Tells of a file in partial/ whether a flight is at it."""
        return lambda path: any(layout.partial(flight.content).name == path.name.partition(".")[0] for flight in self.running())

    def running(self) -> list[BlobFlight]:
        return self._flights.running()

    async def _bring(self, flight: BlobFlight) -> Digest:
        arrived = self._arrived(flight)
        if arrived is not None:
            return arrived
        with disk_errors(f"downloading {flight.places[0].label}"):
            digest = await (self._bring_shared(flight, self._exchange) if self._exchange else self._bring_here(flight))
            repo = flight.places[0].repo
            if repo is not None and flight.content.algorithm == "git-sha1":
                self._repos.set_digest(repo, flight.content.hex, digest)
        return digest

    def _arrived(self, flight: BlobFlight) -> Digest | None:
        """The blob, if an earlier flight brought it after this one's caller had looked at the disk."""
        content = flight.content
        digest: Digest | None = Digest(content.hex)
        repo = flight.places[0].repo
        if content.algorithm == "git-sha1":
            digest = None if repo is None else self._repos.digest_of(repo, content.hex)
        return digest if digest is not None and self._blobs.has(digest, content.size) else None

    async def _bring_shared(self, flight: BlobFlight, exchange: Exchange) -> Digest:
        """Large contents are brought from the hub by one node, and by the others from the store."""
        content = flight.content
        if content.algorithm != "sha256" or content.size < PACKED_BYTES or flight.places[0].tier != "hub":
            return await self._bring_here(flight)
        flight.turn_to("others")
        async with exchange.turn(Digest(content.hex), content.size, lambda: flight.done_bytes) as turn:
            if turn.place is not None:
                flight.places.insert(0, turn.place)
            digest = await self._bring_here(flight)
            if flight.tier == "hub":
                turn.brought(self._blobs.path(digest))
        return digest

    async def _bring_here(self, flight: BlobFlight) -> Digest:
        return await (self._bring_small if flight.content.size <= SMALL_BYTES else self._bring_large)(flight)

    async def _bring_small(self, flight: BlobFlight) -> Digest:
        async def attempt(place: Place) -> Digest | None:
            flight.done_bytes = 0
            data = await place.whole(flight.content.size, flight.received) if flight.content.size else b""
            digest = digest_if_right(data, flight.content)
            if digest is not None:
                await self._blobs.add(data, digest)
            return digest

        return await self._try_places(flight, attempt)

    async def _bring_large(self, flight: BlobFlight) -> Digest:
        async with self._partials.opened(flight.content, self._pool) as partial:

            async def attempt(place: Place) -> Digest | None:
                flight.done_bytes = partial.done_bytes
                origin, size = place.origin(flight.content.size), flight.content.size
                await Download(origin, self._pool, self._limits, size, partial, flight.received).run()
                flight.turn_to("verify")
                digest = await self._pool.run(partial.finish)
                if digest is None:
                    await self._pool.run(partial.reset)
                    return None
                await self._blobs.adopt(partial.path, digest)
                await self._pool.run(partial.forget_map)
                return digest

            return await self._try_places(flight, attempt)

    async def _try_places(self, flight: BlobFlight, attempt: Callable[[Place], Awaitable[Digest | None]]) -> Digest:
        """The first attempt that brings the right bytes: a refused source is left for the next one, wrong bytes are asked for again."""
        wrong, position = 0, 0
        while wrong < WRONG_BYTES_TRIES:
            place = flight.places[position]
            flight.tier = place.tier
            flight.turn_to(place.tier)
            try:
                digest = await attempt(place)
            except (HubProblem, StoreProblem, StoreUnavailable):
                position += 1
                if position == len(flight.places):
                    raise
                continue
            if digest is not None:
                self.bytes[place.tier] += flight.content.size
                return digest
            self.mismatches += 1
            log.warning("wrong bytes", extra={"place": place.label})
            if place.tier == "store" and position + 1 < len(flight.places):
                position += 1  # another tier may have better ones (I10)
                continue
            wrong += 1
            place.renew()
        raise ContentMismatch(
            f"the bytes of {place.label} are not what their {flight.content.algorithm} says ({wrong} tries)",
            "something between here and there alters them (a proxy?), or they were wrong from the start: tell who put them there",
            **place.data,
        )


def digest_if_right(data: bytes, content: Content) -> Digest | None:
    """The SHA-256 of `data` if it is the content of that name."""
    digest = hashlib.sha256(data).hexdigest()
    named = digest
    if content.algorithm == "git-sha1":
        named = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Digest(digest) if named == content.hex and len(data) == content.size else None
