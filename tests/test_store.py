"""The store's contract, on every implementation; and for S3 what networks, servers and crashes do to it.

S3 is a real server (tests/seaweed.py) behind a network that can be made bad (tests/proxy.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from modelcached import errors
from modelcached.download import Limits
from modelcached.model import Content, Digest
from modelcached.partials import Partial
from modelcached.store import Object, Store, check_url, open_store
from modelcached.store.s3_errors import Place, from_response
from modelcached.tasks import Pool

from .conftest import ROOT
from .kernel import fuse, read_only, require_root, run_as
from .liar import Liar
from .proxy import Proxy
from .seaweed import READER, WRITER, SeaweedFS

MIB = 1 << 20
PART_BYTES = 16 * MIB
LIMITS = Limits(connections=4, piece_bytes=MIB, range_bytes=8 * MIB)
ODD_KEYS = [
    "a b/c d",
    "ключ/鍵/🗝",
    "per%20cent/%2F/%",
    "plus+and&amp;=?#;,:@$!'()*~",
    'quotes" and spaces ',
    "-rf",
    "~/x",
    "a/" + "n" * 255,
    "refs/mf.models/models/artifacts/basic_6483655edd5e44dfb2675968dd23b229.0a1.json",
]
BAD_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    "..",
    "a/../b",
    "./a",
    "a/.",
    "a\0b",
    "a\nb",
    "a\\b",
    "\udcff",
    ".modelcached/tmp/x",
    "n" * 256,
    "a/" * 500 + "b",
]


def digest(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool("io", 6)
    yield made
    made.close()


@pytest.fixture(scope="session")
def bucket(seaweed: SeaweedFS) -> str:
    return seaweed.bucket()


@pytest.fixture
def aws(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what botocore reads, for the stores that are opened and used from here on."""

    def choose(identity: str = WRITER, endpoint: str | None = None, **more: str) -> None:
        for name, value in {**seaweed.environment(identity, endpoint), **more}.items():
            monkeypatch.setenv(name, value)

    return choose


@pytest.fixture
def s3_url(bucket: str, aws: Callable[..., None]) -> str:
    """A place of its own in the shared bucket."""
    aws()
    return f"{bucket}/{secrets.token_hex(6)}/deep er"


Open = Callable[..., Store]


@pytest.fixture
async def opener(pool: Pool) -> AsyncIterator[Open]:
    """Opens stores, and closes them at the end."""
    async with contextlib.AsyncExitStack() as stack:

        def open_one(url: str, limits: Limits = LIMITS, stall_seconds: float = 10.0) -> Store:
            store = open_store(url, pool, limits, stall_seconds)
            stack.push_async_callback(store.close)
            return store

        yield open_one


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/store" if request.param == "file" else str(request.getfixturevalue("s3_url"))


@pytest.fixture
async def store(url: str, opener: Open, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """Leaves nothing unfinished behind: no temporary file, no multipart upload."""
    yield opener(url)
    if url.startswith("file://"):
        folder = Path(url[7:]) / ".modelcached/tmp"
        assert not folder.exists() or os.listdir(folder) == []
    else:
        assert await asyncio.to_thread(unfinished, url, request.getfixturevalue("seaweed")) == []


def unfinished(url: str, seaweed: SeaweedFS) -> list[str]:
    """Multipart uploads and probes below a store's prefix."""
    bucket, _, prefix = url[5:].partition("/")
    answer = seaweed.client().list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/")
    probes = seaweed.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/.modelcached/")
    return [found["Key"] for found in [*answer.get("Uploads", []), *probes.get("Contents", [])]]


async def keys(store: Store, prefix: str = "") -> set[str]:
    return {found.key async for found in store.list(prefix)}


class Sample(NamedTuple):
    data: bytes
    sha256: Digest
    path: Path  # a file with these bytes


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Sample]:
    """Random bytes, so many; made once, for it takes a while and the event loop should not wait."""
    folder, everything = tmp_path_factory.mktemp("samples"), random.randbytes(48 * MIB)

    @functools.cache
    def make(size: int) -> Sample:
        path, data = folder / str(size), everything[:size]
        path.write_bytes(data)
        return Sample(data, digest(data), path)

    for size in (20 * MIB, 40 * MIB, 48 * MIB):
        make(size)
    return make


def partial(tmp_path: Path, data: bytes) -> Partial:
    """What a download of these bytes is written into."""
    return Partial(tmp_path / f"partial-{secrets.token_hex(4)}", Content("sha256", digest(data), len(data)))


async def winners(attempts: Sequence[Awaitable[Object]]) -> list[Object]:
    """The attempts that were not told that somebody else was first; any other failure is one."""
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    others = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(error) for error in others} <= {errors.ObjectExists, errors.ObjectChanged}, others
    return [outcome for outcome in outcomes if isinstance(outcome, Object)]


# --- the contract -----------------------------------------------------------------------------------------------------


async def test_put_get_head_delete(store: Store) -> None:
    assert await store.head("refs/a.json") is None
    put = await store.put("refs/a.json", b"one")
    assert await store.get("refs/a.json", 3) == b"one"
    found = await store.head("refs/a.json")
    assert found is not None and (found.key, found.size, found.etag) == ("refs/a.json", 3, put.etag)
    assert abs(found.modified - await store.now()) < 5 and abs(put.modified - found.modified) < 5
    await store.put("refs/a.json", b"other")
    again = await store.head("refs/a.json")
    assert again is not None and again.etag != found.etag and again.size == 5
    await store.delete("refs/a.json")
    await store.delete("refs/a.json")
    assert await store.head("refs/a.json") is None


