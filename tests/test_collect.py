"""`gc-store`: what goes, what stays, what stops it, and who may. Saves that go on meanwhile: test_collect_races.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import IncompatibleReferenceError, InUseError, InvalidRequestError, StoreNotAllowedError
from modelcached.collect import Collect
from modelcached.errors import InUse, StoreProblem
from modelcached.gc_claim import KEY, Rounds, claimed
from modelcached.store import Object, open_store
from modelcached.store.file import FileStore
from modelcached.store.open import LIMITS
from modelcached.tasks import Pool

from .clients import Client
from .conftest import as_uid
from .daemon import Daemon
from .hub import Random
from .liar import Liar
from .saves import MIB, Tree, Wire, contents, hashes, in_bucket, in_folder, key_of, until, wired
from .seaweed import SeaweedFS
from .test_cli import run

pytestmark = pytest.mark.timeout(90)

UID = 1500
WAIT_SECONDS = 60.0
DAYS = 86400.0
COMMIT = "0123456789abcdef0123456789abcdef01234567"
X, Y, Z = (Random(name, MIB) for name in "XYZ")
ONE: Tree = {"x.bin": X, "config.json": b"1"}
TWO: Tree = {"x.bin": X, "y.bin": Y, "config.json": b"2"}


class Private(Daemon):
    program = ("-c", "import sys; from modelcached.command import main; sys.exit(main([*sys.argv[1:], '--private']))")


class Hasty(Daemon):
    """For it, another's claim is stale after a second."""

    program = (
        "-c",
        "import sys; from modelcached import command, gc_claim; gc_claim.STALE_SECONDS = 1.0; sys.exit(command.main())",
    )


class World:
    """A store in a folder, and a connection to a daemon that serves it."""

    def __init__(self, daemon: Daemon, wire: Wire, folder: Path) -> None:
        self.daemon = daemon
        self.wire = wire
        self.folder = folder
        self.url = f"file://{folder}"

    def save(self, **trees: Tree) -> None:
        for name, tree in trees.items():
            self.wire.save(name, tree, storage_format="tar" if name.startswith("tar") else "files", store=self.url)
        assert self.wire.flush(WAIT_SECONDS)["pending"] == []

    def delete(self, *names: str) -> None:
        for name in names:
            self.wire.request("delete", key=key_of(name), store=self.url)

    def collect(self, **more: Any) -> dict[str, Any]:
        return collect(self.wire, store=self.url, **more)

    @property
    def objects(self) -> set[str]:
        return {key for key in in_folder(self.folder)[0] if not key.startswith(".modelcached/")}

    def age(self, *keys: str, days: float = 8) -> None:
        for key in keys or self.objects:
            os.utime(self.folder / key, (time.time() - days * DAYS,) * 2)

    def put(self, key: str, content: bytes = b"{}", days: float = 8) -> str:
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / key).write_bytes(content)
        self.age(key, days=days)
        return key

    def named_by(self, name: str) -> set[str]:
        """The reference, its tree, and what that needs."""
        tree = json.loads((self.folder / f"refs/{key_of(name)}.json").read_bytes())["tree"]
        record = json.loads((self.folder / f"trees/{tree}.json").read_bytes())
        packed = {file[0] for pack in record["packs"] for file in pack["files"]}
        digests = {pack["sha256"] for pack in record["packs"]} | {file[2] for file in record["tree"]["files"] if file[0] not in packed}
        return {f"refs/{key_of(name)}.json", f"trees/{tree}.json"} | {f"blobs/sha256/{digest[:2]}/{digest}" for digest in digests}

    def contents(self) -> dict[str, dict[str, str]]:
        return contents(*in_folder(self.folder))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Private.start(tmp_path_factory.mktemp("collect") / "root") as daemon:
        yield daemon


@pytest.fixture
def world(daemon: Daemon, tmp_path: Path) -> Iterator[World]:
    with wired(daemon.socket) as wire:
        yield World(daemon, wire, tmp_path / "store")


def collect(wire: Wire, **more: Any) -> dict[str, Any]:
    collected: dict[str, Any] = wire.request("gc_store", **more)
    return collected


def blob(content: bytes | Random) -> str:
    (digest,) = hashes({"": content}).values()
    return f"blobs/sha256/{digest[:2]}/{digest}"


