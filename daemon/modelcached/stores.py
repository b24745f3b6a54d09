"""The stores this daemon serves: those of its config; a private daemon any of its own user. Opened at first use, closed at the end."""

from __future__ import annotations

from urllib.parse import unquote

from .errors import InvalidRequest, StoreNotAllowed
from .rates import Rate
from .references import References
from .store import Store, check_url, open_store
from .tasks import Pool


class Stores:
    def __init__(
        self, default: str, others: tuple[str, ...], serves_any: bool, pool: Pool, daemon: str, rate: Rate | None = None
    ) -> None:
        self.default = check_url(default)
        self._allowed = (self.default, *map(check_url, others))
        self._serves_any = serves_any
        self._pool = pool
        self._daemon = daemon  # how an error names it
        self._rate = rate or Rate()  # of all of them together
        self._open: dict[str, Store] = {}

    def named(self, url: str | None) -> str:
        """The store a request means; StoreNotAllowed names it and those there are."""
        if url is None:
            return self.default
        spelt = check_url(url)
        if spelt not in self._allowed and not self._serves_any:
            raise StoreNotAllowed(
                f"the daemon on {self._daemon} does not serve the store {spelt}",
                f"it serves {', '.join(self._allowed)}: add it to `stores` in its config, or ask another daemon: MODELCACHE_SOCKET",
            )
        return spelt

    def around(self, url: str) -> tuple[str, str]:
        """The store that a folder's URL leads into, and the folder's name there."""
        spelt = check_url(url)
        found = [store for store in self._allowed if spelt.startswith(f"{store}/")]
        if not found and self._serves_any:
            scheme, _, path = spelt.partition("://")
            found = [spelt.rpartition("/")[0] if scheme == "file" else f"{scheme}://{path.partition('/')[0]}"]
        store = max(found, key=len) if found else self.named(spelt)
        folder = unquote(spelt[len(store) + 1 :])
        if not folder:
            raise InvalidRequest(f"{spelt} is a store, and no folder of one", "name a folder below it")
        return self.named(store), folder

    async def open(self, url: str) -> Store:
        store = self._open.get(url)
        if store is None:
            store = self._open[url] = open_store(url, self._pool, rate=self._rate)
        return store

    async def references(self, url: str) -> References:
        return References(await self.open(url))

    async def close(self) -> None:
        for store in self._open.values():
            await store.close()
