"""Load: what was saved comes to any node, each byte once, checked; and what the store says that can't be right is never shown."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import (
    ContentMismatchError,
    IncompatibleReferenceError,
    InvalidRequestError,
    ModelcacheError,
    NoSpaceError,
    ReferenceNotFoundError,
    StoreNotAllowedError,
    StoreUnavailableError,
)
from modelcache.keys import checkpoint_key

from .clients import clients, partials
from .daemon import Daemon
from .hub import Random
from .kernel import small_tmpfs
from .proxy import Proxy
from .saves import MIB, Tree, Wire, hashes, key_of, wired
from .seaweed import SeaweedFS

WAIT_SECONDS = 60.0
CHECKPOINT = checkpoint_key("c", 0)
SMALL: Tree = {f"many/{number}": f"small {number}".encode() * (number % 90) for number in range(400)}
TREE: Tree = {**SMALL, "large.bin": Random("large", 20 * MIB), "again.bin": Random("large", 20 * MIB), "b.bin": Random("b", 3 * MIB)}
UNIQUE_BYTES = sum(len(content) for path, content in TREE.items() if path != "again.bin")


@pytest.fixture(scope="module")
def proxy(seaweed: SeaweedFS) -> Iterator[Proxy]:
    with pytest.MonkeyPatch.context() as patch, Proxy(seaweed.address) as proxy:
        for name, value in seaweed.environment(endpoint=proxy.endpoint).items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, seaweed: SeaweedFS, proxy: Proxy) -> str:
    """A bucket with a model in each format, a checkpoint, and one that shares most of their files."""
    url = seaweed.bucket()
    with Daemon.start(tmp_path_factory.mktemp("saver") / "root", store=url) as daemon, wired(daemon.socket) as wire:
        for storage_format in ("files", "tar"):
            wire.save(storage_format, {**TREE, "which": storage_format.encode()}, storage_format=storage_format)
        wire.save("checkpoint", {**TREE, "which": b"checkpoint"}, reference={"type": "checkpoint", "name": "c", "key": CHECKPOINT})
        assert wire.flush(WAIT_SECONDS)["pending"] == []
    return url


def content(view: str | Path) -> dict[str, str]:
    return hashes({str(path.relative_to(view)): path.read_bytes() for path in Path(view).rglob("*") if path.is_file()})


# ---- each byte once


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["files", "tar", "checkpoint"])
def test_eight_processes_load_one_save(tmp_path: Path, proxy: Proxy, saved: str, name: str) -> None:
    tree: Tree = {**TREE, "which": name.encode()}
    key = CHECKPOINT if name == "checkpoint" else key_of(name)
    with Daemon.start(tmp_path / "root", store=saved) as daemon, clients(daemon, 8) as tasks:
        before = proxy.received
        for task in tasks:
            task.begin("load", reference=key, hashes=True)
        outcomes = [task.good(WAIT_SECONDS) for task in tasks]
        assert all(outcome.files == hashes(tree) for outcome in outcomes) and len({outcome.path for outcome in outcomes}) == 1
        received = proxy.received - before
        print(f"{received} bytes came for {UNIQUE_BYTES} of files")
        assert UNIQUE_BYTES < received < UNIQUE_BYTES + 400 * 1600 + MIB  # a tar's headers, the tree, S3's answers
        assert daemon.status()["store_bytes"] < UNIQUE_BYTES + 400 * 1600
        daemon.check_no_temp_files()
        assert os.listdir(daemon.root / "partial") == []
        blobs = {path.name for path in (daemon.root / "blobs").glob("*/*/*")}
        assert blobs == set(hashes(tree).values())  # and no pack
        with wired(daemon.socket) as wire:  # the same model saved otherwise: only what differs comes
            before = proxy.received
            other = "tar" if name == "files" else "files"
            loaded = wire.load(other)
            assert content(loaded["path"]) == hashes({**TREE, "which": other.encode()})
            assert loaded["store_bytes"] < 100 and proxy.received - before < 300_000


def test_what_a_kill_left_is_not_asked_for_again(tmp_path: Path, proxy: Proxy, saved: str) -> None:
    with Daemon.start(tmp_path / "root", store=saved) as daemon:
        with wired(daemon.socket) as wire:
            proxy.delay(0.004)
            before = proxy.received
            wire.start("load", key=key_of("files"))
            proxy.wait(lambda proxy: proxy.received - before > 14 * MIB, WAIT_SECONDS)
            daemon.kill()
        proxy.heal()
        kept = sum(partials(daemon).values())
        assert kept > 2 * MIB
        daemon.restart()
        before = proxy.received
        with wired(daemon.socket) as wire:
            loaded = wire.load("files")
        assert content(loaded["path"]) == hashes({**TREE, "which": b"files"})
        assert proxy.received - before < UNIQUE_BYTES - kept + 2 * MIB


def test_the_store_breaks_off_and_is_away(tmp_path: Path, proxy: Proxy, saved: str) -> None:
    with Daemon.start(tmp_path / "root", store=saved) as daemon, wired(daemon.socket) as wire:
        proxy.cut(2 * MIB, "client", times=3)
        loaded = wire.load("tar")
        assert content(loaded["path"]) == hashes({**TREE, "which": b"tar"})
        proxy.heal()


@pytest.mark.timeout(60)
def test_the_store_is_away(tmp_path: Path, proxy: Proxy, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with Daemon.start(tmp_path / "root", store=saved) as daemon, wired(daemon.socket) as wire:
        proxy.refuse()
        try:
            with pytest.raises(StoreUnavailableError) as caught:
                wire.load("files")
            assert proxy.endpoint in str(caught.value) and caught.value.hint
        finally:
            proxy.listen()
        assert wire.load("files")["files"] == len(TREE) + 1


# ---- what the store says


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one save in each format."""
    folder = tmp_path_factory.mktemp("sound")
    tree: Tree = {"large.bin": Random("spoilt", 2 * MIB), "small": b"small", "other": b"other"}
    with Daemon.start(folder / "saver", store=f"file://{folder}/store") as daemon, wired(daemon.socket) as wire:
        wire.save("files", tree)
        wire.save("tar", {**tree, "format": b"tar"}, storage_format="tar")
        assert wire.flush()["pending"] == []
    return folder / "store"