def tree_of(keys: set[str]) -> str:
    (tree,) = (key.removeprefix("trees/").removesuffix(".json") for key in keys if key.startswith("trees/"))
    return tree


# ---- what goes, and what stays


def test_what_nothing_names_goes_when_it_is_old(world: World) -> None:
    world.save(one=ONE, two=TWO, tar={"z.bin": Z, "a": b"a"}, tar_gone={"z.bin": Z, "b": b"b"}, empty={}, none={"zero": b""})
    stay = world.named_by("one") | world.named_by("tar") | world.named_by("empty") | world.named_by("none")
    gone = world.named_by("two") | world.named_by("tar_gone")
    world.delete("two", "tar_gone")
    there = world.objects

    assert world.collect()["deleted"] == {kind: {"objects": 0, "bytes": 0} for kind in ("blobs", "trees", "repos", "pending")}
    assert world.objects == there  # everything is younger than a week
    world.age()
    young = world.put(blob(b"young"), b"young", days=6.9)
    garbage = sorted(key for key in there - stay if not key.startswith("refs/"))
    sizes = {kind: [(world.folder / key).stat().st_size for key in garbage if key.startswith(kind)] for kind in ("blobs", "trees")}

    plan = world.collect(dry_run=True)
    assert sorted(plan["keys"]) == garbage and plan["dry_run"] and world.objects == there | {young}
    assert not (world.folder / KEY).exists()
    collected = world.collect()
    assert world.objects == stay | {young} and not gone - stay & world.objects
    assert (collected["deleted"], collected["kept"]) == (plan["deleted"], plan["kept"])
    assert collected["keys"] == collected["findings"] == []
    assert {kind: collected["deleted"][kind] for kind in sizes} == {kind: {"objects": len(s), "bytes": sum(s)} for kind, s in sizes.items()}
    assert collected["kept"]["references"]["objects"] == 4
    assert world.contents()[key_of("one")] == hashes(ONE)
    again = world.collect()
    assert again["deleted"]["blobs"]["objects"] == 0 and again["kept"]["blobs"]["objects"] == collected["kept"]["blobs"]["objects"]


def test_what_is_none_of_ours_is_left_alone(world: World) -> None:
    world.save(one=ONE)
    digest = "a" * 64
    for key in ("notes.txt", "blobs/readme", f"blobs/sha256/bb/{digest}", f"blobs/{digest}", "trees/x.json", f"trees/{digest}", "VERSION",
                f"trees/sub/{digest}.json", f"claims/{digest}.json", "refs/notes.txt"):  # fmt: skip
        world.put(key, days=1000)
    there = world.objects
    assert world.collect()["deleted"]["blobs"]["objects"] == 0 and world.objects == there


def test_a_save_that_is_on_its_way_keeps_its_tree(world: World) -> None:
    """As long as it may come; what only says that there will be one keeps nothing."""
    world.save(one=ONE, two=TWO)
    one, two = world.named_by("one"), world.named_by("two")
    tree = tree_of(one)
    world.delete("one", "two")
    world.age()
    pending = {"format": 1, "key": "k", "node": "n"}
    waits = world.put("refs/k/waits.pending", json.dumps({**pending, "tree": tree}).encode(), days=29)
    early = world.put("refs/k/early.pending", json.dumps(pending).encode(), days=29)
    unknown = world.put("refs/k/unknown.pending", json.dumps({**pending, "tree": "f" * 64}).encode(), days=1)
    world.put("refs/k/never.pending", b"not even read", days=31)
    collected = world.collect()
    assert world.objects == {key for key in one if not key.startswith("refs/")} | {waits, early, unknown} and not two <= world.objects
    assert collected["deleted"]["pending"]["objects"] == 1 and collected["findings"] == []
    world.age(waits, days=31)
    assert world.collect()["deleted"]["pending"]["objects"] == 1
    assert world.objects == {early, unknown}


