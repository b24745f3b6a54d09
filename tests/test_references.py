"""References and the records of trees: what is written is read again, and what can't be right is an error with a name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcached.errors import IncompatibleReference, InvalidRequest, ReferenceNotFound, StoreProblem
from modelcached.model import Digest, Tree, TreeFile, TreeId
from modelcached.packs import Pack, Packed
from modelcached.references import (
    MAX_REFERENCE_BYTES,
    References,
    check_key,
    encode_pending,
    encode_record,
    encode_reference,
    pending_key,
    reference_key,
    tree_key,
)
from modelcached.store import Store, open_store
from modelcached.tasks import Pool

from .saves import key_of

A = Digest(hashlib.sha256(b"a").hexdigest())
TREE = Tree(
    (TreeFile("a", 1, A), TreeFile("b/c.sh", 700_000, Digest("b" * 64), True)), (("b/link", "../a"), ("dangling", "not/there")), ("empty",)
)
PACKS = (Pack(Digest("c" * 64), 2048, (Packed("a", 512, 1),)),)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool("test", 2)
    yield pool
    pool.close()


@pytest.fixture
async def store(tmp_path: Path, pool: Pool) -> AsyncIterator[Store]:
    store = open_store(f"file://{tmp_path}/store", pool)
    yield store
    await store.close()


@pytest.mark.parametrize(
    "key",
    [
        "mf.models/models/artifacts/a.b.c_0123",
        "mf.checkpoints/checkpoints/artifacts/Flow/step/scope/1/abcd1234.0.na.me.3.20250101T000000000000-00000000",
        "ünï/çode",
        "k",
    ],
)
def test_keys(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.", "a\nb", "a\0", "a\x7f", "k" * 250, "k/" * 500, "\ud800"])
def test_no_keys(key: str) -> None:
    with pytest.raises(InvalidRequest, match="is no key"):
        check_key(key)


async def test_what_is_written_is_read(store: Store, pool: Pool) -> None:
    references, name = References(store), TREE.tree_id()
    reference = {"key": key_of("x"), "type": "model", "metadata": {"deep": [1, {"ä": None}], "big": 2**60, "float": 1e300}}
    await store.put(tree_key(name), encode_record(TREE, PACKS))
    await store.put(reference_key(key_of("x")), encode_reference(reference, name))
    assert await references.get(key_of("x")) == (reference, name)
    assert await references.record(name, pool) == (TREE, PACKS)
    await references.delete(key_of("x"))
    for attempt in (references.get, references.delete):
        with pytest.raises(ReferenceNotFound) as caught:
            await attempt(key_of("x"))
        assert caught.value.data == {"key": key_of("x")} and "ls --store" in caught.value.hint


def test_the_name_of_a_tree_is_its_digest() -> None:
    record = json.loads(encode_record(TREE, PACKS))
    canonical = json.dumps(record["tree"], separators=(",", ":"), ensure_ascii=False).encode()
    assert hashlib.sha256(canonical).hexdigest() == TREE.tree_id()
    assert record["packs"] == [{"sha256": "c" * 64, "size": 2048, "files": [["a", 512, 1]]}]


async def test_a_listing(store: Store) -> None:
    for name in ("one", "two", "three", "other"):
        await store.put(reference_key(f"models/{name}"), encode_reference({"key": f"models/{name}"}, TREE.tree_id()))
    await store.put(reference_key("models/newer"), json.dumps({"format": 2}).encode())
    await store.put(reference_key("models/damaged"), b"{")
    await store.put(pending_key("models/pending"), encode_pending({"key": "models/pending", "size": 1}, "node"))
    references = References(store)
    assert sorted([kept.reference["key"] for kept in await references.all("models/")]) == [
        f"models/{n}" for n in ("one", "other", "three", "two")
    ]
    assert sorted([kept.reference["key"] for kept in await references.all("models/o")]) == ["models/one", "models/other"]
    assert await references.all("nothing/") == []
    with pytest.raises(InvalidRequest):
        await references.all("../")
    for name in ("newer", "damaged"):  # they can't be read, and can be taken away
        with pytest.raises(IncompatibleReference):
            await references.get(f"models/{name}")
        await references.delete(f"models/{name}")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"\xff",
        json.dumps({"format": 2, "reference": {"key": "k"}, "tree": "a" * 64}).encode(),
        json.dumps({"format": 1, "reference": {"key": "k"}, "tree": "../../x"}).encode(),
        json.dumps({"format": 1, "reference": {"key": "another"}, "tree": "a" * 64}).encode(),
        json.dumps({"format": 1, "reference": {}, "tree": "a" * 64}).encode(),
        json.dumps({"format": 1, "reference": {"key": "k"}}).encode(),
    ],
)
async def test_references_that_cannot_be_read(store: Store, raw: bytes) -> None:
    await store.put(reference_key("k"), raw)
    said = "of a newer version" if b'"format": 2' in raw else "is damaged"
    with pytest.raises(IncompatibleReference, match=said) as caught:
        await References(store).get("k")
    assert "upgrade the daemon" in caught.value.hint
    assert caught.value.data == {"key": "k"}


async def test_a_reference_without_end(store: Store) -> None:
    await store.put(reference_key("k"), bytes(MAX_REFERENCE_BYTES + 1))
    with pytest.raises(StoreProblem, match="more than"):
        await References(store).get("k")


def edited(**more: Any) -> bytes:
    return json.dumps(json.loads(encode_record(TREE, PACKS)) | more).encode()


def bad(*files: TreeFile, links: tuple[tuple[str, str], ...] = (), folders: tuple[str, ...] = ()) -> Tree:
    return Tree(files, links, folders)


@pytest.mark.parametrize(
    ("tree", "packs"),
    [
        pytest.param(bad(TreeFile("a", 1, Digest("../../etc/passwd"))), (), id="no digest"),
        pytest.param(bad(TreeFile("a", -1, A)), (), id="a negative size"),
        pytest.param(bad(TreeFile("../a", 1, A)), (), id="a file that leads out"),
        pytest.param(bad(links=(("../l", "a"),)), (), id="a link outside"),
        pytest.param(bad(links=(("l", "../a"),)), (), id="a link that leads out"),
        pytest.param(bad(links=(("l", "/etc"),)), (), id="an absolute link"),
        pytest.param(bad(links=(("d/up", ".."), ("out", "d/up/.."))), (), id="a link that leads out over another"),
        pytest.param(bad(folders=("../d",)), (), id="a folder outside"),
        pytest.param(bad(TreeFile("a", 1, A), links=(("a", "b"),)), (), id="a file and a link"),
        pytest.param(TREE, (Pack(Digest("../x"), 2048, ()),), id="a pack without digest"),
        pytest.param(TREE, (Pack(A, 2048, (Packed("a", 2048, 1),)),), id="behind the pack's end"),
        pytest.param(TREE, (Pack(A, 2048, (Packed("a", -1, 1),)),), id="before the pack's start"),
        pytest.param(TREE, (Pack(A, 2048, (Packed("a", 0, 2),)),), id="another size than in the tree"),
        pytest.param(TREE, (Pack(A, 2048, (Packed("z", 0, 1),)),), id="a file that is not in the tree"),
    ],
)
async def test_records_that_cannot_be_right(store: Store, pool: Pool, tree: Tree, packs: tuple[Pack, ...]) -> None:
    name = tree.tree_id()
    await store.put(tree_key(name), encode_record(tree, packs))
    with pytest.raises(IncompatibleReference, match="missing or damaged"):
        await References(store).record(name, pool)


async def test_records_that_are_damaged(store: Store, pool: Pool) -> None:
    name = TREE.tree_id()
    for raw in (b"", edited()[:-5], edited(tree={"files": [], "folders": [], "links": []}), edited(packs=3)):
        await store.put(tree_key(name), raw)
        with pytest.raises(IncompatibleReference):
            await References(store).record(name, pool)
    with pytest.raises(IncompatibleReference):
        await References(store).record(TreeId("d" * 64), pool)


def test_what_others_are_told_of_a_save_on_its_way() -> None:
    told = json.loads(
        encode_pending({"key": "k", "created_on": "2025-01-01T00:00:00+00:00", "size": 7, "metadata": {"secret": 1}}, "node-1")
    )
    assert (told["key"], told["node"], told["size"], told["created_on"]) == ("k", "node-1", 7, "2025-01-01T00:00:00+00:00")
    assert "metadata" not in told and math.isfinite(told["format"])