async def test_empty_object(store: Store) -> None:
    assert (await store.put("empty", b"")).size == 0
    assert await store.get("empty", 0) == b""


async def test_missing_object(store: Store, tmp_path: Path) -> None:
    with pytest.raises(errors.MissingObject) as caught:
        await store.get("no/such.json", 10)
    assert "no/such.json" in caught.value.message and caught.value.hint
    with pytest.raises(errors.MissingObject):
        await store.read("no/such.json", (0, 10), partial(tmp_path, b"0123456789"))
    assert await keys(store, "no/") == set()


async def test_get_is_bounded(store: Store) -> None:
    await store.put("large.json", bytes(1000))
    with pytest.raises(errors.StoreProblem, match="1000 bytes"):
        await store.get("large.json", 999)


async def test_odd_keys(store: Store) -> None:
    for key in ODD_KEYS:
        await store.put(key, key.encode())
    assert await keys(store) == set(ODD_KEYS)
    for key in ODD_KEYS:
        assert await store.get(key, 1000) == key.encode()
        found = await store.head(key)
        assert found is not None and found.key == key
        await store.delete(key)
    assert await keys(store) == set()


async def test_bad_keys_are_refused_by_name(store: Store, tmp_path: Path) -> None:
    sink = partial(tmp_path, b"x")
    attempts: list[Callable[[str], Awaitable[object]]] = [
        lambda key: store.get(key, 10),
        lambda key: store.put(key, b""),
        lambda key: store.put_new(key, b""),
        lambda key: store.replace(key, b"", "x"),
        lambda key: store.head(key),
        lambda key: store.delete(key),
        lambda key: store.put_file(key, Path("/dev/null"), 0, digest(b"")),
        lambda key: store.read(key, (0, 1), sink),
    ]
    for key in BAD_KEYS:
        for attempt in attempts:
            with pytest.raises(errors.InvalidRequest, match="key"):
                await attempt(key)
    sink.close()


async def test_list_by_prefix(store: Store) -> None:
    every = {"refs/mf.models/a.json", "refs/mf.models/b/c.json", "refs/mf.checkpoints/a.json", "trees/x.json", "refsx"}
    await asyncio.gather(*(store.put(key, b"1") for key in every))
    assert await keys(store) == every
    assert await keys(store, "refs/") == {key for key in every if key.startswith("refs/")}
    assert await keys(store, "refs/mf.m") == {"refs/mf.models/a.json", "refs/mf.models/b/c.json"}
    assert await keys(store, "refs") == every - {"trees/x.json"}
    assert await keys(store, "refs/mf.models/b/c.json") == {"refs/mf.models/b/c.json"}
    assert await keys(store, "none/") == await keys(store, "trees/x.json/y") == set()
    with pytest.raises(errors.InvalidRequest):
        await keys(store, "../")


@pytest.mark.soak
@pytest.mark.timeout(60)
async def test_list_of_many(store: Store) -> None:
    every = {f"many/{number:04}" for number in range(1010)}  # S3 pages after 1,000
    names = iter(every)

    async def put() -> None:
        for name in names:
            await store.put(name, b"")

    await asyncio.gather(*(put() for _ in range(8)))
    assert await keys(store, "many/") == every


async def test_put_new_has_one_winner_of_32(url: str, opener: Open) -> None:
    stores = [opener(url) for _ in range(4)]
    assert await stores[0].has_conditions()
    won = await winners([stores[number % 4].put_new("claims/c.json", b"writer %d" % number) for number in range(32)])
    assert len(won) == 1
    assert (await stores[1].get("claims/c.json", 100)).startswith(b"writer ")
    for late in (b"late", b""):
        with pytest.raises(errors.ObjectExists):
            await stores[2].put_new("claims/c.json", late)


async def test_replace_has_one_winner(url: str, opener: Open) -> None:
    stores = [opener(url) for _ in range(4)]
    first = await stores[0].put_new("claims/c.json", b"first")
    won = await winners([stores[number % 4].replace("claims/c.json", b"taker %d" % number, first.etag) for number in range(16)])
    assert len(won) == 1 and won[0].etag != first.etag
    found = await stores[0].head("claims/c.json")
    assert found is not None and found.etag == won[0].etag
    with pytest.raises(errors.ObjectChanged):
        await stores[0].replace("claims/c.json", b"late", first.etag)
    await stores[0].replace("claims/c.json", b"renewed", won[0].etag)
    await stores[0].delete("claims/c.json")
    with pytest.raises(errors.MissingObject):
        await stores[0].replace("claims/c.json", b"gone", won[0].etag)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 40 * MIB], ids=str)
async def test_files_go_and_come_back(store: Store, tmp_path: Path, sample: Callable[[int], Sample], size: int) -> None:
    data, sha256, path = sample(size)
    sent: list[int] = []
    put = await store.put_file("blobs/x", path, size, sha256, sent.append, tmp_path / "resume.json")
    assert put.size == size == sum(sent) and not (tmp_path / "resume.json").exists()
    sink, received = partial(tmp_path, data), list[int]()
    await store.read("blobs/x", (0, size), sink, received.append)
    assert sink.finish() == sha256 and sum(received) == size
    sink.close()


