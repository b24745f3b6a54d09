"""Tenants: who holds a tree on this node: leases, pins, saves on their way, flights, the grace after the last lease (I4).

Also where a tree can be had again. `all` is a picture of one moment; `holding` is asked in the step that takes a tree away.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .holds import Holds
from .layout import Layout
from .leases import Leases
from .model import TreeId, is_digest
from .pins import Pins
from .repos import Repos
from .spool import Spool
from .tasks import Pool
from .trees import Trees, age


class Tenancy(NamedTuple):
    """One reason why a tree stays."""

    kind: str  # "lease", "pin", "spool", "flight" or "grace"
    who: str = ""  # a process or a uid: what everybody may know
    since: float = 0.0  # seconds since the epoch; 0: unknown
    until: float | None = None  # None: until somebody ends it
    name: str = ""  # of the pin, key of the save, purpose of the lease: for its owner
    uid: int = -1


class Tenants:
    """`_saved` remembers the trees of spool entries; only the event loop touches it."""

    def __init__(
        self,
        layout: Layout,
        trees: Trees,
        repos: Repos,
        leases: Leases,
        pins: Pins,
        spool: Spool,
        holds: Holds,
        pool: Pool,
        grace_seconds: float,
        is_offline: bool,
        is_shared: Callable[[TreeId], bool],
    ) -> None:
        self._layout = layout
        self._trees = trees
        self._repos = repos
        self._leases = leases
        self._pins = pins
        self._spool = spool
        self._holds = holds
        self._pool = pool
        self._grace_seconds = grace_seconds
        self._is_offline = is_offline
        self._is_shared = is_shared
        self._saved: dict[str, TreeId] = {}
        self._of_hub: set[TreeId] = set()

    async def all(self) -> Mapping[TreeId, list[Tenancy]]:
        """Every tree that somebody holds."""
        held: dict[TreeId, list[Tenancy]] = {}

        def add(name: TreeId, tenancy: Tenancy) -> None:
            held.setdefault(name, []).append(tenancy)

        for name, holders in (await self._pool.run(self._leases.held)).items():
            for holder in holders:
                add(name, Tenancy("lease", f"pid {holder.pid} of uid {holder.uid}", holder.start, None, holder.purpose, holder.uid))
        for pin in self._pins.all():
            for tree in pin.trees:
                add(TreeId(tree), Tenancy("pin", f"uid {pin.uid}", pin.created, pin.expires, pin.name, pin.uid))
        for name, tenancy in self._spooled():
            add(name, tenancy)
        used, self._of_hub = await self._pool.run(lambda: (self._used(), self._shown()))
        now = time.time()
        for name, moment in used.items():
            if name in self._holds:
                add(name, Tenancy("flight"))
            if age(moment, now) < self._grace_seconds:
                add(name, Tenancy("grace", since=moment, until=moment + self._grace_seconds))
        return held

    def holding(self, name: TreeId, since: float, is_save: bool = False) -> bool:
        """Whether somebody holds the tree, or used it after `since`: asked on the loop, without an await to what follows from it."""
        if name in self._holds or self._pins.holding(name) or self._leases.holders(name):
            return True
        if any(tree == name for tree, _ in self._spooled()):
            return True
        try:
            used = self._trees.last_used(name)
        except FileNotFoundError:
            return True  # it went with something else
        return used != since or (not is_save and age(used, time.time()) < self._grace_seconds)

    def again(self, name: TreeId) -> str:
        """Where a tree can be fetched again, as far as this node knows: "store", "hub" or "" (nowhere)."""
        if name not in self._of_hub or self._is_shared(name):
            return "store"  # a save leaves the spool only when the store has it, and a load came from there
        return "" if self._is_offline else "hub"

    def _used(self) -> dict[TreeId, float]:
        """When each tree was used last (blocks)."""
        found = {}
        for name in self._trees.names():
            with contextlib.suppress(FileNotFoundError):
                found[name] = self._trees.last_used(name)
        return found

    def _shown(self) -> set[TreeId]:
        """Trees that show files of repos (blocks)."""
        return {name for repo, _ in self._repos.known() for name in self._repos.shown(repo)}

    def _spooled(self) -> list[tuple[TreeId, Tenancy]]:
        entries = {entry.id: entry for entry in self._spool.entries}
        self._saved = {name: tree for name, tree in self._saved.items() if name in entries}
        for name, entry in entries.items():
            tree = None if name in self._saved else self._spool.tree(entry)
            if tree is not None:
                self._saved[name] = tree
        found = [(tree, entries[name]) for name, tree in self._saved.items()]
        waiting = [(tree, Tenancy("spool", f"uid {entry.uid}", entry.created, None, entry.key, entry.uid)) for tree, entry in found]
        return waiting + [(tree, Tenancy("spool", "set aside", name=f"spool/corrupt/{name}")) for name, tree in self._corrupt()]

    def _corrupt(self) -> list[tuple[str, TreeId]]:
        """Saves that were set aside: what is left of them exists only here."""
        found = []
        for name in self._spool.corrupt():
            try:
                tree = (self._layout.corrupt / name / "tree").read_text()
            except OSError:
                continue
            if is_digest(tree):
                found.append((name, TreeId(tree)))
        return found