@pytest.fixture
def store(tmp_path: Path, sound: Path) -> Path:
    """A copy of it, of which a test spoils some."""
    return Path(shutil.copytree(sound, tmp_path / "store"))


@pytest.fixture
def node(tmp_path: Path, store: Path) -> Iterator[Daemon]:
    """A node that has nothing of it."""
    with Daemon.start(tmp_path / "root", store=f"file://{store}", min_free="0") as daemon:
        yield daemon
        assert os.listdir(daemon.root / "views") == [] or daemon.status()["leases"] >= 0
        daemon.check_no_temp_files()


@pytest.fixture
def wire(node: Daemon) -> Iterator[Wire]:
    with wired(node.socket) as wire:
        yield wire


def objects(store: Path, kind: str) -> list[Path]:
    return [path for path in (store / kind).rglob("*") if path.is_file()]


def flip(path: Path) -> None:
    """Changes a byte of the file's content, of every file in a tar too: no length changes."""
    data = bytearray(path.read_bytes())
    for position in [0, len(data) // 2, len(data) - 1, *range(512, len(data), 1024)]:
        data[position] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["files", "tar"])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        pytest.param(flip, ContentMismatchError, id="other bytes"),
        pytest.param(lambda path: os.truncate(path, path.stat().st_size // 3), IncompatibleReferenceError, id="too few bytes"),
        pytest.param(os.unlink, IncompatibleReferenceError, id="gone"),
    ],
)
def test_wrong_bytes_are_never_shown(
    node: Daemon, wire: Wire, sound: Path, store: Path, name: str, spoil: Callable[[Path], object], error: type[ModelcacheError]
) -> None:
    for blob in objects(store, "blobs"):
        spoil(blob)
    with pytest.raises(error) as caught:
        wire.load(name)
    assert "save it again" in str(caught.value) or "who put them there" in str(caught.value)
    assert os.listdir(node.root / "views") == [] and os.listdir(node.root / "trees") == []
    shutil.rmtree(store / "blobs")
    shutil.copytree(sound / "blobs", store / "blobs")
    assert content(wire.load(name)["path"])["large.bin"] == hashes({"": Random("spoilt", 2 * MIB)})[""]


def edit(store: Path, kind: str, change: Callable[[dict[str, Any]], object]) -> None:
    for path in objects(store, kind):
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))


def spoil_all(kind: str, data: bytes) -> Callable[[Path], None]:
    def spoil(store: Path) -> None:
        for path in objects(store, kind):
            path.write_bytes(data)

    return spoil


