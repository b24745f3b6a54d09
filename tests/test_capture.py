"""Capture: a private copy from a descriptor alone; what changes meanwhile is noticed, and what hangs stops nobody (I7)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelcache.errors import InvalidRequestError, StorageError
from modelcached.capture import COPY_BYTES, capture
from modelcached.errors import InvalidRequest, Storage, TooMany
from modelcached.lanes import Lanes

from .daemon import Daemon
from .kernel import mounted, require_root, small_tmpfs
from .saves import MIB, Saving, Wire, read_only_file, wired


def no_beat() -> None:
    pass


def take(source: Path, target: Path, size: int | None = None, beat: Callable[[], None] = no_beat) -> bool:
    descriptor = os.open(source, os.O_RDONLY)
    try:
        return capture(descriptor, source.name, source.stat().st_size if size is None else size, target, beat)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def filesystem(kind: str, folder: Path) -> Iterator[Path]:
    """A filesystem of that kind on a file of this one."""
    require_root()
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"needs mkfs.{kind} (Debian's package xfsprogs or e2fsprogs)")
    with open(folder / f"{kind}.img", "wb") as image:
        image.truncate(320 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", folder / f"{kind}.img"], check=True)
    with mounted(folder / kind, "-o", "loop", str(folder / f"{kind}.img")) as place:
        yield place


@pytest.mark.parametrize("size", [0, 1, 4096, COPY_BYTES, 2 * COPY_BYTES + 7])
@pytest.mark.parametrize("where", ["here", "from memory to here"])
def test_bytes_are_copied(tmp_path: Path, size: int, where: str) -> None:
    with contextlib.ExitStack() as stack:
        folder = tmp_path if where == "here" else stack.enter_context(small_tmpfs(tmp_path / "memory", "64m"))
        data = os.urandom(size)
        (folder / "source").write_bytes(data)
        moved: list[None] = []
        assert take(folder / "source", tmp_path / "copy", beat=lambda: moved.append(None))
        assert (tmp_path / "copy").read_bytes() == data and (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
        assert bool(moved) == bool(size)
        (folder / "source").write_bytes(b"x")
        assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_bytes_are_shared_where_the_filesystem_can(tmp_path: Path, kind: str) -> None:
    with filesystem(kind, tmp_path) as place:
        data = os.urandom(64 * MIB)
        with open(place / "source", "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        before = os.statvfs(place).f_bfree
        assert take(place / "source", place / "copy")
        os.sync()
        used = (before - os.statvfs(place).f_bfree) * os.statvfs(place).f_frsize
        assert (used < MIB) if kind == "xfs" else (used >= len(data))
        with open(place / "source", "r+b") as file:
            file.write(b"changed after it")
        assert (place / "copy").read_bytes() == data
        (place / "source").write_bytes(data[: 5 * MIB + 1])  # not a whole number of blocks
        assert take(place / "source", place / "odd") and (place / "odd").read_bytes() == data[: 5 * MIB + 1]


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"other bytes")


@pytest.mark.parametrize("change", [grow, rewrite, lambda path: os.truncate(path, 10), lambda path: os.utime(path), Path.unlink])
def test_a_change_meanwhile_is_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    (tmp_path / "source").write_bytes(bytes(2 * COPY_BYTES))
    changes = iter([change])

    def beat() -> None:
        for act in changes:
            act(tmp_path / "source")

    assert not take(tmp_path / "source", tmp_path / "copy", beat=beat)
    assert not (tmp_path / "copy").exists()


def test_another_size_than_was_said(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"12345")
    for size in (4, 6, 0):
        assert not take(tmp_path / "source", tmp_path / "copy", size)
    assert os.listdir(tmp_path) == ["source"]


def test_what_is_no_file_to_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    ends = socket.socketpair()
    refused = [
        os.open(tmp_path / "file", os.O_RDWR),
        os.open(tmp_path / "file", os.O_WRONLY),
        os.open(tmp_path / "file", os.O_PATH),
        os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK),
        os.open(tmp_path, os.O_RDONLY),
        os.open("/dev/zero", os.O_RDONLY),
        ends[0].detach(),
    ]
    ends[1].close()
    for descriptor in refused:
        with pytest.raises(InvalidRequest) as caught:
            capture(descriptor, "weights/a.bin", 1, tmp_path / "copy", no_beat)
        assert "'weights/a.bin' is not" in caught.value.message and caught.value.hint
        os.close(descriptor)
    assert not (tmp_path / "copy").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(3 * MIB))
    with small_tmpfs(tmp_path / "small") as small:
        with pytest.raises(OSError, match="No space left"):
            take(tmp_path / "source", small / "copy")
        assert os.listdir(small) == []


# ---- lanes


class Work:
    """Something that hangs until it is told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.after = 0

    def __call__(self, beat: Callable[[], None]) -> str:
        self.begun.set()
        assert self.go_on.wait(15)
        return "done"

    def count(self) -> None:
        self.after += 1


