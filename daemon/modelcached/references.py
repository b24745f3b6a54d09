"""What the store knows of saves: references by key, and the records of their trees. The only place that names its objects.

blobs/sha256/ab/<sha256>     plain bytes; packs are blobs too
trees/<tree>.json            the tree, and which packs hold which of its files
refs/<key>.json              a reference and its tree
refs/<key>.pending           a save that is on its way: node, time, size, and its tree as soon as that is known
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from .errors import IncompatibleReference, InvalidRequest, MissingObject, ReferenceNotFound, UnsafePath
from .model import Digest, Tree, TreeId, decode_tree, is_digest
from .packs import Pack, Packed
from .store import Store
from .store.contract import check_key as check_store_key
from .tasks import Pool, each

REFERENCE_FORMAT = 1
MAX_REFERENCE_BYTES = 1 << 20
MAX_TREE_BYTES = 256 << 20
# What a pending record says of a save: who may wait for it decides by these.
PENDING_FIELDS = (
    "key", "type", "name", "label", "created_on", "size", "files", "save_id",
    "pathspec", "attempt", "latest", "foreach_index", "node_index",
)  # fmt: skip
READ_AT_ONCE = 32  # references, for a listing


class Kept(NamedTuple):
    """A reference as the store has it."""

    reference: dict[str, Any]
    tree: TreeId


class Record(NamedTuple):
    """A tree as the store has it."""

    tree: Tree
    packs: tuple[Pack, ...]

    @property
    def blobs(self) -> set[Digest]:
        """What has to be in the store for it: packs, and the files that are in none."""
        packed = {file.path for pack in self.packs for file in pack.files}
        return {pack.sha256 for pack in self.packs} | {file.sha256 for file in self.tree.files if file.path not in packed}


class _KeptJson(msgspec.Struct):
    format: int
    reference: dict[str, Any]
    tree: str


class _PendingJson(msgspec.Struct):
    format: int
    key: str
    node: str = ""
    created_on: str = ""
    save_id: str = ""


class _NamingJson(msgspec.Struct):
    format: int
    tree: str | None = None


class _PackJson(msgspec.Struct):
    sha256: str
    size: int
    files: list[tuple[str, int, int]]


class _RecordJson(msgspec.Struct):
    tree: msgspec.Raw
    packs: list[_PackJson]


_kept_json = msgspec.json.Decoder(_KeptJson)
_pending_json = msgspec.json.Decoder(_PendingJson)
_naming_json = msgspec.json.Decoder(_NamingJson)
_record_json = msgspec.json.Decoder(_RecordJson)


def check_key(key: str) -> str:
    """A key whose objects' names every store takes; InvalidRequest says what one looks like."""
    try:
        check_store_key(key)
        check_store_key(pending_key(key))
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{key[:200]!r} is no key: {error.message}", "a key is what a save returned as `key`, e.g. mf.models/models/artifacts/..."
        ) from None
    return key


def blob_key(digest: Digest) -> str:
    return f"blobs/sha256/{digest[:2]}/{digest}"


def tree_key(tree: TreeId) -> str:
    return f"trees/{tree}.json"


def reference_key(key: str) -> str:
    return f"refs/{key}.json"


def pending_key(key: str) -> str:
    return f"refs/{key}.pending"


def encode_record(tree: Tree, packs: tuple[Pack, ...]) -> bytes:
    listed = [{"sha256": pack.sha256, "size": pack.size, "files": [list(file) for file in pack.files]} for pack in packs]
    return msgspec.json.encode({"tree": msgspec.Raw(tree.encode()), "packs": listed})


def encode_reference(reference: dict[str, Any], tree: TreeId) -> bytes:
    return msgspec.json.encode({"format": REFERENCE_FORMAT, "reference": reference, "tree": tree})


def encode_pending(reference: dict[str, Any], node: str, tree: TreeId | None = None) -> bytes:
    """`tree` as soon as it is known: a garbage collection leaves it alone then."""
    known = {name: reference[name] for name in PENDING_FIELDS if name in reference}
    return msgspec.json.encode({"format": REFERENCE_FORMAT, "node": node, **known, "tree": tree})


def named_tree(raw: bytes) -> TreeId | None:
    """The tree that any record but a tree's own names: a reference, a pending save, a hub record. ValueError if it can't be read."""
    try:
        read = _naming_json.decode(raw)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    if read.format > REFERENCE_FORMAT or not (read.tree is None or is_digest(read.tree)):
        raise ValueError("of a newer format")
    return None if read.tree is None else TreeId(read.tree)


def decode_record(raw: bytes, name: TreeId) -> Record:
    """A tree's record; IncompatibleReference if it is not sound."""
    try:
        read = _record_json.decode(raw)
        tree = decode_tree(bytes(read.tree), name)
        packs = tuple(Pack(Digest(pack.sha256), pack.size, tuple(Packed(*file) for file in pack.files)) for pack in read.packs)
        _check_packs(tree, packs)
    except (msgspec.MsgspecError, UnsafePath, ValueError) as error:
        raise _no_record(name) from error
    return Record(tree, packs)


