"""Collect: takes out of a store what nothing in it names any more, while other nodes go on saving.

What references, pending saves and hub records name is marked; what is not, and is older than the grace by the store's own clock, is
deleted. Everything below repos/, and saves that never came, expire by their own age, and mark nothing then.

Invariants: nothing is deleted on account of what was seen before the round was announced (`gc_claim`), however often it was seen; in
every round all names are listed again. Pending saves are listed before references, for a save puts its reference before it takes its
pending record away. What can't be read may name anything: then nothing is deleted, and the error says what it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator

from modelcache.protocol import GcStoreReply

from .errors import IncompatibleReference, MissingObject
from .gc_claim import GcClaim, claimed
from .meter import Meter, Report, ticking
from .model import TreeId, is_commit, is_digest
from .references import MAX_REFERENCE_BYTES, MAX_TREE_BYTES, decode_record, named_tree, tree_key
from .store import Object, Store
from .tasks import Pool, each

REFERENCES, PENDING, REPOS, TREES, BLOBS = "references", "pending", "repos", "trees", "blobs"
FOLDERS = ("repos/", "refs/", "trees/", "blobs/")  # trees go before their blobs: one that is there has them
READ_AT_ONCE = 32
RECORDS_AT_ONCE = 4  # trees: each may be large
DELETE_AT_ONCE = 16
MAX_BATCH = 5000
ROUND_SECONDS = 10.0  # writers may have to wait for the end of a round
LEAST_PENDING_SECONDS = 7 * 86400.0  # a save may be on its way for so long at least, however short other things are kept
MAX_LISTED = 100_000  # keys that a dry run answers with
log = logging.getLogger(__name__)


class Collect:
    def __init__(self, pool: Pool, grace_seconds: float, repo_expiry_seconds: float) -> None:
        self._pool = pool
        self._grace_seconds = grace_seconds
        self._repo_expiry_seconds = repo_expiry_seconds

    async def run(self, store: Store, is_dry: bool, is_alone: bool, report: Report) -> GcStoreReply:
        """Collects, or says what would be deleted. IncompatibleReference if something can't be read, InUse if another collection runs."""
        began = time.monotonic()
        now = await store.now()
        by_grace, by_expiry = now - self._grace_seconds, now - self._repo_expiry_seconds
        abandoned = now - max(self._grace_seconds, self._repo_expiry_seconds, LEAST_PENDING_SECONDS)
        meter = Meter()
        meter.source = "store"
        meter.reports.append(report)
        run = _Run(store, self._pool, {BLOBS: by_grace, TREES: by_grace, REPOS: by_expiry, PENDING: abandoned}, meter)
        orphans = 0
        async with ticking(meter):
            if is_dry:
                await run.plan()
            else:
                async with claimed(store, is_alone, meter.show) as claim:
                    await run.delete(claim)
                    orphans = await store.abort_orphans(self._grace_seconds)
        seconds = round(time.monotonic() - began, 6)
        deleted, kept = ({kind: tally.as_dict() for kind, tally in tallies.items()} for tallies in (run.deleted, run.kept))
        findings = [{"key": key, "problem": problem} for key, problem in sorted(run.findings.items())]
        log.info("collected", extra={"store": store.url, "dry": is_dry, "deleted": str(deleted), "orphans": orphans, "seconds": seconds})
        return GcStoreReply(is_dry, deleted, kept, orphans, findings, run.keys, seconds)


class _Tally:
    def __init__(self) -> None:
        self.objects = 0
        self.size_bytes = 0

    def add(self, found: Object) -> None:
        self.objects += 1
        self.size_bytes += found.size

    def as_dict(self) -> dict[str, int]:
        return {"objects": self.objects, "bytes": self.size_bytes}


