"""Where the daemon's objects are put together: state, tiers, flows, service; and what is closed at the end, in which order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from . import __version__
from .blobs import Blobs
from .claims import Claims
from .collect import Collect
from .config import Config
from .convert import Converter
from .depot import Depot
from .download import Limits
from .exchange import Exchange
from .fetch import Fetch
from .flights import BlobFlights
from .gather import Gather
from .hashing import Hashing
from .hub import Hub
from .keeping import Keeping
from .lanes import Lanes
from .layout import Layout
from .leases import Leases
from .load import Loader
from .lookup import Lookup
from .partials import Partials
from .repos import Repos
from .root import open_root
from .save import Save
from .service import Service
from .sharing import Sharing
from .spool import Spool
from .stores import Stores
from .tasks import Pool
from .transfer import Transfer
from .trees import Trees
from .upkeep import Upkeep
from .upload import Upload
from .watch import Watching

log = logging.getLogger(__name__)
SWEEP_SECONDS = 60.0  # dead leases' files and abandoned saves are removed at least so often
MOST_HANGING = 64  # of one uid's files
CAPTURE_STALL_SECONDS = 300.0  # a reflink moves everything at once, after the kernel has written it to the disk
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
    blobs = Blobs(layout, pool, background)  # what hashes in the background publishes too
    closing.callback(blobs.close)
    hub = Hub(config.hub_attempts, config.hub_backoff_seconds)
    closing.callback(hub.close)
    transfer = Transfer(hub, config.hub_connections, config.stall_seconds)
    closing.push_async_callback(transfer.close)

    partials = Partials(layout)
    closing.callback(partials.close)

    trees, repos, leases = Trees(layout, blobs.path), Repos(layout), Leases(layout)
    stores = Stores(config.store or f"file://{quote(str(layout.root))}/store", config.stores, config.private, pool, str(layout.root))
    closing.push_async_callback(stores.close)
    exchange = None
    if config.store and config.store_repos:  # a store of this node alone has nothing to share
        store = await stores.open(stores.default)
        exchange = Exchange(store, Claims(store, _identity(layout), config.store_claim_seconds, background), background)
        closing.push_async_callback(exchange.claims.close)
    lookup = Lookup(repos, hub, pool, flights, config.fresh_seconds, config.verdict_seconds, config.offline, exchange)
    limits = Limits(config.hub_connections, config.hub_piece, config.hub_range)
    blob_flights = BlobFlights(blobs, repos, partials, pool, flights, limits, exchange)
    gather = Gather(blobs, blob_flights, pool)
    depot = Depot(layout, blobs, pool, config.store_grace)
    sharing = None if exchange is None else Sharing(exchange, depot, gather, blobs, repos, pool, background, config.store_repo_expiry)
    disk = os.statvfs(layout.root)
    min_free = config.min_free.of(disk.f_blocks * disk.f_frsize)
    fetch = Fetch(layout, blobs, trees, repos, lookup, hub, transfer, blob_flights, pool, flights, min_free, sharing)
    upkeep = Upkeep(blobs, trees, repos, leases, pool)
    spool = Spool(layout)
    spool.recover()
    closing.callback(spool.close)
    lanes = Lanes("capture", MOST_HANGING, CAPTURE_STALL_SECONDS)
    save = Save(layout, spool, blobs, trees, pool, lanes, flights)
    hashing = Hashing(spool, blobs, trees, pool, background)
    upload = Upload(spool, blobs, depot, pool, stores.open, hashing.tree)
    converter = Converter(layout, blobs, trees, partials, blob_flights, pool, flights, min_free, stores.open)
    loader = Loader(layout, blobs, trees, gather, converter, pool, flights, min_free, stores.open, upload.find, hashing.tree)
    collect = Collect(pool, config.store_grace, config.store_repo_expiry)
    keeping = Keeping(save, upload, loader, collect, spool, stores, trees, leases)
    watching = Watching()
    closing.callback(watching.close)
    started = time.time()

    def statistics(uid: int | None) -> dict[str, Any]:
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
                "bytes": blob_flights.bytes["hub"],
                "mismatches": blob_flights.mismatches,
            },
            "quarantined": blobs.quarantined,
            "spool": {**upload.waiting(uid)._asdict(), "corrupt": spool.corrupt(), "sent_saves": upload.saves},
            "captures": lanes.statistics(),
            "store_bytes": blob_flights.bytes["store"],
            "store": stores.default,
            "exchange": sharing and sharing.statistics(),
            "watches": watching.statistics(uid),
            **counts(),
        }

    background.create_task(_sweep(leases, save))
    background.create_task(hashing.run())
    background.create_task(upload.run())
    return Service(config, fetch, upkeep, trees, repos, leases, keeping, watching, statistics)


def _identity(layout: Layout) -> str:
    """Names this root among those of all nodes; a predecessor on it had the same."""
    found = layout.lock.stat()
    return f"{os.uname().nodename}:{found.st_dev:x}:{found.st_ino:x}"


async def _sweep(leases: Leases, save: Save) -> None:
    while True:
        try:
            leases.held()
            await save.drop_abandoned()
        except OSError as error:  # out of descriptors, say: the next sweep will do
            log.warning("leases and saves of the dead could not be swept", extra={"error": str(error)})
        await asyncio.sleep(SWEEP_SECONDS)