def test_hub_records_keep_their_trees_until_they_expire(world: World) -> None:
    world.save(one=ONE, two=TWO)
    one, two = ({key for key in world.named_by(name) if not key.startswith("refs/")} for name in ("one", "two"))
    used, expired = tree_of(one), tree_of(two)
    world.delete("one", "two")
    world.age()
    repo = "repos/https%3A%2F%2Fhub/model--org--name"
    kept = {
        world.put(f"{repo}/{COMMIT}/{used}.json", json.dumps({"format": 1, "tree": used, "more": 1}).encode(), days=29),
        world.put(f"{repo}/visibility.json", b"not ours to read", days=29),
        world.put(f"{repo}/refs/main", b"", days=1),
        world.put(f"{repo}/{COMMIT}.json", b"[1]", days=29),
    }
    world.put(f"{repo}/{COMMIT}/{expired}.json", json.dumps({"format": 1, "tree": expired}).encode(), days=31)
    world.put(f"{repo}/refs/v1", b"", days=31)
    deleted = world.collect()["deleted"]
    assert world.objects == one | kept
    assert (deleted["repos"]["objects"], deleted["trees"]["objects"]) == (2, 1)


@pytest.mark.parametrize(
    ("key", "content", "named"),
    [
        ("refs/a/newer.json", json.dumps({"format": 2}), "a/newer"),
        ("refs/a/damaged.json", '{"format": 1, "ref', "a/damaged"),
        ("refs/a/nameless.json", json.dumps({"format": 1, "reference": {"key": "a/nameless"}}), "a/nameless"),
        ("refs/a/odd.json", json.dumps({"format": 1, "reference": {}, "tree": "../x"}), "a/odd"),
        ("refs/a/newer.pending", json.dumps({"format": 2}), "refs/a/newer.pending"),
        ("refs/a/damaged.pending", "", "refs/a/damaged.pending"),
        (f"repos/e/r/{COMMIT}/x.json", json.dumps({"format": 2, "trees": []}), f"repos/e/r/{COMMIT}/x.json"),
        (f"repos/e/r/{COMMIT}/x.json", json.dumps({"format": 1}), f"repos/e/r/{COMMIT}/x.json"),
        ("tree", "{}", "trees/"),
        ("tree", '{"tree": {"files": []}, "packs": []}', "trees/"),
    ],
)
def test_what_cannot_be_read_stops_it(world: World, key: str, content: str, named: str) -> None:
    """It may name anything: nothing is deleted, whatever else there is."""
    world.save(one=ONE, two=TWO)
    tree = tree_of(world.named_by("one"))
    key = f"trees/{tree}.json" if key == "tree" else key
    world.delete("two")
    world.put(key, content.encode())
    world.age()
    world.put("repos/e/r/visibility.json", days=300)
    there = world.objects
    for more in ({"dry_run": True}, {}):
        with pytest.raises(IncompatibleReferenceError) as caught:
            world.collect(**more)
        assert caught.value.message.startswith(named) and world.url in caught.value.message
        assert "nothing more is deleted" in caught.value.message and caught.value.data["keys"] == [key]
        assert world.objects == there
    if key.startswith("refs/") and key.endswith(".json"):
        assert caught.value.hint.endswith(f": modelcache rm --store {world.url} {named}")
        world.wire.request("delete", key=named, store=world.url)
        assert world.collect()["deleted"]["trees"]["objects"] == 1


def test_a_reference_without_its_tree_is_a_finding(world: World) -> None:
    world.save(one=ONE, two=TWO, three={"z.bin": Z})
    tree, two = tree_of(world.named_by("one")), world.named_by("two")
    (world.folder / f"trees/{tree}.json").unlink()
    world.delete("three")
    world.age()
    collected = world.collect()
    (found,) = collected["findings"]
    assert found["key"] == key_of("one") and tree in found["problem"]
    assert world.objects == two | {f"refs/{key_of('one')}.json"}


# ---- how it ends


class Counted(FileStore):
    """Tells of every look at the claim."""

    def __init__(self, root: Path, pool: Pool) -> None:
        super().__init__(root, pool, LIMITS)
        self._looks: asyncio.Queue[None] = asyncio.Queue()

    async def get(self, key: str, limit_bytes: int) -> bytes:
        if key == KEY:
            self._looks.put_nowait(None)
        return await super().get(key, limit_bytes)

    async def looked(self, times: int) -> None:
        """Returns after so many more looks."""
        while not self._looks.empty():
            self._looks.get_nowait()
        for _ in range(times):
            await asyncio.wait_for(self._looks.get(), WAIT_SECONDS)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Counted]:
    pool = Pool("test", 4)
    store = Counted(tmp_path / "store", pool)
    yield store
    await store.close()
    pool.close()