async def test_descriptor_is_read_by_offset_and_stays_open(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    handle = os.open(tmp_path / "file", os.O_RDONLY)
    os.lseek(handle, 7, os.SEEK_SET)
    await store.put_file("blobs/x", handle, 10, digest(b"0123456789"))
    assert os.read(handle, 10) == b"789"
    os.close(handle)
    assert await store.get("blobs/x", 10) == b"0123456789"


@pytest.mark.parametrize("size", [1000, 20 * MIB], ids=str)
async def test_file_that_is_not_what_its_name_says_is_not_put(store: Store, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    for said, claimed in ((size, digest(b"x")), (size + 1, digest(bytes(size)))):
        with pytest.raises(errors.LocalMismatch):
            await store.put_file("blobs/x", tmp_path / "file", said, claimed, resume=tmp_path / "resume.json")
    assert await store.head("blobs/x") is None and not (tmp_path / "resume.json").exists()


async def test_span_of_an_object(store: Store, tmp_path: Path, sample: Callable[[int], Sample]) -> None:
    data, _sha256, _path = sample(3 * MIB)
    await store.put("packs/p", data)
    inner = data[MIB + 7 : 2 * MIB]
    sink = partial(tmp_path, inner)
    await store.read("packs/p", (MIB + 7, 2 * MIB), sink)
    assert sink.finish() == digest(inner)
    sink.close()
    with pytest.raises(errors.StoreMismatch, match="shorter"):
        await store.read("packs/p", (0, 3 * MIB + 1), partial(tmp_path, data + b"x"))


async def test_only_gaps_are_read(store: Store, tmp_path: Path, sample: Callable[[int], Sample]) -> None:
    data, sha256, _path = sample(4 * MIB)
    await store.put("blobs/x", data)
    sink, received = partial(tmp_path, data), list[int]()
    sink.write(MIB, [data[MIB : 2 * MIB]])
    await store.read("blobs/x", (0, 4 * MIB), sink, received.append)
    assert sink.finish() == sha256 and sum(received) == 3 * MIB
    sink.close()


async def test_disk_that_fails_is_the_callers_own_trouble(store: Store) -> None:
    class Full:
        def missing(self) -> list[tuple[int, int]]:
            return [(0, 10)]

        def write(self, offset: int, chunks: Sequence[bytes]) -> None:
            raise OSError(28, "No space left on device")

    await store.put("blobs/x", bytes(10))
    with pytest.raises(OSError, match="No space"):
        await store.read("blobs/x", (0, 10), Full())


async def test_young_leftovers_are_not_orphans(store: Store) -> None:
    await store.put("a", b"")
    assert await store.abort_orphans(3600) == 0


# --- file:// ----------------------------------------------------------------------------------------------------------


async def test_file_store_is_plain_files(opener: Open, tmp_path: Path) -> None:
    store = opener(f"file://{tmp_path}/a%20store")
    assert store.url == f"file://{tmp_path}/a%20store" == check_url(store.url)
    await store.put("blobs/sha256/ab/abc", b"plain")
    assert (tmp_path / "a store/blobs/sha256/ab/abc").read_bytes() == b"plain"
    (tmp_path / "a store/.modelcached/tmp/left").write_bytes(b"by a kill -9")
    os.utime(tmp_path / "a store/.modelcached/tmp/left", (1, 1))
    assert await store.abort_orphans(3600) == 1
    assert os.listdir(tmp_path / "a store/.modelcached/tmp") == []


async def test_key_that_is_a_folder(opener: Open, tmp_path: Path) -> None:
    store = opener(f"file://{tmp_path}/store")
    await store.put("a/b", b"")
    with pytest.raises(errors.StoreProblem, match="folder"):
        await store.put("a", b"")
    with pytest.raises(errors.StoreProblem, match="folder"):
        await store.put_new("a", b"")
    assert await store.head("a") is None and await store.head("a/b/c") is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small filesystem")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


async def test_full_file_store(opener: Open, small_disk: Path, tmp_path: Path) -> None:
    store = opener(f"file://{small_disk}")
    with pytest.raises(errors.StoreFull) as caught:
        await store.put("blobs/x", bytes(2 * MIB))
    assert caught.value.hint and os.listdir(small_disk / ".modelcached/tmp") == []
    (tmp_path / "file").write_bytes(bytes(2 * MIB))
    with pytest.raises(errors.StoreFull):
        await store.put_file("blobs/x", tmp_path / "file", 2 * MIB, digest(bytes(2 * MIB)))
    assert await store.head("blobs/x") is None and os.listdir(small_disk / ".modelcached/tmp") == []
    await store.put("small", b"fits")


async def every_call(store: Store, tmp_path: Path) -> dict[str, str]:
    """The name of the error that each of a store's methods ends with, "" for none."""
    (tmp_path / "three").write_bytes(b"abc")
    sink = partial(tmp_path, b"abc")
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "head": lambda: store.head("refs/a"),
        "get": lambda: store.get("refs/a", 10),
        "read": lambda: store.read("refs/a", (0, 3), sink),
        "list": lambda: keys(store),
        "put": lambda: store.put("refs/a", b"abc"),
        "put_new": lambda: store.put_new("refs/new", b"abc"),
        "replace": lambda: store.replace("refs/a", b"abc", "etag"),
        "put_file": lambda: store.put_file("refs/a", tmp_path / "three", 3, digest(b"abc")),
        "delete": lambda: store.delete("refs/a"),
        "now": store.now,
        "abort_orphans": lambda: store.abort_orphans(3600),
    }
    said = {}
    for name, call in calls.items():
        try:
            await call()
            said[name] = ""
        except errors.ModelcachedError as error:  # anything else is a failure of the test
            said[name] = error.name if error.hint else "no hint"
    sink.close()
    return said


READS = {"head", "get", "read", "list"}


@pytest.mark.parametrize("place", ["file", "file/store", "file/a/b"])
async def test_folder_that_is_a_file(opener: Open, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    said = await every_call(opener(f"file://{tmp_path}/{place}"), tmp_path)
    assert set(said.values()) == {"store_missing_bucket"}, said


async def test_folder_that_is_not_there_is_an_empty_store(opener: Open, tmp_path: Path) -> None:
    store = opener(f"file://{tmp_path}/not/yet")
    assert await store.head("refs/a") is None and await keys(store) == set()
    await store.delete("refs/a")
    with pytest.raises(errors.MissingObject):
        await store.get("refs/a", 1)
    assert not (tmp_path / "not").exists()
    await store.put("refs/a", b"1")
    assert await keys(store) == {"refs/a"}


@pytest.mark.parametrize("key", ["a/b", "a/b/c", "a"])
async def test_object_in_the_way(opener: Open, tmp_path: Path, key: str) -> None:
    """A folder may be written to by others: what no key can be is refused, and nothing is overwritten."""
    store = opener(f"file://{tmp_path}/store")
    await (store.put("a/b/c/d", b"1") if key == "a" else store.put("a", b"1"))
    for attempt in (store.put(key, b""), store.put_new(key, b"")):
        with pytest.raises(errors.StoreProblem, match="folder") as caught:
            await attempt
        assert type(caught.value) is errors.StoreProblem
    assert await keys(store) == {"a/b/c/d" if key == "a" else "a"}


async def test_folder_that_is_read_only(opener: Open, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = opener(f"file://{tmp_path}/store")
    await store.put("refs/a", b"abc")
    with read_only(tmp_path / "store"):
        said = await every_call(store, tmp_path)
    assert {name for name, error in said.items() if not error} == READS, said
    assert {error for error in said.values() if error} == {"store_denied"}, said


async def test_a_folder_that_does_not_answer_holds_up_nobody(tmp_path: Path) -> None:
    """As on a hung NFS server: deadlines count, and everybody else's threads are free."""
    io = Pool("io", 1)
    store = open_store(f"file://{tmp_path}", io, LIMITS)
    os.mkfifo(tmp_path / "hangs")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await store.get("hangs", 10)
    assert await io.run(lambda: "free") == "free"
    assert await store.head("absent") is None
    os.close(os.open(tmp_path / "hangs", os.O_WRONLY))  # it answers
    await store.close()
    io.close()


FOREIGN = """
from modelcached.download import Limits
from modelcached.store.file import FileStore

async def main():
    store = FileStore(Path(sys.argv[1]), tasks.Pool("io", 2), Limits(1, 1, 1))
    said = {}
    for name, call in {
        "head": lambda: store.head("refs/a"), "get": lambda: store.get("refs/a", 10), "put": lambda: store.put("refs/a", b""),
        "list": lambda: list_all(store), "delete": lambda: store.delete("refs/a"), "now": store.now,
    }.items():
        try:
            await call()
        except errors.ModelcachedError as error:
            said[name] = error.name
    print(json.dumps(said))

async def list_all(store):
    return [found async for found in store.list("")]

asyncio.run(main())
"""


async def test_folder_of_somebody_else(opener: Open, tmp_path_factory: pytest.TempPathFactory) -> None:
    require_root()
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's own folders are closed to others
        await opener(f"file://{place}/closed").put("refs/a", b"abc")
        os.chmod(place, 0o755)
        os.chmod(f"{place}/closed", 0o700)
        said = json.loads(await asyncio.to_thread(run_as, 4242, FOREIGN, f"{place}/closed"))
    assert said == dict.fromkeys(("head", "get", "put", "list", "delete", "now"), "store_denied")


@pytest.mark.parametrize(
    ("refused", "kind"),
    [
        ("create:EDQUOT", errors.StoreFull),
        ("write:ENOSPC", errors.StoreFull),
        ("write:EFBIG", errors.StoreProblem),
        ("create:ESTALE", errors.StoreUnavailable),
        ("fsync:EIO", errors.StoreUnavailable),
        ("fsyncdir:EDQUOT", errors.StoreFull),
        ("rename:EROFS", errors.StoreDenied),
        ("rename:ENAMETOOLONG", errors.StoreProblem),
        ("utimens:EACCES", errors.StoreDenied),
        ("mkdir:EPERM", errors.StoreDenied),
        ("mkdir:ENOENT", errors.StoreUnavailable),
    ],
)
async def test_filesystem_that_fails(opener: Open, tmp_path: Path, refused: str, kind: type[errors.ModelcachedError]) -> None:
    """What a remote filesystem says, from the system call on: nothing is half there, and no error comes without a name."""
    with fuse(tmp_path / "fuse", refuse=refused) as place:
        store = opener(f"file://{place}/store")
        (tmp_path / "three").write_bytes(b"abc")
        for attempt in (store.put("refs/a", b"abc"), store.put_file("refs/a", tmp_path / "three", 3, digest(b"abc"))):
            with pytest.raises(errors.ModelcachedError) as caught:
                await attempt
            assert type(caught.value) is kind and caught.value.hint, caught.value
        assert not refused.startswith(("create", "write", "rename")) or await store.head("refs/a") is None


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/some/path", "URL"),
        ("gs://bucket/x", "gs:// is not supported yet"),
        ("azure://container", "azure:// is not supported yet"),
        ("ftp://host/x", "'ftp' is no kind of store"),
        ("s3://", "bucket"),
        ("s3:///prefix", "bucket"),
        ("s3://bucket/a/../b", "normalised"),
        ("s3://AKIDSECRET:hunter2@bucket/x", "more"),
        ("s3://bucket/x?X-Amz-Signature=hunter2", "more"),
        ("s3://bucket/x#hunter2", "more"),
        ("s3://[hunter2/x", "can't be read"),
        ("file://host/x", "absolute path"),
        ("file://relative", "absolute path"),
        ("file:///", "no folder"),
        ("file:///a/../b", "no folder"),
    ],
)
def test_urls_that_are_refused(url: str, said: str, pool: Pool) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        open_store(url, pool)
    assert said in caught.value.message and caught.value.hint
    assert "hunter2" not in str(vars(caught.value)) and "AKIDSECRET" not in str(vars(caught.value))


def test_urls_have_one_spelling() -> None:
    assert check_url("s3://bucket/") == check_url("S3://bucket") == "s3://bucket"
    assert check_url("s3://bucket/a%20b/") == "s3://bucket/a%20b"
    assert check_url("file:///a//b/") == check_url("file://localhost/a/b") == "file:///a/b"


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[Proxy]:
    with Proxy(seaweed.address) as running:
        yield running


async def test_connections_that_break_half_way_down(
    proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    data, sha256, _path = sample(40 * MIB)
    await opener(s3_url).put("blobs/x", data)
    aws(endpoint=proxy.endpoint)
    store, sink = opener(s3_url), partial(tmp_path, data)
    proxy.cut(3 * MIB, "client", times=3)
    proxy.cut(11 * MIB, "client", half=True)
    await store.read("blobs/x", (0, len(data)), sink)
    assert sink.finish() == sha256
    assert proxy.received < len(data) + 4 * 4 * MIB  # what had arrived was not asked for again
    sink.close()
    proxy.cut(MIB, "client", times=1)
    assert await store.get("blobs/x", len(data)) == data


@pytest.mark.parametrize("size", [3 * MIB, 40 * MIB], ids=str)
async def test_connections_that_break_half_way_up(
    proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open, tmp_path: Path, sample: Callable[[int], Sample], size: int
) -> None:
    data, sha256, path = sample(size)
    aws(endpoint=proxy.endpoint)
    proxy.cut(2 * MIB, "server", times=2)
    store = opener(s3_url)
    await store.put_file("blobs/x", path, size, sha256)
    assert await store.get("blobs/x", size) == data


async def test_lost_answers_do_not_lose_claims(proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open) -> None:
    """The write that succeeded and whose answer got lost is this writer's, not somebody else's."""
    aws(endpoint=proxy.endpoint)
    store = opener(s3_url)
    assert await store.head("warm") is None  # two requests, and a connection that stays open
    proxy.cut(1, "client")
    first = await store.put_new("claims/c.json", b"mine, 1")
    proxy.cut(1, "client")
    await store.replace("claims/c.json", b"mine, 2", first.etag)
    assert await store.get("claims/c.json", 100) == b"mine, 2"


async def test_lost_answer_to_the_last_request_of_an_upload(
    proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open, sample: Callable[[int], Sample], tmp_path: Path
) -> None:
    data, sha256, path = sample(20 * MIB)
    aws(endpoint=proxy.endpoint)
    store = opener(s3_url)
    proxy.cut(1, "client", after=b"<CompleteMultipartUpload")
    put = await store.put_file("blobs/x", path, len(data), sha256, resume=tmp_path / "resume.json")
    assert put.size == len(data) and not (tmp_path / "resume.json").exists()


async def test_away_and_back(
    proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    data, sha256, path = sample(20 * MIB)
    aws(endpoint=proxy.endpoint, AWS_MAX_ATTEMPTS="1")
    store = opener(s3_url)
    await store.put("a", b"1")
    await asyncio.to_thread(proxy.refuse)
    for attempt in (
        lambda: store.get("a", 10),
        lambda: store.head("a"),
        lambda: store.put("a", b"2"),
        lambda: store.delete("a"),
        lambda: keys(store),
        lambda: store.put_file("blobs/x", path, len(data), sha256),
    ):
        with pytest.raises(errors.StoreUnavailable) as caught:
            await attempt()
        assert proxy.endpoint in caught.value.message and caught.value.hint
    await asyncio.to_thread(proxy.listen)
    assert await store.get("a", 10) == b"1"
    await store.put_file("blobs/x", path, len(data), sha256)


async def test_server_that_stops_answering(
    proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    data, _sha256, _path = sample(24 * MIB)
    await opener(s3_url).put("blobs/x", data)
    aws(endpoint=proxy.endpoint, AWS_MAX_ATTEMPTS="1")
    store = opener(s3_url, stall_seconds=0.3)
    await store.put("a", b"1")
    proxy.hold()
    with pytest.raises(errors.StoreSlow):
        await store.get("a", 10)
    with pytest.raises(errors.StoreSlow):
        await store.put("a", b"2")
    proxy.let_go()
    assert await store.head("a") is not None


@pytest.mark.slow
async def test_connection_that_stops_in_the_middle(
    proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    """What does not move is noticed and asked for again, up and down, on another connection."""
    data, sha256, path = sample(48 * MIB)
    aws(endpoint=proxy.endpoint)
    store = opener(s3_url, stall_seconds=2.0)

    async def stop(condition: Callable[[Proxy], bool]) -> None:
        await asyncio.to_thread(proxy.wait, condition)
        proxy.hold()
        connections = proxy.connections
        await asyncio.to_thread(proxy.wait, lambda proxy: proxy.connections > connections)
        proxy.let_go()

    putting = asyncio.create_task(store.put_file("blobs/x", path, len(data), sha256))
    await stop(lambda proxy: proxy.sent > 20 * MIB)
    await putting
    sink, before = partial(tmp_path, data), proxy.received
    reading = asyncio.create_task(store.read("blobs/x", (0, len(data)), sink))
    await stop(lambda proxy: proxy.received > before + 8 * MIB)
    await reading
    assert sink.finish() == sha256
    sink.close()


async def test_bytes_that_change_on_the_way_up(proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open, tmp_path: Path) -> None:
    """The server checks what it gets: wrong bytes never become an object."""
    data = bytes(20 * MIB)
    (tmp_path / "file").write_bytes(data)
    aws(endpoint=proxy.endpoint, AWS_MAX_ATTEMPTS="1")
    store = opener(s3_url)
    await store.put("warm", b"")
    proxy.alter("server", lambda piece: piece.replace(bytes(100), bytes(99) + b"!"))
    with pytest.raises(errors.StoreMismatch):
        await store.put_file("blobs/x", tmp_path / "file", len(data), digest(data), resume=tmp_path / "resume.json")
    with pytest.raises(errors.StoreMismatch):
        await store.put("small", bytes(1000))
    proxy.heal()
    assert await keys(store) == {"warm"} and not (tmp_path / "resume.json").exists()


async def test_bytes_that_change_on_the_way_down(proxy: Proxy, s3_url: str, aws: Callable[..., None], opener: Open, tmp_path: Path) -> None:
    """They are the reader's to notice: he knows the digest."""
    data = bytes(MIB)
    await opener(s3_url).put("blobs/x", data)
    aws(endpoint=proxy.endpoint)
    store, sink = opener(s3_url), partial(tmp_path, data)
    proxy.alter("client", lambda piece: piece.replace(bytes(100), bytes(99) + b"!"))
    await store.read("blobs/x", (0, MIB), sink)
    assert sink.finish() is None
    proxy.heal()
    sink.reset()
    await store.read("blobs/x", (0, MIB), sink)
    assert sink.finish() == digest(data)
    sink.close()


async def test_bucket_that_lies_about_etags(
    aws: Callable[..., None], opener: Open, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    """No proof comes with its answers, so what it keeps is read back; it keeps no preconditions, and that is found out."""
    data, sha256, path = sample(MIB)
    async with Liar() as liar:
        aws(endpoint=liar.endpoint)
        store = opener("s3://bucket/prefix")
        await store.put("a", data)
        await store.put_file("b", path, MIB, sha256)
        assert liar.objects["prefix/a"][0] == liar.objects["prefix/b"][0] == data
        assert not await store.has_conditions()
    async with Liar(obeys=True) as liar:
        aws(endpoint=liar.endpoint)
        assert await opener("s3://bucket/prefix").has_conditions()


async def test_bucket_that_keeps_other_bytes(
    aws: Callable[..., None], opener: Open, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    _data, sha256, path = sample(MIB)
    async with Liar(keep=lambda data: data[:-1] + b"!") as liar:
        aws(endpoint=liar.endpoint)
        store = opener("s3://bucket")
        with pytest.raises(errors.StoreMismatch):
            await store.put("a", b"data")
        with pytest.raises(errors.StoreMismatch):
            await store.put_file("b", path, MIB, sha256)
        assert "b" not in liar.objects


async def test_server_without_ranges(aws: Callable[..., None], opener: Open, tmp_path: Path) -> None:
    async with Liar(ranges=False) as liar:
        aws(endpoint=liar.endpoint)
        store = opener("s3://bucket")
        await store.put("a", b"0123456789")
        sink = partial(tmp_path, b"0123456789")
        await store.read("a", (0, 10), sink)
        assert sink.finish() == digest(b"0123456789")
        sink.close()
        for span in ((2, 5), (0, 5)):
            with pytest.raises(errors.StoreProblem, match="part of an object"):
                await store.read("a", span, partial(tmp_path, b"01234"[: span[1] - span[0]]))


async def test_wrong_bucket(aws: Callable[..., None], opener: Open, tmp_path: Path) -> None:
    aws()
    store = opener("s3://no-such-bucket/prefix")
    for attempt in (
        lambda: store.head("a"),
        lambda: store.get("a", 10),
        lambda: store.put("a", b""),
        lambda: store.delete("a"),
        lambda: keys(store),
        lambda: store.has_conditions(),
        lambda: store.put_file("a", Path("/dev/null"), 0, digest(b"")),
    ):
        with pytest.raises(errors.StoreMissingBucket) as caught:
            await attempt()
        assert "s3://no-such-bucket/prefix" in caught.value.message and caught.value.hint


SECRETS = ["AKSECRETAKSECRET", "hunter2hunter2", "tokentokentoken"]


@pytest.mark.parametrize("wrong", ["key", "secret", "rights", "none", "profile", "endpoint"])
async def test_denied(
    wrong: str,
    s3_url: str,
    seaweed: SeaweedFS,
    aws: Callable[..., None],
    opener: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sample: Callable[[int], Sample],
) -> None:
    """And no secret is in an error, its traceback or a log."""
    caplog.set_level(logging.INFO)
    big = sample(PART_BYTES)
    if wrong == "key":
        aws(AWS_ACCESS_KEY_ID="AKSECRETAKSECRET", AWS_SESSION_TOKEN="tokentokentoken")
    elif wrong == "secret":
        aws(AWS_SECRET_ACCESS_KEY="hunter2hunter2")
    elif wrong == "rights":
        aws(READER)
    elif wrong == "profile":
        aws(AWS_PROFILE="nobody")
    elif wrong == "endpoint":
        aws(endpoint=seaweed.endpoint.replace("://", "://AKSECRETAKSECRET:hunter2hunter2@"))
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = opener(s3_url)
    with pytest.raises(errors.InvalidRequest if wrong == "endpoint" else errors.StoreDenied) as caught:
        await store.put("refs/a.json", b"{}")
    assert caught.value.hint
    if wrong in ("secret", "rights"):  # said while the body is still on its way
        with pytest.raises(errors.StoreDenied):
            await store.put_file("blobs/x", big.path, len(big.data), big.sha256)
    words = "".join(traceback.format_exception(caught.value)) + str(vars(caught.value)) + caplog.text
    assert not [secret for secret in [*SECRETS, *seaweed.keys(), *seaweed.keys(READER), "Signature="] if secret in words]


async def test_credentials_that_come_later(
    s3_url: str, seaweed: SeaweedFS, opener: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of an instance whose role can't be asked for yet while it boots: the next request finds them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    store = opener(s3_url)
    refused = await asyncio.gather(*(store.put(f"refs/{number}.json", b"{}") for number in range(4)), return_exceptions=True)
    assert [type(error).__mro__[1] for error in refused] == [errors.StoreDenied] * 4
    access, secret = seaweed.keys()
    (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id={access}\naws_secret_access_key={secret}\n")
    await store.put("refs/a.json", b"{}")
    assert await keys(store, "refs/") == {"refs/a.json"}


async def test_profile(
    s3_url: str, seaweed: SeaweedFS, aws: Callable[..., None], opener: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Credentials and endpoint come from where the AWS tools take them."""
    access, secret = seaweed.keys()
    (tmp_path / "credentials").write_text(f"[team]\naws_access_key_id={access}\naws_secret_access_key={secret}\n")
    (tmp_path / "config").write_text(f"[profile team]\nendpoint_url={seaweed.endpoint}\nregion=eu-central-1\n")
    aws(AWS_PROFILE="team", AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"), AWS_CONFIG_FILE=str(tmp_path / "config"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    store = opener(s3_url)
    await store.put("a", b"1")
    assert await store.get("a", 1) == b"1"


async def test_virtual_host_addressing(aws: Callable[..., None], opener: Open, tmp_path: Path) -> None:
    """`addressing_style = virtual` is botocore's own setting: the bucket is part of the host's name then."""
    (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    async with Liar() as liar:
        aws(endpoint=liar.endpoint.replace("127.0.0.1", "localhost"), AWS_CONFIG_FILE=str(tmp_path / "config"), AWS_MAX_ATTEMPTS="1")
        try:
            await opener("s3://bucket/prefix").put("a", b"1")
        except errors.StoreUnavailable:
            pass  # bucket.localhost: not every resolver knows it
        assert "prefix/a" not in liar.objects  # by path it would be there


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "RequestTimeTooSkewed", errors.StoreClockSkew),
        (403, "AccessDenied", errors.StoreDenied),
        (400, "ExpiredToken", errors.StoreDenied),
        (404, "NoSuchBucket", errors.StoreMissingBucket),
        (404, "NoSuchKey", errors.MissingObject),
        (412, "PreconditionFailed", errors.ObjectChanged),
        (507, "XMinioStorageFull", errors.StoreFull),
        (403, "QuotaExceeded", errors.StoreDenied),
        (503, "SlowDown", errors.StoreUnavailable),
        (500, "InternalError", errors.StoreUnavailable),
        (400, "BadDigest", errors.StoreMismatch),
        (400, "MalformedXML", errors.StoreProblem),
    ],
)
def test_answers_become_named_errors(status: int, code: str, kind: type[errors.ModelcachedError]) -> None:
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": {"date": "Thu, 01 Jan 2026 00:00:00 GMT"}, "RetryAttempts": 0}
    answer = {"Error": {"Code": code, "Message": "key AKSECRETAKSECRET"}, "ResponseMetadata": metadata}
    error = from_response(Place("s3://bucket"), answer, "refs/a.json")
    assert type(error) is kind and error.hint and "AKSECRET" not in str(vars(error))
    if kind is errors.StoreClockSkew:
        assert "ahead of" in error.message


async def test_orphans_are_aborted(s3_url: str, seaweed: SeaweedFS, opener: Open) -> None:
    bucket, _, prefix = s3_url[5:].partition("/")
    await asyncio.to_thread(seaweed.client().create_multipart_upload, Bucket=bucket, Key=f"{prefix}/blobs/x")
    await asyncio.to_thread(seaweed.client().create_multipart_upload, Bucket=bucket, Key=f"{prefix}-of-another/blobs/x")
    store = opener(s3_url)
    assert await store.abort_orphans(3600) == 0
    assert await store.abort_orphans(-60) == 1
    assert await asyncio.to_thread(unfinished, s3_url, seaweed) == []
    assert len(await asyncio.to_thread(unfinished, f"{s3_url}-of-another", seaweed)) == 1


async def test_cancelled_upload_leaves_nothing(
    proxy: Proxy, s3_url: str, seaweed: SeaweedFS, aws: Callable[..., None], opener: Open, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    data, sha256, path = sample(40 * MIB)
    aws(endpoint=proxy.endpoint)
    putting = asyncio.create_task(opener(s3_url).put_file("blobs/x", path, len(data), sha256))
    await asyncio.to_thread(proxy.wait, lambda proxy: proxy.sent > 8 * MIB)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert await asyncio.to_thread(unfinished, s3_url, seaweed) == []


async def test_resume_of_something_else_starts_over(
    s3_url: str, seaweed: SeaweedFS, opener: Open, tmp_path: Path, sample: Callable[[int], Sample]
) -> None:
    data, sha256, path = sample(20 * MIB)
    for content in (b"", b"torn {", json.dumps({"store": s3_url}).encode()):
        (tmp_path / "resume.json").write_bytes(content)
        await opener(s3_url).put_file("blobs/x", path, len(data), sha256, resume=tmp_path / "resume.json")
    assert await asyncio.to_thread(unfinished, s3_url, seaweed) == []


# --- processes of their own -------------------------------------------------------------------------------------------

_PROCESS = """
import asyncio, os, sys
from pathlib import Path
from modelcached.download import Limits
from modelcached.store import open_store
from modelcached.tasks import Pool

class Discard:
    def __init__(self, size):
        self.size, self.done = size, 0
    def missing(self):
        return [(0, self.size)] if not self.done else []
    def write(self, offset, chunks):
        self.done += sum(map(len, chunks))

async def main(url, path, size, sha256, resume, what):
    pool = Pool("io", 6)
    store = open_store(url, pool, Limits(int(os.environ.get("CONNECTIONS", "8")), 1 << 20, 32 << 20))
    if "up" in what:
        await store.put_file("blobs/x", Path(path), int(size), sha256, resume=Path(resume))
    if "down" in what:
        await store.read("blobs/x", (0, int(size)), Discard(int(size)))
    await store.close()
    pool.close()
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

asyncio.run(main(*sys.argv[1:]))
"""


def start(environment: dict[str, str], url: str, path: Path, size: int, sha256: str, resume: Path, what: str) -> subprocess.Popen[str]:
    import_path = os.pathsep.join([str(ROOT / "daemon"), str(ROOT / "sdk")])
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, url, str(path), str(size), sha256, str(resume), what],
        env={**os.environ, "PYTHONPATH": import_path, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def random_file(path: Path, size: int) -> str:
    sha256 = hashlib.sha256()
    with open(path, "wb") as file:
        for start in range(0, size, MIB):
            piece = random.randbytes(min(MIB, size - start))
            sha256.update(piece)
            file.write(piece)
    return sha256.hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(60)  # what reads ahead gives way to whoever else computes here
def test_upload_goes_on_after_kill_9(proxy: Proxy, s3_url: str, seaweed: SeaweedFS, tmp_path: Path) -> None:
    """By its upload id: the parts that were there are not sent again, and nothing of it is left when it is done."""
    size = 8 * PART_BYTES
    sha256 = random_file(tmp_path / "file", size)
    environment = {**seaweed.environment(endpoint=proxy.endpoint), "CONNECTIONS": "2"}
    arguments = (environment, s3_url, tmp_path / "file", size, sha256, tmp_path / "resume.json", "up")
    with start(*arguments) as first:
        proxy.wait(lambda proxy: proxy.sent > 5 * PART_BYTES)
        first.kill()
    proxy.refuse()  # what the kernel still has of it must not count as sent by the second one
    proxy.listen()
    upload = json.loads((tmp_path / "resume.json").read_text())["upload"]
    bucket, _, prefix = s3_url[5:].partition("/")
    parts = seaweed.client().list_parts(Bucket=bucket, Key=f"{prefix}/blobs/x", UploadId=upload)["Parts"]
    assert 2 <= len(parts) <= 6
    before = proxy.sent
    with start(*arguments) as second:
        assert second.wait(45) == 0
    assert proxy.sent - before < (8 - len(parts)) * PART_BYTES + MIB
    assert not (tmp_path / "resume.json").exists() and unfinished(s3_url, seaweed) == []
    body = seaweed.client().get_object(Bucket=bucket, Key=f"{prefix}/blobs/x")["Body"]
    assert hashlib.sha256(body.read()).hexdigest() == sha256


def test_nothing_of_s3_is_imported_before_it_is_used(s3_url: str, seaweed: SeaweedFS) -> None:
    code = f"""
import asyncio, sys
from modelcached.store import open_store
from modelcached.tasks import Pool
async def main():
    pool = Pool("io", 2)
    store = open_store({s3_url!r}, pool)
    assert not [name for name in sys.modules if "botocore" in name]
    await store.put("a", b"1")
    await store.close()
    pool.close()
asyncio.run(main())
"""
    import_path = os.pathsep.join([str(ROOT / "daemon"), str(ROOT / "sdk")])
    environment = {**os.environ, "PYTHONPATH": import_path, **seaweed.environment()}
    subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", code], env=environment, check=True, timeout=15)


@pytest.mark.parametrize(
    "size", [pytest.param(192 * MIB, marks=pytest.mark.slow), pytest.param(1024 * MIB, marks=pytest.mark.soak)], ids=str
)
def test_memory_is_bounded(size: int, s3_url: str, seaweed: SeaweedFS, tmp_path: Path) -> None:
    sha256 = random_file(tmp_path / "file", size)
    started = time.monotonic()
    with start(seaweed.environment(), s3_url, tmp_path / "file", size, sha256, tmp_path / "resume.json", "up, down") as process:
        output, _ = process.communicate()
        assert process.returncode == 0
    peak = int(output)
    assert peak < 150 << 10, f"{peak >> 10} MiB for {size >> 20} MiB in {time.monotonic() - started:.1f} s"