class References:
    """The references of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, key: str) -> Kept:
        """ReferenceNotFound, or IncompatibleReference if it is there and can't be read."""
        try:
            raw = await self._store.get(reference_key(key), MAX_REFERENCE_BYTES)
        except MissingObject:
            raise _not_found(key) from None
        return _kept(raw, key)

    async def get_late(self, key: str, is_hidden: Callable[[str], bool]) -> Kept:
        """What `get` did not find, if it has arrived by now. ReferenceNotFound has `pending` in its data if a node is bringing it,
        unless that save's id is one that nobody is to be told of."""
        try:
            record: _PendingJson | None = _pending_json.decode(await self._store.get(pending_key(key), MAX_REFERENCE_BYTES))
        except (MissingObject, msgspec.MsgspecError):
            record = None
        if record is not None and is_hidden(record.save_id):
            record = None
        try:  # only now: who brings it takes the record away when the reference is there
            return await self.get(key)
        except ReferenceNotFound:
            if record is None or record.key != key:
                raise
            raise ReferenceNotFound(
                f"{key} is not in the store yet: node {record.node} has been bringing it since {record.created_on}",
                f"it is there as soon as that node's daemon has sent it: modelcache status on {record.node} says what holds it up",
                key=key,
                pending={"node": record.node, "created_on": record.created_on},
            ) from None

    async def record(self, name: TreeId, pool: Pool) -> Record:
        """A tree's record; IncompatibleReference if it is not there, or not sound. A large one takes long to read: a thread does it."""
        try:
            raw = await self._store.get(tree_key(name), MAX_TREE_BYTES)
        except MissingObject as error:
            raise _no_record(name) from error
        return await pool.run(decode_record, raw, name)

    async def all(self, prefix: str, is_wanted: Callable[[str], bool] = lambda key: True) -> list[Kept]:
        """Every readable reference whose key begins so and is wanted, in no order."""
        return (await self.listed(prefix, is_wanted))[0]

    async def listed(self, prefix: str, is_wanted: Callable[[str], bool]) -> tuple[list[Kept], list[dict[str, Any]]]:
        """The same, and the pending records that have no reference yet: saves that some node is bringing, or died with."""
        names = [found.key.removeprefix("refs/") async for found in self._store.list(f"refs/{prefix}")]
        there = {key for name in names if (key := name.removesuffix(".json")) != name and is_wanted(key)}
        awaited = {key for name in names if (key := name.removesuffix(".pending")) != name and is_wanted(key)} - there
        found: list[Kept] = []
        pending: list[dict[str, Any]] = []

        async def read(key: str) -> None:
            try:
                found.append(await self.get(key))
            except (ReferenceNotFound, IncompatibleReference):  # deleted meanwhile, or of a newer daemon
                pass

        async def read_pending(key: str) -> None:
            with contextlib.suppress(MissingObject, ValueError):  # it has arrived meanwhile, or is damaged
                raw = await self._store.get(pending_key(key), MAX_REFERENCE_BYTES)
                if _pending_json.decode(raw).key == key:
                    pending.append(msgspec.json.decode(raw))

        await each(sorted(there), read, READ_AT_ONCE)
        await each(sorted(awaited), read_pending, READ_AT_ONCE)
        return found, pending

    async def delete(self, key: str) -> None:
        """Takes the reference away, readable or not. ReferenceNotFound if there is none."""
        if await self._store.head(reference_key(key)) is None:
            raise _not_found(key)
        await self._store.delete(reference_key(key))


def _no_record(name: TreeId) -> IncompatibleReference:
    return IncompatibleReference(f"the store's record of tree {name[:12]} is missing or damaged", "save it again", tree=name)


def _not_found(key: str) -> ReferenceNotFound:
    return ReferenceNotFound(f"no save has the key {key}", "it was deleted, or belongs to another store: modelcache ls --store", key=key)


def _check_packs(tree: Tree, packs: tuple[Pack, ...]) -> None:
    """ValueError if the index can't be right."""
    sizes = {file.path: file.size for file in tree.files}
    for pack in packs:
        if not is_digest(pack.sha256):
            raise ValueError("a pack has no digest")
        for file in pack.files:
            if sizes.get(file.path) != file.size or file.offset < 0 or file.offset + file.size > pack.size:
                raise ValueError(f"{file.path!r} can't lie where the index says")


def _kept(raw: bytes, key: str) -> Kept:
    try:
        read = _kept_json.decode(raw)
        if read.format > REFERENCE_FORMAT:
            raise IncompatibleReference(
                f"the reference {key} is of a newer version (format {read.format})", "upgrade the daemon, or save again", key=key
            )
        if not is_digest(read.tree) or read.reference.get("key") != key:
            raise ValueError("not what was written")
    except (msgspec.MsgspecError, ValueError) as error:
        raise IncompatibleReference(
            f"the reference {key} is damaged in the store", "upgrade the daemon if a newer one wrote it, or save again", key=key
        ) from error
    return Kept(read.reference, TreeId(read.tree))
