"""Where the daemon's objects are put together: state, tiers, flows, service; and what is closed at the end, in which order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from . import __version__
from .blobs import Blobs
from .config import Config
from .download import Limits
from .fetch import Fetch
from .flights import BlobFlights
from .hub import Hub
from .leases import Leases
from .lookup import Lookup
from .partials import Partials
from .repos import Repos
from .root import open_root
from .service import Service
from .tasks import Pool
from .transfer import Transfer
from .trees import Trees
from .upkeep import Upkeep

log = logging.getLogger(__name__)
SWEEP_SECONDS = 60.0  # dead leases' files are removed at least so often
IO_THREADS = 4 + (os.cpu_count() or 1)  # pieces written and hashed at the same time: some wait for the disk


async def build_service(
    config: Config,
    background: asyncio.TaskGroup,
    flights: asyncio.TaskGroup,
    closing: contextlib.AsyncExitStack,
    counts: Callable[[], Mapping[str, int]],
) -> Service:
    """Opens the root and puts a service on it. `closing` closes what it uses, after every task has ended."""
    layout, lock = open_root(config.root, config.private)
    closing.callback(os.close, lock)
    pool = Pool("io", IO_THREADS)
    closing.callback(pool.close)
    blobs = Blobs(layout, pool, flights)
    closing.callback(blobs.close)
    hub = Hub(config.hub_attempts, config.hub_backoff_seconds)
    closing.callback(hub.close)
    transfer = Transfer(hub, config.hub_connections, config.stall_seconds)
    closing.push_async_callback(transfer.close)

    partials = Partials(layout)
    closing.callback(partials.close)

    trees, repos, leases = Trees(layout, blobs.path), Repos(layout), Leases(layout)
    lookup = Lookup(repos, hub, pool, flights, config.fresh_seconds, config.verdict_seconds, config.offline)
    limits = Limits(config.hub_connections, config.hub_piece, config.hub_range)
    blob_flights = BlobFlights(blobs, repos, partials, transfer, pool, flights, limits)
    disk = os.statvfs(layout.root)
    min_free = config.min_free.of(disk.f_blocks * disk.f_frsize)
    fetch = Fetch(layout, blobs, trees, repos, lookup, hub, blob_flights, pool, flights, min_free)
    upkeep = Upkeep(blobs, trees, repos, leases, pool)
    started = time.time()

    def statistics() -> dict[str, Any]:
        disk = os.statvfs(layout.root)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": started,
            "root": str(layout.root),
            "private": config.private,
            "endpoint": config.hub_endpoint,
            "disk": {"size_bytes": disk.f_blocks * disk.f_frsize, "free_bytes": disk.f_bavail * disk.f_frsize, "min_free_bytes": min_free},
            "fetches": fetch.statistics(),
            "blob_flights": blob_flights.statistics(),
            "leases": sum(map(len, leases.held().values())),
            "hub": {
                "requests": hub.requests,
                "pauses": hub.pauses.count,
                "bytes": blob_flights.hub_bytes,
                "mismatches": blob_flights.mismatches,
            },
            "quarantined": blobs.quarantined,
            **counts(),
        }

    background.create_task(_sweep(leases))
    return Service(config, fetch, upkeep, trees, repos, leases, statistics)


async def _sweep(leases: Leases) -> None:
    while True:
        try:
            leases.held()
        except OSError as error:  # out of descriptors, say: the next sweep will do
            log.warning("dead leases could not be swept", extra={"error": str(error)})
        await asyncio.sleep(SWEEP_SECONDS)