class _Run:
    """One collection. Marks only grow; digests are kept as bytes, for there may be millions."""

    def __init__(self, store: Store, pool: Pool, oldest: dict[str, float], meter: Meter) -> None:
        self._store = store
        self._pool = pool
        self._oldest = oldest  # by kind: what was modified before may go
        self._meter = meter
        self._trees: set[bytes] = set()
        self._blobs: set[bytes] = set()
        self._read: dict[str, str] = {}  # references and hub records whose names are marked, and their ETags
        self.deleted = {kind: _Tally() for kind in (BLOBS, TREES, REPOS, PENDING)}
        self.kept = {kind: _Tally() for kind in (REFERENCES, BLOBS, TREES, REPOS, PENDING)}
        self.findings: dict[str, str] = {}  # references whose tree is gone
        self.keys: list[str] = []

    async def plan(self) -> None:
        """Counts what would be deleted, and lists it."""
        await self._mark()
        async for found, kind in self._candidates():
            self.deleted[kind].add(found)
            if len(self.keys) < MAX_LISTED:
                self.keys.append(found.key)

    async def delete(self, claim: GcClaim) -> None:
        await self._mark()
        batch: list[tuple[Object, str]] = []
        async for candidate in self._candidates():
            batch.append(candidate)
            while len(batch) >= MAX_BATCH:
                batch = await self._round(claim, batch)
        while batch:
            batch = await self._round(claim, batch)

    async def _candidates(self) -> AsyncIterator[tuple[Object, str]]:
        """What was old and not marked when it was listed."""
        for folder in FOLDERS:
            self._begin(f"list {folder[:-1]}")
            async for found in self._store.list(folder):
                kind = _kind(found.key)
                if kind is None:  # somebody else's
                    continue
                self._meter.finish(0)
                if kind in self._oldest and found.modified < self._oldest[kind] and not self._is_marked(found.key, kind):
                    yield found, kind
                else:
                    self.kept[kind].add(found)

    async def _round(self, claim: GcClaim, batch: list[tuple[Object, str]]) -> list[tuple[Object, str]]:
        """Deletes what is still not named and still old; returns what there was no time for."""
        await claim.begin_round()
        await self._mark()
        self._begin("delete", batch)
        end = time.monotonic() + ROUND_SECONDS
        left: list[tuple[Object, str]] = []

        async def take(candidate: tuple[Object, str]) -> None:
            found, kind = candidate
            if time.monotonic() > end:
                left.append(candidate)
                return
            seen = found if self._is_marked(found.key, kind) else await self._store.head(found.key)
            if seen is not None and (seen is found or seen.modified >= self._oldest[kind]):  # named, or put again
                self.kept[kind].add(seen)
            elif seen is not None:
                await claim.delete(found.key)
                self.deleted[kind].add(seen)
            self._meter.finish(found.size)

        await each(batch, take, DELETE_AT_ONCE)
        await claim.end_round()
        return left

    async def _mark(self) -> None:
        """Marks what is named now. Pending records and their trees are read every time: a save may be packing its tree anew."""
        await self._mark_trees(await self._names([found async for found in self._store.list("refs/") if self._is_pending(found)]))
        await self._mark_trees(await self._names([found async for found in self._new()]))

    def _is_pending(self, found: Object) -> bool:
        return _kind(found.key) == PENDING and found.modified >= self._oldest[PENDING]

    async def _new(self) -> AsyncIterator[Object]:
        """References and hub records that were not read yet."""
        async for found in self._store.list("refs/"):
            if _kind(found.key) == REFERENCES and self._read.get(found.key) != found.etag:
                yield found
        async for found in self._store.list("repos/"):
            if _is_hub_record(found.key) and found.modified >= self._oldest[REPOS] and self._read.get(found.key) != found.etag:
                yield found

    async def _names(self, records: list[Object]) -> dict[TreeId, list[str]]:
        """The trees these records name, and the keys of those of them that are references."""
        self._begin("read", [(found, "") for found in records])
        names: dict[TreeId, list[str]] = {}
        unreadable: list[str] = []

        async def read(found: Object) -> None:
            kind = _kind(found.key)
            self._meter.finish(found.size)
            try:
                name = named_tree(await self._store.get(found.key, MAX_REFERENCE_BYTES))
                if name is None and kind != PENDING:
                    raise ValueError("it names no tree")
            except MissingObject:  # deleted meanwhile
                return
            except ValueError:
                unreadable.append(found.key)
                return
            if kind != PENDING:
                self._read[found.key] = found.etag
            if name is not None:
                names.setdefault(name, []).extend([found.key] if kind == REFERENCES else [])

        await each(records, read, READ_AT_ONCE)
        self._refuse(unreadable)
        return names

    async def _mark_trees(self, names: dict[TreeId, list[str]]) -> None:
        self._begin("mark", total=len(names))
        unreadable: list[str] = []

        async def mark(named: tuple[TreeId, list[str]]) -> None:
            name, references = named
            self._trees.add(bytes.fromhex(name))
            self._meter.finish(0)
            try:
                raw = await self._store.get(tree_key(name), MAX_TREE_BYTES)
                needed = await self._pool.run(_needed, raw, name)
            except MissingObject:  # of a pending save: it is not there yet
                self.findings.update((_reference(key), f"its tree {name} is not in the store") for key in references)
            except IncompatibleReference:
                unreadable.append(tree_key(name))
            else:
                self._blobs |= needed

        await each(names.items(), mark, RECORDS_AT_ONCE)
        self._refuse(unreadable)

    def _refuse(self, unreadable: list[str]) -> None:
        if unreadable:
            first = min(unreadable)
            more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
            hint = "upgrade this daemon if a newer one wrote it"
            if _kind(first) == REFERENCES:
                first = _reference(first)
                hint += f"; if it is damaged: modelcache rm --store {self._store.url} {first}"
            raise IncompatibleReference(
                f"{first}{more} can't be read in {self._store.url}, so nobody knows what it needs: nothing more is deleted",
                hint,
                keys=sorted(unreadable)[:100],
            )

    def _is_marked(self, key: str, kind: str) -> bool:
        if kind == TREES:
            return bytes.fromhex(_stem(key)) in self._trees
        return kind == BLOBS and bytes.fromhex(_stem(key)) in self._blobs

    def _begin(self, phase: str, items: list[tuple[Object, str]] | None = None, total: int = 0) -> None:
        items = items or []
        self._meter.phase = phase
        self._meter.start(sum(found.size for found, _ in items), len(items) or total, 0, 0)


def _needed(raw: bytes, name: TreeId) -> set[bytes]:
    return set(map(bytes.fromhex, decode_record(raw, name).blobs))


def _kind(key: str) -> str | None:
    """What an object is; None for what no node of ours put there, and for what is no business of a collection."""
    folder, _, rest = key.partition("/")
    if folder == "repos":
        return REPOS
    if folder == "refs":
        return REFERENCES if rest.endswith(".json") else PENDING if rest.endswith(".pending") else None
    stem = _stem(key)
    if not is_digest(stem):
        return None
    return TREES if key == tree_key(TreeId(stem)) else BLOBS if rest == f"sha256/{stem[:2]}/{stem}" and folder == "blobs" else None


def _stem(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")


def _reference(key: str) -> str:
    return key.removeprefix("refs/").removesuffix(".json")


def _is_hub_record(key: str) -> bool:
    """repos/<endpoint>/<repo>/<commit>/<name>.json; the others below repos/ name nothing."""
    parts = key.split("/")
    return parts[0] == "repos" and len(parts) > 3 and is_commit(parts[-2]) and parts[-1].endswith(".json")
