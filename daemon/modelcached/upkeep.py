"""Upkeep: what is on this node, taking some of it away, and hashing it again."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable, Set
from typing import NamedTuple

from modelcache.protocol import Entry, RemoveReply, VerifyReply

from .blobs import Blobs
from .errors import InUse, LocalEntryNotFound
from .holds import Holds
from .leases import Holder, Leases
from .meter import TICK_SECONDS, Meter, Report
from .model import Digest, Repo, Tree, TreeFile, TreeId
from .pins import Pins
from .repos import Repos, Selected, Visibility
from .tasks import Pool
from .trees import Trees

PULLED = "pulled "  # how the pins begin that `modelcache pull` leaves for a day: who removes what was pulled has changed his mind


class Known(NamedTuple):
    """One repo this node has something of."""

    repo: Repo
    visibility: Visibility
    shown: dict[TreeId, Selected]


class Upkeep:
    def __init__(
        self,
        blobs: Blobs,
        trees: Trees,
        repos: Repos,
        leases: Leases,
        pins: Pins,
        holds: Holds,
        pool: Pool,
        drop: Callable[[TreeId, Tree | None], Awaitable[int]],
    ) -> None:
        self._blobs = blobs
        self._trees = trees
        self._repos = repos
        self._leases = leases
        self._pins = pins
        self._holds = holds
        self._pool = pool
        self._drop = drop  # takes a tree out of sight before its first await; the bytes freed

    async def known(self, repo_id: str | None = None) -> list[Known]:
        def look() -> list[Known]:
            found = [Known(repo, seen, self._repos.shown(repo)) for repo, seen in self._repos.known()]
            return [known for known in found if repo_id in (None, known.repo.id)]

        return await self._pool.run(look)

    async def entries(self, known: list[Known]) -> list[Entry]:
        """Every tree of these repos."""
        held = self._leases.held()
        return await self._pool.run(lambda: [entry for each in known for entry in self._entries(each, held)])

    def _entries(self, known: Known, held: dict[TreeId, list[Holder]]) -> list[Entry]:
        refs = self._repos.refs(known.repo)
        entries = []
        for name, selected in known.shown.items():
            tree = self._trees.load(name)
            if tree is None:
                continue
            entries.append(
                Entry(
                    repo_id=known.repo.id,
                    repo_type=known.repo.type,
                    endpoint=known.repo.endpoint,
                    revisions=[revision for revision, ref in refs.items() if ref.commit == selected.commit],
                    commit=selected.commit,
                    tree=name,
                    files=len(tree.files),
                    size_bytes=tree.size,
                    path=str(self._trees.view(name)),
                    last_used=self._trees.last_used(name),
                    leases=len(held.get(name, [])),
                )
            )
        return entries

    async def remove(self, repo: Repo, revision: str | None, is_running: Callable[[], bool]) -> RemoveReply:
        """Takes the repo, or one revision of it, off this node. InUse while somebody holds a part of it (I4), or fetches it.

        Somebody may come while it goes: then what he holds stays, and what has not gone yet.
        """
        everything = await self.known()
        mine = next((known for known in everything if known.repo == repo), None)
        if mine is None:
            raise LocalEntryNotFound(f"nothing of {repo} is on this node", "see what is: modelcache ls")
        commits = {ref.commit for name, ref in self._repos.refs(repo).items() if name == revision} | {revision}
        shown = {name for name, selected in mine.shown.items() if revision is None or selected.commit in commits}
        if revision is not None and not shown:
            raise LocalEntryNotFound(f"no files of {repo}@{revision} are on this node", "see what is: modelcache ls")
        shared = {name for known in everything if known.repo != repo for name in known.shown}
        self._refuse_held(repo, shown - shared, is_running)
        freed = 0
        for name in sorted(shown):
            tree = await self._pool.run(self._trees.load, name)
            # No await between this look and the drop: who comes later finds no tree, and who came before is seen (I4).
            self._refuse_held(repo, {name} - shared, is_running)
            self._repos.forget_shown(repo, name)
            freed += 0 if name in shared else await self._drop(name, tree)
        self._refuse_held(repo, set(), is_running)
        for known_ref in [name for name, ref in self._repos.refs(repo).items() if revision is None or ref.commit in commits]:
            self._repos.forget(repo, known_ref)
        if revision is None:
            self._repos.forget(repo)
        return RemoveReply(sorted(shown), freed)

    async def verify(self, repo: Repo | None, report: Report) -> VerifyReply:
        """Hashes every blob, or those of one repo; what lies goes to quarantine (I10)."""
        wanted = await self._pool.run(self._blobs_of, repo)
        meter = Meter()
        meter.phase, meter.source = "verify", "disk"
        meter.reports.append(report)
        meter.start(sum(wanted.values()), len(wanted), 0, 0)
        damaged, missing, shown_at = [], [], 0.0
        for digest, size in sorted(wanted.items()):
            if not self._blobs.path(digest).exists():
                missing.append(digest)
            elif not await self._pool.run(self._check, digest):
                damaged.append(digest)
            meter.finish(size)
            now = asyncio.get_running_loop().time()
            if now - shown_at > TICK_SECONDS:
                shown_at = now
                meter.show()
        return VerifyReply(len(wanted), sum(wanted.values()), list(damaged), list(missing))

    def _check(self, digest: Digest) -> bool:
        is_executable = self._blobs.path(digest, executable=True).exists()
        return self._blobs.check(digest) and (not is_executable or self._blobs.check(digest, executable=True))

    def _blobs_of(self, repo: Repo | None) -> dict[Digest, int]:
        names = self._trees.names() if repo is None else list(self._repos.shown(repo))
        wanted = {file.sha256: file.size for name in names for file in self._files(name)}
        if repo is None:
            wanted.update(self._blobs.walk())
        return wanted

    def _files(self, name: TreeId) -> tuple[TreeFile, ...]:
        tree = self._trees.load(name)
        return tree.files if tree else ()

    def _refuse_held(self, repo: Repo, names: Set[TreeId], is_running: Callable[[], bool]) -> None:
        if is_running() or any(name in self._holds for name in names):
            raise InUse(f"{repo} is being fetched", "wait until that is done, then remove it again")
        pins = [pin for name in names for pin in self._pins.holding(name) if not pin.name.startswith(PULLED)]
        if pins:
            who = ", ".join(sorted({f"{pin.name!r} of uid {pin.uid}" for pin in pins})[:3])
            raise InUse(f"{repo} is pinned: {who}", f"modelcache unpin {shlex.quote(pins[0].name)}, then remove it again", pins=len(pins))
        holders = [holder for name in names for holder in self._leases.holders(name)]
        if holders:
            who = ", ".join(
                f"pid {holder.pid} of uid {holder.uid}" + (f" ({holder.purpose})" if holder.purpose else "") for holder in holders[:3]
            )
            raise InUse(
                f"{repo} is in use: {len(holders)} leases, held by {who}",
                "wait until these processes end, then remove it again",
                holders=len(holders),
            )