def edit_all(kind: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda store: edit(store, kind, change)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda store: os.rename(store / "trees", store / "gone"), id="no tree"),
        pytest.param(spoil_all("trees", b"{"), id="half a tree"),
        pytest.param(edit_all("trees", lambda record: record["tree"]["files"].pop()), id="another tree"),
        pytest.param(edit_all("trees", lambda record: record.update(packs=[])), id="no index"),
        pytest.param(edit_all("trees", lambda record: record["packs"][0].update(sha256="../x")), id="a pack that is none"),
        pytest.param(edit_all("refs", lambda reference: reference.update(format=2)), id="newer"),
        pytest.param(edit_all("refs", lambda reference: reference.update(tree="a" * 64)), id="a tree that never was"),
        pytest.param(spoil_all("refs", b"\xff"), id="no JSON"),
    ],
)
def test_references_that_lead_nowhere(node: Daemon, wire: Wire, store: Path, spoil: Callable[[Path], object]) -> None:
    spoil(store)
    for name in ("files", "tar"):
        with pytest.raises(IncompatibleReferenceError) as caught:
            wire.load(name)
        assert caught.value.hint
    assert os.listdir(node.root / "views") == []


def test_what_was_deleted(node: Daemon, wire: Wire) -> None:
    wire.load("files")
    wire.request("delete", key=key_of("files"))
    with pytest.raises(ReferenceNotFoundError) as caught:
        wire.load("files")
    assert caught.value.data == {"key": key_of("files")}
    assert wire.load("tar")["files"] == 4


def test_what_may_not_be_asked(node: Daemon, wire: Wire, store: Path) -> None:
    with pytest.raises(StoreNotAllowedError) as caught:
        wire.load("files", store="s3://elsewhere/x")
    assert "s3://elsewhere/x" in str(caught.value) and str(store) in str(caught.value)
    for key in ("../x", "", "/etc/passwd", "a//b"):
        with pytest.raises(InvalidRequestError, match="is no key"):
            wire.request("load", key=key)
    assert wire.load("files", store=f"file://{store}/")["files"] == 3  # another spelling of the same store


def test_what_does_not_fit(tmp_path: Path, store: Path) -> None:
    with small_tmpfs(tmp_path / "small", "2m") as small:
        with Daemon.start(small / "root", store=f"file://{store}", min_free="0") as daemon, wired(daemon.socket) as wire:
            with pytest.raises(NoSpaceError) as caught:
                wire.load("files")
            assert caught.value.data["needed_bytes"] > 2 * MIB and os.listdir(daemon.root / "partial") == []


def test_a_view_that_was_written_to_is_mended(node: Daemon, wire: Wire) -> None:
    """uid 0 can write through a view; the next caller gets right bytes all the same."""
    view = Path(wire.load("files")["path"])
    with open(view / "large.bin", "r+b") as file:
        file.write(b"other bytes")
    (view / "small").write_bytes(b"longer than it was")
    assert wire.load("files")["path"] == str(view)
    assert content(view) == hashes({"large.bin": Random("spoilt", 2 * MIB), "small": b"small", "other": b"other"})
    with wire.open("tool", 3) as saving:
        saving.file("run", b"run", executable=True)
        saving.close()
    for spoilt in (b"RUN", b"longer"):
        tool = Path(wire.load("tool")["path"]) / "run"
        assert (tool.read_bytes(), stat.S_IMODE(tool.stat().st_mode)) == (b"run", 0o555)
        tool.write_bytes(spoilt)
    assert Path(wire.load("tool")["path"], "run").read_bytes() == b"run"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_file_of_more_than_two_gigabytes_in_a_tar(tmp_path: Path) -> None:
    """What one system call reads at most; and memory does not grow with it."""
    size = (2 << 30) + 5 * MIB
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/huge.bin", "wb") as file:
        file.truncate(size)
        file.write(b"begin")
        file.seek(size - 3)
        file.write(b"end")
    store = f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "root", store=store) as daemon, wired(daemon.socket) as wire:
        with wire.open("huge", size, storage_format="tar") as saving:
            assert saving.files([os.open(tmp_path / "out/huge.bin", os.O_RDONLY)], [("huge.bin", size, False)]) == []
            saving.close()
        assert wire.flush(600)["pending"] == []
        assert peak_bytes(daemon) < 400 * MIB
    with Daemon.start(tmp_path / "fresh", store=store) as daemon, wired(daemon.socket) as wire:
        loaded = Path(wire.load("huge")["path"]) / "huge.bin"
        assert loaded.stat().st_size == size and peak_bytes(daemon) < 400 * MIB
        with open(loaded, "rb") as file:
            assert file.read(5) == b"begin"
            file.seek(-3, os.SEEK_END)
            assert file.read() == b"end"


def peak_bytes(daemon: Daemon) -> int:
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