def no_wait(message: str) -> None:
    pass


async def test_one_at_a_time(store: Counted, world: World) -> None:
    def attempt() -> str:
        with pytest.raises(InUseError) as caught:
            world.collect()
        return caught.value.message

    async with claimed(store, False, no_wait) as claim:
        assert json.loads((world.folder / KEY).read_bytes())["pid"] == os.getpid()
        message = await asyncio.to_thread(attempt)
        assert f"{os.uname().nodename} (pid {os.getpid()})" in message and world.url in message
        await claim.begin_round()  # it holds
        await claim.end_round()
    assert not (world.folder / KEY).exists()
    async with claimed(store, False, no_wait) as claim:
        (world.folder / KEY).unlink()
        with pytest.raises(InUse, match="lost its claim"):
            await claim.begin_round()


def test_many_at_once(world: World, tmp_path: Path) -> None:
    """Whoever loses says so; nothing that is named goes."""
    world.save(one=ONE, two=TWO)
    world.delete("two")
    world.age()
    with Daemon.start(tmp_path / "root", store=world.url) as daemon, wired(daemon.socket) as other:
        calls = [(wire, wire.start("gc_store", store=world.url)) for wire in (world.wire, other) * 4]
        results = []
        for wire, call in calls:
            try:
                results.append(wire.wait(call).result["deleted"]["trees"]["objects"])
            except InUseError:
                results.append(-1)
    assert sum(number for number in results if number > 0) == 1, results
    assert world.objects == world.named_by("one")


@pytest.mark.slow
def test_killed_in_the_middle_and_begun_again(tmp_path: Path) -> None:
    with Hasty.start(tmp_path / "root", store=f"file://{tmp_path}/store") as daemon:
        with wired(daemon.socket) as wire:
            world = World(daemon, wire, tmp_path / "store")
            world.save(one=ONE)
            stay = world.named_by("one")
            for number in range(2000):
                world.put(blob(b"%d" % number), b"%d" % number)
            wire.start("gc_store")
            until(lambda: len(world.objects) < 1900)
            daemon.kill()
        left = world.objects
        assert len(left) > len(stay) + 10 and KEY in left, "it was over before it was killed"
        daemon.restart()
        with wired(daemon.socket) as wire:
            world = World(daemon, wire, tmp_path / "store")
            world.save(two=TWO)  # waits until the dead one's claim is stale, no longer
            stay |= world.named_by("two")
            assert world.collect()["deleted"]["blobs"]["objects"] > 10
            assert world.objects == stay
            assert world.contents() == {key_of("one"): hashes(ONE), key_of("two"): hashes(TWO)}


def test_who_leaves_ends_it(world: World) -> None:
    """In good order: what was asked for is answered, and the next one has to wait for nobody."""
    world.save(one=ONE)
    for number in range(2000):
        world.put(blob(b"%d" % number), b"%d" % number)
    world.wire.start("gc_store", store=world.url)
    until(lambda: len(world.objects) < 1900)
    world.wire.leave()
    until(lambda: KEY not in world.objects)
    assert len(world.objects) > 10, "it was over before it was left"
    assert world.collect()["deleted"]["blobs"]["objects"] > 10
    assert world.objects == world.named_by("one")


async def test_a_writer_waits_for_the_round_it_met_and_no_other(store: Counted) -> None:
    rounds = Rounds(store)

    async def passes(change: Callable[[], Awaitable[object]]) -> None:
        """It waits, however often it looks, until `change` is made."""
        waiting = asyncio.create_task(rounds.passed())
        await store.looked(3)
        assert not waiting.done()
        await change()
        await asyncio.wait_for(waiting, WAIT_SECONDS)

    await rounds.passed()  # nobody collects
    async with contextlib.AsyncExitStack() as collecting:
        claim = await collecting.enter_async_context(claimed(store, False, no_wait))
        await rounds.passed()  # it has announced no round: it will read what is there now
        await claim.begin_round()
        await passes(claim.begin_round)
        await passes(claim.end_round)
        await rounds.passed()
        await claim.begin_round()
        await passes(collecting.aclose)
    await store.put(KEY, b"of a newer daemon")
    await passes(lambda: store.delete(KEY))


