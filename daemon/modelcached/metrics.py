"""What Prometheus is told: the daemon's own counters, read when somebody asks, on a loopback port or a Unix socket.

METRICS is the only list of names; docs/metrics.md is compared with it. No label names a repo, a key or a uid: whoever may connect to a
loopback port learns nothing of what others have (I8).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from . import listen
from .latencies import BOUNDS, Latencies
from .listen import ListenError

UNIX = "unix:"
log = logging.getLogger(__name__)

Seen = Mapping[str, Any]  # the daemon's own view of itself, as `status` answers it


class Told(NamedTuple):
    """One metric: `read` gives its value, or with a label one value for each of the label's."""

    name: str  # without "modelcached_"; of a counter, without "_total"
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    words: str
    read: Callable[[Seen], float | Mapping[str, float]]
    label: str = ""


COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily

METRICS = (
    Told("info", GAUGE, "1; the label is the daemon's version", lambda seen: {seen["version"]: 1.0}, "version"),
    Told("start_time_seconds", GAUGE, "when the daemon started, in seconds since the epoch", lambda seen: seen["started"]),
    Told("fetches", COUNTER, "repos handed out, by the farthest tier that had to be asked", lambda seen: seen["fetches"]["tiers"], "tier"),
    Told("fetch_joins", COUNTER, "callers who found the fetch they asked for running", lambda seen: seen["fetches"]["joined"]),
    Told("fetches_running", GAUGE, "fetches now", lambda seen: seen["fetches"]["running"]),
    Told("loads", COUNTER, "saved artifacts handed out, by the farthest tier that had to be asked", lambda seen: seen["loads"], "tier"),
    Told("received_bytes", COUNTER, "bytes of files that arrived whole and right, by tier", lambda seen: seen["received_bytes"], "tier"),
    Told("flights", COUNTER, "downloads of files that were begun", lambda seen: seen["blob_flights"]["started"]),
    Told("flight_joins", COUNTER, "files that somebody else was downloading already", lambda seen: seen["blob_flights"]["joined"]),
    Told("flights_running", GAUGE, "files on their way to this node now", lambda seen: seen["blob_flights"]["running"]),
    Told(
        "verify_failures",
        COUNTER,
        "bytes that were not what their name says: on arrival from the hub or a store, or on this disk",
        lambda seen: {"arrival": seen["hub"]["mismatches"], "disk": seen["quarantined"]},
        "where",
    ),
    Told("hub_requests", COUNTER, "questions to the hub, retries included, downloads not", lambda seen: seen["hub"]["requests"]),
    Told("hub_pauses", COUNTER, "how often the hub asked to be left alone for a while", lambda seen: seen["hub"]["pauses"]),
    Told("claims", COUNTER, "turns to ask the hub that this node took", lambda seen: _exchanged(seen, "claims")),
    Told("claim_waits", COUNTER, "waits for another node to bring something from the hub", lambda seen: _exchanged(seen, "waits")),
    Told("claims_taken_over", COUNTER, "turns taken over from a node that brought no more", lambda seen: _exchanged(seen, "taken_over")),
    Told("shared_bytes", COUNTER, "bytes from the hub that this node put into the store", lambda seen: _exchanged(seen, "sent_bytes")),
    Told("spool_saves", GAUGE, "saves that are not in the store yet", lambda seen: seen["spool"]["saves"]),
    Told("spool_bytes", GAUGE, "their size", lambda seen: seen["spool"]["size_bytes"]),
    Told("spool_oldest_seconds", GAUGE, "for how long the oldest of them has waited", lambda seen: seen["spool"]["oldest_seconds"]),
    Told("spool_unreadable_saves", GAUGE, "saves that were set aside in spool/corrupt", lambda seen: len(seen["spool"]["corrupt"])),
    Told("sent_saves", COUNTER, "saves brought to the store", lambda seen: seen["spool"]["sent_saves"]),
    Told("sent_bytes", COUNTER, "bytes of saves brought to the store", lambda seen: seen["spool"]["sent_bytes"]),
    Told("captures_running", GAUGE, "files being copied from their savers now", lambda seen: seen["captures"]["running"]),
    Told("captures_hanging", GAUGE, "files whose filesystem does not answer", lambda seen: seen["captures"]["hanging"]),
    Told("leases", GAUGE, "leases that processes hold", lambda seen: seen["leases"]),
    Told("disk_size_bytes", GAUGE, "size of the cache's filesystem", lambda seen: seen["disk"]["size_bytes"]),
    Told("disk_free_bytes", GAUGE, "what is free of it", lambda seen: seen["disk"]["free_bytes"]),
    Told("disk_min_free_bytes", GAUGE, "what downloads leave free of it", lambda seen: seen["disk"]["min_free_bytes"]),
    Told("checkpoint_reserve_bytes", GAUGE, "what they leave besides, for saves", lambda seen: seen["room"]["checkpoint_reserve_bytes"]),
    Told("used_bytes", GAUGE, "what the cache takes: blobs and unfinished downloads", lambda seen: seen["room"]["used_bytes"]),
    Told("max_size_bytes", GAUGE, "what it may take; 0 is all there is", lambda seen: seen["room"]["max_size_bytes"]),
    Told("evictions", COUNTER, "trees that were taken away to make room", lambda seen: seen["room"]["evictions"]),
    Told("evicted_bytes", COUNTER, "bytes that this freed", lambda seen: seen["room"]["evicted_bytes"]),
    Told("room_refusals", COUNTER, "fetches and saves that did not fit", lambda seen: seen["room"]["refusals"]),
    Told("pins", GAUGE, "pins", lambda seen: seen["room"]["pins"]),
    Told("rate_limit_bytes", GAUGE, "bytes a second allowed, by tier; 0 is no limit", lambda seen: _limits(seen["rates"]), "tier"),
    Told("connections", GAUGE, "clients now", lambda seen: seen["connections"]),
    Told("requests_running", GAUGE, "requests now", lambda seen: seen["requests"]),
    Told("refused", COUNTER, "connections and requests above a limit", lambda seen: seen["refused"]),
)
LATENCY = "request_seconds"
LATENCY_WORDS = "how long requests took, by method"