async def begun(work: Work) -> None:
    assert await asyncio.to_thread(work.begun.wait, 15)


async def over(lanes: Lanes) -> None:
    """What hung has ended."""
    for thread in threading.enumerate():
        if thread.name == "test":
            await asyncio.to_thread(thread.join, 15)
    await asyncio.sleep(0)  # the last thing that a thread does is to tell the loop
    assert lanes.statistics() == {"running": 0, "hanging": 0}


async def test_lanes_give_the_outcome() -> None:
    lanes, turn = Lanes("test", 1, 60.0), asyncio.Semaphore(1)
    after: list[str] = []
    assert await lanes.run(0, turn, lambda beat: 7, lambda: after.append("one")) == 7

    def fail(beat: Callable[[], None]) -> int:
        raise KeyError("no")

    with pytest.raises(KeyError):
        await lanes.run(0, turn, fail, lambda: after.append("two"))
    assert after == ["one", "two"] and lanes.statistics() == {"running": 0, "hanging": 0}


async def test_one_lane_hangs_and_others_do_not() -> None:
    lanes, mine, work, waiting = Lanes("test", 1, 60.0), asyncio.Semaphore(1), Work(), Work()
    hung = asyncio.create_task(lanes.run(1, mine, work, work.count))
    await begun(work)
    queued = asyncio.create_task(lanes.run(1, mine, waiting, waiting.count))
    assert await lanes.run(1, asyncio.Semaphore(1), lambda beat: "another save", no_beat) == "another save"
    queued.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await queued
    assert waiting.after == 1 and not waiting.begun.is_set()  # what never began is tidied up too
    hung.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await hung
    assert work.after == 0 and lanes.statistics() == {"running": 0, "hanging": 1}
    with pytest.raises(TooMany, match="1 files of uid 1 hang"):
        await lanes.run(1, asyncio.Semaphore(1), lambda beat: "no more", no_beat)
    assert await lanes.run(2, asyncio.Semaphore(1), lambda beat: "another uid", no_beat) == "another uid"
    work.go_on.set()
    await over(lanes)
    assert work.after == 1
    assert await lanes.run(1, mine, lambda beat: "again", no_beat) == "again"


async def test_what_stops_moving_is_left_behind() -> None:
    lanes, work = Lanes("test", 1, 0.05), Work()
    with pytest.raises(Storage, match="gave no byte for"):
        await lanes.run(1, asyncio.Semaphore(1), work, work.count)
    work.go_on.set()

    def slowly(beat: Callable[[], None]) -> str:
        for _ in range(5):
            threading.Event().wait(0.03)
            beat()
        return "slow is not stalled"

    assert await lanes.run(2, asyncio.Semaphore(1), slowly, no_beat) == "slow is not stalled"
    await over(lanes)


# ---- with the daemon


def test_descriptors_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * MIB)
    os.mkfifo(tmp_path / "fifo")
    with Daemon.start(tmp_path / "root") as daemon, wired(daemon.socket) as wire, wire.open("refused", MIB, 1) as saving:
        for flags, path in ((os.O_RDWR, "file"), (os.O_PATH, "file"), (os.O_RDONLY | os.O_NONBLOCK, "fifo")):
            with pytest.raises(InvalidRequestError, match="is not"):
                saving.files([os.open(tmp_path / path, flags)], [("w.bin", MIB, False)])
        with pytest.raises(InvalidRequestError, match="2 files came with 1 descriptors"):
            saving.files([read_only_file(b"")], [("a", 0, False), ("b", 0, False)])
        assert saving.files([os.open(tmp_path / "file", os.O_RDONLY)], [("w.bin", MIB - 1, False)]) == [0]
        with pytest.raises(InvalidRequestError, match="larger than was said"):
            saving.file("more", bytes(MIB + 1))
        with pytest.raises(InvalidRequestError, match="larger than was said"):
            saving.files([read_only_file(b"")], [("a", -5, False)])
        saving.file("w.bin", b"y" * MIB)  # nothing of all this has used up its room
        assert saving.close()["size"] == MIB
        assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < 40  # and nothing is open for ever


