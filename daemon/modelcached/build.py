"""Where the daemon's objects are put together: state, tiers, flows, service; and what is closed at the end, in which order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any
from urllib.parse import quote

from . import __version__, first_start
from .blobs import Blobs
from .claims import Claims
from .collect import Collect
from .config import Config
from .connection import Traffic
from .convert import Converter
from .depot import Depot
from .download import Limits
from .evict import Evict
from .exchange import Exchange
from .features import features
from .fetch import Fetch
from .flights import BlobFlights
from .gather import Gather
from .hashing import Hashing
from .holds import Holds
from .hub import Hub
from .hubtoken import HubToken
from .importing import Importing
from .keep import Keep
from .keeping import Keeping
from .lanes import Lanes
from .layout import Layout
from .leases import Leases
from .leftovers import Leftovers
from .load import Loader
from .lookup import Lookup
from .model import Repo
from .partials import Partials
from .pins import Pins
from .policy import Policy
from .rates import Rate
from .repair import Repair
from .repos import Repos
from .room import Limits as RoomLimits
from .room import Room
from .root import open_root
from .save import Save
from .scrub import Scrub
from .service import Service
from .sharing import Sharing
from .spool import Spool
from .stores import Stores
from .tasks import Pool
from .tenants import Tenants
from .tending import Tending
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
    callers: asyncio.TaskGroup,
    closing: contextlib.AsyncExitStack,
    traffic: Traffic,
) -> Service:
    """Opens the root and puts a service on it. `closing` closes what it uses, after every task has ended."""
    layout, lock = open_root(config.root, config.private)
    closing.callback(os.close, lock)
    if config.origins.get("max_size") == first_start.ORIGIN:
        first_start.remember(layout, config.max_size)
    pool = Pool("io", IO_THREADS)
    closing.callback(pool.close)
    blobs = Blobs(layout, pool, background)  # what hashes in the background publishes too
    closing.callback(blobs.close)
    hub = Hub(config.hub_attempts, config.hub_backoff_seconds)
    closing.callback(hub.close)
    rates = {"hub_rate": Rate(config.hub_rate), "store_rate": Rate(config.store_rate)}
    transfer = Transfer(hub, config.hub_connections, config.stall_seconds, rates["hub_rate"])
    closing.push_async_callback(transfer.close)

    partials = Partials(layout)
    closing.callback(partials.close)

    trees, repos, leases = Trees(layout, blobs.path), Repos(layout), Leases(layout)
    store_url = config.store or f"file://{quote(str(layout.root))}/store"
    stores = Stores(store_url, config.stores, config.private, pool, str(layout.root), rates["store_rate"])
    closing.push_async_callback(stores.close)
    exchange = None
    if config.store and config.store_repos:  # a store of this node alone has nothing to share
        store = await stores.open(stores.default)
        exchange = Exchange(store, Claims(store, _identity(layout), config.store_claim_seconds, background), background)
        closing.push_async_callback(exchange.claims.close)
    own_token = HubToken.of(os.environ, config.hub_endpoint)
    lookup = Lookup(repos, hub, pool, flights, callers, config.fresh_seconds, config.verdict_seconds, config.offline, exchange, own_token)
    limits = Limits(config.hub_connections, config.hub_piece, config.hub_range)
    blob_flights = BlobFlights(blobs, repos, partials, pool, flights, limits, exchange)
    gather = Gather(blobs, blob_flights, pool)
    depot = Depot(layout, blobs, pool, config.store_grace)
    sharing = None if exchange is None else Sharing(exchange, depot, gather, blobs, repos, pool, background, config.store_repo_expiry)
    disk = os.statvfs(layout.root)
    min_free = config.min_free.of(disk.f_blocks * disk.f_frsize)
    total = disk.f_blocks * disk.f_frsize
    spool = Spool(layout, config.max_spool_per_user.of(total))
    spool.recover()
    closing.callback(spool.close)
    holds, pins = Holds(), Pins(layout)
    limits_of_room = RoomLimits(
        config.max_size.of(total), min_free, config.checkpoint_reserve.of(total), config.high_watermark, config.low_watermark
    )
    room = Room(layout, limits_of_room, blobs, partials, spool, pool, lambda size, is_save: evict.make_room(size, is_save))
    fetch = Fetch(layout, blobs, trees, repos, lookup, hub, transfer, blob_flights, pool, flights, room, holds, sharing)
    is_shared = (lambda _: False) if sharing is None else sharing.has
    tenants = Tenants(layout, trees, repos, leases, pins, spool, holds, pool, config.grace, config.offline, is_shared)
    leftovers = Leftovers(layout, blobs, trees, holds, config.grace, blob_flights.is_flying(layout), room.promised_downloads)
    evict = Evict(blobs, trees, tenants, leftovers, holds, room, pool, fetch.forget)
    upkeep = Upkeep(blobs, trees, repos, leases, pins, holds, pool, evict.drop)
    repair = Repair(blobs, trees, repos, blob_flights, transfer, room, pool, lambda: stores.open(stores.default), config.offline)
    scrub = Scrub(layout, blobs, trees, leases, pool, config.scrub_rate, config.scrub_interval, fetch.note_damaged, repair.bring)
    closing.callback(scrub.close)
    lanes = Lanes("capture", MOST_HANGING, CAPTURE_STALL_SECONDS)
    save = Save(room, spool, blobs, trees, pool, lanes, flights)
    hashing = Hashing(spool, blobs, trees, pool, background, holds, room)
    upload = Upload(spool, blobs, depot, pool, room, stores.open, hashing.tree)
    converter = Converter(layout, blobs, trees, partials, blob_flights, pool, flights, room, holds, stores.open)
    loader = Loader(blobs, trees, gather, converter, pool, flights, room, holds, stores.open, upload.find, upload.hides, hashing.tree)
    collect = Collect(pool, config.store_grace, config.store_repo_expiry)
    tending = Tending(config, layout, trees, repos, pins, evict, room, upload, stores, pool, hashing.tree)
    keeping = Keeping(save, upload, loader, collect, spool, stores, trees, leases)
    importing = Importing(config, layout, blobs, trees, repos, pool, lanes, room, holds)
    found_features = await pool.run(features, layout)
    policy = Policy(config.allowed_repos, config.denied_repos)
    watching = Watching()
    closing.callback(watching.close)
    started = time.time()

    def is_visible(repo: Repo) -> bool:
        """Whether everybody may know that it is here."""
        seen = repos.visibility(repo)
        return seen is not None and seen.is_public

    def statistics(uid: int | None) -> dict[str, Any]:
        disk = os.statvfs(layout.root)
        held = leases.held()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "started": started,
            "root": str(layout.root),
            "private": config.private,
            "endpoint": config.hub_endpoint,
            "disk": {"size_bytes": disk.f_blocks * disk.f_frsize, "free_bytes": disk.f_bavail * disk.f_frsize, "min_free_bytes": min_free},
            "features": found_features,
            "fetches": fetch.statistics(),
            "blob_flights": blob_flights.statistics(),
            "loads": dict(loader.tiers),
            "received_bytes": dict(blob_flights.bytes),
            "leases": sum(map(len, held.values())),
            "holders": [
                {"tree": tree, **holder._asdict()} for tree, holders in held.items() for holder in holders if uid in (None, holder.uid)
            ],
            "activities": [
                *fetch.activities(is_visible if uid is not None else lambda repo: True),
                *(loader.activities() if uid is None else ()),
                *upload.activities(uid),
            ],
            "hub": {
                "requests": hub.requests,
                "pauses": hub.pauses.count,
                "bytes": blob_flights.bytes["hub"],
                "mismatches": blob_flights.mismatches,
            },
            "quarantined": blobs.quarantined,
            "scrub": scrub.statistics(),
            "room": {**room.statistics(), **evict.statistics(), "pins": len(pins)},
            "spool": {**upload.waiting(uid)._asdict(), "corrupt": spool.corrupt() if uid is None else [], "sent_saves": upload.saves},
            "captures": lanes.statistics(),
            "rates": {field: rate.limit for field, rate in rates.items()},
            "store_bytes": blob_flights.bytes["store"],
            "store": stores.default,
            "exchange": sharing and sharing.statistics(),
            **traffic.counts(),
            "watches": watching.statistics(uid),
        }

    if config.metrics:
        from .metrics import Exporter  # 6 MB that a daemon without metrics need not have

        exporter = Exporter(lambda: statistics(None), traffic.latencies)
        closing.push_async_callback(exporter.close)
        await exporter.start(config.metrics)
    background.create_task(_sweep(leases, save, pins, pool))
    background.create_task(hashing.run())
    background.create_task(evict.run())
    callers.create_task(scrub.run())
    callers.create_task(Keep(fetch, trees, pins, pool, config.hub_endpoint).run(config.keep))
    background.create_task(upload.run())
    return Service(config, fetch, upkeep, trees, repos, leases, keeping, watching, tending, importing, policy, rates, statistics)


def _identity(layout: Layout) -> str:
    """Names this root among those of all nodes; a predecessor on it had the same."""
    found = layout.lock.stat()
    return f"{os.uname().nodename}:{found.st_dev:x}:{found.st_ino:x}"


async def _sweep(leases: Leases, save: Save, pins: Pins, pool: Pool) -> None:
    while True:
        try:
            leases.held()
            await save.drop_abandoned()
            await pool.run(pins.sweep())
        except OSError as error:  # out of descriptors, say: the next sweep will do
            log.warning("leases and saves of the dead, and old pins, could not be swept", extra={"error": str(error)})
        await asyncio.sleep(SWEEP_SECONDS)