def _exchanged(seen: Seen, name: str) -> float:
    return float((seen["exchange"] or {}).get(name, 0))  # without a store of several nodes there is no exchange


def _limits(rates: Mapping[str, int]) -> dict[str, float]:
    return {field.removesuffix("_rate"): float(limit) for field, limit in rates.items()}


class Daemon(Collector):
    """Reads the counters when it is asked."""

    def __init__(self, look: Callable[[], Seen], latencies: Latencies) -> None:
        self._look = look
        self._latencies = latencies

    def collect(self) -> Iterator[Metric]:
        seen = self._look()
        for told in METRICS:
            family = told.kind(f"modelcached_{told.name}", told.words, labels=[told.label] if told.label else None)
            value = told.read(seen)
            for label, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                family.add_metric([label] if told.label else [], number)
            yield family
        yield self._latency()

    def describe(self) -> Iterable[Metric]:
        return ()  # else the registry would collect once, before there is anything to see

    def _latency(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"modelcached_{LATENCY}", LATENCY_WORDS, labels=["method"])
        for method, histogram in self._latencies.by_method.items():
            total, buckets = 0, []
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), histogram.buckets, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric([method], buckets, histogram.seconds)
        return family


class Exporter:
    """An HTTP server that answers one question: GET /metrics."""

    def __init__(self, look: Callable[[], Seen], latencies: Latencies) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Daemon(look, latencies))
        ProcessCollector(registry=self._registry)
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        self._listener: listen.Listener | None = None

    async def start(self, address: str) -> None:
        """Listens at `host:port` or `unix:/path`; ListenError when that can't be."""
        await self._runner.setup()
        try:
            await self._site(address).start()
        except OSError as error:
            await self.close()
            hint = "choose another place with --metrics"
            raise ListenError(f"metrics can't be served at {address}: {error.strerror or error}", hint) from None
        log.info("metrics", extra={"address": self.address})

    def _site(self, address: str) -> web.BaseSite:
        if address.startswith(UNIX):
            self._listener = listen.bind(Path(address.removeprefix(UNIX)))
            return web.SockSite(self._runner, self._listener.socket)
        host, _, port = address.rpartition(":")
        return web.TCPSite(self._runner, host.strip("[]"), int(port))

    @property
    def address(self) -> str:
        """Where it listens, with the port it was given."""
        if self._listener is not None:
            return f"{UNIX}{self._listener.path}"
        host, port = self._runner.addresses[0][:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    async def close(self) -> None:
        await self._runner.cleanup()
        if self._listener is not None:
            self._listener.close()

    async def _answer(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def __repr__(self) -> str:
        return f"<Exporter {self._runner.addresses}>"