HANGING = """
import errno, os, stat, sys, threading
import mfusepy

class Hanging(mfusepy.Operations):
    use_ns = True
    def init(self, path):
        os.write(1, b"mounted\\n")
    def getattr(self, path, fh=None):
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        return {"st_mode": stat.S_IFREG | 0o644, "st_nlink": 1, "st_size": 1 << 20}
    def open(self, path, flags):
        return 0
    def read(self, path, size, offset, fh):
        os.write(1, b"read\\n")
        threading.Event().wait()

mfusepy.FUSE(Hanging(), sys.argv[1], foreground=True, nothreads=False)
"""


class HangingFiles:
    """A FUSE filesystem: every file is a MiB long, and none gives a byte."""

    def __init__(self, mount: Path, process: subprocess.Popen[bytes]) -> None:
        self.mount = mount
        self._process = process

    def open(self, name: str) -> int:
        return os.open(self.mount / name, os.O_RDONLY)

    def next_line(self) -> bytes:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], 15)
        assert ready, "nobody reads"
        return self._process.stdout.readline()


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[HangingFiles]:
    require_root()
    if shutil.which("fusermount3") is None or not os.path.exists("/dev/fuse"):
        pytest.skip("needs FUSE: Debian's package fuse3 and /dev/fuse")
    mount = tmp_path / "hanging"
    mount.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HANGING, str(mount)], stdout=subprocess.PIPE)
    try:
        files = HangingFiles(mount, process)
        assert files.next_line() == b"mounted\n"
        yield files
    finally:
        process.kill()
        process.communicate()
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def hang(wire: Wire, name: str, files: HangingFiles, count: int) -> Saving:
    """A save of files that hang, being copied."""
    saving = wire.open(name, count * MIB, count)
    descriptors = [files.open(f"{name}-{number}") for number in range(count)]
    wire.start("save_files", descriptors, save=saving.name, files=[(f"{number}", MIB, False) for number in range(count)])
    assert files.next_line() == b"read\n"
    return saving


def test_a_file_that_hangs_stops_nobody_else(tmp_path: Path, hanging: HangingFiles) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        with wired(daemon.socket) as wire, wired(daemon.socket) as other:
            savings = [hang(wire, f"hung{number}", hanging, 20) for number in range(3)]
            reference = other.save("fine", {"a": b"a", "b.bin": os.urandom(MIB)})
            assert other.load("fine")["files"] == 2 and other.flush()["pending"] == []
            assert reference["size"] == MIB + 1 and daemon.status()["captures"]["running"] >= 3
            assert len(os.listdir(daemon.root / "tmp")) == 3
            for saving in savings:
                saving.let_go()
        # The client has gone. What hangs is left behind, and its saves go as soon as the next one is opened.
        with wired(daemon.socket) as wire:
            wire.save("later", {"a": b"later"})
            assert os.listdir(daemon.root / "tmp") == [] and wire.flush()["pending"] == []
            captures = daemon.status()["captures"]
            assert captures["running"] == 0 and 3 <= captures["hanging"] <= 12
    # Leaving the block has ended the daemon in order: no thread kept it.


def test_a_filesystem_that_dies_is_an_error(tmp_path: Path, hanging: HangingFiles) -> None:
    with Daemon.start(tmp_path / "root") as daemon, wired(daemon.socket) as wire, wire.open("dying", MIB) as saving:
        call = wire.start("save_files", [hanging.open("a")], save=saving.name, files=[("a", MIB, False)])
        assert hanging.next_line() == b"read\n"
        hanging._process.kill()
        with pytest.raises(StorageError, match="capturing 'a'"):
            wire.wait(call)
        saving.file("a", b"a" * MIB)
        assert saving.close()["files"] == 1