class Overtaking(FileStore):
    """Lists a folder's keys in their order, as S3 does; before the `when`th listing of refs/ a save begins, and in it it ends."""

    def __init__(self, root: Path, pool: Pool, when: int, begin: Callable[[], object], end: Callable[[], object]) -> None:
        super().__init__(root, pool, LIMITS)
        self._left = when
        self._begin = begin
        self._end = end

    async def list(self, prefix: str) -> AsyncIterator[Object]:
        self._left -= prefix == "refs/"
        is_its_turn = prefix == "refs/" and self._left == 0
        if is_its_turn:
            self._begin()
        for is_late in (False, True):
            if is_late and is_its_turn:
                self._end()
            for found in sorted([found async for found in super().list(prefix)]):
                if found.key.endswith(".pending") == is_late:
                    yield found


@pytest.mark.parametrize("when", [1, 2, 3, 4])  # the fourth is the first after the round was announced: later ones would wait for its end
async def test_a_save_that_ends_while_names_are_listed(world: World, tmp_path: Path, when: int) -> None:
    """Its pending record goes and its reference comes, and a listing may show neither."""
    await asyncio.to_thread(world.save, one=ONE)
    world.age()
    named, tree = world.named_by("one"), tree_of(world.named_by("one"))
    reference, pending = (world.folder / f"refs/{key_of('one')}.{kind}" for kind in ("json", "pending"))
    data = reference.read_bytes()
    reference.unlink()

    def begin() -> None:
        pending.write_text(json.dumps({"format": 1, "tree": tree}))

    def end() -> None:
        reference.write_bytes(data)
        pending.unlink()

    world.put(blob(b"garbage"), b"garbage")
    pool = Pool("test", 4)
    overtaking = Overtaking(world.folder, pool, when, begin, end)
    collected = await Collect(pool, 7 * DAYS, 30 * DAYS).run(overtaking, False, False, lambda _: None)
    assert world.objects == named and collected.deleted["blobs"]["objects"] == 1
    pool.close()


class Hesitant(FileStore):
    """Replaces an object when it is told to."""

    def __init__(self, root: Path, pool: Pool) -> None:
        super().__init__(root, pool, LIMITS)
        self.began, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def replace(self, key: str, data: bytes, etag: str) -> Object:
        self.began.set()
        await self.may_go_on.wait()
        return await super().replace(key, data, etag)


async def test_a_collection_that_is_cancelled_twice_leaves_no_claim(tmp_path: Path) -> None:
    pool = Pool("test", 4)
    store = Hesitant(tmp_path / "store", pool)

    async def run() -> None:
        async with claimed(store, False, lambda _: None) as claim:
            saying.append(asyncio.create_task(claim.begin_round()))
            await asyncio.Event().wait()

    saying: list[asyncio.Task[None]] = []
    running = asyncio.create_task(run())
    await store.began.wait()
    for _ in range(2):  # the request, then its connection
        running.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([running], timeout=10)
    store.may_go_on.set()
    await saying[0]
    async with asyncio.timeout(WAIT_SECONDS):
        while await store.head(KEY) is not None:
            pass
    pool.close()


