"""Sharing: the small files of a commit, fetched from the hub by one node for all, and what the store is told of a repo.

The small files of a commit count as one content: one claim, packs, one record. Whoever needs them reads the records of the commit, takes
what they name out of the packs (each byte checked against the record, and against the hub's own git id), and asks the hub for the rest when
it is its turn. When a view is complete, its tree goes to the store behind the caller's back: the hub record that names it, blobs, tree.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence, Set
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

import msgspec

from .blobs import Blobs
from .claims import Claim
from .depot import Depot
from .errors import ContentMismatch, IncompatibleReference, disk_errors
from .exchange import Exchange
from .flights import digest_if_right
from .gather import Gather
from .holds import Hand
from .meter import Meter
from .model import Commit, Digest, ListedFile, Repo, Tree, TreeFile, TreeId
from .packs import PACKED_BYTES, Pack
from .recent import Recent
from .references import Record, tree_key
from .repos import Ref, Repos, Selected, Visibility
from .tasks import Pool, behind, each

FROM_HUB_AT_ONCE = 192  # connections are bounded elsewhere
READ_AT_ONCE = 16  # records
KNOWN_FILES = 50_000  # of records that are kept in memory
Said = TypeVar("Said", Ref, Visibility)
log = logging.getLogger(__name__)


class Brought(NamedTuple):
    """A view that is complete."""

    repo: Repo
    commit: Commit
    revision: str  # as it was asked for
    selected: Selected
    name: TreeId
    tree: Tree


class Sharing:
    """`_records` are the store's, which never change; `_turns` let one assembly of a commit after the other at the small files."""

    def __init__(
        self,
        exchange: Exchange,
        depot: Depot,
        gather: Gather,
        blobs: Blobs,
        repos: Repos,
        pool: Pool,
        group: asyncio.TaskGroup,
        expiry_seconds: float,
    ) -> None:
        self._exchange = exchange
        self._depot = depot
        self._gather = gather
        self._blobs = blobs
        self._repos = repos
        self._pool = pool
        self._group = group
        self._refresh_seconds = expiry_seconds / 4
        self.shared = 0  # trees
        self._records: Recent[TreeId, Record] = Recent(KNOWN_FILES, lambda record: 1 + len(record.tree.files))
        self._in_store: set[TreeId] = set()
        self._doubted: set[tuple[Repo, Commit]] = set()  # whose packs hold wrong bytes: they are put again
        self._turns: WeakValueDictionary[tuple[Repo, Commit], asyncio.Lock] = WeakValueDictionary()
        self._publishing: WeakValueDictionary[tuple[Repo, Commit], asyncio.Lock] = WeakValueDictionary()

    async def bring_small(
        self,
        repo: Repo,
        commit: Commit,
        files: list[ListedFile],
        here: dict[str, Digest],
        meter: Meter,
        hand: Hand,
        from_hub: Callable[[ListedFile], Awaitable[None]],
    ) -> None:
        """Every one of these files becomes a blob in the hand and is entered into `here`; `from_hub` does so for one."""
        turn = self._turns.setdefault((repo, commit), asyncio.Lock())
        async with turn:
            claim: Claim | None = None
            try:
                with self._exchange.suppressed():
                    claim = await self._from_store(repo, commit, files, here, meter, hand)
                files = [file for file in files if file.path not in here]
                await each(files, from_hub, FROM_HUB_AT_ONCE)
                if files:
                    tree = Tree(tuple(TreeFile(file.path, file.size, here[file.path]) for file in files))
                    if behind(self._group, self._publish_small(repo, commit, tree, claim)) is not None:
                        claim = None
            finally:
                if claim is not None:
                    self._exchange.release(claim)

    def publish(self, brought: Brought) -> None:
        """Tells the store of a complete view, behind the caller's back."""
        if self._exchange.is_near:
            behind(self._group, self._publish(brought))

    def has(self, tree: TreeId) -> bool:
        """Whether this daemon knows that the store has the tree."""
        return tree in self._in_store

    def statistics(self) -> dict[str, int]:
        return {**self._exchange.statistics(), "shared": self.shared}

    async def _from_store(
        self, repo: Repo, commit: Commit, files: list[ListedFile], here: dict[str, Digest], meter: Meter, hand: Hand
    ) -> Claim | None:
        """Enters into `here` what the store has of these files. If something is left for the hub: the claim on it."""
        name = hashlib.sha256(msgspec.json.encode(["small files", *repo, commit])).hexdigest()
        claim: Claim | None = None
        try:
            while files := await self._take_known(repo, commit, files, here, meter, hand):
                if claim is not None or not await self._exchange.answered(self._exchange.store.has_conditions()):
                    kept, claim = claim, None
                    return kept
                claim = await self._exchange.answered(
                    self._exchange.claims.take(name, lambda: meter.received_bytes + self._exchange.sent_bytes)
                )
                if claim is None:
                    with meter.spent.during("others"):
                        await self._exchange.claims.wait(name)
            return None
        finally:
            if claim is not None:
                self._exchange.release(claim)

    async def _take_known(
        self, repo: Repo, commit: Commit, files: list[ListedFile], here: dict[str, Digest], meter: Meter, hand: Hand
    ) -> list[ListedFile]:
        """Takes out of the store what its records name; the files that are left."""
        named: dict[str, TreeFile] = {}
        holding: list[Pack] = []
        wanted = {file.path: file for file in files}
        for record in await self._known(repo, commit):
            found = {file.path: file for file in record.tree.files if file.path in wanted and file.path not in named}
            found = {path: file for path, file in found.items() if _agrees(file, wanted[path])}
            holding += _only(record.packs, found.keys())
            named |= found
        hand.add(file.sha256 for file in named.values())
        missing = await self._pool.run(self._gather.missing, Tree(tuple(named.values())))
        try:
            await self._gather.bring(self._exchange.store, missing, holding, meter)
        except ContentMismatch:
            self._doubted.add((repo, commit))
            raise
        brought = {file.path for file in missing}
        for file in named.values():
            if file.path not in brought:
                meter.finish(file.size)  # the same bytes as another's
        with disk_errors("looking at small files"):
            lying = await self._pool.run(self._wrong, repo, [(file, wanted[path]) for path, file in named.items()])
        sound = {path: file.sha256 for path, file in named.items() if path not in lying}
        here.update(sound)
        self._repos.set_digests(repo, {wanted[path].oid: digest for path, digest in sound.items() if wanted[path].sha256 is None})
        if lying:
            log.warning("records of the store disagree with the hub", extra={"repo": str(repo), "files": sorted(lying)[:10]})
        return [file for file in files if file.path not in here]

    async def _known(self, repo: Repo, commit: Commit) -> list[Record]:
        found: list[Record] = []

        async def read(name: TreeId) -> None:
            record = self._records.get(name)
            if record is None:
                try:
                    record = self._records.put(name, await self._exchange.references.record(name, self._pool))
                except IncompatibleReference as error:  # damaged, or collected: the hub has the files
                    log.info("a record names no tree", extra={"tree": name, "error": str(error)})
                    return
            found.append(record)

        await each(await self._exchange.answered(self._exchange.records.trees(repo, commit)), read, READ_AT_ONCE)
        return found

    def _wrong(self, repo: Repo, files: Sequence[tuple[TreeFile, ListedFile]]) -> set[str]:
        """Files whose bytes are not what the hub's git id says (blocks)."""
        git_named = [(self._blobs.path(file.sha256), listed) for file, listed in files if listed.sha256 is None]
        return {listed.path for path, listed in git_named if digest_if_right(path.read_bytes(), self._repos.content(repo, listed)) is None}

    async def _publish_small(self, repo: Repo, commit: Commit, tree: Tree, claim: Claim | None) -> None:
        try:
            with self._exchange.suppressed():
                async with self._publishing.setdefault((repo, commit), asyncio.Lock()):
                    await self._put_tree(repo, commit, await self._pool.run(tree.tree_id), tree, None)
        finally:
            if claim is not None:
                await self._exchange.claims.release(claim)

    async def _publish(self, brought: Brought) -> None:
        repo, commit, name, exchange = brought.repo, brought.commit, brought.name, self._exchange
        records = exchange.records
        with exchange.suppressed():
            ref = self._repos.ref(repo, brought.revision)
            if ref is not None:
                known = await exchange.answered(records.ref(repo, brought.revision))
                if self._is_news(ref, known, lambda each: each.commit):
                    await records.put_ref(repo, brought.revision, ref)
            seen = self._repos.visibility(repo)
            if seen is not None:
                told = await exchange.answered(records.visibility(repo))
                if self._is_news(seen, told, lambda each: (each.private, each.gated)):
                    await records.put_visibility(repo, seen)
            async with self._publishing.setdefault((repo, commit), asyncio.Lock()):
                age = await exchange.answered(records.tree_age(repo, commit, name))
                is_there = await exchange.answered(exchange.store.head(tree_key(name))) is not None
                if is_there and age is not None:
                    self._in_store.add(name)
                if is_there and age is not None and age < self._refresh_seconds and (repo, commit) not in self._doubted:
                    return
                listing = await self._pool.run(self._repos.listing, repo, commit)
                if listing is not None:
                    await records.put_listing(repo, listing)
                for digest in {file.sha256 for file in brought.tree.files}:
                    await exchange.sent(digest)
                await self._put_tree(repo, commit, name, brought.tree, brought.selected)
            self.shared += 1
            log.info("shared", extra={"repo": str(repo), "commit": commit, "tree": name, "bytes": brought.tree.size})

    async def _put_tree(self, repo: Repo, commit: Commit, name: TreeId, tree: Tree, selected: Selected | None) -> None:
        """The hub record comes first, for it keeps collections away; one whose tree is not there yet is passed over by readers."""
        exchange = self._exchange
        await exchange.records.put_tree(repo, commit, name, selected)
        doubts = (repo, commit) in self._doubted
        self._records.put(name, await self._depot.bring(exchange.store, name, tree, exchange.put, doubts=doubts))
        self._in_store.add(name)
        self._doubted.discard((repo, commit))

    def _is_news(self, seen: Said, told: Said | None, what: Callable[[Said], object]) -> bool:
        """Whether the store should hear of it: never of what was so before what it knows (I8), and of the same only now and then."""
        return told is None or seen.checked - told.checked > (self._refresh_seconds if what(seen) == what(told) else 0)


def is_small(file: ListedFile) -> bool:
    """Whether a file counts as one of its commit's small ones: it travels in a pack, or nothing but its git id is known beforehand."""
    return file.sha256 is None or file.size < PACKED_BYTES


def _agrees(file: TreeFile, listed: ListedFile) -> bool:
    return file.size == listed.size and listed.sha256 in (None, file.sha256)


def _only(holding: Sequence[Pack], paths: Set[str]) -> list[Pack]:
    """The packs that hold some of these files, with no others in their index."""
    found = (pack._replace(files=tuple(file for file in pack.files if file.path in paths)) for pack in holding)
    return [pack for pack in found if pack.files]
