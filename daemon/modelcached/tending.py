"""The verbs of room: pin, unpin, pins, evict, explain. Who may see a tree may pin it and ask why it is here; only owners evict."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from modelcache.protocol import Evict as EvictParams
from modelcache.protocol import Explain, Pin, Pins, Unpin

from . import pins as state
from .config import Config
from .errors import InvalidRequest, LocalEntryNotFound
from .evict import Evict, frees
from .layout import Layout
from .meter import Report
from .model import Caller, Reply, Repo, Tree, TreeId, check_repo, is_digest, is_owner, require_owner
from .references import check_key
from .repos import Repos
from .room import Room
from .spool import Entry
from .stores import Stores
from .tasks import Pool, finished
from .tenants import Tenancy
from .trees import Trees
from .upload import Upload

MAX_TREES = 10_000  # of one pin
Verb = Callable[[Any, Caller, Report], Awaitable[Reply]]


class Tending:
    def __init__(
        self,
        config: Config,
        layout: Layout,
        trees: Trees,
        repos: Repos,
        pins: state.Pins,
        evict: Evict,
        room: Room,
        upload: Upload,
        stores: Stores,
        pool: Pool,
        tree_of: Callable[[Entry], Awaitable[tuple[TreeId, Tree]]],
    ) -> None:
        self._config = config
        self._layout = layout
        self._trees = trees
        self._repos = repos
        self._pins = pins
        self._evict = evict
        self._room = room
        self._upload = upload
        self._stores = stores
        self._pool = pool
        self._tree_of = tree_of
        self.verbs: dict[str, tuple[type, Verb]] = {
            "pin": (Pin, self._pin),
            "pins": (Pins, self._list),
            "unpin": (Unpin, self._unpin),
            "evict": (EvictParams, self._do_evict),
            "explain": (Explain, self._explain),
        }

    async def _pin(self, params: Pin, caller: Caller, report: Report) -> Reply:
        if params.seconds is not None and not 0 < params.seconds < 1e10:
            raise InvalidRequest(f"a pin can't last {params.seconds:g} s", "longer than 0; leave it out for a pin that does not expire")
        what, names = await self._named(params, caller)
        if params.trees:
            names = [name for name in names if name in params.trees]
        if not names or len(names) > MAX_TREES:
            raise LocalEntryNotFound(f"nothing of {what} that could be pinned is on this node", "fetch it first: modelcache pull, or load")
        pin, keep = self._pins.put(params.name or what, what, tuple(names), caller, params.seconds)
        await finished(self._pool.run(keep))
        return Reply(_plain(pin))

    async def _unpin(self, params: Unpin, caller: Caller, report: Report) -> Reply:
        await finished(self._pool.run(self._pins.remove(params.name, caller)))
        return Reply({})

    async def _list(self, params: Pins, caller: Caller, report: Report) -> Reply:
        own = [pin for pin in self._pins.all() if is_owner(caller) or pin.uid == caller.uid]
        return Reply({"pins": [_plain(pin) for pin in own]})

    async def _do_evict(self, params: EvictParams, caller: Caller, report: Report) -> Reply:
        require_owner(caller, "evict")
        if params.size_bytes is not None and params.size_bytes < 0:
            raise InvalidRequest("a size is not negative")
        disk = await self._room.disk()
        budget = await self._room.excess(at_once=True) if params.size_bytes is None else max(0, disk.used - params.size_bytes)
        evicted = await self._evict.free(budget, params.dry_run)
        whats = await self._pool.run(self._whats, caller)
        victims = [
            {
                "tree": entry.tree,
                "what": whats.get(entry.tree, ""),
                "last_used": entry.last_used,
                "again": entry.again,
                "frees_bytes": frees([entry]),
            }
            for entry in evicted.victims
        ]
        return Reply(
            {
                "dry_run": params.dry_run,
                "used_bytes": disk.used,
                "freed_bytes": evicted.freed,
                "leftovers": len(evicted.leftovers),
                "victims": victims,
            }
        )

    async def _explain(self, params: Explain, caller: Caller, report: Report) -> Reply:
        what, names = await self._named(params, caller)
        found = await self._evict.explain(names)
        if not found:
            raise LocalEntryNotFound(f"nothing of {what} is on this node", "see what is: modelcache ls")
        whats = {} if params.key is not None else await self._pool.run(self._whats, caller)
        told = []
        for entry, held, tree in found:
            told.append(
                {
                    "tree": entry.tree,
                    "what": whats.get(entry.tree, params.key or ""),
                    "path": str(self._trees.view(entry.tree)),
                    "files": len(tree.files),
                    "size_bytes": tree.size,
                    "frees_bytes": frees([entry]),
                    "last_used": entry.last_used,
                    "again": entry.again,
                    "held": [_told(each, caller) for each in held],
                }
            )
        return Reply({"trees": told})

    async def _named(self, params: Pin | Explain, caller: Caller) -> tuple[str, list[TreeId]]:
        """What is meant, in words, and those of its trees that the caller may enter (I8)."""
        path = getattr(params, "path", None)
        if sum(each is not None for each in (params.repo_id, params.key, path)) != 1:
            raise InvalidRequest("what is meant is not clear", "name a repo, or a key, or a path")
        if path is not None:
            what, names = path, self._at(path)
        elif params.key is not None:
            what, names = params.key, await self._kept(params.key, params.store, caller)
        else:
            repo = check_repo(self._config.endpoint(params.endpoint), params.repo_type, params.repo_id or "")
            what = str(repo) if params.revision is None else f"{repo}@{params.revision}"
            names = await self._pool.run(self._shown, repo, params.revision) if self._repos.may_know(repo, caller) else []
        visible = [name for name in names if is_owner(caller) or self._trees.may_enter(name, caller)]
        if not visible:
            raise LocalEntryNotFound(f"nothing of {what} is on this node", "see what is: modelcache ls")
        return what, visible

    def _at(self, path: str) -> list[TreeId]:
        """The tree whose view a path lies in. Nothing is opened: the name says it (I7)."""
        below = os.path.relpath(os.path.normpath(path), self._layout.views)
        first = Path(below).parts[:1]
        return [TreeId(first[0])] if first and is_digest(first[0]) else []

    async def _kept(self, key: str, store: str | None, caller: Caller) -> list[TreeId]:
        url = self._stores.named(store)
        entry = self._upload.find(check_key(key), url, caller)
        if entry is not None:
            return [(await self._tree_of(entry))[0]]
        return [(await (await self._stores.references(url)).get(key)).tree]

    def _shown(self, repo: Repo, revision: str | None) -> list[TreeId]:
        commits = {ref.commit for name, ref in self._repos.refs(repo).items() if name == revision} | {revision}
        return [name for name, selected in self._repos.shown(repo).items() if revision is None or selected.commit in commits]

    def _whats(self, caller: Caller) -> dict[str, str]:
        """Which repo a tree shows, of those that the caller may know of (blocks)."""
        return {
            name: f"{repo}@{selected.commit[:8]}"
            for repo, _ in self._repos.known()
            if self._repos.may_know(repo, caller)
            for name, selected in self._repos.shown(repo).items()
        }


def _plain(pin: state.Pin) -> dict[str, Any]:
    return dict(msgspec.to_builtins(pin))


def _told(tenancy: Tenancy, caller: Caller) -> dict[str, Any]:
    """Names are for whoever gave them (I8)."""
    name = tenancy.name if is_owner(caller) or tenancy.uid == caller.uid else ""
    return {"kind": tenancy.kind, "who": tenancy.who, "name": name, "since": tenancy.since, "until": tenancy.until}