async def test_a_store_that_ignores_conditions(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool("test", 4)
    async with Liar() as liar:
        for name, value in seaweed.environment(endpoint=liar.endpoint).items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://bucket", pool)
        with pytest.raises(StoreProblem) as caught:
            async with claimed(store, False, no_wait):
                raise AssertionError("two could run at once")
        assert "--alone" in caught.value.hint and KEY not in liar.objects
        async with claimed(store, True, no_wait) as claim:
            await claim.begin_round()
            assert json.loads(liar.objects[KEY][0])["is_deleting"]
        assert KEY not in liar.objects
        await store.close()
    pool.close()


# ---- S3


def test_a_bucket(tmp_path: Path, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages are the server's own; uploads that broke off go too."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    url, client = seaweed.bucket(), seaweed.client()
    bucket = url.removeprefix("s3://")
    with Daemon.start(tmp_path / "root", store=f"{url}/deep", store_grace="2s") as daemon, wired(daemon.socket) as wire:
        trees: dict[str, Tree] = {"one": ONE, "two": TWO, "three": {"a": b"a", "z": Z}}
        for name, tree in trees.items():
            wire.save(name, tree)
        assert wire.flush(WAIT_SECONDS)["pending"] == []
        for name in ("two", "three"):
            wire.request("delete", key=key_of(name))
        client.put_object(Bucket=bucket, Key="blobs/sha256/of/somebody-else", Body=b"x")
        client.create_multipart_upload(Bucket=bucket, Key="deep/" + blob(b"broke off"))
        orphans = 0

        def is_done() -> bool:
            nonlocal orphans
            orphans += collect(wire)["orphans"]
            return len(in_bucket(seaweed, url)[0]) == 5 and orphans > 0

        until(is_done)
        assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
        keys, read = in_bucket(seaweed, url)
        below = [key.removeprefix("deep/") for key in keys if key.startswith("deep/")]
        assert contents(below, lambda key: read(f"deep/{key}")) == {key_of("one"): hashes(ONE)} and len(below) == 4
        assert wire.load("one")["files"] == 2


# ---- who, and from the command line


def test_only_owners_may(shared_tmp_path: Path) -> None:
    as_uid(UID)  # or skip
    with Daemon.start(shared_tmp_path / "root", uid=UID + 1) as daemon:
        with Client.of(daemon, uid=UID) as stranger, Client.of(daemon, uid=UID + 1) as owner, wired(daemon.socket) as root:
            for more in ({}, {"dry_run": True}):
                refused = stranger.refused("wire", method="gc_store", params=more)
                assert refused.is_error("NotPermittedError") and f"uid {UID} may not collect" in refused.message
                owner.begin("wire", method="gc_store", params=more)
                assert owner.good().value["findings"] == [] == collect(root, **more)["findings"]


def test_of_which_store(tmp_path: Path) -> None:
    other = f"file://{tmp_path}/other"
    with Daemon.start(tmp_path / "root", store=f"file://{tmp_path}/store", stores=other) as daemon, wired(daemon.socket) as wire:
        garbage = [World(daemon, wire, tmp_path / name).put(blob(b"x"), b"x") for name in ("store", "other")]
        assert collect(wire, dry_run=True)["keys"] == garbage[:1]
        assert collect(wire, store=other)["deleted"]["blobs"]["objects"] == 1
        assert collect(wire)["deleted"]["blobs"]["objects"] == 1
        with pytest.raises(InvalidRequestError):
            collect(wire, store="gs://bucket")
        with pytest.raises(StoreNotAllowedError):
            collect(wire, store=f"file://{tmp_path}/third")


def test_the_command(world: World, tmp_path: Path) -> None:
    environment = {**world.daemon.environment, "HOME": str(tmp_path)}

    def gc(*words: str) -> subprocess.CompletedProcess[str]:
        return run(environment, "gc-store", "--store", world.url, *words)

    world.save(one=ONE, two=TWO)
    world.delete("two")
    world.age()
    plan = gc("--dry-run")
    assert plan.returncode == 0 and sorted(plan.stdout.split()) == sorted(world.objects - world.named_by("one"))
    assert plan.stderr.startswith("would delete 1.1 MB: 2 blobs, 1 tree\nkept 1.1 MB: 1 reference, 2 blobs, 1 tree\n")
    said = json.loads(gc("--dry-run", "--json").stdout)
    assert said["dry_run"] and sorted(said["keys"]) == sorted(plan.stdout.split())
    done = gc()
    assert (done.returncode, done.stdout) == (0, "") and done.stderr.startswith("deleted 1.1 MB: 2 blobs, 1 tree\n")
    assert gc().stderr.startswith("deleted nothing\n") and gc("-q").stderr == ""
    for key in world.objects:
        if key.startswith("trees/"):
            (world.folder / key).unlink()
    lost = gc()
    assert lost.returncode == 8 and f"warning: {key_of('one')}: its tree" in lost.stderr
    assert json.loads(gc("--json").stdout)["findings"][0]["key"] == key_of("one")
    world.put("refs/newer.json", b'{"format": 9}')
    stopped = gc()
    assert stopped.returncode == 1 and "newer can't be read" in stopped.stderr and "hint: upgrade this daemon" in stopped.stderr
