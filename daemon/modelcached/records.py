"""Hub records: what a store knows of repos that its nodes fetched from the hub, so that a fleet asks the hub once.

repos/<endpoint>/<type>--<id>/visibility.json        who may have it
repos/<endpoint>/<type>--<id>/refs/<revision>        what a branch or tag pointed to, and when the hub said so
repos/<endpoint>/<type>--<id>/<commit>.json          all files of a commit
repos/<endpoint>/<type>--<id>/<commit>/<tree>.json   a tree that shows files of it, and as what they were asked for

They expire unless they are used: nodes put again what they use, and the garbage collection goes by the store's own time.
"""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import quote

import msgspec

from .errors import MissingObject, UnsafePath
from .layout import repo_folder
from .model import Commit, Listing, Repo, TreeId, check_paths, is_commit, is_digest, listing_json
from .repos import Ref, Selected, Visibility, ref_json, visibility_json
from .store import Store

RECORD_FORMAT = 1
MAX_SMALL_BYTES = 1 << 20
MAX_LISTING_BYTES = 256 << 20
MOST_TREES = 256  # of one commit that are looked at, the newest
T = TypeVar("T")


class _TreeJson(msgspec.Struct):
    tree: str
    selected: Selected | None
    endpoint: str
    type: str
    id: str
    format: int = RECORD_FORMAT


class HubRecords:
    """The hub records of one store. What can't be read counts as not there."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def visibility(self, repo: Repo) -> Visibility | None:
        return await self._read(_visibility_key(repo), MAX_SMALL_BYTES, visibility_json)

    async def put_visibility(self, repo: Repo, seen: Visibility) -> None:
        await self._store.put(_visibility_key(repo), msgspec.json.encode(seen))

    async def ref(self, repo: Repo, revision: str) -> Ref | None:
        ref = await self._read(_ref_key(repo, revision), MAX_SMALL_BYTES, ref_json)
        return ref if ref is not None and is_commit(ref.commit) else None

    async def put_ref(self, repo: Repo, revision: str, ref: Ref) -> None:
        await self._store.put(_ref_key(repo, revision), msgspec.json.encode(ref))

    async def listing(self, repo: Repo, commit: Commit) -> Listing | None:
        listing = await self._read(_listing_key(repo, commit), MAX_LISTING_BYTES, listing_json)
        if listing is None or listing.commit != commit:
            return None
        try:
            check_paths([file.path for file in listing.files], str(repo))
        except UnsafePath:
            return None
        return listing

    async def put_listing(self, repo: Repo, listing: Listing) -> None:
        await self._store.put(_listing_key(repo, Commit(listing.commit)), msgspec.json.encode(listing))

    async def trees(self, repo: Repo, commit: Commit) -> list[TreeId]:
        """Trees that show files of a commit."""
        found = [each async for each in self._store.list(_tree_folder(repo, commit))]
        found.sort(key=lambda each: each.modified, reverse=True)
        names = (each.key.rpartition("/")[2].removesuffix(".json") for each in found[:MOST_TREES])
        return [TreeId(name) for name in names if is_digest(name)]

    async def tree_age(self, repo: Repo, commit: Commit, tree: TreeId) -> float | None:
        """Seconds since the record was last put, by the store's clock; None if there is none."""
        found = await self._store.head(_tree_key(repo, commit, tree))
        return None if found is None else await self._store.now() - found.modified

    async def put_tree(self, repo: Repo, commit: Commit, tree: TreeId, selected: Selected | None) -> None:
        """It keeps collections away from the tree, which may be on its way to the store still."""
        await self._store.put(_tree_key(repo, commit, tree), msgspec.json.encode(_TreeJson(tree, selected, *repo)))

    async def _read(self, key: str, most_bytes: int, decoder: msgspec.json.Decoder[T]) -> T | None:
        try:
            return decoder.decode(await self._store.get(key, most_bytes))
        except (MissingObject, msgspec.MsgspecError):
            return None


def _folder(repo: Repo) -> str:
    return f"repos/{repo_folder(repo)}"


def _visibility_key(repo: Repo) -> str:
    return f"{_folder(repo)}/visibility.json"


def _ref_key(repo: Repo, revision: str) -> str:
    return f"{_folder(repo)}/refs/{quote(revision, safe='')}"


def _listing_key(repo: Repo, commit: Commit) -> str:
    return f"{_folder(repo)}/{commit}.json"


def _tree_folder(repo: Repo, commit: Commit) -> str:
    return f"{_folder(repo)}/{commit}/"


def _tree_key(repo: Repo, commit: Commit, tree: TreeId) -> str:
    return f"{_tree_folder(repo, commit)}{tree}.json"
